"""What the two ends of a session tell each other beside the numbered messages, so that it waits for no window.

A control names a message of the end that says it, by its `source_callback_id`. What is said twice changes nothing, and
what comes late neither, so a control needs no number and no acknowledgement of its own. It is said once; what is lost
with its link is told by something else: a cancellation by the deadline of the message.

What must never happen here: state that grows with what a peer claims.

Source: docs/protocol.md, "Controls".
"""

from collections.abc import Iterator

from .wire import CONTROLS_MAX, Control, ControlKind


class Controls:
    """Of one end of a session, while it is joined to one incarnation of the other.

    Attributes:
        pending: What is to be said at the next flush.
        cancelled: Messages of the other end that it has given up, by `source_callback_id`, oldest first.
    """

    __slots__ = ("_cancelled_max", "cancelled", "pending")

    def __init__(self, cancelled_max: int) -> None:
        self._cancelled_max = cancelled_max
        self.pending: dict[tuple[int, int], Control] = {}
        self.cancelled: dict[int, None] = {}

    def tell(self, kind: ControlKind, message_id: int) -> None:
        """Say something at the next flush, in place of what was to be said of the same."""
        self.pending[kind, message_id] = Control(kind, message_id)

    def take(self) -> Iterator[list[Control]]:
        """Yield what is to be said, as much at a time as a frame may have."""
        controls, self.pending = list(self.pending.values()), {}
        for start in range(0, len(controls), CONTROLS_MAX):
            yield controls[start : start + CONTROLS_MAX]

    def note_cancelled(self, message_id: int) -> None:
        """Note that the other end has given up a message; only the latest are kept, or a peer could fill the memory."""
        self.cancelled[message_id] = None
        if len(self.cancelled) > self._cancelled_max:
            del self.cancelled[next(iter(self.cancelled))]
