"""Coroutine callbacks: the tasks that run them, how many at a time, and what cancels them.

The coroutines of a listener's callback wait in its **lane** until one of `workers` is free, so they start in the order
in which the messages came; all others start at once. A message counts as processed when its tasks have ended
(`running.py`). The task of a message whose sender has given it up is cancelled, and one that did not start never does.

What must never happen here: a task that nobody knows of; a coroutine that is dropped without a `close`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any

from .exchange import Exchange
from .futures import Sent
from .limits import CLOSE_TIMEOUT_S
from .link import FOREVER
from .message import Message
from .session import Session
from .transports.wakeup import SLEEP_S_MAX

logger = logging.getLogger("messenger")

# Event loops may round to whole milliseconds; a shorter sleep would end before its time, again and again.
TIMER_S_MIN = 0.001
# Of tasks that run for messages with deadlines, those that are over are looked for at most so often.
EXPIRY_SPACING_S = 0.02


class Lane:
    """The coroutines of one listener's callback: some run, the others wait for their turn."""

    def __init__(self, endpoint: Any, active_max: int) -> None:
        self.endpoint = endpoint
        self.active_max = active_max
        self.active_count = 0
        self.waiting: deque[tuple[Any, Any, Any]] = deque()


class Handlers:
    """The coroutine callbacks of one messenger that run or wait. Used on its event loop only.

    Args:
        exchange: Is told which messages are processed, and tells which are cancelled.
        backlog_max: Of messages of plain peers that wait in one lane.
        report: Called with (callback, argument, error) when one raises.
        on_end: Called when one has ended.
    """

    event_loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        exchange: Exchange,
        backlog_max: int,
        report: Callable[[Any, Any, BaseException], None],
        on_end: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._backlog_max = backlog_max
        self._report = report
        self._on_end = on_end
        # With their arguments; those whose senders wait also by session and id.
        self._tasks: dict[asyncio.Task[None], Any] = {}
        self._awaited: dict[tuple[Any, int], list[asyncio.Task[None]]] = {}
        self._lanes: dict[Any, Lane] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_at = FOREVER
        exchange.on_cancelled = self._cancel_tasks

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def runs_in(self, task: Any) -> bool:
        """Return whether a task is one of these."""
        return task in self._tasks

    def discard_waiting(self) -> None:
        """Drop what has not been started, because the messenger ends."""
        for lane in self._lanes.values():
            for _, _, coroutine in lane.waiting:
                coroutine.close()
            lane.waiting.clear()
        if self._expiry is not None:
            self._expiry.cancel()

    async def end(self, wait_s: float) -> None:
        """Wait for the tasks of callbacks, then cancel them."""
        if self._tasks and wait_s:
            await asyncio.wait(self._tasks, timeout=wait_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        if self._tasks:
            logger.error("! %d callbacks still run after the close", len(self._tasks))

    def take_result(self, callback: Any, argument: Any, result: Any) -> None:
        """Run the coroutine that a callback returned, now or when its lane has room."""
        if type(result) is Sent or not isinstance(result, Coroutine):
            return
        if self.event_loop.is_closed():
            result.close()
            return
        is_message = isinstance(argument, Message)
        if is_message:
            self._note_running(argument)
        if not is_message or callback is not argument.link.callback:
            self._start_task(callback, argument, result, None)
        else:
            endpoint = argument.link.handle
            lane = self._lanes.get(endpoint)
            if lane is None:
                lane = self._lanes[endpoint] = Lane(endpoint, max(1, endpoint.worker_count))
            if not argument.number and len(lane.waiting) >= self._backlog_max:
                # A session's window bounds what it sends; a plain peer cannot be told to slow down.
                result.close()
                self._exchange.drop("workers_full")
                return
            lane.waiting.append((callback, argument, result))
            self._start_waiting(lane)

    def _note_running(self, message: Message) -> None:
        session = message.link
        if isinstance(session, Session) and message.incarnation == session.peer_incarnation:
            session.running.begin(message.number)

    def _note_ended(self, message: Message) -> None:
        session = message.link
        if isinstance(session, Session) and message.incarnation == session.peer_incarnation:
            session.note_processed(session.running.end(message.number))
            self._exchange.mark_dirty(session)

    def _start_task(self, callback: Any, argument: Any, coroutine: Any, lane: Lane | None) -> None:
        task = self.event_loop.create_task(self._run_task(callback, argument, coroutine))
        self._tasks[task] = argument
        if isinstance(argument, Message) and argument.source_callback_id and argument.number:
            self._awaited.setdefault((argument.link, argument.source_callback_id), []).append(task)
            if argument.deadline_at < self._expiry_at:
                self._plan_expiry(argument.deadline_at)
        task.add_done_callback(partial(self._end_task, argument, coroutine, lane))

    async def _run_task(self, callback: Any, argument: Any, coroutine: Any) -> None:
        try:
            await coroutine
        except asyncio.CancelledError as error:
            # Whose sender has given it up is not told.
            if not (isinstance(argument, Message) and argument.is_given_up(monotonic())):
                self._report(callback, argument, error)
        except GeneratorExit:
            raise  # The event loop was closed with this in it.
        except BaseException as error:
            self._report(callback, argument, error)

    def _end_task(self, argument: Any, coroutine: Any, lane: Lane | None, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # A Ctrl-C, which went to the event loop, is not to be logged again.
        coroutine.close()  # If it was cancelled before its first step, it was never started.
        if isinstance(argument, Message):
            self._awaited.pop((argument.link, argument.source_callback_id), None)
            self._note_ended(argument)
        if lane is not None:
            lane.active_count -= 1
            self._start_waiting(lane)
            if not lane.active_count:
                del self._lanes[lane.endpoint]
        self._on_end()

    def _start_waiting(self, lane: Lane) -> None:
        """Start what waits in a lane, as far as it has room, but for what was given up meanwhile."""
        while lane.waiting and lane.active_count < lane.active_max:
            callback, argument, coroutine = lane.waiting.popleft()
            if argument.is_given_up(monotonic()) and not argument.is_response:
                coroutine.close()
                self._exchange.drop("expired")
                self._note_ended(argument)
            else:
                lane.active_count += 1
                self._start_task(callback, argument, coroutine, lane)

    def _cancel_tasks(self, session: Any, message_id: int) -> None:
        """Cancel what runs for a message that was cancelled."""
        for task in self._awaited.get((session, message_id), ()):
            task.cancel()

    def _plan_expiry(self, deadline_at: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_at = deadline_at
        delay_s = min(max(TIMER_S_MIN, deadline_at - monotonic()), SLEEP_S_MAX)
        self._expiry = self.event_loop.call_later(delay_s, self._expire)

    def _expire(self) -> None:
        """Cancel what runs for messages whose senders do not wait any more."""
        self._expiry, self._expiry_at = None, FOREVER
        now = monotonic()
        earliest = FOREVER
        for tasks in self._awaited.values():
            for task in tasks:
                deadline_at = self._tasks[task].deadline_at
                if deadline_at > now:
                    earliest = min(earliest, deadline_at)
                else:
                    task.cancel()
        if earliest < FOREVER:
            self._plan_expiry(max(earliest, now + EXPIRY_SPACING_S))
