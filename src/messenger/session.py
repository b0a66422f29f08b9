"""A session: exactly once and in order between two ends, over links that come and go.

Each end has an **incarnation**, a random number that it drew when its state began. A session joins two incarnations,
and both directions number their messages from 1. Whoever restarts, or has forgotten the session, has a new
incarnation and begins anew; what was sent to the old one and not answered has an unknown outcome, and is not given to
the new one (unless the sender asked for it).

    state at a connection   event                                            next state
    CONNECTING              CHALLENGE that echoes our nonce                  ESTABLISHED
    ESTABLISHED             the same, from the incarnation that we know      the same; resends
    ESTABLISHED             the same, from another incarnation               ESTABLISHED (told: ended)
    ESTABLISHED             GOODBYE                                          CONNECTING (told: ended); says HELLO
    any but CLOSED          the link is up, UNKNOWN, a strange CHALLENGE     the same; says HELLO until echoed
    any but CLOSED          REFUSED, of what we asked                        CONNECTING (told: refused)
    any                     close                                            CLOSED

    state at a listener     event                                            next state
    (none)                  RESPONSE that echoes our nonce                   ESTABLISHED
    ESTABLISHED             GOODBYE, a new process of the same identity,     CLOSED (told: ended)
                            a key that was revoked, long silence, close

The transitions stand in `handshake.py`, which tells the exchange; here is what an established session does. A frame
that fits no row is counted and dropped.

Sending. What is queued goes out in batches as long as the window has room. A sent batch is kept until
`received_through` covers it, and counts against the window until `processed_through` does. Resending starts where the
other side says that something is missing, and when a link comes up. If acknowledgements stay away for the
retransmission timeout (RFC 6298) an empty frame asks for them; it carries the number of the next message, so that a
receiver that lacks anything before it says so. A receiver that is busy is thus asked, with back-off, and never
flooded.

Receiving. Only the next number is accepted; lower ones are duplicates, higher ones show a gap. So all that the receiver
keeps is bounded by the window. Acknowledgements travel on every frame, and on one of their own if nothing goes the
other way for a moment.

What must never happen here: a message processed twice or out of order; a window exceeded; a number that a peer claims
believed without a check.

Source: docs/protocol.md, "Session dialect".
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from .batch import Batch
from .blocks import Control, Option
from .control import Controls
from .errors import MalformedMessage
from .limits import (
    ACK_DELAY_S,
    BATCH_BYTES_MAX,
    BATCH_MSGS_MAX,
    IDLE_PROBE_S,
    RTO_MAX_S,
    TIMEOUT_S,
    TIMEOUT_SLACK_S,
    Limits,
)
from .link import FOREVER, Link, Outlet, Random
from .outgoing import Outgoing
from .roundtrip import Resends, RoundTrip
from .running import Running
from .wire import Flag, Numbers, decode_identity, encode_controls, encode_data, encode_goodbye, encode_left_ms


class State(Enum):
    """Of a session; the table is in the module's docstring."""

    CONNECTING = "connecting"
    ESTABLISHED = "established"
    CLOSED = "closed"


# Read for each frame; an attribute of an enumeration costs a call.
ESTABLISHED = State.ESTABLISHED


