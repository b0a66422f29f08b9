"""Commit levels: how far each replica is, and which transactions that confirms.

A transaction waits for a level and for k replicas. Its own disk always counts too: what `received` and more confirm is
durable here as well. All positions are cumulative, so one acknowledgement confirms every transaction before it, and
the waiters of each (level, k) stand in the order of their LSNs.

What must never happen here: a confirmation that some replica did not give.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

from .records import Position


class Level(IntEnum):
    """Where a transaction must be before its commit returns."""

    LOCAL = 0
    RECEIVED = 1
    DURABLE = 2
    APPLIED = 3

    @classmethod
    def parse(cls, name: str) -> "Level":
        """Return the level of this name.

        Raises:
            ValueError: There is none.
        """
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError):
            raise ValueError(f"commit level is {name!r}, it must be {', '.join(LEVELS)}") from None


LEVELS = tuple(level.name.lower() for level in Level)


class Progress(Protocol):
    """How far a replica is, up to and including these LSNs."""

    received: int
    durable: int
    applied: int


class Waiter:
    """A thread that waits for the confirmation of one transaction, or to be told to write it.

    Attributes:
        position: The transaction's, once it is committed here.
        written_at: When (monotonic seconds) it was.
        error: Why it was not.
        is_settled, is_confirmed: Whether it need not wait any more, and whether that is because it is confirmed.
    """

    __slots__ = ("_lock", "error", "is_confirmed", "is_settled", "position", "written_at")

    def __init__(self, position: Position | None = None) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.position = position
        self.written_at = time.monotonic()
        self.error: BaseException | None = None
        self.is_settled = False
        self.is_confirmed = False

    def note_written(self, position: Position) -> None:
        """The transaction is committed here."""
        self.position = position
        self.written_at = time.monotonic()

    def settle(self, is_confirmed: bool) -> None:
        """Let the thread go on for good."""
        self.is_confirmed = is_confirmed
        self.is_settled = True
        self.wake()

    def wait(self, timeout: float) -> bool:
        """Return whether `wake` was called within so many seconds."""
        return self._lock.acquire(timeout=timeout)

    def wake(self) -> None:
        """Let the thread go on. Once for each wait."""
        self._lock.release()


class Confirmations:
    """All transactions that wait. Called with the primary's lock held."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[Level, int], deque[Waiter]] = {}
        self.durable_lsn = 0

    def add(self, waiter: Waiter, level: Level, count: int) -> None:
        """Let a transaction wait; in the order of LSNs."""
        self._waiting.setdefault((level, count), deque()).append(waiter)

    def add_earlier(self, waiter: Waiter, level: Level, count: int) -> None:
        """Let a transaction wait that is not the newest."""
        waiters = self._waiting.setdefault((level, count), deque())
        waiters.append(waiter)
        self._waiting[level, count] = deque(sorted(waiters, key=lambda other: other.position or Position(0, 0)))

    def settle(self, replicas: Iterable[Progress]) -> None:
        """Wake whoever is confirmed by now."""
        known = None
        for (level, count), waiters in self._waiting.items():
            if not waiters:
                continue
            if known is None:
                known = list(replicas)
            lsn = self._confirmed_lsn(known, level, count)
            while waiters and waiters[0].position is not None and waiters[0].position.lsn <= lsn:
                waiters.popleft().settle(True)

    def _confirmed_lsn(self, replicas: list[Progress], level: Level, count: int) -> int:
        if level is Level.LOCAL or count == 0:
            return self.durable_lsn
        return min(self.durable_lsn, nth_lsn(replicas, level, count))

    def discard(self, waiter: Waiter) -> None:
        """A thread waits no longer."""
        for waiters in self._waiting.values():
            if waiter in waiters:
                waiters.remove(waiter)

    def wake_all(self, level: Level = Level.RECEIVED) -> None:
        """Wake who waits for a level or a higher one, unconfirmed, because that will not come any more."""
        for (own_level, _), waiters in self._waiting.items():
            while own_level >= level and waiters:
                waiters.popleft().settle(False)


def nth_lsn(replicas: Iterable[Progress], level: Level, count: int) -> int:
    """Return the LSN up to which at least `count` replicas have reached a level."""
    if level is Level.RECEIVED:
        positions = sorted((replica.received for replica in replicas), reverse=True)
    elif level is Level.DURABLE:
        positions = sorted((replica.durable for replica in replicas), reverse=True)
    else:
        positions = sorted((replica.applied for replica in replicas), reverse=True)
    return positions[count - 1] if len(positions) >= count else 0
