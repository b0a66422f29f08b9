"""The messages that went out in one frame."""

from .outgoing import Outgoing

# Messages up to this size, on average, keep their bytes until they have their outcome: to let go of each costs more.
KEPT_BYTES_MAX = 256


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
