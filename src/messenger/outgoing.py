"""A message on its way out."""

from typing import Any

import msgspec

from .blocks import Option, OptionKind
from .wire import MSC_ID_MIN, decode_message


# Python's collector does not look at these: a million of them would hold up everything for long, and often. It cannot
# free a cycle with one in it either, so whatever holds them lets go of them when it ends.
class Outgoing(msgspec.Struct, eq=False, gc=False):
    """A message on its way out.

    Attributes:
        message_id: What `send_message` returned; 0 for what the core itself answers.
        data: The whole message, or if it is large what stands in front of its contents.
        size_bytes: Of the whole message.
        deadline_at: When the sender gives it up; infinite for what the core itself answers, 0 for what was given up.
        outlet: Where it was queued.
        callback: Run on the response, or the waiter that takes the outcome.
        on_error: Told of any other outcome.
        large: The contents of a large message, which are not copied.
        peer: The routing id that a plain peer has at a listener.
        roams: Whether another link of the same listener may reach the peer.
        redeliver: Whether a new process of the peer may get what an old one may have run.
        option: What goes beside the message, its index still 0.
    """

    message_id: int
    data: bytes
    size_bytes: int
    deadline_at: float
    outlet: Any = None
    callback: Any = None
    on_error: Any = None
    large: bytes | None = None
    peer: bytes = b""
    roams: bool = False
    redeliver: bool = False
    option: Option | None = None

    @property
    def is_silent(self) -> bool:
        """Whether nobody waits for its outcome, and nobody ever did."""
        return self.callback is None and self.on_error is None

    @property
    def is_answer(self) -> bool:
        """Whether it means something only to the incarnation that it was given to."""
        _, dest_callback_id, _ = decode_message(self.data)
        return dest_callback_id >= MSC_ID_MIN or not self.message_id

    @property
    def may_have_run(self) -> bool:
        """Whether an earlier process of the peer may have run it."""
        return self.option is not None and self.option.kind == OptionKind.REDELIVERED

    def whole(self) -> bytes:
        """Return the whole message in one piece."""
        return self.data if self.large is None else self.data + self.large
