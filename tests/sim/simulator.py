"""One run: a plan that a seed draws, the clock, the sites, and the faults.

A server and one or two clients (and sometimes a second live process with a client's identity) send each other messages
for some seconds of virtual time, while the network and the processes fail as the plan says. Then all faults end, and
what was promised is demanded: everything settles, and new messages get their responses soon.
"""

import hashlib
import heapq
import traceback
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from messenger.limits import LARGE_BYTES_MIN, TIMEOUT_S, Limits
from messenger.wire import ECHO, NOOP

from .network import TO_CONNECTION, TO_LISTENER, ListenerLink, Mode, Network, Weather, Wire
from .oracles import Oracles, Sent, Violation
from .process import REGISTERED_ID, Process, draw_dest

# The faults end so long after the start, in virtual seconds.
HEAL_S = 9.0
# So long after healing all is as if nothing had happened; what is sent then must be answered soon.
RECOVER_S = 25.0
ANSWER_S = 5.0
WAKE_UP_S = 2.5
SETTLE_S = 15.0
AUDIT_S = 1.0
# A run has some hundreds of events; more than this is two ends that never stop to answer each other.
EVENTS_MAX = 20_000
VIOLATIONS_MAX = 20


class Site(msgspec.Struct, eq=False, kw_only=True):
    """A place where a process of one identity lives, and after it the next."""

    name: str
    identity: bytes
    is_client: bool
    has_callback: bool
    connection_count: int = 0
    worker_count: int = 0
    is_led: bool = False
    may_lack_handler: bool = False
    process: Any = None
    lives: int = 0


