"""One life of a messenger, driven as the real server loop drives it, on a virtual clock.

A turn takes what has arrived and what is due, runs callbacks, then flushes and looks at its links, as
`messenger.loop.Loop` does. A callback may take time; meanwhile the process takes no input, unless another thread
**leads**, as one that waits in `request` does. A listener with workers hands each message to the next free one; they
start in order and end in any.

A process may be killed at each of its steps, between two packets, callbacks or frames of one turn too.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from messenger.errors import Cancelled, DeliveryError, LimitReached, QueueFull
from messenger.exchange import BATCH_PROCESSED, Exchange
from messenger.limits import DESERTED_S, Limits
from messenger.link import FOREVER, GoneOutlet, Link, Outlet
from messenger.message import Message
from messenger.session import Session
from messenger.takers import Parts
from messenger.wire import ECHO, NOOP

from .network import ConnectionLink, ListenerLink, SimLink
from .oracles import Sent, token_of

if TYPE_CHECKING:
    from .simulator import Simulator, Site

REGISTERED_ID = 64
UNKNOWN_ID = 999


class Planned(Exception):
    """What callbacks raise on purpose."""


class SimParts(Parts):
    """The parts of a stream, and a reader that takes them now and then."""

    __slots__ = ("process", "sent", "taken")

    def __init__(self, process: "Process", sent: Sent) -> None:
        super().__init__()
        self.process = process
        self.sent = sent
        self.taken: list[bytes] = []

    def read(self) -> None:
        """Take what a reader takes at a time, and note the end when all is taken."""
        process = self.process
        if not process.is_alive and not process.has_closed:
            return
        for _ in range(process.simulator.streams.choice((1, 1, 3, 20))):
            part = process.exchange.take_part(self)
            if part is not None:
                self.taken.append(part.contents)
        if self.is_over and not self.waiting:
            process.simulator.oracles.note_stream_end(self.sent, self.taken, self.error)
        else:
            if process.is_alive:
                process.flush()
            process.simulator.schedule(process.simulator.now + process.simulator.streams.choice((0.02, 0.3)), self.read)


class WatchedExchange(Exchange):
    """The real core; it only also tells the oracles when it is told that a peer is gone."""

    process: "Process"

    def drop_expired(self, now: float) -> None:
        """Have each message checked that is not started."""
        before = [argument for _, argument in self.calls if isinstance(argument, Message)]
        super().drop_expired(now)
        kept = {id(argument) for _, argument in self.calls}
        for message in before:
            if id(message) not in kept:
                self.process.note_expired(message)

    def handle_ended(self, session: Session, why: str) -> None:
        """Note it, and go on."""
        self.process.simulator.oracles.note_end(self.process, session, why)
        super().handle_ended(session, why)

    def handle_deserted(self, link: Link) -> None:
        """Note it, and go on."""
        self.process.simulator.oracles.note_deserted(self.process, link.session)
        super().handle_deserted(link)

    def handle_refused(self, session: Session, *details: Any) -> None:
        """Note it, and go on."""
        self.process.simulator.oracles.note_refused(self.process, session, str(details[1]))
        super().handle_refused(session, *details)


class Process:
    """A messenger of a site, from its start to its end.

    Attributes:
        is_busy: Whether a callback runs now.
    """

    def __init__(self, simulator: "Simulator", site: "Site", life: int) -> None:
        self.simulator = simulator
        self.site = site
        self.life = life
        self.is_client = site.is_client
        self.limits: Limits = simulator.plan.limits
        self.is_alive = True
        self.is_closing = False
        self.has_closed = False
        self.is_busy = False
        self.is_led = site.is_led
        self.links: list[Any] = []
        self._open: dict[int, Sent] = {}
        self._inbox: deque[tuple[SimLink, bytes, tuple[bytes, ...]]] = deque()
        self._running: Message | None = None
        # Of a listener with workers: what waits for one, and what they work on.
        self._backlog: deque[Message] = deque()
        self._working: list[Message] = []
        self.died_at = FOREVER
        self._wake_at = FOREVER
        rng = Random(simulator.rng.getrandbits(64))
        self.exchange = WatchedExchange(self, self.limits, self._on_unheard, site.identity, rng)
        self.exchange.process = self
        self.exchange.register_callback(REGISTERED_ID, self._on_message)
        callback = self._on_message if site.has_callback else None
        if site.is_client:
            for number in range(site.connection_count):
                link = ConnectionLink(simulator.network, self, f"{self} connection {number}", callback)
                session = self.exchange.handshake.open(link)
                simulator.oracles.note_owner(self, session.incarnation)
                self._adopt(link)
                simulator.network.connect(link)
        else:
            slc = self._submit if site.worker_count else callback
            listener = ListenerLink(simulator.network, self, f"{self} listener", slc)
            listener.has_workers = site.worker_count > 0
            self._adopt(listener)

    def _adopt(self, link: SimLink) -> None:
        self.links.append(link)
        self.exchange.links.add(link)

    def __str__(self) -> str:
        return f"{self.site.name}.{self.life}"

    # What the network does.

    def take_packet(self, link: SimLink, routing_id: bytes, packet: tuple[bytes, ...]) -> None:
        """A packet has arrived; the loop is woken."""
        self._inbox.append((link, routing_id, packet))
        self.wake(self.simulator.now)

    def wake_soon(self) -> None:
        """A descriptor has news; a loop needs a moment to notice, and a link may go down and up meanwhile."""
        self.wake(self.simulator.now + self.simulator.rng.choice((0.0, 0.001, 0.1)))

    def wake(self, at: float) -> None:
        """Have a turn at an instant, if none comes before."""
        if at < self._wake_at:
            self._wake_at = at
            self.simulator.schedule(at, self._turn, at)

    # The loop.

    def _guard(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call into the core, out of which nothing may come."""
        try:
            return function(*arguments, **options)
        except (QueueFull, LimitReached):
            raise
        except Exception as error:
            self.simulator.oracles.fail("exception", f"{self}: {error!r}")
            self.simulator.keep_traceback(error)
            return None

    def _turn(self, at: float) -> None:
        if not self.is_alive or at != self._wake_at:
            return
        self._wake_at = FOREVER
        if not self.is_busy or self.is_led:
            self._take_input()
        if not self.is_busy:
            self._run_calls()
        if not self.is_busy or self.is_led:
            self._read_events()
            deadline_at = self.exchange.next_deadline_at
            if deadline_at < FOREVER:
                self.wake(max(deadline_at, self.simulator.now + 1e-6))

    def _take_input(self) -> None:
        now = self.simulator.now
        while self._inbox:
            self.simulator.note_step()
            if not self.is_alive:
                return
            link, routing_id, packet = self._inbox.popleft()
            self.simulator.oracles.watch_packet(self, packet, False)
            self._guard(self.exchange.handshake.receive, link, routing_id, packet[0], list(packet[1:]), now)
            self.simulator.oracles.check_established(self)
        if self.exchange.next_deadline_at <= now:
            self._guard(self.exchange.handle_deadline, now)
            self.simulator.oracles.check_deadline(self)

    def _read_events(self) -> None:
        now = self.simulator.now
        if not self.is_alive:
            return
        self._guard(self.exchange.flush, now)
        for link in self.links:
            if isinstance(link, ConnectionLink) and link.told_up != (link.wire is not None):
                link.told_up = link.wire is not None
                if link.told_up:
                    self._guard(self.exchange.handshake.handle_link_up, link, now)
                else:
                    self._guard(self.exchange.handshake.handle_link_down, link)
                    self.simulator.schedule(now + DESERTED_S, self._look_for_server, link)
        self._guard(self.exchange.flush, now)

    def _look_for_server(self, link: ConnectionLink) -> None:
        """See whether the process at the other end of a broken link is dead, as can be seen on one machine.

        Now and then that is wrong, as behind a proxy that has ended; nothing may then run twice either.
        """
        server = self.simulator.sites[0].process
        is_taken_for_dead = not (server and server.is_alive) or self.simulator.mistakes.random() < 0.1
        if self.is_alive and link.wire is None and is_taken_for_dead:
            self._guard(self.exchange.handle_deserted, link)
            self.wake(self.simulator.now)

    def _run_calls(self) -> None:
        calls = self.exchange.calls
        while calls and not self.is_busy:
            self.simulator.note_step()
            if not self.is_alive:
                return
            if self.simulator.now >= self.exchange.expires_at:
                self._guard(self.exchange.drop_expired, self.simulator.now)
                continue
            callback, argument = calls.popleft()
            if callback is BATCH_PROCESSED:
                self._guard(self.exchange.note_processed, *argument)
                continue
            try:
                pause: Any = callback(argument)
            except Planned as error:
                self._guard(self.exchange.report_raised, argument, error)
                continue
            if pause is not None:
                duration_s, rest = pause
                self.is_busy = True
                self._running = argument
                self.simulator.schedule(self.simulator.now + duration_s, self._end_callback, rest, argument)

    def _end_callback(self, rest: Callable[[], None], argument: Message) -> None:
        if not self.is_alive:
            return
        try:
            rest()
        except Planned as error:
            self._guard(self.exchange.report_raised, argument, error)
        self.is_busy = False
        self._running = None
        self.wake(self.simulator.now)

    # Workers.

    def _submit(self, message: Message) -> None:
        """What an SLC is at a listener with workers: it only hands the message on."""
        self._backlog.append(message)
        self.simulator.schedule(self.simulator.now + self.simulator.rng.choice((0.0, 0.001)), self._work)

    def _work(self) -> None:
        """A worker takes the next message, if one is free."""
        if not (self.is_alive and self._backlog and len(self._working) < self.site.worker_count):
            return
        message = self._backlog.popleft()
        self._working.append(message)
        pause: Any = None
        if message.is_given_up(self.simulator.now) and not message.is_response:
            self.note_expired(message)
        else:
            try:
                pause = self._on_message(message)
            except Planned as error:
                self._guard(self.exchange.report_raised, message, error)
        duration_s, rest = pause or (0.0, None)
        self.simulator.schedule(self.simulator.now + duration_s, self._end_work, rest, message)

    def _end_work(self, rest: Callable[[], None] | None, message: Message) -> None:
        if not self.is_alive:
            return
        try:
            if rest is not None:
                rest()
        except Planned as error:
            self._guard(self.exchange.report_raised, message, error)
        self._working.remove(message)
        self._guard(self.exchange.note_one_processed, message)
        self._guard(self.exchange.flush, self.simulator.now)
        self.wake(max(self.exchange.next_deadline_at, self.simulator.now))
        self._work()

    def note_expired(self, message: Message) -> None:
        """A message is not started, because its sender has given it up."""
        oracles = self.simulator.oracles
        oracles.note_expired(self, oracles.sent[token_of(message)], message.is_sender_gone)

    def waiting_messages(self) -> Iterator[Message]:
        """Yield the messages whose callbacks have not returned."""
        if self._running is not None:
            yield self._running
        yield from self._working
        yield from self._backlog
        for callback, argument in self.exchange.calls:
            if callback is not BATCH_PROCESSED and isinstance(argument, Message):
                yield argument

    def open_messages(self) -> list[Sent]:
        """Return the messages that wait for their outcome, as the simulator knows."""
        self._open = {token: sent for token, sent in self._open.items() if not sent.outcomes}
        return list(self._open.values())

    # What users do.

    def send(
        self, outlet: Any, dest_callback_id: int = NOOP, parent: Sent | None = None, **options: Any
    ) -> Sent | None:
        """Send one message as a user would; None if there is no room."""
        simulator = self.simulator
        if self.is_closing:
            return None
        sent = simulator.draw_message(self, outlet, dest_callback_id, parent, **options)
        contents = b"%d %b" % (sent.token, bytes(simulator.draw_size()))
        callback, on_error = (
            (partial(self._on_response, sent), partial(self._on_error, sent)) if sent.waits else (None,) * 2
        )
        try:
            message_id = self._guard(
                self.exchange.send,
                *(outlet, b"", contents, callback, on_error),
                *(dest_callback_id, sent.deadline_at, False, sent.redeliver, sent.is_timed),
            )
        except (QueueFull, LimitReached):
            return None
        sent.index = simulator.oracles.next_index(outlet)
        simulator.oracles.note_sent(sent)
        if sent.waits:
            self._open[sent.token] = sent
            if options.get("cancel_after_s") is not None:
                simulator.schedule(simulator.now + options["cancel_after_s"], self._cancel, sent, message_id)
        if not self._running:
            # Another thread sends by itself; what a callback sends waits for the end of the turn.
            self._guard(self.exchange.flush, simulator.now)
            self.wake(max(self.exchange.next_deadline_at, simulator.now))
        simulator.note("send", sent, outlet, dest_callback_id, sent.action)
        return sent

    def open_stream(self, session: Session, sent: Sent) -> None:
        """Ask for a response in parts, and read it."""
        parts = SimParts(self, sent)
        try:
            self.exchange.open_stream(session, parts, b"%d " % sent.token, NOOP, sent.deadline_at)
        except QueueFull:
            return
        sent.index = self.simulator.oracles.next_index(session)
        self.simulator.oracles.note_sent(sent)
        self.simulator.note("stream", sent, sent.part_count)
        self.flush()
        parts.read()

    def _write(self, message: Message, sent: Sent, number: int) -> None:
        """Send the next part of a stream, or the last, when there is room."""
        if not self.is_alive or self.is_closing:
            return
        contents = b"%d %d" % (sent.token, number)
        try:
            if number == sent.part_count:
                self._guard(
                    *(self.exchange.send, self._outlet_of(message), b"", contents, None, None),
                    *(message.source_callback_id, self.simulator.now + 200.0),
                )
                number += 1
            elif not self.exchange.is_held_up(message.link, message):
                self.exchange.reply_part(message, contents, self.simulator.now)
                number += 1
        except Cancelled:
            return
        except QueueFull:
            self.simulator.note("full", self, sent)
        self.flush()
        if number <= sent.part_count:
            wait_s = self.simulator.streams.choice((0.0, 0.01, 0.1))
            self.simulator.schedule(self.simulator.now + wait_s, self._write, message, sent, number)

    def flush(self) -> None:
        """Send what is queued, as a call of another thread than the loop's does."""
        self._guard(self.exchange.flush, self.simulator.now)
        self.wake(max(self.exchange.next_deadline_at, self.simulator.now))

    def _cancel(self, sent: Sent, message_id: int) -> None:
        """A user gives a message up; it is told so only if it has no outcome yet."""
        if not self.is_alive:
            return
        sent.cancelled = bool(self._guard(self.exchange.cancel, message_id))
        self.simulator.note("cancel", sent, sent.cancelled)
        self.wake(self.simulator.now)

    def _on_message(self, message: Message) -> Any:
        """The SLC, the connection's callback, and the registered one."""
        sent = self.simulator.oracles.sent[token_of(message)]
        if sent.sender is self:
            return None  # Our own message comes back as an echo.
        self.simulator.oracles.note_run(self, message, sent)
        self.simulator.note("run", self, sent)
        if sent.duration_s:
            return sent.duration_s, partial(self._act, message, sent)
        self._act(message, sent)
        return None

    def _outlet_of(self, message: Message) -> Outlet:
        """Return where an answer leaves, as `Endpoints.route` does: it is only for the incarnation that asked."""
        is_gone = message.incarnation != message.link.peer_incarnation
        return GoneOutlet(message.link.handle) if is_gone else message.link

    def _act(self, message: Message, sent: Sent) -> None:
        if sent.action == "stream":
            self._write(message, sent, 1)
        if sent.action.startswith("reply") and message.source_callback_id:
            waits = sent.action == "reply and wait"
            sent.replied = True
            self.send(self._outlet_of(message), message.source_callback_id, sent, waits=waits)
        if sent.action.endswith("raise"):
            sent.raised = True
            raise Planned(f"on {sent}")

    def _on_response(self, sent: Sent, message: Message) -> Any:
        reply = self.simulator.oracles.sent.get(token_of(message))
        self.simulator.oracles.note_response(sent, reply, message)
        if reply is not None and reply is not sent and not self.site.has_callback and reply.waits:
            self._act(message, reply)

    def _on_error(self, sent: Sent, error: DeliveryError) -> None:
        self.simulator.oracles.note_error(sent, error)

    def _on_unheard(self, error: DeliveryError) -> None:
        self.simulator.note("unheard", self, error)

    # Its end.

    def crash(self) -> None:
        """End without a word."""
        self.simulator.note("crash", self)
        self.is_alive = False
        self.died_at = self.simulator.now
        self.simulator.network.end_process(self, drains=self.simulator.rng.random() < 0.7)

    def close(self) -> None:
        """Say goodbye and end, as a closed messenger does: every message gets its outcome first."""
        self.simulator.note("close", self)
        self.is_closing = True
        for link in self.links:
            self._guard(self.exchange.close_link, link, "the messenger was closed", self.simulator.now)
        self._running = None
        self._working.clear()
        self._backlog.clear()
        calls = self.exchange.calls
        while calls:
            if self.simulator.now >= self.exchange.expires_at:
                self._guard(self.exchange.drop_expired, self.simulator.now)
                continue
            callback, argument = calls.popleft()
            if callback is BATCH_PROCESSED:
                continue
            try:
                callback(argument)
            except Planned as error:
                self._guard(self.exchange.report_raised, argument, error)
        self.has_closed = True
        self.is_alive = False
        self.died_at = self.simulator.now
        self.simulator.network.end_process(self, drains=True)


def draw_dest(rng: Random, has_callback: bool) -> int:
    """Return what a message is to run at an endpoint with or without a callback of its own."""
    if rng.random() < 0.1:
        return int(ECHO)
    if not has_callback:
        return REGISTERED_ID if rng.random() < 0.7 else int(NOOP)
    return UNKNOWN_ID if rng.random() < 0.05 else int(NOOP)
