"""The core: which callback a message runs, and what became of each message that was sent.

No sockets, no threads, no clock, no random numbers: a driver holds a lock, calls in, moves bytes between the links
and the network, and then runs what is in `calls` with no lock held. The same class runs under a simulated network.

What must never happen here: a callback that runs inside the core; an outcome that is told twice, or not at all; bytes
of a peer that raise out of `receive`; work that grows with what a peer claims instead of with what it sent.

How it works. A **message-specific callback (MSC)** is an entry in one table, from message id to whom to tell.
Whatever settles a message (its response, an error, its deadline) takes the entry out first, so the second to come
finds nothing and is counted. There is no deadline queue: the table is swept when the earliest deadline is reached,
because nearly every message is answered long before its own, and a sweep of a thousand entries each 30 s costs less
than a queue operation a message. Sweeps of a large table are spaced so that they take a small part of the time.

Source: docs/protocol.md, "Order of processing".
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import msgspec

from .errors import (
    Cancelled,
    DeliveryError,
    HandlerError,
    IdentityInUse,
    LimitReached,
    MalformedMessage,
    MessageTooLarge,
    NoHandler,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from .handshake import Decoded, Handshake
from .limits import LARGE_BYTES_MIN, Limits
from .link import Link, Outgoing, Outlet
from .message import Callback, ErrorCallback, Message, Statistics, Waiter
from .session import FOREVER, Random, Session
from .wire import (
    ECHO,
    ID_MAX,
    MSC_ID_MIN,
    NOOP,
    REGISTERED_ID_MAX,
    REGISTERED_ID_MIN,
    Buffer,
    Option,
    OptionKind,
    Reason,
    decode_identity,
    decode_message,
    encode_message,
)

# A sweep looks at an entry in about 0.05 microseconds; spaced so, sweeps take at most a twentieth of the time.
SWEEP_SPACING_S_PER_ENTRY = 1e-6
SWEEP_SPACING_S = 0.001
# In `calls` this is no callback: the driver answers it with `note_processed(*argument)`, under its lock.
BATCH_PROCESSED = None
# Of an exception's text in an error response.
ERROR_TEXT_MAX = 2_000


class _Outstanding(msgspec.Struct, eq=False):
    """Whom to tell what became of a message."""

    callback: Callback | Waiter | None
    on_error: ErrorCallback | None
    deadline_at: float
    owner: object
    peer: bytes
    redeliver: Outgoing | None = None


class Exchange:
    """The callback table and the deadlines of one messenger.

    Args:
        messenger: Who is named as the receiver in messages.
        on_unheard: Called, by way of `calls`, with an error that no `on_error` was given for.
        next_id: Where message ids start.

    A driver calls `send`, `receive` and `handle_…` under its lock, then takes (function, argument) pairs off `calls`,
    oldest first, and runs them with the lock released.
    """

    def __init__(
        self,
        messenger: Any,
        limits: Limits,
        on_unheard: ErrorCallback,
        identity: bytes,
        rng: Random,
        *,
        next_id: int = MSC_ID_MIN,
    ) -> None:
        self.calls: deque[tuple[Callable[[Any], object] | None, Any]] = deque()
        self.links: set[Link] = set()
        self.dropped: Counter[str] = Counter()
        self.handshake = Handshake(self, identity, limits, rng)
        self._messenger = messenger
        # Read for each message, so not through the structure.
        self._message_bytes_max = limits.message_bytes_max
        self._queue_msgs_max = limits.queue_msgs_max
        self._queue_bytes_max = limits.queue_bytes_max
        self._outstanding_max = limits.outstanding_max
        self._on_unheard = on_unheard
        self._next_id = next_id
        self._wrapped = False
        self._outstanding: dict[int, _Outstanding] = {}
        self._registered: dict[int, Callback] = {}
        self._dirty: list[Outlet] = []
        self._sweep_at = FOREVER
        self._sessions_at = FOREVER
        self._sent_msgs = 0
        self._received_msgs = 0
        self._response_msgs = 0
        self._not_delivered_msgs = 0
        self._outcome_unknown_msgs = 0
        self._callback_error_count = 0

    # Sending.

    def send(
        self,
        outlet: Outlet,
        peer: bytes,
        contents: Buffer,
        callback: Callback | Waiter | None,
        on_error: ErrorCallback | None,
        dest_callback_id: int,
        deadline_at: float,
        roams: bool = False,
        redeliver: bool = False,
    ) -> int:
        """Queue one message at an outlet and return its id; the driver flushes.

        Raises:
            MessageTooLarge, QueueFull, LimitReached: Nothing was queued and no callback is kept.
        """
        size_bytes = len(contents)
        if size_bytes > self._message_bytes_max:
            raise MessageTooLarge(f"contents are {size_bytes} bytes, message_bytes_max is {self._message_bytes_max}")
        queue = outlet.queue
        if len(queue) >= self._queue_msgs_max or outlet.queue_bytes >= self._queue_bytes_max:
            raise QueueFull(
                f"{len(queue)} messages, {outlet.queue_bytes} bytes wait for {outlet}; queue_msgs_max is "
                f"{self._queue_msgs_max}, queue_bytes_max is {self._queue_bytes_max}"
            )
        message_id = self._next_id
        waits = callback is not None or on_error is not None
        if waits:
            if len(self._outstanding) >= self._outstanding_max:
                raise LimitReached(f"{len(self._outstanding)} messages wait for a response, that is outstanding_max")
            while self._wrapped and message_id in self._outstanding:
                message_id = self._successor(message_id)
        self._next_id = message_id + 1 if message_id < ID_MAX else self._successor(message_id)
        large = None
        if size_bytes >= LARGE_BYTES_MIN:
            # What may still change under us is copied; bytes are not.
            large, contents = bytes(contents), b""
        data = encode_message(message_id if waits else 0, dest_callback_id or 0, contents)
        size_bytes = len(data) if large is None else len(data) + size_bytes
        outgoing = Outgoing(message_id, data, size_bytes, deadline_at, large, peer, roams, redeliver)
        if waits:
            self._outstanding[message_id] = _Outstanding(
                callback, on_error, deadline_at, outlet.owner, peer, outgoing if redeliver else None
            )
        if deadline_at < self._sweep_at:
            self._sweep_at = deadline_at
        queue.append(outgoing)
        outlet.queue_bytes += size_bytes
        if not outlet.is_dirty:
            outlet.is_dirty = True
            self._dirty.append(outlet)
        self._sent_msgs += 1
        return message_id

    def _enqueue(self, outlet: Outlet, outgoing: Outgoing) -> None:
        outlet.queue.append(outgoing)
        outlet.queue_bytes += outgoing.size_bytes
        self.mark_dirty(outlet)

    def mark_dirty(self, outlet: Outlet) -> None:
        """Have an outlet flushed at the end of the turn."""
        if not outlet.is_dirty:
            outlet.is_dirty = True
            self._dirty.append(outlet)

    def flush(self, now: float) -> None:
        """Send what outlets have to send."""
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for outlet in dirty:
                outlet.is_dirty = False
                outlet.flush(now)
                if outlet.is_closed and outlet.queue:
                    self.dropped["peer_gone"] += len(outlet.queue)
                    self.abandon(outlet, "the peer is gone")
                self._sessions_at = min(self._sessions_at, outlet.next_deadline_at)

    def cancel(self, message_id: int) -> bool:
        """Give a message up: its outcome is `Cancelled`, unless it has one. Return whether it had none."""
        if message_id not in self._outstanding:
            return False
        self._fail(message_id, Cancelled, "it was cancelled")
        return True

    def is_full(self, outlet: Outlet) -> bool:
        """Return whether an outlet's queue takes no further message."""
        return len(outlet.queue) >= self._queue_msgs_max or outlet.queue_bytes >= self._queue_bytes_max

    def register_callback(self, callback_id: int, callback: Callback) -> None:
        """Let peers run `callback` under a fixed id.

        Raises:
            ValueError: The id is not 64 to 1023, or is taken.
        """
        if not REGISTERED_ID_MIN <= callback_id <= REGISTERED_ID_MAX:
            raise ValueError(f"callback id {callback_id} is not {REGISTERED_ID_MIN} to {REGISTERED_ID_MAX}")
        if callback_id in self._registered:
            raise ValueError(f"callback id {callback_id} is already registered")
        self._registered[callback_id] = callback

    # Receiving.

    def receive(self, link: Link, peer: bytes, data: bytes) -> None:
        """Take one message of the basic dialect off the network; what it runs is appended to `calls`."""
        self._received_msgs += 1
        try:
            source_callback_id, dest_callback_id, contents = decode_message(data)
        except MalformedMessage:
            self.drop("malformed_message")
            return
        message = Message(self._messenger, contents, source_callback_id, dest_callback_id, link, peer)
        if len(contents) > self._message_bytes_max:
            self.drop("message_too_large")
        else:
            self._process(message)

    def handle_batch(self, session: Session, first: int, batch: Decoded, skipped: int) -> None:
        """Process the messages of a session's batch but for the first `skipped`, which were processed before."""
        messages, large, options = batch
        options_by_index = {option.index: option for option in options}
        is_plain = not (large or options) and sum(map(len, messages)) <= self._message_bytes_max
        messenger, peer, incarnation = self._messenger, session.peer, session.peer_incarnation
        number = first + skipped - 1
        for data in messages[skipped:] if skipped else messages:
            number += 1
            try:
                source_callback_id, dest_callback_id, contents = decode_message(data)
            except MalformedMessage:
                self.drop("malformed_message")
                session.note_unrun(number)
                continue
            message = Message(
                messenger, contents, source_callback_id, dest_callback_id, session, peer, number, incarnation
            )
            if is_plain:
                self._process(message)
                continue
            index = number - first
            message.contents = large.get(index, contents)
            if len(message.contents) > self._message_bytes_max:
                self.drop("message_too_large")
                session.note_unrun(number)
            elif index in options_by_index:
                self._process_option(session, message, options_by_index[index])
            else:
                self._process(message)
        self._received_msgs += len(messages) - skipped
        if not session.has_workers:
            # Its turn comes when the callbacks of the whole batch have returned.
            self.calls.append((BATCH_PROCESSED, (session, session.peer_incarnation, number)))

    def note_processed(self, session: Session, peer_incarnation: int, number: int) -> None:
        """The callbacks of all messages of a session up to a number have returned."""
        if session.peer_incarnation == peer_incarnation:
            session.note_processed(number)
            self.mark_dirty(session)

    def note_one_processed(self, message: Message) -> None:
        """A worker is done with a message."""
        if isinstance(message.link, Session):
            message.link.note_one_processed(message.number)
            self.mark_dirty(message.link)

    def _process_option(self, session: Session, message: Message, option: Option) -> None:
        """Process a message that is an error response, or that may have run before."""
        if option.kind not in (OptionKind.HANDLER_ERROR, OptionKind.NO_HANDLER):
            # A kind that is not known here says nothing.
            message.redelivered = option.kind == OptionKind.REDELIVERED
            self._process(message)
            return
        message_id = message.dest_callback_id
        session.note_unrun(message.number)
        entry = self._find_asked(message)
        if entry is None:
            return
        if option.kind == OptionKind.NO_HANDLER:
            self._fail(
                message_id, NoHandler, "there is nothing to run at the receiver: no callback, no such callback id"
            )
        else:
            self._fail(message_id, HandlerError, f"the callback raised {option.name}: {option.text}", option.name)

    def _process(self, message: Message) -> None:
        """Run what the message names, and then what its endpoint runs on every message."""
        is_handled = message.dest_callback_id != NOOP and self.process_message(message)
        callback = message.link.callback
        if callback is not None:
            self.calls.append((callback, message))
        elif not is_handled and message.source_callback_id:
            self._answer_error(message, OptionKind.NO_HANDLER)

    def process_message(self, message: Message) -> bool:
        """Run what the message names: a built-in, a registered callback, or an MSC, which is forgotten first.

        Returns:
            Whether there is such a thing.
        """
        dest_callback_id = message.dest_callback_id
        if dest_callback_id >= MSC_ID_MIN:
            entry = self._find_asked(message)
            if entry is None:
                return False
            del self._outstanding[dest_callback_id]
            self._response_msgs += 1
            callback = entry.callback
            if isinstance(callback, Waiter):
                callback.settle(message, None)
            elif callback is not None:
                self.calls.append((callback, message))
        elif dest_callback_id == ECHO:
            self._answer(message, message.contents, None)
        elif dest_callback_id in self._registered:
            self.calls.append((self._registered[dest_callback_id], message))
        else:
            self.drop("unknown_callback")
            return False
        return True

    def report_raised(self, argument: object, error: BaseException) -> None:
        """A callback raised: count it, and tell the sender of the message if it waits and can be told."""
        self._callback_error_count += 1
        if isinstance(argument, Message) and argument.source_callback_id:
            self._answer_error(argument, OptionKind.HANDLER_ERROR, _printable(type(error).__name__), _text_of(error))

    def _answer_error(self, message: Message, kind: OptionKind, name: str = "", text: str = "") -> None:
        # The basic dialect has no form for it; there the sender's deadline tells.
        if isinstance(message.link, Session):
            self._answer(message, b"", Option(0, kind, name, text))

    def _find_asked(self, message: Message) -> _Outstanding | None:
        """Return the entry of the MSC that a message names, if the message may end it."""
        message_id = message.dest_callback_id
        entry = self._outstanding.get(message_id)
        if entry is None:
            was_used = message_id >= MSC_ID_MIN and (self._wrapped or message_id < self._next_id)
            self.drop("late_response" if was_used else "unknown_callback")
        # Ids are easy to guess, so only the peer that was asked may answer.
        elif entry.owner is not message.link.owner or (entry.peer and entry.peer != message.peer):
            self.drop("foreign_response")
            entry = None
        return entry

    def _answer(self, message: Message, contents: bytes, option: Option | None) -> None:
        """Answer in the core's own name: an ECHO, or an error response."""
        if message.incarnation != message.link.peer_incarnation:
            self.drop("peer_gone")
            return
        if self.is_full(message.link):
            self.drop("queue_full")
            return
        large = None
        if len(contents) >= LARGE_BYTES_MIN:
            large, contents = contents, b""
        data = encode_message(NOOP, message.source_callback_id, contents)
        size_bytes = len(data) + (len(large) if large is not None else 0)
        self._enqueue(message.link, Outgoing(NOOP, data, size_bytes, FOREVER, large, message.peer, option=option))

    def drop(self, kind: str) -> None:
        """Count something that a peer sent, or that was for a peer, and that goes no further."""
        self.dropped[kind] += 1

    # Outcomes other than a response.

    def handle_unsendable(self, link: Link, outgoing: Outgoing, kind: str) -> None:
        """Take back what the network refuses: the peer is gone (`peer_gone`) or does not read (`peer_full`)."""
        if outgoing.roams:
            siblings = list(link.siblings())
            position = siblings.index(link) + 1
            if position < len(siblings):
                self._enqueue(siblings[position], outgoing)
                return
        self.drop(kind)
        why = "is not connected" if kind == "peer_gone" else "does not read what it is sent"
        self._fail(outgoing.message_id, NotDelivered, f"the peer {decode_identity(outgoing.peer)!r} {why}")

    def handle_deadline(self, now: float) -> None:
        """Do what is due; afterwards `next_deadline_at` is later than `now`."""
        if self._sweep_at <= now:
            self._sweep(now)
        if self._sessions_at <= now:
            self.handshake.handle_deadline(now)
            self.flush(now)
            self._sessions_at = max(self.handshake.next_deadline_at(), now + SWEEP_SPACING_S)

    def _sweep(self, now: float) -> None:
        """End every message whose deadline has passed."""
        held = self._take_expired(now)
        expired = [message_id for message_id, entry in self._outstanding.items() if entry.deadline_at <= now]
        for message_id in expired:
            if message_id in held:
                self._fail(message_id, NotDelivered, "nobody was there to take the message before its deadline")
            else:
                self._fail(message_id, OutcomeUnknown, "no response came before the deadline")
        earliest = min((entry.deadline_at for entry in self._outstanding.values()), default=FOREVER)
        for outlet in self._outlets():
            earliest = min(earliest, min((outgoing.deadline_at for outgoing in outlet.queue), default=FOREVER))
        spacing_s = SWEEP_SPACING_S + len(self._outstanding) * SWEEP_SPACING_S_PER_ENTRY
        self._sweep_at = FOREVER if earliest == FOREVER else max(earliest, now + spacing_s)

    def _outlets(self) -> Iterable[Outlet]:
        yield from self.links
        yield from self.handshake.sessions

    def _take_expired(self, now: float) -> set[int]:
        """Remove what expired from the queues and return its ids."""
        held: set[int] = set()
        for outlet in self._outlets():
            if not outlet.queue or min(outgoing.deadline_at for outgoing in outlet.queue) > now:
                continue
            kept: deque[Outgoing] = deque()
            expired: list[Outgoing] = []
            for outgoing in outlet.queue:
                (kept if outgoing.deadline_at > now else expired).append(outgoing)
            held |= self._discard(outlet, expired, "nobody was there to take them")
            outlet.queue = kept
        return held

    def _discard(self, outlet: Outlet, queue: Iterable[Outgoing], why: str) -> set[int]:
        """Count what leaves a queue unsent; return its ids, and report those that nobody waits for together."""
        held: set[int] = set()
        silent_count = 0
        for outgoing in queue:
            outlet.queue_bytes -= outgoing.size_bytes
            held.add(outgoing.message_id)
            silent_count += outgoing.is_silent
        if silent_count:
            self.dropped["not_delivered"] += silent_count
            text = f"{silent_count} messages without a callback to {outlet}: {why}"
            self.calls.append((self._on_unheard, NotDelivered(text, max(held))))
        return held

    def abandon(self, outlet: Outlet, why: str, kind: type[DeliveryError] = NotDelivered) -> None:
        """End every message of an outlet, because it is closed for good; what was queued ends as `kind`."""
        held = self._discard(outlet, outlet.queue, why)
        outlet.queue.clear()
        for message_id in [key for key, entry in self._outstanding.items() if entry.owner is outlet.owner]:
            self._fail(message_id, kind if message_id in held else OutcomeUnknown, why)

    def close_link(self, link: Link, why: str, now: float) -> None:
        """Send what a link and its sessions have, say goodbye to their peers, and end every message."""
        self.links.discard(link)
        link.flush(now)
        for session in [s for s in self.handshake.sessions if s.handle is link.handle]:
            session.flush(now)
            session.say_goodbye()
            self.abandon(session, why)
            self.handshake.discard(session)
        self.abandon(link, why)

    # What the handshake tells.

    def handle_ended(self, session: Session, why: str) -> None:
        """The other end's incarnation is gone: what was sent to it and not answered has an unknown outcome."""
        self._discard_answers(session, why)
        queued = {outgoing.message_id for outgoing in session.queue}
        again: list[Outgoing] = []
        silent_count = 0
        for outgoing in session.end():
            if outgoing.is_silent:
                if outgoing.redeliver:
                    again.append(outgoing)
                elif outgoing.message_id:
                    silent_count += 1
        for message_id in [key for key, entry in self._outstanding.items() if entry.owner is session]:
            redeliver = self._outstanding[message_id].redeliver
            if message_id in queued:
                continue
            if redeliver is not None and session.connection_link is not None:
                again.append(redeliver)
            else:
                self._fail(message_id, OutcomeUnknown, why)
        for outgoing in sorted(again, key=lambda outgoing: outgoing.message_id, reverse=True):
            outgoing.option = Option(0, OptionKind.REDELIVERED)
            session.queue.appendleft(outgoing)
            session.queue_bytes += outgoing.size_bytes
        if session.connection_link is None:
            # A peer of a listener; if it comes back, it has another session.
            self.abandon(session, why)
        if silent_count:
            self.dropped["outcome_unknown"] += silent_count
            text = f"{silent_count} messages without a callback to {session}: {why}"
            self.calls.append((self._on_unheard, OutcomeUnknown(text, 0)))

    def _discard_answers(self, session: Session, why: str) -> None:
        """End queued answers: to another incarnation they would be answers to other questions."""
        kept: deque[Outgoing] = deque()
        answers: list[Outgoing] = []
        for outgoing in session.queue:
            _, dest_callback_id, _ = decode_message(outgoing.data)
            (answers if dest_callback_id >= MSC_ID_MIN else kept).append(outgoing)
        self._discard(session, answers, why)
        session.queue = kept
        for outgoing in answers:
            self._fail(outgoing.message_id, NotDelivered, why)

    def handle_refused(self, session: Session, reason: Reason, text: str, did_not_run: bool) -> None:
        """The other end does not want this connection.

        What is queued certainly does not run, and what was sent neither if `did_not_run`.
        """
        self.drop("refused")
        sent = session.end()
        if did_not_run:
            session.queue.extendleft(reversed(sent))
            session.queue_bytes += sum(outgoing.size_bytes for outgoing in sent)
        self.abandon(session, f"refused: {text}", IdentityInUse if reason == Reason.IDENTITY_IN_USE else NotDelivered)

    def forget(self, waiter: Waiter) -> None:
        """Drop the entry of a waiter that nobody waits on any more (an interrupted `request`)."""
        for message_id in [key for key, entry in self._outstanding.items() if entry.callback is waiter]:
            del self._outstanding[message_id]

    def _fail(self, message_id: int, kind: type[DeliveryError], why: str, *details: str) -> None:
        entry = self._outstanding.pop(message_id, None)
        if entry is None:
            return
        if issubclass(kind, NotDelivered):
            self._not_delivered_msgs += 1
        elif kind is OutcomeUnknown:
            self._outcome_unknown_msgs += 1
        error = kind(f"message {message_id} to {entry.owner}: {why}", message_id, *details)
        if isinstance(entry.callback, Waiter):
            entry.callback.settle(None, error)
        else:
            self.calls.append((self._on_unheard if entry.on_error is None else entry.on_error, error))

    # What a driver asks.

    @property
    def is_dirty(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._dirty)

    @property
    def next_deadline_at(self) -> float:
        """When `handle_deadline` has something to do."""
        return min(self._sweep_at, self._sessions_at)

    @property
    def outstanding_count(self) -> int:
        """Messages that wait for their outcome."""
        return len(self._outstanding)

    @property
    def queued_count(self) -> int:
        """Messages that wait to be sent."""
        return sum(len(outlet.queue) for outlet in self._outlets())

    @property
    def is_settled(self) -> bool:
        """Whether nothing is queued, outstanding, or sent and not known to be processed."""
        is_under_way = any(session.unprocessed_count for session in self.handshake.sessions)
        return not (is_under_way or self._outstanding or self.queued_count or self.calls)

    def statistics(self, identity: str, connection_count: int, listener_count: int) -> Statistics:
        """Return the counts as they stand."""
        return Statistics(
            identity=identity,
            sent_msgs=self._sent_msgs,
            received_msgs=self._received_msgs,
            response_msgs=self._response_msgs,
            not_delivered_msgs=self._not_delivered_msgs,
            outcome_unknown_msgs=self._outcome_unknown_msgs,
            callback_error_count=self._callback_error_count,
            outstanding_msgs=self.outstanding_count,
            queued_msgs=self.queued_count,
            connection_count=connection_count,
            listener_count=listener_count,
            dropped=MappingProxyType(dict(self.dropped)),
        )

    def _successor(self, message_id: int) -> int:
        if message_id < ID_MAX:
            return message_id + 1
        self._wrapped = True
        return MSC_ID_MIN


def _text_of(error: BaseException) -> str:
    """Return an exception's text as far as it has one: its `__str__` is a user's, and may raise."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be shown)"
    return _printable(text[:ERROR_TEXT_MAX])


def _printable(text: str) -> str:
    """Return text that can be encoded: a file's name may have surrogates in it."""
    return text.encode(errors="backslashreplace").decode()