class Plan(msgspec.Struct, kw_only=True):
    """What a seed decides before the run starts."""

    limits: Limits
    weather: Weather
    client_count: int
    fault_count: int
    msg_count: int
    slow_share: float
    longest_s: float
    worker_count: int = 0
    cancel_share: float = 0.0
    visitor_count: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was."""

    seed: int
    violations: list[Violation]
    digest: str
    log: list[tuple[Any, ...]]
    counts: dict[str, int]
    tracebacks: list[str]

    @property
    def rules(self) -> set[str]:
        """The rules that were broken."""
        return {violation.rule for violation in self.violations}

    def report(self, log_lines: int = 40) -> str:
        """Return what a person needs to reproduce and to understand a failing run."""
        lines = [f"seed {self.seed}: make sim SEED={self.seed} SEEDS=1"]
        lines += [f"  {violation.rule}: {violation.text}" for violation in self.violations[:10]]
        lines += self.tracebacks[:2]
        lines += ["  the end of the event log:"]
        lines += ["  " + " ".join(map(str, entry)) for entry in self.log[-log_lines:]]
        return "\n".join(lines)


# A session that is heard of says something within 12.5 s; a listener with less patience forgets the living too.
IDLE_S_MIN = 13


def draw_plan(rng: Random, more: Random) -> Plan:
    """Draw what a run is like; about one in twelve has no faults at all.

    Args:
        more: Draws what was added later, so that a seed without it stays the run that it was.
    """
    is_calm = rng.random() < 0.08
    mode = rng.choices((Mode.FIFO, Mode.LOSSY, Mode.HARSH), (45, 15, 40))[0]
    delay_s = rng.choice(((0.0001, 0.002), (0.001, 0.02), (0.001, 0.02), (0.2, 0.5)))
    if is_calm:
        weather = Weather(mode=Mode.FIFO, delay_s=delay_s)
    elif mode is Mode.FIFO:
        weather = Weather(mode=mode, delay_s=delay_s, late_share=rng.choice((0.0, 0.01)))
    else:
        loss, doubling = rng.choice((0.0, 0.05, 0.2)), rng.choice((0.0, 0.1, 0.3))
        weather = Weather(mode=mode, delay_s=delay_s, late_share=0.1, loss=loss, doubling=doubling)
    limits = Limits(
        window_msgs=rng.choice((1, 2, 3, 8, 64, 8192)),
        window_bytes=rng.choice((100, 4096, 64 * 1024 * 1024)),
        queue_msgs_max=rng.choice((4, 50, 100_000)),
    )
    plan = Plan(
        limits=limits,
        weather=weather,
        client_count=rng.choice((1, 1, 2)),
        fault_count=0 if is_calm else rng.randint(0, 7),
        # A window of one message and a round trip of a second leave no time for many.
        msg_count=rng.randint(5, 15 if delay_s[0] > 0.1 else 50),
        slow_share=rng.choice((0.0, 0.1, 0.3)),
        longest_s=rng.choice((0.05, 0.5, 3.0)),
    )
    # No more sessions than the clients that live need, so those of the dead must make room.
    sessions_max = more.choice((10_000, 10_000, 2 * plan.client_count))
    idle_s = more.choice((600, IDLE_S_MIN)) if sessions_max == 10_000 else IDLE_S_MIN
    if more.random() < 0.1:
        # Callbacks that take as long as its patience would make it forget at any time.
        idle_s, plan.longest_s = 3, 0.5
    return msgspec.structs.replace(
        plan,
        limits=msgspec.structs.replace(limits, sessions_max=sessions_max, session_idle_s_max=idle_s),
        worker_count=more.choice((0, 0, 1, 3)),
        cancel_share=more.choice((0.0, 0.2)),
        # What waits for a visitor that is gone must be over at the end, so the server must forget it before.
        visitor_count=more.choice((0, 4)) if plan.fault_count and idle_s <= IDLE_S_MIN else 0,
    )


class Simulator:
    """A run of one seed.

    Attributes:
        now: The virtual clock, in seconds.
        sites: The server's is the first.
    """

    def __init__(self, seed: int, change: Callable[[Plan], Plan] = lambda plan: plan) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.more = Random(f"{seed} more")
        self._deadlines = Random(f"{seed} deadlines")
        self.streams = Random(f"{seed} streams")
        self.mistakes = Random(f"{seed} mistakes")
        self.now = 0.0
        self.plan = change(draw_plan(self.rng, self.more))
        self.log: list[tuple[Any, ...]] = []
        self.tracebacks: list[str] = []
        self.oracles = Oracles(lambda: self.now, self.note, self.plan.limits.window_msgs)
        self.network = Network(
            self.rng, lambda: self.now, self.schedule, self.note, self.oracles.watch_packet, self.plan.weather
        )
        self.network.dial = self._dial
        self.oracles.is_fifo = self.plan.weather.mode is Mode.FIFO
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._event_count = 0
        self._token = 0
        self.step_count = 0
        self._processes: list[Process] = []
        self.sites = self._draw_sites()

    def _draw_sites(self) -> list[Site]:
        rng = self.rng
        server = Site(name="server", identity=b"server", is_client=False, has_callback=rng.random() < 0.8)
        sites = [server]
        for number in range(self.plan.client_count):
            name = f"client{number}"
            site = Site(name=name, identity=name.encode(), is_client=True, has_callback=rng.random() < 0.7)
            site.connection_count = rng.choice((1, 1, 2))
            sites.append(site)
        for site in sites:
            site.is_led = rng.random() < 0.5
        # Without a callback there is nothing for workers to do.
        server.worker_count = self.plan.worker_count if server.has_callback else 0
        for site in sites[1:]:
            site.may_lack_handler = not server.has_callback
        server.may_lack_handler = not all(site.has_callback for site in sites[1:])
        return sites

    # For the parts of a run.

    def schedule(self, at: float, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called at an instant."""
        self._event_count += 1
        heapq.heappush(self._events, (at, self._event_count, function, arguments))

    def note_step(self) -> None:
        """A process is about to take a packet, run a callback or send a frame; or an event is about to happen."""
        self.step_count += 1

    def note(self, what: str, *details: Any) -> None:
        """Write an event into the log."""
        self.log.append((f"{self.now:.6f}", what, *map(str, details)))

    def keep_traceback(self, error: BaseException) -> None:
        """Keep where an exception came from."""
        self.tracebacks.append("".join(traceback.format_exception(error)))

    def _dial(self) -> ListenerLink | None:
        process = self.sites[0].process
        return process.links[0] if process is not None and process.is_alive else None

    def draw_size(self) -> int:
        """Return how many bytes of contents follow a message's number."""
        return LARGE_BYTES_MIN if self.rng.random() < 0.01 else self.rng.choice((0, 10, 60))

    def draw_message(
        self, sender: Process, outlet: Any, dest_callback_id: int, parent: Sent | None, **options: Any
    ) -> Sent:
        """Return a message that knows what will be done with it."""
        rng, plan = self.rng, self.plan
        self._token += 1
        action = "nothing"
        if parent is None:
            chances = (70, 8, 5, 4, 13)
            action = rng.choices(("reply", "reply and wait", "raise", "reply and raise", "nothing"), chances)[0]
        elif options.get("waits"):
            action = "reply"
        # A reply for which the queue is full is lost, and then only the deadline can tell.
        is_long = action in ("reply", "reply and raise") and rng.random() < 0.5 and plan.limits.queue_msgs_max > 1000
        timeout_s = 200.0 if is_long else rng.uniform(0.3, 15.0)
        waits = options.get("waits", rng.random() < 0.85)
        if not waits:
            timeout_s = 200.0
        is_timed = parent is None and rng.random() < plan.slow_share
        sent = Sent(
            token=self._token,
            sender=sender,
            outlet=outlet,
            index=0,
            # Whoever asked may have ended before the answer is sent.
            ends=-1 if parent is not None and self.oracles.ends_of(outlet) else self.oracles.ends_of(outlet),
            sent_at=self.now,
            deadline_at=self.now + timeout_s,
            waits=waits,
            redeliver=parent is None and rng.random() < 0.2,
            dest_callback_id=dest_callback_id,
            action=action,
            duration_s=rng.uniform(0.001, plan.longest_s) if is_timed else 0.0,
            parent=parent,
            must_run=self._must_run(sender.site, dest_callback_id),
            is_probe=options.get("is_probe", False),
        )
        if sent.is_probe:
            sent.action, sent.duration_s, sent.redeliver = "reply", 0.0, False
            sent.deadline_at = self.now + ANSWER_S
        elif sent.waits and self.now < HEAL_S and timeout_s < TIMEOUT_S and self._deadlines.random() < 0.3:
            # Then the receiver is not told.
            sent.deadline_at, sent.is_timed = self.now + TIMEOUT_S, False
        return sent

    def _must_run(self, site: Site, dest_callback_id: int) -> bool:
        receivers = self.sites[:1] if site.is_client else self.sites[1:]
        has_callback = all(receiver.has_callback for receiver in receivers)
        return dest_callback_id == REGISTERED_ID or (has_callback and dest_callback_id != ECHO)

    # Load.

    def _start(self, site: Site) -> None:
        if site.process is not None and site.process.is_alive:
            return
        site.lives += 1
        site.process = Process(self, site, site.lives)
        self._processes.append(site.process)
        self.note("start", site.process)
        site.process.wake(self.now)

    def _send(self, site: Site, burst: int) -> None:
        """A user of a site sends some messages, or answers, from a thread of its own."""
        process = site.process
        if process is None or not process.is_alive:
            return
        for _ in range(burst):
            if site.is_client:
                link = self.rng.choice(process.links)
                process.send(
                    link.session, draw_dest(self.rng, self.sites[0].has_callback), cancel_after_s=self._draw_cancel()
                )
            else:
                peer = self.rng.choice(self.sites[1:])
                session = process.exchange.handshake.find(process.links[0].handle, peer.identity)
                if session is not None:
                    process.send(session, draw_dest(self.rng, peer.has_callback), cancel_after_s=self._draw_cancel())

    def _open_stream(self, site: Site) -> None:
        """A user of a client asks for a response in parts."""
        process = site.process
        if process is None or not process.is_alive or process.is_closing:
            return
        session = self.streams.choice(process.links).session
        self._token += 1
        sent = Sent(
            token=self._token,
            sender=process,
            outlet=session,
            index=0,
            ends=self.oracles.ends_of(session),
            sent_at=self.now,
            deadline_at=self.now + 200.0,
            waits=True,
            redeliver=False,
            dest_callback_id=int(NOOP),
            action="stream",
            duration_s=0.0,
            parent=None,
            # A window of one message and a round trip of a second leave no time for many.
            part_count=self.streams.choice((1, 2, 5, 5 if self.plan.weather.delay_s[0] > 0.1 else 30)),
        )
        process.open_stream(session, sent)

    def _draw_cancel(self) -> float | None:
        """Return after how long a message is given up, if it is."""
        return self.more.choice((0.0, 0.01, 0.5)) if self.more.random() < self.plan.cancel_share else None

    def _wake_up(self) -> None:
        """A listener may have forgotten who was silent for long; the first message then finds that out."""
        for site in self.sites[1:]:
            for link in site.process.links:
                site.process.send(link.session, draw_dest(self.more, self.sites[0].has_callback))

    def _probe(self) -> None:
        """After healing, all connections work, in both directions."""
        self.note("probe")
        server = self.sites[0]
        for site in self.sites[1:]:
            for link in site.process.links:
                site.process.send(
                    link.session, NOOP if server.has_callback else REGISTERED_ID, waits=True, is_probe=True
                )
            session = server.process.exchange.handshake.find(server.process.links[0].handle, site.identity)
            if session is None:
                self.oracles.fail("no progress", f"{server.process} does not know {site.name} after healing")
            else:
                server.process.send(session, NOOP if site.has_callback else REGISTERED_ID, waits=True, is_probe=True)

    # Faults.

    def _draw_faults(self) -> None:
        kinds: list[Callable[[], None]] = [self._cut, self._flap, self._partition]
        kinds += [self._end_client, self._end_server, self._start_twin]
        for _ in range(self.plan.fault_count):
            self.schedule(self.rng.uniform(0.0, HEAL_S - 4.5), self.rng.choices(kinds, (4, 3, 3, 4, 4, 1))[0])
        for number in range(self.plan.visitor_count):
            self.schedule(self.more.uniform(0.0, HEAL_S - 2.0), self._start_visitor, number)
        weather = self.plan.weather
        is_impatient = self.plan.limits.session_idle_s_max < IDLE_S_MIN
        self.oracles.may_end = bool(self.plan.fault_count or weather.loss or is_impatient)

    def _pick_wire(self) -> Wire | None:
        return self.rng.choice(self.network.wires) if self.network.wires else None

    def _cut(self) -> None:
        wire = self._pick_wire()
        if wire is not None:
            noticed_s = (self.rng.uniform(0.001, 3.0), self.rng.uniform(0.001, 3.0))
            self.network.cut(wire, noticed_s, self.rng.uniform(0.05, 1.0))

    def _flap(self) -> None:
        """The wire is made anew before anybody looks."""
        wire = self._pick_wire()
        if wire is not None:
            again_s = self.rng.choice((0.0, 0.0005, 0.05, 0.5))
            self.network.cut(wire, (0.0, self.rng.choice((0.0, 0.5))), again_s)
            self.schedule(self.now + again_s / 2, self._send, wire.connection.process.site, 2)

    def _partition(self) -> None:
        site = self.rng.choice(self.sites[1:])
        directions = self.rng.choice(((TO_LISTENER, TO_CONNECTION), (TO_LISTENER,), (TO_CONNECTION,)))
        self.network.partition(site.name, directions, self.now + self.rng.uniform(0.2, 4.0))

    def _end_client(self) -> None:
        self._end(self.rng.choice(self.sites[1:]))

    def _end_server(self) -> None:
        self._end(self.sites[0])

    def _end(self, site: Site) -> None:
        """Crash or close a site's process, and start the next a while later."""
        process = site.process
        if process is None or not process.is_alive:
            return
        if self.rng.random() < 0.75:
            process.crash()
        else:
            process.close()
        self.schedule(self.now + self.rng.choice((0.0, 0.02, 0.3, 2.0)), self._start, site)

    def _start_twin(self) -> None:
        """A second live process with a client's identity starts, and ends before the healing."""
        other = self.rng.choice(self.sites[1:])
        twin = Site(
            name=f"twin of {other.name}", identity=other.identity, is_client=True, has_callback=other.has_callback
        )
        twin.connection_count = 1
        twin.may_lack_handler = other.may_lack_handler
        self._start(twin)
        for _ in range(3):
            self.schedule(self.now + self.rng.uniform(0.0, 3.0), self._send, twin, 2)
        end = twin.process.crash if self.rng.random() < 0.5 else twin.process.close
        self.schedule(self.now + self.rng.uniform(0.5, 4.0), self._end_twin, twin, end)

    def _end_twin(self, twin: Site, end: Callable[[], None]) -> None:
        if twin.process.is_alive:
            end()

    def _start_visitor(self, number: int) -> None:
        """Another client comes for a moment, sends, and never comes again: only its going is to be remembered."""
        name = f"visitor{number}"
        visitor = Site(name=name, identity=name.encode(), is_client=True, has_callback=True, connection_count=1)
        visitor.may_lack_handler = not self.sites[0].has_callback
        self._start(visitor)
        self._send(visitor, 2)
        end = visitor.process.crash if self.more.random() < 0.5 else visitor.process.close
        self.schedule(self.now + self.more.choice((0.05, 0.3, 2.0)), self._end_twin, visitor, end)

    def _heal(self) -> None:
        self.network.heal(Weather(mode=Mode.FIFO, delay_s=self.plan.weather.delay_s))

    # The run.

    def _audit(self) -> None:
        for process in self._processes:
            if process.is_alive:
                self.oracles.audit(process)
        self.schedule(self.now + AUDIT_S, self._audit)

    def run(self) -> Result:
        """Run to the end, and say what was."""
        rng = self.rng
        for site in self.sites:
            self.schedule(rng.choice((0.0, 0.0, rng.uniform(0.0, 1.0))), self._start, site)
        sent_count = 0
        while sent_count < self.plan.msg_count:
            burst = rng.choice((1, 1, 2, 8))
            self.schedule(rng.uniform(0.1, HEAL_S), self._send, rng.choice(self.sites), burst)
            sent_count += burst
        if self.sites[0].has_callback and self.streams.random() < 0.3:
            for _ in range(self.streams.randint(1, 3)):
                self.schedule(self.streams.uniform(0.1, HEAL_S), self._open_stream, self.streams.choice(self.sites[1:]))
        self._draw_faults()
        self.schedule(AUDIT_S, self._audit)
        self.schedule(HEAL_S, self._heal)
        if self.plan.limits.session_idle_s_max < IDLE_S_MIN:
            self.schedule(HEAL_S + RECOVER_S - WAKE_UP_S, self._wake_up)
        self.schedule(HEAL_S + RECOVER_S, self._probe)
        end_at = HEAL_S + RECOVER_S + ANSWER_S + SETTLE_S
        events = self._events
        for _ in range(EVENTS_MAX):
            if not events or events[0][0] > end_at or len(self.oracles.violations) >= VIOLATIONS_MAX:
                self.oracles.check_end(self._processes)
                break
            self.now, _, function, arguments = heapq.heappop(events)
            self.note_step()
            function(*arguments)
        else:
            self.oracles.fail("storm", f"{EVENTS_MAX} events and no end")
        text = "\n".join(map(repr, self.log))
        return Result(
            seed=self.seed,
            violations=self.oracles.violations,
            digest=hashlib.sha256(text.encode()).hexdigest(),
            log=self.log,
            counts=dict(self.oracles.counts),
            tracebacks=self.tracebacks,
        )


def simulate(seed: int) -> Result:
    """Run one seed."""
    return Simulator(seed).run()
