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
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from .errors import (
    DeliveryError,
    LimitReached,
    MalformedMessage,
    MessageTooLarge,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from .limits import Limits
from .wire import (
    ECHO,
    ID_MAX,
    MSC_ID_MIN,
    NOOP,
    REGISTERED_ID_MAX,
    REGISTERED_ID_MIN,
    Buffer,
    decode_identity,
    decode_message,
    encode_message,
)

FOREVER = float("inf")
# A sweep looks at an entry in about 0.05 microseconds; spaced so, sweeps take at most a twentieth of the time.
SWEEP_SPACING_S_PER_ENTRY = 1e-6


class Message(msgspec.Struct, eq=False):
    """A message that arrived.

    Attributes:
        messenger: The messenger that received it.
        contents: The application's bytes.
        source_callback_id: What an answer names as destination; 0 if the sender waits for none.
        dest_callback_id: The callback that the sender asked for.
        redelivered: Whether an earlier process of this identity may have run it already.
    """

    messenger: Any
    contents: bytes
    source_callback_id: int
    dest_callback_id: int
    link: "Link"
    peer: bytes
    redelivered: bool = False

    @property
    def buffer(self) -> memoryview:
        """The contents, without a copy."""
        return memoryview(self.contents)

    @property
    def sender(self) -> str:
        """The sender's identity; of a plain peer its routing id, as `0x` and hex if that is not UTF-8."""
        return decode_identity(self.peer)

    def reply(self, contents: Any, callback: "Callback | None" = None, **options: Any) -> Any:
        """Answer this message, on the link that it came by; takes and returns what `send_message` does."""
        return self.messenger.send_message(self, contents, callback, **options)

    def __repr__(self) -> str:
        ids = f"{self.source_callback_id}-{self.dest_callback_id}"
        return f"<Message {ids} from {self.sender!r}, {len(self.contents)} bytes>"


Callback = Callable[[Message], object]
ErrorCallback = Callable[[DeliveryError], object]


class Waiter:
    """Takes an outcome in place of a callback, at once, inside the core: it only notes it and wakes who waits."""

    __slots__ = ("done", "error", "response")

    def __init__(self) -> None:
        self.done = False
        self.response: Message | None = None
        self.error: DeliveryError | None = None

    def settle(self, response: Message | None, error: DeliveryError | None) -> None:
        """Note the outcome. Called once, by the core."""
        self.response = response
        self.error = error
        self.done = True


class Outgoing(msgspec.Struct, gc=False, eq=False):
    """A message in a link's queue."""

    message_id: int
    peer: bytes  # The routing id at a listener; empty on a connection.
    data: bytes
    deadline_at: float
    roams: bool  # Whether another link of the same listener may reach the peer.


class _Outstanding(msgspec.Struct, eq=False):
    """Whom to tell what became of a message."""

    callback: Callback | Waiter | None
    on_error: ErrorCallback | None
    deadline_at: float
    owner: object
    peer: bytes


class Link:
    """Where messages leave and arrive: a connection's socket, or one of a listener's; transports make it move bytes.

    Attributes:
        owner: The connection or listener that it belongs to.
        callback: Run on every message that arrives here: a listener's SLC, or a connection's callback.
        queue: What has not been given to the network yet.
    """

    def __init__(self, owner: object, callback: Callback | None) -> None:
        self.owner = owner
        self.callback = callback
        self.queue: deque[Outgoing] = deque()
        self.queue_bytes = 0

    def siblings(self) -> Iterable["Link"]:
        """Return all links of the same owner, itself included, in order of preference."""
        return (self,)


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a messenger has counted since it was made, and holds now.

    Attributes:
        identity: The messenger's.
        sent_msgs: Messages accepted by `send_message` and `request`.
        received_msgs: Messages that arrived, malformed ones included.
        response_msgs: Messages that ran an MSC or ended a `request`.
        not_delivered_msgs, outcome_unknown_msgs: Sent messages that ended so.
        callback_error_count: Callbacks that raised.
        outstanding_msgs: Sent messages whose outcome is open now.
        queued_msgs: Messages that wait for a connection now.
        connection_count, listener_count: Open now.
        dropped: What was dropped, by kind (docs/protocol.md, "What is dropped and counted").
    """

    identity: str
    sent_msgs: int
    received_msgs: int
    response_msgs: int
    not_delivered_msgs: int
    outcome_unknown_msgs: int
    callback_error_count: int
    outstanding_msgs: int
    queued_msgs: int
    connection_count: int
    listener_count: int
    dropped: Mapping[str, int]


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
        self, messenger: Any, limits: Limits, on_unheard: "ErrorCallback", *, next_id: int = MSC_ID_MIN
    ) -> None:
        self.calls: deque[tuple[Callable[[Any], object], Any]] = deque()
        self.links: set[Link] = set()
        self.dropped: Counter[str] = Counter()
        self.callback_error_count = 0
        self.next_deadline_at = FOREVER
        self._messenger = messenger
        self._limits = limits
        self._on_unheard = on_unheard
        self._next_id = next_id
        self._wrapped = False
        self._outstanding: dict[int, _Outstanding] = {}
        self._registered: dict[int, Callback] = {}
        self._sent_msgs = 0
        self._received_msgs = 0
        self._response_msgs = 0
        self._not_delivered_msgs = 0
        self._outcome_unknown_msgs = 0

    # Sending.

    def send(
        self,
        link: Link,
        peer: bytes,
        contents: Buffer,
        callback: Callback | Waiter | None,
        on_error: ErrorCallback | None,
        dest_callback_id: int,
        deadline_at: float,
        roams: bool = False,
    ) -> int:
        """Queue one message on a link and return its id; the driver flushes the link.

        Raises:
            MessageTooLarge, QueueFull, LimitReached: Nothing was queued and no callback is kept.
        """
        limits = self._limits
        if len(contents) > limits.message_bytes_max:
            raise MessageTooLarge(
                f"contents are {len(contents)} bytes, message_bytes_max is {limits.message_bytes_max}"
            )
        if link.queue and self.is_full(link):
            raise QueueFull(
                f"{len(link.queue)} messages, {link.queue_bytes} bytes wait for {link.owner}; queue_msgs_max is "
                f"{limits.queue_msgs_max}, queue_bytes_max is {limits.queue_bytes_max}"
            )
        message_id = self._next_id
        source_callback_id: int = NOOP
        if callback is not None or on_error is not None:
            if len(self._outstanding) >= limits.outstanding_max:
                raise LimitReached(f"{len(self._outstanding)} messages wait for a response, that is outstanding_max")
            while message_id in self._outstanding:
                message_id = self._successor(message_id)
            self._outstanding[message_id] = _Outstanding(callback, on_error, deadline_at, link.owner, peer)
            source_callback_id = message_id
        self._next_id = self._successor(message_id)
        if deadline_at < self.next_deadline_at:
            self.next_deadline_at = deadline_at
        data = encode_message(source_callback_id, dest_callback_id, contents)
        link.queue.append(Outgoing(message_id, peer, data, deadline_at, roams))
        link.queue_bytes += len(data)
        self._sent_msgs += 1
        return message_id

    def is_full(self, link: Link) -> bool:
        """Return whether a link's queue takes no further message."""
        return len(link.queue) >= self._limits.queue_msgs_max or link.queue_bytes >= self._limits.queue_bytes_max

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
        """Take one message off the network; what it runs is appended to `calls`."""
        self._received_msgs += 1
        try:
            source_callback_id, dest_callback_id, contents = decode_message(data)
        except MalformedMessage:
            self.drop("malformed_message")
            return
        if len(contents) > self._limits.message_bytes_max:
            self.drop("message_too_large")
            return
        message = Message(self._messenger, contents, source_callback_id, dest_callback_id, link, peer)
        if dest_callback_id != NOOP:
            self.process_message(message)
        if link.callback is not None:
            self.calls.append((link.callback, message))

    def process_message(self, message: Message) -> None:
        """Run what the message names: a built-in, a registered callback, or an MSC, which is forgotten first."""
        dest_callback_id = message.dest_callback_id
        if dest_callback_id >= MSC_ID_MIN:
            self._process_response(dest_callback_id, message)
        elif dest_callback_id == ECHO:
            self._echo(message)
        elif dest_callback_id in self._registered:
            self.calls.append((self._registered[dest_callback_id], message))
        else:
            self.drop("unknown_callback")

    def _process_response(self, message_id: int, message: Message) -> None:
        entry = self._outstanding.get(message_id)
        if entry is None:
            self.drop("late_response" if self._wrapped or message_id < self._next_id else "unknown_callback")
            return
        # Ids are easy to guess, so only the peer that was asked may answer.
        if entry.owner is not message.link.owner or (entry.peer and entry.peer != message.peer):
            self.drop("foreign_response")
            return
        del self._outstanding[message_id]
        self._response_msgs += 1
        callback = entry.callback
        if isinstance(callback, Waiter):
            callback.settle(message, None)
        elif callback is not None:
            self.calls.append((callback, message))

    def _echo(self, message: Message) -> None:
        link = message.link
        if self.is_full(link):
            self.drop("queue_full")
            return
        data = encode_message(NOOP, message.source_callback_id, message.contents)
        link.queue.append(Outgoing(NOOP, message.peer, data, FOREVER, False))
        link.queue_bytes += len(data)

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
                sibling = siblings[position]
                sibling.queue.append(outgoing)
                sibling.queue_bytes += len(outgoing.data)
                return
        self.drop(kind)
        why = "is not connected" if kind == "peer_gone" else "does not read what it is sent"
        self._fail(outgoing.message_id, NotDelivered, f"the peer {decode_identity(outgoing.peer)!r} {why}")

    def handle_deadline(self, now: float) -> None:
        """End every message whose deadline has passed; afterwards `next_deadline_at` is later than `now`."""
        held = self._take_expired(now)
        expired = [message_id for message_id, entry in self._outstanding.items() if entry.deadline_at <= now]
        for message_id in expired:
            if message_id in held:
                self._fail(message_id, NotDelivered, "nobody was there to take the message before its deadline")
            else:
                self._fail(message_id, OutcomeUnknown, "no response came before the deadline")
        earliest = min((entry.deadline_at for entry in self._outstanding.values()), default=FOREVER)
        for link in self.links:
            earliest = min(earliest, min((outgoing.deadline_at for outgoing in link.queue), default=FOREVER))
        self.next_deadline_at = max(earliest, now + 0.001 + len(self._outstanding) * SWEEP_SPACING_S_PER_ENTRY)
        if earliest == FOREVER:
            self.next_deadline_at = FOREVER

    def _take_expired(self, now: float) -> set[int]:
        """Remove what expired from the links' queues and return its ids."""
        held: set[int] = set()
        for link in self.links:
            if not link.queue or min(outgoing.deadline_at for outgoing in link.queue) > now:
                continue
            kept: deque[Outgoing] = deque()
            expired: deque[Outgoing] = deque()
            for outgoing in link.queue:
                (kept if outgoing.deadline_at > now else expired).append(outgoing)
            held |= self._discard(link, expired, "nobody was there to take them")
            link.queue = kept
        return held

    def abandon(self, link: Link, why: str) -> None:
        """End every message of a link's owner, because that link is closed for good."""
        self.links.discard(link)
        held = self._discard(link, link.queue, why)
        link.queue.clear()
        for message_id in [key for key, entry in self._outstanding.items() if entry.owner is link.owner]:
            self._fail(message_id, NotDelivered if message_id in held else OutcomeUnknown, why)

    def _discard(self, link: Link, queue: Iterable[Outgoing], why: str) -> set[int]:
        """Count what leaves a link's queue unsent; return its ids, and report those that nobody waits for together."""
        held: set[int] = set()
        silent_count = 0
        for outgoing in queue:
            link.queue_bytes -= len(outgoing.data)
            held.add(outgoing.message_id)
            silent_count += outgoing.message_id not in self._outstanding
        if silent_count:
            self.dropped["not_delivered"] += silent_count
            text = f"{silent_count} messages without a callback to {link.owner}: {why}"
            self.calls.append((self._on_unheard, NotDelivered(text, max(held))))
        return held

    def forget(self, waiter: Waiter) -> None:
        """Drop the entry of a waiter that nobody waits on any more (an interrupted `request`)."""
        for message_id in [key for key, entry in self._outstanding.items() if entry.callback is waiter]:
            del self._outstanding[message_id]

    def _fail(self, message_id: int, kind: type[DeliveryError], why: str) -> None:
        entry = self._outstanding.pop(message_id, None)
        if kind is NotDelivered:
            self._not_delivered_msgs += entry is not None
        else:
            self._outcome_unknown_msgs += entry is not None
        if entry is None:
            return
        error = kind(f"message {message_id} to {entry.owner}: {why}", message_id)
        if isinstance(entry.callback, Waiter):
            entry.callback.settle(None, error)
        else:
            self.calls.append((entry.on_error or self._on_unheard, error))

    # What a driver asks.

    @property
    def outstanding_count(self) -> int:
        """Messages that wait for their outcome."""
        return len(self._outstanding)

    @property
    def queued_count(self) -> int:
        """Messages that no link has given to the network yet."""
        return sum(len(link.queue) for link in self.links)

    def statistics(self, identity: str, connection_count: int, listener_count: int) -> Statistics:
        """Return the counts as they stand."""
        return Statistics(
            identity=identity,
            sent_msgs=self._sent_msgs,
            received_msgs=self._received_msgs,
            response_msgs=self._response_msgs,
            not_delivered_msgs=self._not_delivered_msgs,
            outcome_unknown_msgs=self._outcome_unknown_msgs,
            callback_error_count=self.callback_error_count,
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
