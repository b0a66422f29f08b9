"""What the simulator knows to be true of each message, and the rules that no run may break.

The simulator sees everything: when a callback really began at which process, and what the sender was told. A rule that
is broken becomes a `Violation`; the run goes on, so that a run may break several.
"""

from collections import Counter
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any

import msgspec

from messenger.errors import (
    Cancelled,
    DeliveryError,
    HandlerError,
    IdentityInUse,
    NoHandler,
    NotDelivered,
    OutcomeUnknown,
)
from messenger.link import FOREVER, GoneOutlet
from messenger.message import Message
from messenger.session import Session
from messenger.wire import MAGIC, Kind

if TYPE_CHECKING:
    from .network import Packet
    from .process import Process

# The start of a DATA frame: magic, version, kind, flags, two incarnations, first, two acknowledgements, count.
_DATA_START = Struct("<BBBBQQQQQI")
# The start of every frame, and the nonce of a HELLO.
_HEADER = Struct("<BBBBQQ")
_HELLO_START = Struct("<BBBBQQQ")
# A listener has forgotten a peer that is gone so long after its idle time.
FORGET_LATE_S = 2.0
# A deadline may be swept so much later than it is reached, with the spacing of sweeps and a late timer.
SWEEP_LATE_S = 0.25


class Violation(msgspec.Struct, frozen=True):
    """A broken rule."""

    rule: str
    text: str


class Sent(msgspec.Struct, eq=False, kw_only=True):
    """A message, as the simulator knows it.

    Attributes:
        index: Its place among all that were sent by the same outlet.
        ends: How often the other end of its outlet was told to be gone, or refused us, before it was sent.
        parent: The message that this one answers.
        must_run: Whether its receiver certainly has a callback for it.
        action: What the callback that gets it does: "reply", "reply and wait", "raise", "reply and raise", "nothing".
        runs: The processes whose callback began with it.
        msc_runs: How often it arrived as a response and ran what waited for it.
    """

    token: int
    sender: Any
    outlet: Any
    index: int
    ends: int
    sent_at: float
    deadline_at: float
    waits: bool
    redeliver: bool
    dest_callback_id: int
    action: str
    duration_s: float
    parent: "Sent | None"
    must_run: bool = True
    is_probe: bool = False
    is_timed: bool = True
    part_count: int = 0
    runs: list[Any] = msgspec.field(default_factory=list)
    run_keys: set[Any] = msgspec.field(default_factory=set)
    msc_runs: int = 0
    raised: bool = False
    replied: bool = False
    cancelled: bool = False
    outcomes: list[str] = msgspec.field(default_factory=list)

    def __str__(self) -> str:
        return f"message {self.token} of {self.sender}"

    @property
    def ran(self) -> bool:
        """Whether a callback of the receiver began with it."""
        return bool(self.runs) or self.msc_runs > 0


