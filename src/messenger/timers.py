"""When each session wants attention, so that thousands of idle ones cost nothing until then: a timer wheel.

Sessions whose instants fall into the same tick share a slot. To plan one anew, earlier or later, takes it out of its
slot and puts it into another, so it stands in one slot at most, and what is forgotten is gone at once.

What must never happen here: attention before its instant, or none within a tick after it.
"""

from heapq import heappop, heappush

from .limits import TIMER_TICK_S
from .link import FOREVER
from .session import Session


class Timers:
    """The sessions of one messenger, each by its `due_at`."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[Session, None]] = {}
        # The ticks of all slots, as a heap.
        self._ticks: list[int] = []

    def plan(self, session: Session, due_at: float) -> None:
        """Have a session be due at an instant instead of when it was planned before; never, if that is infinite."""
        if session.due_at != FOREVER:
            del self._slots[_tick(session.due_at)][session]
        session.due_at = due_at
        if due_at != FOREVER:
            tick = _tick(due_at)
            if tick not in self._slots:
                self._slots[tick] = {}
                heappush(self._ticks, tick)
            self._slots[tick][session] = None

    @property
    def next_at(self) -> float:
        """When `take_due` has something to return."""
        ticks = self._ticks
        while ticks and not self._slots[ticks[0]]:
            del self._slots[heappop(ticks)]
        return ticks[0] * TIMER_TICK_S if ticks else FOREVER

    def take_due(self, now: float) -> list[Session]:
        """Return the sessions whose instant has come; they must be planned anew."""
        due: list[Session] = []
        while self.next_at <= now:
            due.extend(self._slots.pop(heappop(self._ticks)))
        for session in due:
            session.due_at = FOREVER
        return due


def _tick(due_at: float) -> int:
    """Return the first tick that is later than an instant."""
    return int(due_at / TIMER_TICK_S) + 1
