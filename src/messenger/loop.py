"""The server loop of a messenger, as far as it is the same in every driver.

A loop repeats: receive what is there, process, flush, run callbacks with no lock held, sleep until the next deadline or
wake-up. The drivers say what it sleeps on and who wakes it: a thread of its own (`threads.py`) or an asyncio event loop
(`tasks.py`).

An error in the loop itself, which is a mistake in this library, ends the messenger: the core may not be whole any more,
and one that looks alive and does nothing would be worse. What is open ends with an error, and later calls say why.

What must never happen here: a callback that runs with the lock held; a sleep with a touched link whose events were
not read again; a callback whose exception ends the loop; a loop that has ended, of a messenger that is running.
"""

import atexit
import logging
import os
import threading
import time
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import Enum
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Final

from .compiled import mypyc_attr
from .endpoint import Connection, Endpoints, To
from .errors import Cancelled, ContentsInvalid, DeliveryError, QueueFull
from .exchange import BATCH_PROCESSED, Exchange
from .limits import CLOSE_TIMEOUT_S, FLUSH_S, NEWS_PAUSE_S, TIMEOUT_S
from .link import FOREVER, Outlet
from .message import Callback, ErrorCallback, Message
from .takers import Taker
from .transports.inflow import Lookout
from .transports.sockets import Kernel
from .transports.zeromq import SocketLink
from .wire import Buffer

logger = logging.getLogger("messenger")
# Compiled, this module looks a name up that it imports, at each use, but not what is final.
monotonic: Final = time.monotonic
get_ident: Final = threading.get_ident
FunctionType: Final = types.FunctionType


class State(Enum):
    """Of a loop, and so of its messenger."""

    NEW = "new"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"
    FORKED = "forked"


RUNNING: Final = State.RUNNING