class Session(Outlet):
    """One end of a session. A connection has one for its whole life, a listener one for each peer.

    Attributes:
        incarnation: Of this end.
        peer_incarnation: Of the other end, 0 at a connection as long as none is established.
        process: Of a listener's peer, the number of its messenger, which tells two with the same identity apart.
        peer: The other end's identity, as bytes.
        link: The link that leads to the other end now, None if there is none.
        routing_id: The other end's label at that link.
        connection_link: Of a connection, the link that it was made with, up or not.
        window_msgs: The most that may be sent and not processed: the smaller of what both ends allow.
        must_answer: Whether the other end is to get acknowledgements at the next flush.
        nonce: Of the HELLO that waits for its echo, 0 if none does.
        due_at: When it gets attention (`timers.py`), no later than it wants it; infinite if that was not planned.
    """

    def __init__(
        self, incarnation: int, handle: Any, callback: Callable[[Any], object] | None, limits: Limits, rng: Random
    ) -> None:
        super().__init__(handle, callback)
        self.incarnation = incarnation
        self.state = State.CONNECTING
        self.process = 0
        self.peer = b""
        self.link: Link | None = None
        self.connection_link: Link | None = None
        self.routing_id = b""
        self.nonce = 0
        self.hello_at = FOREVER
        self.hello_count = 0
        self.due_at = FOREVER
        self._limits = limits
        self._rng = rng
        self._reset(limits.window_msgs, limits.window_bytes, 0.0)

    def _reset(self, window_msgs: int, window_bytes: int, now: float) -> None:
        """Begin the numbering anew."""
        # Sending.
        self.window_msgs = min(window_msgs, self._limits.window_msgs)
        self._window_bytes = min(window_bytes, self._limits.window_bytes)
        self.next_number = 1
        self.peer_received_through = 0
        self.peer_processed_through = 0
        self._unreceived: deque[Batch] = deque()
        self._resending: deque[Batch] = deque()
        self._unprocessed: deque[Batch] = deque()
        self._unprocessed_bytes = 0
        # Receiving.
        self.received_through = 0
        self.processed_through = 0
        self._told_received_through = 0
        self._told_processed_through = 0
        self._resend_asked_at = -FOREVER
        self._resend_asked_after = -1
        self._done_early: set[int] = set()
        self.running = Running()
        self._held: deque[tuple[int, int]] = deque()
        self._held_bytes = 0
        self._resends = Resends()
        self._attached_after = -1
        self.controls = Controls(self.window_msgs, self._window_bytes)
        self.cancelled = self.controls.cancelled
        self.must_answer = False
        self._must_ask_resend = False
        # Time.
        self.heard_at = now
        self._trip = RoundTrip()
        self._unanswered_count = 0
        self.probe_at = now + IDLE_PROBE_S
        self.ack_at = FOREVER

    @property
    def is_closed(self) -> bool:
        """Whether nothing will ever leave here again."""
        return self.state is State.CLOSED

    # The life of a session; `handshake.py` decides when.

    def establish(self, peer_incarnation: int, window_msgs: int, window_bytes: int, now: float) -> None:
        """Join an incarnation of the other end that was proven to be alive."""
        self.peer_incarnation = peer_incarnation
        self.state = ESTABLISHED
        self._reset(window_msgs, window_bytes, now)

    def attach(self, link: Link | None, routing_id: bytes = b"") -> None:
        """Use a link from now on; what may have been lost on the way there is sent again.

        Only once as long as nothing arrives there: a peer that never reads would have it queued again by each new link.
        """
        is_same = link is not None and link is self.link and routing_id == self.routing_id
        self.link, self.routing_id = link, routing_id or self.routing_id
        if not is_same and self._attached_after == self.peer_received_through:
            self.probe_at = 0.0  # It says by RESEND that it lacks something.
        elif not is_same:
            self._resending = deque(self._unreceived)
            if link is not None and self._unreceived:
                self._attached_after = self.peer_received_through
        self.controls.repeat_credits()
        if link is not None and self.received_through:
            self.must_answer = True  # What was told last may have been lost with the old link.

    def _lose_link(self) -> None:
        """The link took nothing: it is down. It may be up again before anybody looks, so a connection says HELLO."""
        self.attach(None)
        if self.connection_link is not None:
            self.hello_at = 0.0

    def end(self) -> list[Outgoing]:
        """Forget the other end's incarnation; return what was sent to it and is not known to be processed."""
        lost = [outgoing for batch in self._unprocessed for outgoing in batch.messages]
        if lost:
            lost = lost[self.peer_processed_through + 1 - self._unprocessed[0].first :]
        self.state = State.CONNECTING
        if self.connection_link is not None:
            self.peer_incarnation = 0  # Answers to it must find that it is gone.
        self._reset(self._limits.window_msgs, self._limits.window_bytes, self.heard_at)
        return lost

    def take_back(self, received_through: int) -> None:
        """Queue again what the other end, which is gone for good, has never received: it certainly did not run."""
        known_through = max(received_through, self.peer_received_through)
        back: list[Outgoing] = []
        kept: deque[Batch] = deque()
        for batch in self._unprocessed:
            kept_count = max(0, known_through + 1 - batch.first)
            for outgoing, data in zip(batch.messages[kept_count:], batch.datas[kept_count:], strict=True):
                outgoing.data = data
                back.append(outgoing)
            self.is_plain = self.is_plain and (batch.is_plain or not back)
            if kept_count:
                del batch.messages[kept_count:]
                kept.append(batch)
        self._unprocessed = kept
        self.queue.extendleft(reversed(back))
        self.queue_bytes += sum(outgoing.size_bytes for outgoing in back)

    # Sending.

    @property
    def unreceived_count(self) -> int:
        """Messages that were sent and of which it is not known that they arrived."""
        return self.next_number - 1 - self.peer_received_through

    @property
    def owner(self) -> object:
        """Itself."""
        return self

    @property
    def is_quiet(self) -> bool:
        """Whether nothing that was sent is still on its way."""
        return self.peer_received_through == self.next_number - 1

    @property
    def unprocessed_count(self) -> int:
        """Messages that were sent and of which it is not known that their callbacks have returned."""
        return self.next_number - 1 - self.peer_processed_through

    def why_unsent(self) -> str:
        """Return what is known of why its queue did not leave, for people."""
        count = self.unprocessed_count
        if self.link is not None and self.state is ESTABLISHED and count:
            limit = f"window_msgs is {self.window_msgs}" if count >= self.window_msgs else "these fill window_bytes"
            return f"it waited behind {count} that the peer, which is connected, has not processed; {limit}"
        return "the peer was not connected" if self.connection_link is None else self.connection_link.why_unsent()

    def flush(self, now: float) -> None:
        """Send what may be sent now; an acknowledgement alone only if it is due."""
        link = self.link
        if link is None or self.state is not ESTABLISHED:
            return
        if self.controls.pending:
            for controls in self.controls.take():
                self._send_empty(0, controls)
        has_sent = False
        while (self._resending or self.queue) and (batch := self._next_batch(now)) is not None:
            if not link.send_frames(self.routing_id, self._encode(batch, now)):
                self._lose_link()
                return
            has_sent = True
        if has_sent:
            return
        if self.must_answer or self._must_ask_resend or self._owes_much():
            self._send_empty(0)
        elif self.ack_at == FOREVER and self._owes_any():
            self.ack_at = now + ACK_DELAY_S

    def _next_batch(self, now: float) -> Batch | None:
        """Return what is to be sent again, else what is new and fits the window, else None."""
        trip = self._trip
        while self._resending:
            batch = self._resending.popleft()
            if batch.last > self.peer_received_through:
                batch.is_plain = False  # Of its messages some may have been given up meanwhile.
                trip.timed_number = 0
                return batch
        new = self._take_batch() if self.queue else None
        if new is None:
            return None
        if not self._unreceived:
            self.probe_at = now + trip.timeout_s
            self._unanswered_count = 0
        if not trip.timed_number:
            trip.timed_number, trip.timed_at = new.last, now
        self._unreceived.append(new)
        self._unprocessed.append(new)
        self._unprocessed_bytes += new.size_bytes
        return new

    def _take_batch(self) -> Batch | None:
        """Move messages off the queue, as many as the window and a batch have room for; None if the window is full."""
        queue = self.queue
        # Without `min`, whose call takes 4 % of the core's time for a round trip.
        count = len(queue)
        if count > BATCH_MSGS_MAX:
            count = BATCH_MSGS_MAX
        room_msgs = self.window_msgs - (self.next_number - 1 - self.peer_processed_through)
        if count > room_msgs:
            count = room_msgs
            if count <= 0:
                return None
        room_bytes = self._window_bytes - self._unprocessed_bytes
        if count == len(queue):
            messages, size_bytes = list(queue), self.queue_bytes
            queue.clear()
        else:
            messages = [queue.popleft() for _ in range(count)]
            size_bytes = sum([outgoing.size_bytes for outgoing in messages])
        while messages and (size_bytes > BATCH_BYTES_MAX or size_bytes > room_bytes):
            # A message larger than a batch goes alone, and one larger than the whole window when that is empty.
            if len(messages) == 1 and (size_bytes <= room_bytes or not self._unprocessed):
                break
            surplus = messages.pop()
            queue.appendleft(surplus)
            size_bytes -= surplus.size_bytes
        if not messages:
            return None
        self.queue_bytes -= size_bytes
        batch = Batch(self.next_number, messages, size_bytes, self.is_plain)
        self.is_plain = self.is_plain or not queue
        self.next_number += len(messages)
        return batch

    def _encode(self, batch: Batch, now: float) -> list[bytes]:
        flags = Flag.RESEND if self._must_ask_resend else 0
        numbers = (batch.first, self.received_through, self.processed_through, len(batch.messages))
        self._note_told()
        # Those that follow the first are younger, or have no deadline that the receiver is told.
        if batch.is_plain and batch.messages[0].deadline_at > now + TIMEOUT_S - TIMEOUT_SLACK_S:
            return [encode_data(self.incarnation, self.peer_incarnation, flags, numbers, batch.datas)]
        messages = batch.messages
        large = [outgoing.large for outgoing in messages if outgoing.large is not None]
        is_large = [outgoing.large is not None for outgoing in messages]
        options = [
            Option(index, outgoing.option.kind, outgoing.option.name, outgoing.option.text)
            for index, outgoing in enumerate(messages)
            if outgoing.option is not None
        ]
        left_ms = [encode_left_ms(outgoing.deadline_at - now) for outgoing in messages]
        incarnations = (self.incarnation, self.peer_incarnation)
        return [encode_data(*incarnations, flags, numbers, batch.datas, is_large, options, left_ms), *large]

    def _send_empty(self, flags: int, controls: Sequence[Control] = ()) -> None:
        """Send a frame without messages: acknowledgements, and the number of the next message, which shows a gap."""
        if self.link is None:
            return
        if self._must_ask_resend:
            flags |= Flag.RESEND
        numbers = (self.next_number, self.received_through, self.processed_through, 0)
        self._note_told()
        if controls:
            frame = encode_controls(self.incarnation, self.peer_incarnation, flags, numbers, controls)
        else:
            frame = encode_data(self.incarnation, self.peer_incarnation, flags, numbers, ())
        if not self.link.send_frames(self.routing_id, [frame]):
            self._lose_link()

    def _note_told(self) -> None:
        self._told_received_through = self.received_through
        self._told_processed_through = self.processed_through
        self.must_answer = self._must_ask_resend = False
        self.ack_at = FOREVER

    def _owes_any(self) -> bool:
        told = (self._told_received_through, self._told_processed_through)
        return (self.received_through, self.processed_through) != told

    def _owes_much(self) -> bool:
        """Return whether the other end may soon wait for acknowledgements."""
        owed_count = self.processed_through - self._told_processed_through
        return owed_count > 0 and owed_count >= self.window_msgs // 8

    def is_reachable(self) -> bool:
        """Return whether a link leads to the other end, as far as can be told by using it."""
        self._send_empty(Flag.ASK)
        return self.link is not None

    def say_goodbye(self) -> None:
        """Tell the other end, if it can be reached, what was processed and that this end is gone for good."""
        if self.state is ESTABLISHED:
            self._send_empty(0)
            if self.link is not None:
                goodbye = encode_goodbye(self.incarnation, self.peer_incarnation, self.received_through)
                self.link.send_frames(self.routing_id, [goodbye])
        self.state = State.CLOSED

    @property
    def is_urgent(self) -> bool:
        """Whether the other end waits for what the next flush sends."""
        return self.must_answer or self._must_ask_resend or bool(self._resending)

    # Receiving.

    def receive(self, flags: int, numbers: Numbers, size_bytes: int, now: float) -> int | None:
        """Take the numbers of a DATA frame of the established peer, and the size of its messages.

        Returns:
            How many of its messages, from the first, are duplicates; None if none of them may be processed.

        Raises:
            MalformedMessage: It acknowledges what was never sent, or exceeds the window. Nothing was taken.
        """
        first, received_through, processed_through, msg_count = numbers
        if received_through >= self.next_number or processed_through > received_through:
            raise MalformedMessage("a frame acknowledges what was never sent")
        expected = self.received_through + 1
        last = first + msg_count - 1
        if first <= expected <= last:
            is_too_large = self._held_bytes + size_bytes > self._limits.window_bytes
            if (self._held and is_too_large) or last - self.processed_through > self._limits.window_msgs:
                raise MalformedMessage("a batch exceeds the window")
        self.heard_at = now
        self._unanswered_count = 0
        if received_through > self.peer_received_through or processed_through > self.peer_processed_through:
            self._take_acks(received_through, processed_through, now)
        if flags & Flag.RESEND and received_through == self.peer_received_through:
            self._resend(now)
        if flags & Flag.ASK:
            self.must_answer = True
            self.controls.repeat_credits()
        if first > expected:
            # Once for each number, and again when the answer seems lost.
            if self._resend_asked_after != self.received_through or now >= self._resend_asked_at + self._trip.timeout_s:
                self._resend_asked_after, self._resend_asked_at = self.received_through, now
                self._must_ask_resend = True
            return None
        if not msg_count:
            return None
        if last < expected:
            self.must_answer = True
            return None
        skipped = expected - first
        self.received_through = last
        self._held.append((last, size_bytes))
        self._held_bytes += size_bytes
        return skipped

    def _resend(self, now: float) -> None:
        """Send again what is not known to have arrived; once, and ever less often, however often the peer asks."""
        if self._resends.is_due(self.peer_received_through, now, self._trip.timeout_s):
            self._resending = deque(self._unreceived)

    def note_processed(self, number: int) -> None:
        """Note that the callbacks of all messages up to a number have returned; some may still run as coroutines."""
        if self.running:
            number = self.running.limit(number)
        if number > self.processed_through:
            self.processed_through = number
        while self._held and self._held[0][0] <= self.processed_through:
            self._held_bytes -= self._held.popleft()[1]

    def note_unrun(self, number: int) -> None:
        """Note a message that no worker will ever be done with, since it was dropped or is no message of the user's."""
        if self.has_workers:
            self.note_one_processed(number)

    def note_one_processed(self, number: int) -> None:
        """Note that the callbacks of one message have returned, in any order (a listener with workers)."""
        if number > self.processed_through:
            self._done_early.add(number)
        while self.processed_through + 1 in self._done_early:
            self.processed_through += 1
            self._done_early.discard(self.processed_through)
        self.note_processed(self.processed_through)

    def _take_acks(self, received_through: int, processed_through: int, now: float) -> None:
        if received_through > self.peer_received_through:
            self.peer_received_through = received_through
            unreceived = self._unreceived
            while unreceived and unreceived[0].last <= received_through:
                unreceived.popleft().forget_bytes()
            trip = self._trip
            if 0 < trip.timed_number <= received_through:
                trip.note(now - trip.timed_at)
            self.probe_at = now + (trip.timeout_s if unreceived else IDLE_PROBE_S)
        if processed_through > self.peer_processed_through:
            self.peer_processed_through = processed_through
            unprocessed = self._unprocessed
            while unprocessed and unprocessed[0].last <= processed_through:
                self._unprocessed_bytes -= unprocessed.popleft().size_bytes

    # Time.

    @property
    def next_deadline_at(self) -> float:
        """When `handle_deadline` has something to do."""
        deadline_at = self.hello_at
        if self.state is ESTABLISHED and self.link is not None:
            if self.probe_at < deadline_at:
                deadline_at = self.probe_at
            if self.ack_at < deadline_at:
                deadline_at = self.ack_at
        return deadline_at

    @property
    def is_overlooked(self) -> bool:
        """Whether it would get attention too late, or never."""
        return self.due_at == FOREVER or self.next_deadline_at < self.due_at

    def handle_deadline(self, now: float) -> None:
        """Send an acknowledgement that waited long enough, or ask for those that stay away."""
        if self.state is not ESTABLISHED or self.link is None:
            return
        if now >= self.ack_at:
            self._send_empty(0)
        if now >= self.probe_at:
            self._unanswered_count += 1
            wait_s = IDLE_PROBE_S
            if self.unprocessed_count:
                wait_s = min(self._trip.timeout_s * 2 ** min(self._unanswered_count, 10), RTO_MAX_S)
            self.probe_at = now + wait_s * (0.75 + 0.5 * self._rng.random())
            self._send_empty(Flag.ASK)

    def __str__(self) -> str:
        return f"{self.handle} ({decode_identity(self.peer)!r})" if self.peer else str(self.handle)
