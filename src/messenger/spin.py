"""An event loop that stays awake for a moment, as a thread does that waits; `transports/wakeup.py` says what for."""

import asyncio
import os
from time import monotonic

from .transports.wakeup import spin_s_max


class Spin:
    """Keeps an event loop awake while an answer is likely to come at once."""

    def __init__(self) -> None:
        self._s_max = spin_s_max()
        self._asked_at = self._ends_at = 0.0
        # Whether the last answer came in time.
        self._is_worth_it = False
        self._is_planned = False

    def begin(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """A message has left that is waited for, and nothing else is on its way."""
        self._asked_at = now = monotonic()
        if self._is_worth_it:
            self._ends_at = now + self._s_max
            if not self._is_planned:
                self._is_planned = True
                event_loop.call_soon(self._turn, event_loop)

    def end(self) -> None:
        """Something has come."""
        self._ends_at = 0.0
        self._is_worth_it = monotonic() < self._asked_at + self._s_max

    def _turn(self, event_loop: asyncio.AbstractEventLoop) -> None:
        if monotonic() < self._ends_at:
            os.sched_yield()
            event_loop.call_soon(self._turn, event_loop)
        else:
            self._is_planned = False
