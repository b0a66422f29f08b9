"""What a replica has received and not applied: one queue, from the messenger's thread to the apply thread."""

from queue import SimpleQueue
from typing import NamedTuple

from messenger import Message

from .limits import APPLY_BYTES, APPLY_TRANSACTIONS
from .records import CheckEnd, Entry, SnapshotBegin, SnapshotEnd, SnapshotPart, Welcome


class Batch:
    """Entries that are applied together, and the messages that brought them and wait for an answer."""

    __slots__ = ("entries", "messages", "size_bytes")

    def __init__(self, entries: list[Entry], message: Message | None, size_bytes: int) -> None:
        self.entries = entries
        self.messages = [] if message is None else [message]
        self.size_bytes = size_bytes

    def has_room_for(self, more: "Batch") -> bool:
        """Return whether both are few enough to be applied together."""
        return (
            len(self.entries) + len(more.entries) <= APPLY_TRANSACTIONS
            and self.size_bytes + more.size_bytes <= APPLY_BYTES
        )

    def add(self, more: "Batch") -> None:
        """Take in what follows."""
        self.entries += more.entries
        self.messages += more.messages
        self.size_bytes += more.size_bytes


class Part(NamedTuple):
    """A part of a snapshot, and the message that brought it and waits for an answer."""

    part: SnapshotPart
    message: Message


Item = Batch | SnapshotBegin | Part | SnapshotEnd | Welcome | CheckEnd


class Inbox:
    """Items in the order in which they came, each with the stream that it belongs to; one thread puts, one takes."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()
        self._next: tuple[int, Item] | None = None
        # Each is written by one thread only.
        self._put_bytes = self._put_count = 0
        self._taken_bytes = self._taken_count = self._done_count = 0

    @property
    def bytes(self) -> int:
        """Of the entries that wait."""
        return self._put_bytes - self._taken_bytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and whoever takes has come back for more, so is done with all that it took."""
        return self._put_count == self._done_count

    def put(self, stream: int, item: Item) -> None:
        """Append an item; does not wait."""
        if isinstance(item, Batch):
            self._put_bytes += item.size_bytes
        self._put_count += 1
        self._queue.put((stream, item))

    def take(self) -> tuple[int, Item] | None:
        """Wait for the oldest item, and return it; batches together, as far as they are there. None once closed."""
        self._done_count = self._taken_count
        taken, self._next = self._next or self._queue.get(), None
        if taken is None:
            return None
        self._taken_count += 1
        stream, item = taken
        if isinstance(item, Batch):
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    self._queue.put(None)
                    break
                if more[0] != stream or not isinstance(more[1], Batch) or not item.has_room_for(more[1]):
                    self._next = more
                    break
                item.add(more[1])
                self._taken_count += 1
            self._taken_bytes += item.size_bytes
        return stream, item

    def close(self) -> None:
        """Let `take` return None behind what is there."""
        self._queue.put(None)
