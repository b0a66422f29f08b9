"""The core: which callback a message runs, and what goes back.

No sockets, no threads, no clock, no random numbers: a driver holds a lock, calls in, moves bytes between the links
and the network, and then runs what is in `calls` with no lock held. The same class runs under a simulated network.
A **message-specific callback (MSC)** is an entry in one table, from message id to whom to tell (`outcomes.py`).

What must never happen here: a callback that runs inside the core; bytes of a peer that raise out of `receive`; work
that grows with what a peer claims instead of with what it sent.

Source: docs/protocol.md, "Order of processing".
"""

import types
from collections.abc import Callable
from itertools import groupby
from types import MappingProxyType
from typing import Any, Final, NoReturn

from .blocks import Option, OptionKind
from .compiled import mypyc_attr
from .errors import HandlerError, LimitReached, MalformedMessage, MessageTooLarge, OutcomeUnknown, QueueFull
from .failures import FAILURES, decode_failure, encode_failure
from .handshake import Decoded, Handshake
from .limits import BATCH_MSGS_MAX, LARGE_BYTES_MIN, TIMEOUT_S, Limits
from .link import FOREVER, Link, Outlet, Random
from .message import Callback, ErrorCallback, Message, Statistics
from .outgoing import Outgoing
from .session import Session
from .streams import Streams
from .takers import Parts, Taker
from .wire import (
    ECHO,
    ID_MAX,
    MSC_ID_MIN,
    NO_DEADLINE_MS,
    NOOP,
    REGISTERED_ID_MAX,
    REGISTERED_ID_MIN,
    Buffer,
    decode_message,
    encode_message,
)

# In `calls` this is never called: the driver answers it with `note_processed(*argument)`, under its lock. It is nothing
# that a user could give as a callback.
BATCH_PROCESSED: Final[Any] = object()
FunctionType: Final = types.FunctionType
# Ids below are compared faster.
_ID_SMALL: Final = 2**62 - 1