@mypyc_attr(allow_interpreted_subclasses=True)
class Loop:
    """The links of one messenger, and the turns of its server loop. Methods are called with `lock` held unless they
    say otherwise.

    Args:
        name: Of the loop, for the log.
        exchange: The core that it drives.
        endpoints: Whose links it serves.
        attach_links: Called when an inproc listener has come or gone.

    Attributes:
        lock: Guards the core and all sockets; `acquire` and `release` are its own.
        state: What the messenger may do.
        close_at: When a close that was begun waits no longer.
        thread_id: Of the thread that sends what callbacks sent at the end of its turn.
        uses_threads: Whether a listener may have worker threads.
        asks: Whether a callback of this turn has sent a message with a callback, so that an answer may come soon.
        failure: The error of its own that has ended it, if one has.
    """

    lock: AbstractContextManager[object]
    acquire: Callable[[], object]
    release: Callable[[], object]
    thread_id = 0
    uses_threads = False
    asks = False
    failure: BaseException | None = None

    def __init__(self, name: str, exchange: Exchange, endpoints: Endpoints, attach_links: Callable[[], None]) -> None:
        self._name = name
        self._messenger = exchange.messenger
        self._set_lock()
        self.state = State.NEW
        self.close_at = FOREVER
        self._exchange = exchange
        self._endpoints = endpoints
        self._attach_links = attach_links
        # By descriptor: of the sockets, and of their monitors.
        self._links: dict[int, SocketLink] = {}
        self._monitored: dict[int, SocketLink] = {}
        # Listeners whose monitors nobody sleeps on for a moment.
        self._unwatched: set[SocketLink] = set()
        self._lookout = Lookout(exchange, self._links.values(), Kernel(), endpoints.limits.unread_bytes_max)
        exchange.on_look = self._look_around
        # Links whose events must be read before a sleep, and links that are known to have input. The first stays
        # the same set for ever, as the links have its `add` as their `touch`.
        self._touched: set[SocketLink] = set()
        self._readable: set[SocketLink] = set()
        # What `note_processed` is to be called with.
        self._processed: list[Any] = []
        # Whether what others than callbacks queue is sent within `FLUSH_S` without `flush_soon`.
        self._flushes_soon = False
        # When the callback that runs now began, and the first of this turn.
        self._callback_at = self._calls_at = FOREVER
        self._must_attach = False
        self._poll_at = 0.0
        self._room_wanted_count = 0
        # The connection that was sent to last, as long as it is open, and its outlet.
        self._last_to: Connection | None = None
        self._last_outlet: Outlet | None = None

    # What the drivers say.

    def _set_lock(self) -> None:
        """Make a new lock, that nobody holds."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to serve."""
        raise NotImplementedError

    def begin_close(self, timeout: float) -> None:
        """Have all settled, for at most `timeout` seconds, and then stop. Called without the lock; does not wait."""
        raise NotImplementedError

    def end_at_exit(self) -> None:
        """End a close that was begun, because the process ends. Called without the lock."""
        raise NotImplementedError

    def is_own_thread(self) -> bool:
        """Return whether the caller is a callback, which must not wait for the loop. No lock needed."""
        raise NotImplementedError

    def await_outcome(self, waiter: Any, outlet: Outlet, deadline_at: float) -> None:
        """Send what is queued at an outlet for a waiter, and see to it that the waiter is settled."""
        raise NotImplementedError

    def wait_room(self, outlet: Outlet, deadline_at: float, message: Message | None = None) -> None:
        """Wait until a full queue takes a message, or a part of the response to a message.

        Raises:
            QueueFull: There was no room before the deadline, or the caller cannot wait.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Give what waits to the network; whoever sleeps is woken if that brought work."""
        raise NotImplementedError

    def flush_soon(self, outlet: Outlet, now: float) -> None:
        """Send what was queued at an outlet, or have it sent soon together with what follows."""
        raise NotImplementedError

    def run_in_worker(self, callback: Any, message: Message) -> None:
        """Run a user's callback in the calling thread, survive it, and note that it is processed. Without the lock."""
        raise NotImplementedError

    def poll(self, now: float) -> None:
        """Take input in the middle of a callback, if nobody else does and not long after the last time.

        What comes is processed, and what that runs waits for its turn. Called without the lock.
        """
        raise NotImplementedError

    def announce_calls(self) -> None:
        """Have callbacks run, if there are some and nobody is about to."""
        raise NotImplementedError

    def ask_attention(self) -> None:
        """Have the loop look again at what has changed. Any thread, no lock needed."""
        raise NotImplementedError

    def _watch(self, descriptor: int) -> None:
        raise NotImplementedError

    def _unwatch(self, descriptor: int) -> None:
        raise NotImplementedError

    def _announce_room(self) -> None:
        """Have those look again who wait for room."""
        raise NotImplementedError

    # Life.

    @property
    def is_serving(self) -> bool:
        """Whether it takes input and sends: it runs, or is closing."""
        return self.state in (State.RUNNING, State.CLOSING)

    def mark_forked(self) -> None:
        """Never work again: this is the child of a fork. What serves lives in the parent, and may hold the lock."""
        self._set_lock()
        self.state = State.FORKED

    def _is_over(self) -> bool:
        if monotonic() >= self.close_at:
            return True
        return self._endpoints.are_idle() and self._exchange.is_settled

    def _note_failure(self, error: BaseException) -> None:
        """Tell of an error in the loop itself; the driver ends it now."""
        self.failure = error
        self.close_at = monotonic()
        logger.critical("! %s has ended by an error of its own, please report it", self._name, exc_info=error)

    # Links.

    def add(self, link: SocketLink) -> None:
        """Receive from a link from now on."""
        self._exchange.links.add(link)
        self._links[link.descriptor] = link
        self._monitored[link.monitor_descriptor] = link
        self._watch(link.descriptor)
        self._watch(link.monitor_descriptor)
        link.touch = self._touched.add
        self._touched.add(link)
        # A descriptor tells of nothing before the events were read once.
        link.read_news()
        self.ask_attention()

    def remove(self, link: SocketLink, why: str) -> None:
        """Forget a link, before it is closed, and end its messages."""
        try:
            self._exchange.close_link(link, why, monotonic())
        finally:
            self._unwatch(link.descriptor)
            if link not in self._unwatched:
                self._unwatch(link.monitor_descriptor)
            self._unwatched.discard(link)
            del self._links[link.descriptor]
            del self._monitored[link.monitor_descriptor]
            self._touched.discard(link)
            self._readable.discard(link)
            link.inflows.clear()
            self._last_to = self._last_outlet = None
            self.announce_calls()
            self._announce_room()

    def _remove_all(self) -> None:
        """Forget all links and end all messages, also if the core is not whole."""
        why = "the messenger was closed" if self.failure is None else f"the messenger has ended by {self.failure!r}"
        for link in list(self._links.values()):
            try:
                self.remove(link, why)
            except Exception as error:
                self._note_failure(error)
        self._exchange.end_all(why)

    def notice_change(self) -> None:
        """Look again which inproc endpoints have a listener. For the transports; any thread, no lock held or taken."""
        self._must_attach = True
        if self.is_serving:
            self.ask_attention()

    # Sending: what `BaseMessenger` does for each message once it has looked at what it was given.

    def send(
        self,
        to: To,
        contents: Buffer,
        callback: Callback | None,
        on_error: ErrorCallback | None,
        dest_id: int,
        timeout: float,
        redeliver: bool,
    ) -> int:
        """Do what `send_message` says. Takes the lock."""
        now = monotonic()
        deadline_at = now + timeout
        exchange = self._exchange
        peer, roams, is_timed = b"", False, timeout != TIMEOUT_S
        # Not `with`, which costs twice as much.
        self.acquire()
        try:
            if self.state is not RUNNING:
                self._messenger._require_open(type(to) is Message)
            outlet = self._last_outlet if to is self._last_to else None
            if outlet is None:
                outlet, peer, roams = self._endpoints.route(to, self)
                if isinstance(to, Message):
                    dest_id = dest_id or to.source_callback_id
                elif isinstance(to, Connection):
                    self._last_to, self._last_outlet = to, outlet
            message_id = 0
            while not message_id:
                try:
                    message_id = exchange.send(
                        outlet, peer, contents, callback, on_error, dest_id, deadline_at, roams, redeliver, is_timed
                    )
                except QueueFull:
                    self.wait_room(outlet, deadline_at)
                    self._messenger._require_open(type(to) is Message)
                    # It may have been closed meanwhile, or the peer's process, which an answer was for, is gone.
                    outlet, peer, roams = self._endpoints.route(to, self)
            if callback is not None and type(callback) is not FunctionType and isinstance(callback, Taker):
                self.await_outcome(callback, outlet, deadline_at)
            elif exchange.is_urgent:
                self.flush()
            elif self.thread_id != get_ident():
                # `flush_soon` asks that, too, but it may be interpreted.
                if not self._flushes_soon or outlet.is_quiet or now - self._callback_at > FLUSH_S:
                    self.flush_soon(outlet, now)
            elif callback is not None:
                self.asks = True
        finally:
            self.release()
        return message_id

    def answer(self, message: Message, contents: bytes) -> Any:
        """Do what `send_message(message, contents)` does, which most replies are, with less work. Takes the lock."""
        now = monotonic()
        exchange = self._exchange
        message_id = 0
        self.acquire()
        try:
            outlet = message.link
            incarnation = message.incarnation
            # What is not the usual case is one for `send_message`.
            is_same = incarnation and incarnation == outlet.peer_incarnation
            if is_same and self.state is RUNNING and not outlet.handle.closed:
                message_id = exchange.answer(message, contents, now + TIMEOUT_S)
                if exchange.is_urgent:
                    self.flush()
                elif self.thread_id != get_ident():
                    self.flush_soon(outlet, now)
        finally:
            self.release()
        return message_id or self._messenger.send_message(message, contents)

    # A turn of the loop.

    def _take_input(self, descriptors: Iterable[int]) -> None:
        """Receive what is there, of links with input and those with these descriptors, and end what has expired."""
        for descriptor in descriptors:
            link = self._links.get(descriptor)
            if link is not None:
                self._readable.add(link)
            elif descriptor in self._monitored:
                self._read_news(self._monitored[descriptor])
        exchange = self._exchange
        if self._readable:
            links, self._readable = self._readable, set()
            for link in links:
                link.receive()
            self._touched |= links
        if self._must_attach:
            self._must_attach = False
            self._attach_links()
        now = monotonic()
        if exchange.next_deadline_at <= now:
            exchange.handle_deadline(now)
        if exchange.is_urgent:
            # Acknowledgements that the other end waits for do not wait for callbacks.
            exchange.flush(now)
        if self._room_wanted_count:
            self._announce_room()

    def _read_news(self, link: SocketLink) -> None:
        """Read what a monitor tells. Peers come and go at a listener by the thousand, and nobody waits to know."""
        link.read_news()
        if link.is_shared and link not in self._unwatched:
            self._unwatch(link.monitor_descriptor)
            self._unwatched.add(link)
            self._exchange.look_at = min(self._exchange.look_at, monotonic() + NEWS_PAUSE_S)

    def _look_around(self, now: float) -> float:
        """Look again at monitors that were left alone, at connections, and whether links take what they did not."""
        for link in self._unwatched:
            self._watch(link.monitor_descriptor)
        self._unwatched.clear()
        for link in self._links.values():
            if link.queue and link.is_up:
                self._exchange.mark_dirty(link)
        return self._lookout.look(now)

    def _read_events(self) -> bool:
        """Send what waits and read touched links' events, as is due before a sleep; return whether there is input."""
        exchange = self._exchange
        if exchange.is_dirty:
            exchange.flush(monotonic())
        if self._touched:
            touched = list(self._touched)
            self._touched.clear()
            for link in touched:
                if link.has_input():
                    self._readable.add(link)
        if self._room_wanted_count:
            self._announce_room()
        return bool(self._readable)

    def _run_calls(self) -> None:
        """Run the callbacks that are due. Called without the lock."""
        calls = self._exchange.calls
        if not calls:
            return
        take_result = self._take_result
        self._calls_at = self._callback_at = now = monotonic()
        if now >= self._exchange.expires_at:
            with self.lock:
                self._exchange.drop_expired(now)
        flush_at = now + FLUSH_S
        # Only those that are there now: callbacks may add calls for ever, and input must have its turn.
        for _ in range(len(calls)):
            callback, argument = calls.popleft()
            if callback is BATCH_PROCESSED:
                self._processed.append(argument)
                continue
            try:
                result = callback(argument)
                # What most callbacks return, an id as `reply` does among it, is of no interest.
                if result is not None and type(result) is not int:
                    take_result(callback, argument, result)
            except BaseException as error:
                self._report(callback, argument, error)
            self._callback_at = now = monotonic()
            if now >= flush_at:
                # What earlier callbacks sent must not wait for slow ones.
                with self.lock:
                    self._note_processed()
                    self.flush()
                if now >= self._exchange.expires_at:
                    break
                flush_at = now + FLUSH_S
        self._calls_at = self._callback_at = FOREVER

    def _take_result(self, callback: Any, argument: Any, result: Any) -> None:
        """Do something with what a callback has returned. A coroutine is work that nothing here would do."""
        refuse_generator(callback, result)
        if type(result) is CoroutineType:
            result.close()
            raise TypeError(
                f"{callback!r} returned a coroutine, which nothing runs here; use AsyncMessenger, or a plain function"
            )

    def _note_processed(self) -> None:
        """Have acknowledged what was run; with the lock, which is taken only once for all that a turn has to do."""
        for session, incarnation, number in self._processed:
            self._exchange.note_processed(session, incarnation, number)
        self._processed.clear()

    def _report(self, callback: Any, argument: Message | DeliveryError, error: BaseException) -> None:
        """Tell of a callback that raised; whatever it was, the loop serves others and goes on. Takes the lock."""
        if type(error) is Cancelled and type(argument) is Message and error.message_id == argument.source_callback_id:
            return  # It had parts to send that nobody reads; that is the usual end of one.
        if type(error) is ContentsInvalid and type(argument) is Message and not argument.is_response:
            # The sender's mistake, who is told of it; one that makes it all the time must not fill the log.
            logger.debug("! %r: %s", argument, error)
        else:
            try:
                logger.error("! a callback raised: %r on %r", callback, argument, exc_info=error)
            except Exception as log_error:  # A user's filter or handler, which must not end the loop either.
                error.add_note(f"It could not be logged: {log_error!r}")
        with self.lock:
            self._exchange.report_raised(argument, error)

    def count_drop(self, kind: str) -> None:
        """Count a message that goes no further. Takes the lock."""
        with self.lock:
            self._exchange.drop(kind)


def refuse_generator(callback: Any, result: Any) -> None:
    """Raise if a callback has returned a generator: nothing of the callback has run, and nothing would run it."""
    if type(result) in (GeneratorType, AsyncGeneratorType):
        raise TypeError(
            f"{callback!r} returned a generator, of which nothing has run; it must not yield: call message.reply(part, "
            "more=True) for each part"
        )


# Loops that serve.
started: set[Loop] = set()


def _close_at_exit() -> None:
    loops = list(started)
    # All at once, so that many do not take many seconds.
    for loop in loops:
        loop.begin_close(CLOSE_TIMEOUT_S)
    for loop in loops:
        loop.end_at_exit()


def _mark_forked() -> None:
    for loop in started:
        loop.mark_forked()
    started.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_mark_forked)
