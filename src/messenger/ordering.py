"""Which of several messages may start: those of one key one after the other, those of different keys at once.

What must never happen here: two messages of one key at work at one time; state about a key of which nothing waits or
runs.

Source: docs/protocol.md, "Order of processing".
"""

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class KeyOrder(Generic[T]):
    """The keys at work, and behind each what waits for it. Called by one at a time; a driver asks before each start.

    Attributes:
        waiting_count: Messages that wait because another of their key is at work.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[T]] = {}
        self.waiting_count = 0

    def admit(self, key: Hashable, message: T) -> bool:
        """Return whether a message may start now; else it waits, and a `release` returns it.

        Raises:
            TypeError: The key cannot be hashed, or what else it raises when it is compared.
        """
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = deque()
            return True
        waiting.append(message)
        self.waiting_count += 1
        return False

    def release(self, key: Hashable) -> T | None:
        """Note that the message of a key that was at work is done; return the next one, which may start now."""
        waiting = self._waiting[key]
        if waiting:
            self.waiting_count -= 1
            return waiting.popleft()
        del self._waiting[key]
        return None

    def take_waiting(self) -> list[T]:
        """Return all that wait because another of their key is at work, and forget them: nothing follows those."""
        taken = [message for waiting in self._waiting.values() for message in waiting]
        for waiting in self._waiting.values():
            waiting.clear()
        self.waiting_count = 0
        return taken
