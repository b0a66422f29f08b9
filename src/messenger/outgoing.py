"""What is on its way out: single messages, and the batches that went out in one frame each."""

from typing import Any

import msgspec

from .wire import MSC_ID_MIN, Option, OptionKind, decode_message

# Messages up to this size, on average, keep their bytes until they have their outcome: to let go of each costs more.
KEPT_BYTES_MAX = 256


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


class Batch:
    """What went out in one frame, kept until it has been processed; its bytes only until it has been received.

    Attributes:
        first, last: The numbers of its messages.
        datas: The bytes of each message, or of large ones what stands in front of their contents.
        is_plain: Whether no message is large, has an option, or another deadline than the default.
    """

    __slots__ = ("datas", "first", "is_plain", "last", "messages", "size_bytes")

    def __init__(self, first: int, messages: list[Outgoing], size_bytes: int, is_plain: bool) -> None:
        self.first = first
        self.last = first + len(messages) - 1
        self.messages = messages
        self.datas = [outgoing.data for outgoing in messages] if len(messages) > 1 else [messages[0].data]
        self.size_bytes = size_bytes
        self.is_plain = is_plain
        if size_bytes > KEPT_BYTES_MAX * len(messages):
            # A message whose response is awaited for long must not hold its bytes for as long.
            for outgoing in messages:
                if not outgoing.redeliver:
                    outgoing.data = b""

    def forget_bytes(self) -> None:
        """Let go of what will not be sent again."""
        self.datas = []
        if not self.is_plain:
            for outgoing in self.messages:
                if not outgoing.redeliver:
                    outgoing.large = None