class Oracles:
    """The rules, each of which is checked where it can be broken first.

    Attributes:
        is_fifo: Whether no packet of this run overtakes another on its wire.
        may_end: Whether the faults of this run may end a session at all.
        counts: Of outcomes, by name.
    """

    def __init__(self, clock: Callable[[], float], note: Callable[..., None], window_msgs: int) -> None:
        self.violations: list[Violation] = []
        self.sent: dict[int, Sent] = {}
        self.may_end = False
        self.is_fifo = False
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._note = note
        self._window_msgs = window_msgs
        self._ends: Counter[int] = Counter()
        self._refused: set[int] = set()
        # By outlet: when its receiver was last taken for dead.
        self._deserted_at: dict[int, float] = {}
        self._kept: list[Any] = []
        self._sent_counts: Counter[int] = Counter()
        self._last_run: dict[Any, int] = {}
        # By (sender's, receiver's incarnation): the highest number that the sender was told to be processed.
        self._told_processed: dict[tuple[int, int], int] = {}
        # By incarnation: its process. By (challenger's, challenged incarnation): when that challenge was first sent.
        # By a connection's incarnation: its last nonce, and when that was first sent.
        self._owners: dict[int, Any] = {}
        self._challenged_at: dict[tuple[int, int], float] = {}
        self._hellos: dict[int, tuple[int, float]] = {}
        # By an end's incarnation: the other incarnation that it was seen to be established with.
        self._established: dict[int, int] = {}

    def fail(self, rule: str, text: str) -> None:
        """Note a broken rule."""
        self.violations.append(Violation(rule, f"{self._clock():.4f} {text}"))
        self._note("VIOLATION", rule, text)

    # Messages.

    def ends_of(self, outlet: Any) -> int:
        """Return how often an outlet lost its other end so far."""
        return self._ends[id(outlet)]

    def note_end(self, process: "Process", outlet: Any, why: str) -> None:
        """An outlet's other end is said to be gone, or to refuse us."""
        self._ends[id(outlet)] += 1
        self._kept.append(outlet)  # So that no other object gets its id.
        self._note("ended", process, why)
        wire = getattr(outlet.link, "routes", {}).get(outlet.routing_id)
        if "new one has its identity" in why and wire is not None and not wire.is_cut:
            self.fail("identity taken from the living", f"{process}: {why}")
        if not self.may_end:
            self.fail("ended without a reason", f"{process}: {why}")

    def note_deserted(self, process: "Process", outlet: Any) -> None:
        """Nobody listens any more where a connection led, as far as can be seen."""
        self._ends[id(outlet)] += 1
        self._kept.append(outlet)
        self._deserted_at[id(outlet)] = self._clock()
        self._note("deserted", process)

    def note_refused(self, process: "Process", outlet: Any, why: str) -> None:
        """The other end does not want us: what waits for it is given up, also what is to be redelivered."""
        self._refused.add(id(outlet))
        self.note_end(process, outlet, f"refused: {why}")

    def note_sent(self, sent: Sent) -> None:
        """A message was accepted."""
        self.sent[sent.token] = sent

    def next_index(self, outlet: Any) -> int:
        """Return the place of the next message of an outlet."""
        self._sent_counts[id(outlet)] += 1
        return self._sent_counts[id(outlet)]

    def note_run(self, process: "Process", message: Message, sent: Sent) -> None:
        """A callback of an endpoint begins."""
        text = f"{sent} at {process}"
        # The listener's end of a session has one object for each session, so it names the session for both ends.
        key = (process, sent.outlet if process.is_client else message.link)
        if key in sent.run_keys:
            self.fail("processed twice", text)
        if sent.runs and not sent.redeliver:
            self.fail("given to a successor", f"{text}, it ran at {sent.runs[0]}")
        if message.redelivered != bool(sent.runs) and (sent.runs or not sent.redeliver):
            self.fail("redelivered is wrong", f"{text}: {message.redelivered} after {len(sent.runs)} runs")
        if sent.index <= self._last_run.get(key, 0):
            self.fail("out of order", f"{text}: {sent.index} after {self._last_run[key]}")
        if sent.outcomes and sent.outcomes[0] in ("NotDelivered", "NoHandler", "IdentityInUse"):
            self.fail("ran after NotDelivered", text)
        # Where packets overtake each other, a cancellation may come before its message.
        is_late = message.is_given_up(self._clock()) if self.is_fifo else self._clock() >= message.deadline_at
        if is_late and message.source_callback_id and not message.is_response:
            self.fail("started too late", f"{text}: it was given up before")
        self._last_run[key] = sent.index
        sent.run_keys.add(key)
        sent.runs.append(process)

    def note_expired(self, process: "Process", sent: Sent, is_sender_gone: bool) -> None:
        """A message is not started: its sender must have given it up, or be gone as far as the receiver can tell."""
        self._note("expired", process, sent)
        self.counts["expired"] += 1
        # Its sender's callback may be told later than the receiver.
        was_deserted = sent.sent_at <= self._deserted_at.get(id(sent.outlet), -1.0)
        is_given_up = sent.cancelled or was_deserted or is_sender_gone
        if self._clock() < sent.deadline_at and not is_given_up:
            self.fail("dropped before its deadline", f"{sent} at {process}, its deadline is {sent.deadline_at:.3f}")

    def note_response(self, sent: Sent, reply: Sent | None, message: Message) -> None:
        """The MSC of a message runs."""
        self._note_outcome(sent, "response")
        if reply is sent:
            if sent.dest_callback_id != 1:
                self.fail("false response", f"{sent}: an echo that it did not ask for")
        elif reply is None or reply.parent is not sent:
            self.fail("false response", f"{sent}: {reply} answers {reply and reply.parent}")
        else:
            reply.msc_runs += 1
            if reply.msc_runs > 1:
                self.fail("processed twice", f"{reply} as a response")

    def note_stream_end(self, sent: Sent, taken: list[bytes], error: DeliveryError | None) -> None:
        """The reader of a stream has taken all that came."""
        self.counts["stream"] += 1
        if taken != [b"%d %d" % (sent.token, number) for number in range(1, len(taken) + 1)]:
            self.fail("parts out of order", f"{sent}: {taken}")
        if error is not None:
            self.note_error(sent, error)
            return
        self._note_outcome(sent, "response")
        if len(taken) != sent.part_count:
            self.fail("parts are missing", f"{sent}: {len(taken)} of {sent.part_count}")

    def note_error(self, sent: Sent, error: DeliveryError) -> None:
        """The error callback of a message runs."""
        name = type(error).__name__
        self._note_outcome(sent, name)
        if isinstance(error, NotDelivered) and sent.ran:
            self.fail("false outcome", f"{sent} ran, and {name} is told: {error}")
        if isinstance(error, NoHandler) and sent.parent is None and not sent.sender.site.may_lack_handler:
            self.fail("false outcome", f"{sent}: there is a handler, and NoHandler is told")
        if isinstance(error, IdentityInUse) and not self.may_end:
            self.fail("false outcome", f"{sent}: nobody else has its identity, and {name} is told")
        if isinstance(error, Cancelled) and not sent.cancelled:
            self.fail("false outcome", f"{sent} was not given up, and {name} is told")
        if isinstance(error, HandlerError) and not sent.raised:
            self.fail("false outcome", f"{sent} did not raise, and {name} is told")
        if (
            type(error) in (OutcomeUnknown, NotDelivered)
            and self._clock() < sent.deadline_at
            and self.ends_of(sent.outlet) == sent.ends
            and not (sent.sender.is_closing or sent.outlet.is_closed)
        ):
            self.fail("false outcome", f"{sent}: {name} before its deadline, without a reason: {error}")

    def _note_outcome(self, sent: Sent, outcome: str) -> None:
        self.counts[outcome] += 1
        sent.outcomes.append(outcome)
        self._note("outcome", sent, outcome)
        if len(sent.outcomes) > 1:
            self.fail("outcome told twice", f"{sent}: {sent.outcomes}")
        if not sent.waits:
            self.fail("false outcome", f"{sent} has no callback, and {outcome} is told")

    # Frames.

    def watch_packet(self, process: "Process", packet: "Packet", is_sent: bool) -> None:
        """Check a packet that a process sends or receives."""
        frame = packet[0]
        if is_sent:
            self._note_handshake(process, frame)
        if len(frame) < _DATA_START.size or frame[0] != MAGIC or frame[2] != Kind.DATA:
            return
        _, _, _, _, source, dest, first, _, processed_through, msg_count = _DATA_START.unpack_from(frame)
        if not is_sent:
            key = (dest, source)
            self._told_processed[key] = max(self._told_processed.get(key, 0), processed_through)
            return
        in_flight = first + msg_count - 1 - self._told_processed.get((source, dest), 0)
        if msg_count and in_flight > self._window_msgs:
            self.fail("window exceeded", f"{process}: {in_flight} of {self._window_msgs}")
        if processed_through:
            self._check_processed(process, {source, dest}, processed_through)

    def _note_handshake(self, process: "Process", frame: bytes) -> None:
        _, _, kind, _, source, dest = _HEADER.unpack_from(frame)
        if kind == Kind.CHALLENGE:
            self._owners[source] = process
            self._challenged_at.setdefault((source, dest), self._clock())
        elif kind == Kind.HELLO:
            *_, nonce = _HELLO_START.unpack_from(frame)
            if self._hellos.get(source, (0, 0.0))[0] != nonce:
                self._hellos[source] = (nonce, self._clock())

    def note_owner(self, process: "Process", incarnation: int) -> None:
        """A connection's incarnation was drawn."""
        self._owners[incarnation] = process

    def check_established(self, process: "Process") -> None:
        """An incarnation counts only when its process has lived to see a fresh nonce."""
        for session in process.exchange.handshake.sessions:
            ours, theirs = session.incarnation, session.peer_incarnation
            if not theirs or self._established.get(ours) == theirs:
                continue
            self._established[ours] = theirs
            at = self._hellos[ours][1] if process.is_client else self._challenged_at.get((ours, theirs), FOREVER)
            if self._owners[theirs].died_at < at:
                self.fail("the dead established", f"{process}: with {self._owners[theirs]}")

    def _check_processed(self, process: "Process", incarnations: set[int], processed_through: int) -> None:
        """Nothing is acknowledged as processed whose callback has not returned."""
        for message in process.waiting_messages():
            sent = self.sent.get(token_of(message))
            if sent is None or message.number > processed_through or not isinstance(message.link, Session):
                continue
            session = sent.outlet if process.is_client else message.link
            # What asked for a stream counts as processed from its first part on.
            is_whole = sent.action != "stream"
            if (
                is_whole
                and sent.sender is not process
                and {session.incarnation, session.peer_incarnation} == incarnations
            ):
                self.fail("acknowledged too early", f"{process}: {processed_through} while {sent} waits or runs")

    # Processes.

    def check_deadline(self, process: "Process") -> None:
        """After `handle_deadline(now)` the next deadline is later."""
        next_deadline_at = process.exchange.next_deadline_at
        if not next_deadline_at > self._clock():
            self.fail("deadline not later", f"{process}: {next_deadline_at}")

    def audit(self, process: "Process") -> None:
        """Look at what a process holds."""
        exchange, now = process.exchange, self._clock()
        limits = process.limits
        for session in exchange.handshake.sessions:
            # What is redelivered was accepted before, and goes in front of a queue that may be full.
            queued_count = sum(outgoing.option is None for outgoing in session.queue)
            if queued_count > limits.queue_msgs_max + limits.window_msgs:
                self.fail("queue not bounded", f"{process}: {queued_count} wait for {session}")
            if session.queue_bytes != sum(outgoing.size_bytes for outgoing in session.queue):
                self.fail("queue not bounded", f"{process}: queue_bytes of {session} is {session.queue_bytes}")
        for session in exchange.handshake.sessions:
            if len(session.cancelled) > limits.window_msgs:
                self.fail("cancellations not bounded", f"{process}: {len(session.cancelled)}")
        if not process.is_client and len(exchange.handshake.sessions) > limits.sessions_max:
            self.fail("sessions not bounded", f"{process}: {len(exchange.handshake.sessions)}")
        if process.is_busy:
            return
        for sent in process.open_messages():
            if sent.deadline_at + SWEEP_LATE_S < now:
                self.fail("deadline not swept", f"{sent}, whose deadline was {sent.deadline_at:.3f}")
                sent.outcomes.append("none")

    def check_end(self, processes: list["Process"]) -> None:
        """When all is over, every message has what it was promised."""
        for sent in self.sent.values():
            if not sent.sender.is_alive and not sent.sender.has_closed:
                continue
            if sent.waits and not sent.outcomes:
                self.fail("no outcome", f"{sent}, {sent.action}")
            if isinstance(sent.outlet, GoneOutlet):
                continue
            is_same_session = self.ends_of(sent.outlet) == sent.ends and sent.sender.is_alive
            is_in_time = sent.deadline_at > self._clock()
            if is_same_session and is_in_time and sent.must_run and not sent.ran and not sent.outcomes:
                self.fail("message vanished", f"{sent}, {sent.action}")
            elif (
                id(sent.outlet) not in self._refused
                and sent.redeliver
                and sent.sender.is_client
                and sent.sender.is_alive
                and is_in_time
                and sent.must_run
                and not sent.ran
                and not sent.outcomes
            ):
                self.fail("not redelivered", f"{sent}, {sent.action}")
            if sent.is_probe and sent.outcomes != ["response"]:
                self.fail("no progress", f"{sent} after healing: {sent.outcomes}")
        self._check_forgotten(processes)
        for process in processes:
            if process.is_alive and not process.exchange.is_settled:
                exchange = process.exchange
                waits = f"{exchange.outstanding_count} outstanding, {exchange.queued_count} queued"
                unprocessed = [session.unprocessed_count for session in exchange.handshake.sessions]
                self.fail("not settled", f"{process}: {waits}, {unprocessed} not processed")

    def _check_forgotten(self, processes: list["Process"]) -> None:
        """A listener keeps no session of whom it has heard nothing for long."""
        for process in processes:
            if not process.is_alive or process.is_client:
                continue
            for session in process.exchange.handshake.sessions:
                gone_s = self._clock() - self._owners[session.peer_incarnation].died_at
                if gone_s > process.limits.session_idle_s_max + FORGET_LATE_S:
                    self.fail("the dead not forgotten", f"{process}: {session}, gone for {gone_s:.1f} s")


def token_of(message: Message) -> int:
    """Return the number that a message of the simulator carries."""
    return int(message.contents.split(b" ", 1)[0] or b"0")
