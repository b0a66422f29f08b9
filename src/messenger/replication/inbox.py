"""What a replica has received and not applied: one queue, from the messenger's thread to the apply thread."""

import threading
from collections import deque
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
    """Items in the order in which they came, each with the stream that it belongs to.

    Attributes:
        bytes: Of the entries that wait.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._items: deque[tuple[int, Item]] = deque()
        self._has_items = threading.Condition()
        self._is_closed = False

    def put(self, stream: int, item: Item) -> None:
        """Append an item; does not wait."""
        with self._has_items:
            if isinstance(item, Batch):
                self.bytes += item.size_bytes
            self._items.append((stream, item))
            self._has_items.notify()

    def take(self) -> tuple[int, Item] | None:
        """Wait for the oldest item, and return it; batches together, as far as they are there. None once closed."""
        with self._has_items:
            while not self._items:
                if self._is_closed:
                    return None
                self._has_items.wait()
            stream, item = self._items.popleft()
            if isinstance(item, Batch):
                while self._items and isinstance(more := self._items[0][1], Batch) and item.has_room_for(more):
                    item.add(more)
                    self._items.popleft()
                self.bytes -= item.size_bytes
            return stream, item

    def clear(self) -> None:
        """Forget what waits."""
        with self._has_items:
            self._items.clear()
            self.bytes = 0

    def close(self) -> None:
        """Forget what waits, and let `take` return."""
        with self._has_items:
            self._is_closed = True
            self._items.clear()
            self._has_items.notify_all()