# The simulator watches one.
@mypyc_attr(allow_interpreted_subclasses=True)
class Exchange(Streams):
    """The core of one messenger.

    A driver calls `send`, `receive` and `handle_…` under its lock, then takes (function, argument) pairs off `calls`,
    oldest first, and runs them with the lock released.

    Args:
        messenger: Who is named as the receiver in messages.
        on_unheard: Called, by way of `calls`, with an error that no `on_error` was given for.
        identity: Of the messenger, as bytes.
        rng: Draws incarnations and nonces; must not be predictable.
        next_id: Where message ids start.
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
        super().__init__(on_unheard)
        self.handshake = Handshake(self, identity, limits, rng)
        self.messenger = messenger
        # Read for each message, so not through the structure.
        self._message_bytes_max = limits.message_bytes_max
        self._large_bytes_min = min(LARGE_BYTES_MIN, limits.message_bytes_max + 1)
        self._queue_msgs_max = limits.queue_msgs_max
        self._queue_bytes_max = limits.queue_bytes_max
        self._outstanding_max = limits.outstanding_max
        self._next_id = next_id
        self._wrapped = False
        self._registered: dict[int, Callback] = {}
        self._sent_msgs = 0
        self._received_msgs = 0
        self._response_msgs = 0
        self._callback_error_count = 0

    # Sending.

    def send(
        self,
        outlet: Outlet,
        peer: bytes,
        contents: Buffer,
        callback: Callback | Taker | None,
        on_error: ErrorCallback | None,
        dest_callback_id: int,
        deadline_at: float,
        roams: bool = False,
        redeliver: bool = False,
        is_timed: bool = True,
    ) -> int:
        """Queue one message at an outlet and return its id; the driver flushes.

        Args:
            is_timed: Whether the deadline is another one than that of the default timeout, and so must travel.

        Raises:
            MessageTooLarge, QueueFull, LimitReached: Nothing was queued and no callback is kept.
        """
        if len(outlet.queue) >= self._queue_msgs_max or outlet.queue_bytes >= self._queue_bytes_max:
            self._refuse_full(outlet)
        if len(contents) >= self._large_bytes_min:
            large, small = self._take_large(contents, outlet), b""
        else:
            large, small = None, contents if isinstance(contents, bytes) else bytes(contents)
        message_id = self._next_id
        if callback is None and on_error is None:
            data = b"0-%d-%b" % (dest_callback_id, small)
            outgoing = Outgoing(message_id, data, len(data), deadline_at, outlet)
        else:
            outstanding = self._outstanding
            if len(outstanding) >= self._outstanding_max:
                raise LimitReached(f"{len(outstanding)} messages wait for a response, that is outstanding_max")
            while self._wrapped and message_id in outstanding:
                message_id = self._successor(message_id)
            if dest_callback_id:
                data = b"%d-%d-%b" % (message_id, dest_callback_id, small)
            else:
                data = b"%d-0-%b" % (message_id, small)
            outgoing = Outgoing(message_id, data, len(data), deadline_at, outlet, callback, on_error)
            outstanding[message_id] = outgoing
        size_bytes = len(data)
        if peer or redeliver or is_timed or large is not None:
            outgoing.peer, outgoing.roams, outgoing.redeliver, outgoing.large = peer, roams, redeliver, large
            if large is not None:
                size_bytes = outgoing.size_bytes = size_bytes + len(large)
            if large is not None or not outgoing.is_silent:
                outlet.is_plain = False
        if deadline_at < self._sweep_at:
            self._sweep_at = deadline_at
        self._next_id = message_id + 1 if message_id < _ID_SMALL else self._successor(message_id)
        queue = outlet.queue  # As `_enqueue` does, which would cost a call.
        queue.append(outgoing)
        outlet.queue_bytes += size_bytes
        if not outlet.is_dirty:
            outlet.is_dirty = True
            self._dirty.append(outlet)
        elif len(queue) % BATCH_MSGS_MAX == 0:
            self.is_urgent = True
        self._sent_msgs += 1
        return message_id

    def answer(self, message: Message, contents: bytes, deadline_at: float) -> int:
        """Queue an answer that wants no answer, as `send` does, only faster: most messages of a server are such.

        Args:
            message: Of a session, and of its present incarnation.

        Returns:
            The message's id; 0 if this is a case for `send`, and nothing was queued.
        """
        outlet = message.link
        if (
            len(outlet.queue) >= self._queue_msgs_max
            or outlet.queue_bytes >= self._queue_bytes_max
            or len(contents) >= self._large_bytes_min
        ):
            return 0
        message_id = self._next_id
        self._next_id = message_id + 1 if message_id < _ID_SMALL else self._successor(message_id)
        data = b"0-%d-%b" % (message.source_callback_id, contents)
        if deadline_at < self._sweep_at:
            self._sweep_at = deadline_at
        self._enqueue(outlet, Outgoing(message_id, data, len(data), deadline_at, outlet))
        self._sent_msgs += 1
        return message_id

    def _refuse_full(self, outlet: Outlet) -> NoReturn:
        raise QueueFull(
            f"{len(outlet.queue)} messages, {outlet.queue_bytes} bytes wait for {outlet}; queue_msgs_max is "
            f"{self._queue_msgs_max}, queue_bytes_max is {self._queue_bytes_max}"
        )

    def _take_large(self, contents: Buffer, outlet: Outlet) -> bytes:
        """Return contents that follow the batch as a frame of their own.

        Raises:
            MessageTooLarge: They are too large for that, too.
        """
        size_bytes = len(contents)
        if size_bytes > self._message_bytes_max:
            raise MessageTooLarge(f"contents are {size_bytes} bytes, message_bytes_max is {self._message_bytes_max}")
        if size_bytes > outlet.contents_max:
            raise MessageTooLarge(
                f"contents are {size_bytes} bytes, message_bytes_max of {outlet} is {outlet.contents_max}"
            )
        return bytes(contents)  # What may still change under us is copied; bytes are not.

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
        message = Message(self.messenger, contents, source_callback_id, dest_callback_id, link, peer)
        if len(contents) > self._message_bytes_max:
            self.drop("message_too_large")
        else:
            self._process(message)

    def handle_batch(self, session: Session, first: int, batch: Decoded, skipped: int) -> None:
        """Process the messages of a session's batch but for the first `skipped`, which were processed before."""
        messages, large, options, size_bytes, left_ms = batch
        if large or options or size_bytes > self._message_bytes_max:
            number = self._process_odd(session, first, batch, skipped)
        elif left_ms:
            number = self._process_timed(session, first, batch, skipped)
        else:
            # The sender did not choose; it gives up a moment earlier, since it began to wait before.
            deadline_at = session.heard_at + TIMEOUT_S
            number = self._process_plain(
                session, first + skipped, messages[skipped:] if skipped else messages, deadline_at
            )
        self._received_msgs += len(messages) - skipped
        if session.has_workers:
            return
        if self.calls:
            # Its turn comes when the callbacks of the whole batch have returned.
            self.calls.append((BATCH_PROCESSED, (session, session.peer_incarnation, number)))
        else:
            session.note_processed(number)

    def _process_timed(self, session: Session, first: int, batch: Decoded, skipped: int) -> int:
        """Process a batch whose messages have deadlines of their own, all of one deadline at once."""
        messages, *_, left_ms = batch
        position = skipped
        for left, same in groupby(left_ms[skipped:]):
            end = position + len(list(same))
            self._process_plain(session, first + position, messages[position:end], _deadline_at(session, left))
            position = end
        return first + position - 1

    def _process_plain(self, session: Session, number: int, messages: list[bytes], deadline_at: float) -> int:
        """Process the messages of a batch without large ones and options, from `number` on; return the last number.

        What stands in this loop runs for each message, so it calls as little as it can.
        """
        messenger, peer, incarnation = self.messenger, session.peer, session.peer_incarnation
        outstanding, callback, make = self._outstanding, session.callback, Message
        calls: list[tuple[Callable[[Any], object], Any]] = []
        response_callback = callback if session.hears_responses else None
        response_count = 0
        if deadline_at < self.expires_at:
            self.expires_at = deadline_at
        for data in messages:
            try:
                source_id, dest_id, contents = decode_message(data)
            except MalformedMessage:
                self.drop("malformed_message")
                session.note_unrun(number)
                number += 1
                continue
            message = make(messenger, contents, source_id, dest_id, session, peer, number, incarnation, deadline_at)
            number += 1
            if not dest_id and callback is not None:
                if not source_id:
                    # No answer will carry the acknowledgement, and the callback may take long.
                    session.must_answer = True
                calls.append((callback, message))
                continue
            entry = outstanding.get(dest_id)
            if entry is not None and entry.outlet is session:
                del outstanding[dest_id]
                response_count += 1
                msc = entry.callback
                if type(msc) is FunctionType:
                    calls.append((msc, message))
                elif isinstance(msc, Taker):
                    msc.settle(message, None)
                elif msc is not None:
                    calls.append((msc, message))
                if response_callback is not None:
                    calls.append((response_callback, message))
                continue
            if not source_id and dest_id < MSC_ID_MIN:
                session.must_answer = True
            self.calls.extend(calls)
            calls.clear()
            self._process(message)
        self.calls.extend(calls)
        self._response_msgs += response_count
        return number - 1

    def _process_odd(self, session: Session, first: int, batch: Decoded, skipped: int) -> int:
        """Process the messages of a batch of which some are large or have options; return the last number."""
        messages, large, options, _, left_ms = batch
        options_by_index = {option.index: option for option in options}
        messenger, peer, incarnation = self.messenger, session.peer, session.peer_incarnation
        for index in range(skipped, len(messages)):
            number = first + index
            try:
                source_id, dest_id, contents = decode_message(messages[index])
            except MalformedMessage:
                self.drop("malformed_message")
                session.note_unrun(number)
                continue
            contents = large.get(index, contents)
            deadline_at = _deadline_at(session, left_ms[index]) if left_ms else session.heard_at + TIMEOUT_S
            self.expires_at = min(self.expires_at, deadline_at)
            message = Message(messenger, contents, source_id, dest_id, session, peer, number, incarnation, deadline_at)
            if not source_id and dest_id < MSC_ID_MIN:
                session.must_answer = True
            if len(contents) > self._message_bytes_max:
                self.drop("message_too_large")
                session.note_unrun(number)
                if source_id:
                    self._answer_failure(message, Option(0, OptionKind.TOO_LARGE))
            elif index in options_by_index:
                self._process_option(session, message, options_by_index[index])
            else:
                self._process(message)
        return first + len(messages) - 1

    def note_processed(self, session: Session, peer_incarnation: int, number: int) -> None:
        """The callbacks of all messages of a session up to a number have returned."""
        # A peer may come back under an incarnation that it said goodbye to, before its callbacks have returned.
        if session.peer_incarnation == peer_incarnation and number <= session.received_through:
            session.note_processed(number)
            self.mark_dirty(session)

    def note_one_processed(self, message: Message) -> None:
        """A worker is done with a message."""
        if isinstance(message.link, Session):
            message.link.note_one_processed(message.number)
            self.mark_dirty(message.link)

    def _process_option(self, session: Session, message: Message, option: Option) -> None:
        """Process a message with an option: a part, an error response, or one that is just more than plain."""
        if option.kind == OptionKind.MORE:
            self._process_part(session, message)
            return
        if option.kind not in FAILURES:
            # A kind that is not known here says nothing.
            message.redelivered = option.kind == OptionKind.REDELIVERED
            if option.kind == OptionKind.STREAM:
                self._open_reply(session, message)
            self._process(message)
            return
        message_id = message.dest_callback_id
        session.note_unrun(message.number)
        entry = self._find_asked(message)
        if entry is None:
            return
        kind, text, details = decode_failure(option)
        if kind is not HandlerError and entry.redeliver and entry.option is not None:
            kind, text = OutcomeUnknown, "an earlier process may have run it; now there is nothing to run"
        self._fail(message_id, kind, text, *details)

    def _process(self, message: Message) -> None:
        """Run what the message names, and then what its endpoint runs on every message."""
        is_handled = message.dest_callback_id != NOOP and self.process_message(message)
        callback = message.link.callback
        if callback is not None and (message.link.hears_responses or not message.is_response):
            self.calls.append((callback, message))
        elif not is_handled and message.source_callback_id:
            self._answer_failure(message, Option(0, OptionKind.NO_HANDLER))

    def _process_part(self, session: Session, message: Message) -> None:
        """Give a part to the stream that it belongs to; to anybody else it is a response like any other."""
        entry = self._outstanding.get(message.dest_callback_id)
        if entry is not None and not isinstance(entry.callback, Parts):
            self._process(message)
            return
        entry = self._find_asked(message)
        if entry is None:
            # Whoever sends it does not know yet that nobody reads.
            self._give_up_reply(session, message)
        else:
            self._add_part(entry, message)
        if message.link.callback is not None and message.link.hears_responses:
            self.calls.append((message.link.callback, message))

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
            if isinstance(entry.callback, Taker):
                entry.callback.settle(message, None)
            elif entry.callback is not None:
                self.calls.append((entry.callback, message))
        elif dest_callback_id == ECHO and len(message.contents) <= message.link.contents_max:
            self._answer(message, message.contents, None)
        elif dest_callback_id == ECHO:
            self._answer_failure(message, Option(0, OptionKind.TOO_LARGE))
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
            self._answer_failure(argument, encode_failure(error))

    def _answer_failure(self, message: Message, option: Option) -> None:
        # The basic dialect has no form for it; there the sender's deadline tells.
        if isinstance(message.link, Session):
            self._answer(message, b"", option)

    def _find_asked(self, message: Message) -> Outgoing | None:
        """Return the entry of the MSC that a message names, if the message may end it."""
        message_id = message.dest_callback_id
        entry = self._outstanding.get(message_id)
        if entry is None:
            was_used = message_id >= MSC_ID_MIN and (self._wrapped or message_id < self._next_id)
            self.drop("late_response" if was_used else "unknown_callback")
        # Ids are easy to guess, so only the peer that was asked may answer.
        elif entry.outlet.owner is not message.link.owner or (entry.peer and entry.peer != message.peer):
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
        if large is not None or option is not None:
            message.link.is_plain = False
        outgoing = Outgoing(NOOP, data, size_bytes, FOREVER, message.link, large=large, peer=message.peer)
        outgoing.option = option
        self._enqueue(message.link, outgoing)

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


def _deadline_at(session: Session, left_ms: int) -> float:
    """Return when a message that has just arrived is given up."""
    return FOREVER if left_ms == NO_DEADLINE_MS else session.heard_at + left_ms / 1000
