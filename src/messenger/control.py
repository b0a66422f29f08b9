"""What the two ends of a session tell each other beside the numbered messages, so that it waits for no window.

A control names a message of the end that says it, by its `source_callback_id`. What is said twice changes nothing, and
what comes late neither, so a control needs no number and no acknowledgement of its own. It is said once; what is lost
with its link is told by something else: a cancellation by the deadline of the message, or when the next part of a
stream comes, and credit again when the other end asks for acknowledgements, and on a new link.

What must never happen here: state that grows with what a peer claims.

Source: docs/protocol.md, "Controls".
"""

from collections.abc import Iterator
from weakref import WeakValueDictionary

from .blocks import COUNT_MAX, Control, ControlKind
from .limits import STREAM_SHARE


class Credit:
    """What may be sent of a response in parts, until its reader has taken what was sent before.

    Args:
        msgs_max, bytes_max: Of the parts that were sent and not taken; the last of them may exceed the bytes.
    """

    __slots__ = ("__weakref__", "_bytes_max", "_msgs_max", "sent_bytes", "sent_msgs", "taken_bytes", "taken_msgs")

    def __init__(self, msgs_max: int, bytes_max: int) -> None:
        self._msgs_max = msgs_max
        self._bytes_max = bytes_max
        self.sent_msgs = self.sent_bytes = 0
        self.taken_msgs = self.taken_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether a part may be sent now."""
        is_short = self.sent_msgs - self.taken_msgs < self._msgs_max
        return is_short and self.sent_bytes - self.taken_bytes < self._bytes_max

    def note_sent(self, size_bytes: int) -> None:
        """Note a part that was queued."""
        self.sent_msgs += 1
        self.sent_bytes += size_bytes

    def note_taken(self, msgs: int, size_bytes: int) -> None:
        """Note what the reader says that it has taken, in all; no more than was sent, whatever it says."""
        self.taken_msgs = max(self.taken_msgs, min(msgs, self.sent_msgs))
        self.taken_bytes = max(self.taken_bytes, min(size_bytes, self.sent_bytes))


class Controls:
    """Of one end of a session, while it is joined to one incarnation of the other.

    Args:
        window_msgs, window_bytes: Of the session, in which both ends agree.

    Attributes:
        pending: What is to be said at the next flush.
        cancelled: Messages of the other end that it has given up, by `source_callback_id`, oldest first.
        stream_limits: How many messages and bytes of one stream may be sent and not taken by its reader.
    """

    __slots__ = ("_cancelled_max", "_replies", "_told_credits", "cancelled", "pending", "stream_limits")

    def __init__(self, window_msgs: int, window_bytes: int) -> None:
        self._cancelled_max = window_msgs
        self.stream_limits = (max(1, window_msgs // STREAM_SHARE), max(1, window_bytes // STREAM_SHARE))
        self.pending: dict[tuple[int, int], Control] = {}
        self.cancelled: dict[int, None] = {}
        # Of the streams that are read here, what was said last. Of those that are written here, as long as the message
        # that they answer is held by somebody.
        self._told_credits: dict[int, Control] = {}
        self._replies: WeakValueDictionary[int, Credit] = WeakValueDictionary()

    def tell_cancelled(self, message_id: int) -> None:
        """Say at the next flush that a message of ours was given up."""
        self.pending[ControlKind.CANCEL, message_id] = Control(ControlKind.CANCEL, message_id)

    def tell_credit(self, message_id: int, taken_msgs: int, taken_bytes: int) -> None:
        """Say at the next flush what was taken of the stream that answers a message of ours."""
        control = Control(ControlKind.CREDIT, message_id, taken_msgs, taken_bytes)
        self.pending[ControlKind.CREDIT, message_id] = self._told_credits[message_id] = control

    def repeat_credits(self) -> None:
        """Say again what may have been lost: without credit the other end waits."""
        for control in self._told_credits.values():
            self.pending[control.kind, control.message_id] = control

    def end_stream(self, message_id: int) -> None:
        """A stream that is read here is over."""
        self._told_credits.pop(message_id, None)
        self.pending.pop((ControlKind.CREDIT, message_id), None)

    def open_reply(self, message_id: int) -> Credit:
        """Return the credit of the stream that answers a message of the other end."""
        credit = self._replies[message_id] = Credit(*self.stream_limits)
        return credit

    def note_credit(self, control: Control) -> None:
        """The reader of a stream has taken parts; of a stream that is over that means nothing."""
        credit = self._replies.get(control.message_id)
        if credit is not None:
            credit.note_taken(control.taken_msgs, control.taken_bytes)

    def take(self) -> Iterator[list[Control]]:
        """Yield what is to be said, as much at a time as a frame may have."""
        controls, self.pending = list(self.pending.values()), {}
        for start in range(0, len(controls), COUNT_MAX):
            yield controls[start : start + COUNT_MAX]

    def note_cancelled(self, message_id: int) -> None:
        """Note that the other end has given up a message; only the latest are kept, or a peer could fill the memory."""
        self.cancelled[message_id] = None
        if len(self.cancelled) > self._cancelled_max:
            del self.cancelled[next(iter(self.cancelled))]
