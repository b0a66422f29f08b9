"""Coroutine callbacks: the tasks that run them, how many at a time, and what cancels them.

The coroutines of a listener's callback wait in its **lane** until one of `workers` is free, so they start in the order
in which the messages came; all others start at once. A message counts as processed when its tasks have ended
(`running.py`). What runs for a message whose sender has given it up is cancelled, and what did not start never does.

What must never happen here: a task that nobody knows of; a coroutine that is dropped without a `close`; a task that is
cancelled again while it cleans up, because its message was given up in two ways (cancelled and late, for instance).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterator
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from .exchange import Exchange
from .futures import Sent
from .limits import CLOSE_TIMEOUT_S
from .link import FOREVER
from .message import Message
from .ordering import KeyOrder
from .session import Session
from .transports.wakeup import SLEEP_S_MAX
from .wire import NOOP

logger = logging.getLogger("messenger")

# Event loops may round to whole milliseconds; a shorter sleep would end before its time, again and again.
TIMER_S_MIN = 0.001
# Of tasks that run for messages with deadlines, those that are over are looked for at most so often.
EXPIRY_SPACING_S = 0.02


class Work(NamedTuple):
    """A coroutine that is to run.

    Attributes:
        callback, argument: The call that returned it.
        key: What `order_by` said of the message.
    """

    callback: Any
    argument: Any
    coroutine: Any
    key: Hashable = None


class Lane:
    """The coroutines of one listener's callback: some run, the others wait for their turn."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.active_max = max(1, endpoint.worker_count)
        self.active_count = 0
        # Those that wait for a free worker, and those that wait for another one of their key.
        self.waiting: deque[Work] = deque()
        self.order: KeyOrder[Work] | None = None if endpoint.order_by is None else KeyOrder()

    @property
    def waiting_count(self) -> int:
        """All that wait."""
        return len(self.waiting) + (0 if self.order is None else self.order.waiting_count)

    def add(self, work: Work) -> None:
        """Have one wait for its turn."""
        if self.order is None or self.order.admit(work.key, work):
            self.waiting.append(work)

    def finish(self, work: Work) -> None:
        """Note that one is done, or will not be: the next one of its key may start."""
        following = None if self.order is None else self.order.release(work.key)
        if following is not None:
            self.waiting.append(following)

    def take_all(self) -> Iterator[Work]:
        """Return all that wait, and forget them."""
        if self.order is not None:
            yield from self.order.take_waiting()
        while self.waiting:
            work = self.waiting.popleft()
            self.finish(work)
            yield work


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
        # With their arguments; those whose senders still wait also by session and id.
        self._tasks: dict[asyncio.Task[None], Any] = {}
        self._awaited: dict[Any, dict[int, list[asyncio.Task[None]]]] = {}
        self._lanes: dict[Any, Lane] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_at = FOREVER
        self._starts = True
        self._unstoppable: set[asyncio.Task[None]] = set()
        exchange.on_cancelled = self._cancel_tasks

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def runs_in(self, task: Any) -> bool:
        """Return whether a task is one of these."""
        return task in self._tasks

    def discard_waiting(self) -> None:
        """Drop what has not been started, and start nothing more of it, because the messenger ends."""
        self._starts = False
        for lane in self._lanes.values():
            for work in lane.take_all():
                work.coroutine.close()
        if self._expiry is not None:
            self._expiry.cancel()

    async def end(self, wait_s: float) -> None:
        """Wait for the tasks of callbacks, then cancel them. Those that do not end then are not waited for again."""
        tasks = self._tasks.keys() - self._unstoppable
        if tasks and wait_s:
            await asyncio.wait(tasks, timeout=wait_s)
        tasks = self._tasks.keys() - self._unstoppable
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        tasks &= self._tasks.keys()
        if tasks:
            self._unstoppable |= tasks
            logger.error("! %d callbacks still run after the close", len(tasks))

    def take_result(self, callback: Any, argument: Any, result: Any) -> None:
        """Run the coroutine that a callback returned, now or when its lane has room."""
        if type(result) is Sent or not isinstance(result, Coroutine):
            return
        if not self.event_loop.is_running():
            result.close()  # The program ends.
            return
        work = Work(callback, argument, result)
        if not isinstance(argument, Message):
            self._start(work, None)
        elif callback is argument.link.callback:
            self._join_lane(work)
        else:
            self._note_running(argument)
            self._start(work, None)

    def _join_lane(self, work: Work) -> None:
        message = work.argument
        endpoint = message.link.handle
        lane = self._lanes.get(endpoint) or Lane(endpoint)
        if not message.number and lane.waiting_count >= self._backlog_max:
            # A session's window bounds what it sends; a plain peer cannot be told to slow down.
            work.coroutine.close()
            self._exchange.drop("workers_full")
            return
        try:
            if lane.order is not None:
                work = work._replace(key=endpoint.order_by(message))
            if self._starts:
                lane.add(work)
            else:
                work.coroutine.close()
        except BaseException as error:  # Of the key, which may not even be comparable.
            work.coroutine.close()
            self._report(work.callback, message, error)
            return
        self._note_running(message)
        if self._starts:
            self._lanes[endpoint] = lane
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

    def let_go(self, message: Message) -> None:
        """Count a message as processed though its task goes on: it sends a stream, which its reader holds up."""
        session = message.link
        if isinstance(session, Session) and message.incarnation == session.peer_incarnation:
            session.note_processed(session.running.let_go(message.number))

    def _start(self, work: Work, lane: Lane | None) -> None:
        argument = work.argument
        # Not by the event loop's task factory, whose tasks may take their first step here (`eager_task_factory`): in
        # the middle of a turn, where nothing can wait.
        task = asyncio.Task(self._run(work), loop=self.event_loop)
        self._tasks[task] = argument
        if isinstance(argument, Message) and argument.source_callback_id and argument.number:
            awaited = self._awaited.setdefault(argument.link, {})
            awaited.setdefault(argument.source_callback_id, []).append(task)
            if argument.deadline_at < self._expiry_at:
                self._plan_expiry(argument.deadline_at)
        task.add_done_callback(partial(self._end_task, work, lane))

    async def _run(self, work: Work) -> None:
        argument = work.argument
        try:
            await work.coroutine
        except asyncio.CancelledError as error:
            # Whose sender has given it up is not told.
            if not (isinstance(argument, Message) and argument.is_given_up(monotonic())):
                self._report(work.callback, argument, error)
        except GeneratorExit:
            raise  # The event loop was closed with this in it.
        except BaseException as error:
            self._report(work.callback, argument, error)

    def _end_task(self, work: Work, lane: Lane | None, task: asyncio.Task[None]) -> None:
        argument = work.argument
        del self._tasks[task]
        if not task.cancelled():
            task.exception()  # A Ctrl-C, which went to the event loop, is not to be logged again.
        work.coroutine.close()  # If it was cancelled before its first step, it was never started.
        if isinstance(argument, Message):
            awaited = self._awaited.get(argument.link)
            tasks = None if awaited is None else awaited.get(argument.source_callback_id)
            if awaited is not None and tasks is not None and task in tasks:
                tasks.remove(task)
                if not tasks:
                    del awaited[argument.source_callback_id]
                    if not awaited:
                        del self._awaited[argument.link]
            self._note_ended(argument)
        if lane is not None:
            lane.active_count -= 1
            lane.finish(work)
            self._start_waiting(lane)
            if not lane.active_count:
                self._lanes.pop(lane.endpoint, None)
        self._on_end()

    def _start_waiting(self, lane: Lane) -> None:
        """Start what waits in a lane, as far as it has room, but for what was given up meanwhile."""
        while lane.waiting and lane.active_count < lane.active_max:
            work = lane.waiting.popleft()
            if work.argument.is_given_up(monotonic()) and not work.argument.is_response:
                work.coroutine.close()
                self._exchange.drop("expired")
                self._note_ended(work.argument)
                lane.finish(work)
            else:
                lane.active_count += 1
                self._start(work, lane)

    def _take_awaited(self, session: Any, message_id: int) -> list[asyncio.Task[None]]:
        """Return the tasks of a message whose sender waits, and note that it does not any more; an id of 0 is all."""
        awaited = self._awaited.get(session, {})
        if message_id == NOOP:
            taken = [task for tasks in awaited.values() for task in tasks]
            awaited.clear()
        else:
            taken = awaited.pop(message_id, [])
        if not awaited:
            self._awaited.pop(session, None)
        return taken

    def _cancel_tasks(self, session: Any, message_id: int) -> None:
        """Cancel what runs for a message that was given up; an id of 0 stands for all of a session that has ended."""
        for task in self._take_awaited(session, message_id):
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
        late: list[Message] = []
        for argument in [self._tasks[tasks[0]] for awaited in self._awaited.values() for tasks in awaited.values()]:
            if argument.deadline_at > now:
                earliest = min(earliest, argument.deadline_at)
            else:
                late.append(argument)
        for message in late:
            self._cancel_tasks(message.link, message.source_callback_id)
        if earliest < FOREVER:
            self._plan_expiry(max(earliest, now + EXPIRY_SPACING_S))
