"""The server loop of an `AsyncMessenger`: turns on the caller's asyncio event loop.

The sockets' descriptors are watched by the event loop. A turn begins when one becomes readable, when a deadline is
reached, or soon after something was queued: it receives, runs callbacks, sends, and reads the events of all links that
were used, because a descriptor tells only of what is new (it is edge-triggered). Nothing here is touched by another
thread than the event loop's, so the lock only checks that.

Coroutine callbacks are tasks of the event loop (`handlers.py`).

What must never happen here: a task that is left behind by `close`; a wait that blocks the event loop; a sleep of the
event loop with a touched link whose events were not read again.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from time import monotonic, sleep
from types import CoroutineType
from typing import Any

from . import interrupts
from .endpoint import Endpoints
from .errors import DeliveryError, QueueFull
from .exchange import Exchange
from .futures import Done, NoRoom, Response, Sent, Steps, TaskParts
from .handlers import TIMER_S_MIN, Handlers
from .limits import CLOSE_TIMEOUT_S, POLL_S
from .link import FOREVER, Outlet
from .loop import Loop, State, refuse_generator, started
from .message import Message
from .spin import Spin
from .transports.local import inproc_names
from .transports.wakeup import SLEEP_S_MAX
from .transports.zeromq import SocketLink

logger = logging.getLogger("messenger")

# How often a socket that is being closed is asked whether it is: at first, and later.
SOCKET_POLL_S = 0.001
SOCKET_POLL_S_MAX = 0.02
# A socket sends what it has for at least so long, also when the time of a close is over.
LAST_LINGER_S = 0.05


_Place = tuple[Outlet, Message | None]


class _Guard:
    """The lock of a loop that only one thread uses: it checks that this is so."""

    def __init__(self) -> None:
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.thread_id = 0

    def acquire(self) -> None:
        running = asyncio._get_running_loop()
        if running is self.event_loop or self.event_loop is None:
            return
        # Between two runs of the event loop its thread may: so `asyncio.run` cancels what is left.
        if running is not None or threading.get_ident() != self.thread_id:
            raise RuntimeError(
                "an AsyncMessenger may only be used on the event loop that it was first used on; from another thread "
                "call it by asyncio.run_coroutine_threadsafe or loop.call_soon_threadsafe"
            )

    def release(self) -> None:
        return

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        return


class TaskLoop(Loop):
    """The turns of one messenger on an event loop, and the tasks of its callbacks."""

    _event_loop: asyncio.AbstractEventLoop

    def __init__(self, name: str, exchange: Exchange, endpoints: Endpoints, attach_links: Callable[[], None]) -> None:
        super().__init__(name, exchange, endpoints, attach_links)
        self._is_turn_planned = False
        # Whether `_look` will be called before the event loop can sleep.
        self._is_look_planned = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = FOREVER
        backlog_max = endpoints.limits.worker_backlog_max
        self._handlers = Handlers(exchange, backlog_max, self._report, self._plan_last_turn)
        # Of sockets that are being closed.
        self._closing_sockets: set[asyncio.Task[None]] = set()
        # By outlet, and message whose response comes in parts: who waits for room, and how to send then.
        self._room_wanted: dict[_Place, OrderedDict[asyncio.Future[Any], Callable[[], object]]] = {}
        self._closer: asyncio.Task[None] | None = None
        self._spin = Spin()
        # Set after each turn while the messenger closes.
        self._turned = asyncio.Event()

    def _set_lock(self) -> None:
        self.lock = self._guard = _Guard()
        self.acquire, self.release = self._guard.acquire, self._guard.release

    # Life.

    def start(self) -> None:
        """Serve on the event loop that runs now."""
        event_loop = asyncio._get_running_loop()
        if event_loop is None:
            raise RuntimeError("an AsyncMessenger needs a running event loop; without one, use Messenger")
        # Where asyncio takes Ctrl-C itself, as in `asyncio.run`, this leaves it alone.
        interrupts.install()
        self._event_loop = self._guard.event_loop = self._handlers.event_loop = event_loop
        self._guard.thread_id = threading.get_ident()
        self.state = State.RUNNING
        started.add(self)
        inproc_names.watch(self)

    def is_own_thread(self) -> bool:
        """Return whether the caller is a callback that is a plain function. No lock needed."""
        # Other threads may ask whether a message was cancelled, also while a callback runs.
        return self._callback_at != FOREVER and self._guard.thread_id == threading.get_ident()

    def close(self, timeout: float) -> Awaitable[None]:
        """Stop when all is settled or `timeout` is over; what is returned waits for that, except in a callback."""
        with self.lock:
            if self.state is State.NEW:
                self.state = State.CLOSED
            elif self.state is State.RUNNING and self._event_loop.is_closed():
                self._finish_close()
            elif self.state is State.RUNNING:
                self.state = State.CLOSING
                self.close_at = monotonic() + timeout
                self._exchange.ask_all()
                self._announce_room()
                self._plan_turn()
                self._start_closer()
            if self._closer is None or self.is_own_thread():
                return Done()
            task = asyncio.current_task(self._event_loop)
            return Done() if self._handlers.runs_in(task) else asyncio.shield(self._closer)

    def begin_close(self, timeout: float) -> None:
        """Close as `close` does, at the end of the program, if a daemon thread still runs the event loop."""
        if self._runs_elsewhere():
            self._event_loop.call_soon_threadsafe(self.close, timeout)

    def end_at_exit(self) -> None:
        """Wait for a thread that still runs the event loop, for a while; if none does, say goodbye here."""
        give_up_at = monotonic() + 2 * CLOSE_TIMEOUT_S
        while self._runs_elsewhere():
            if (self._closer is not None and self._closer.done()) or monotonic() >= give_up_at:
                return
            sleep(SOCKET_POLL_S)
        self._guard.event_loop = None
        self._finish_close(linger_s=CLOSE_TIMEOUT_S)

    def _runs_elsewhere(self) -> bool:
        return self._event_loop.is_running() and self._guard.thread_id != threading.get_ident()

    async def _close(self) -> None:
        while not self._is_over():
            self._turned.clear()
            waiting = asyncio.ensure_future(self._turned.wait())
            await asyncio.wait((waiting,), timeout=min(max(0.0, self.close_at - monotonic()), SLEEP_S_MAX))
            waiting.cancel()
        # Or each that is cancelled would make room for one that waits.
        self._handlers.discard_waiting()
        await self._handlers.end(0.0)
        self._stop()
        started.discard(self)
        links = [link for endpoint in self._endpoints.detach_all() for link in endpoint.links]
        self.close_links(links, max(LAST_LINGER_S, self.close_at - monotonic()))
        # What the end of all messages has started.
        await self._handlers.end(CLOSE_TIMEOUT_S)
        await asyncio.gather(*self._closing_sockets)

    def _start_closer(self) -> None:
        self._closer = asyncio.Task(self._close(), loop=self._event_loop, name=f"{self._name} closes")  # Never eager.
        self._closer.add_done_callback(self._finish_close)

    def _finish_close(self, _: object = None, linger_s: float = LAST_LINGER_S) -> None:
        """Do at once what the task that closes has not done, because it was cancelled or nothing runs it."""
        if self.state is not State.CLOSED:
            self._stop()
        started.discard(self)
        self._endpoints.close_all(linger_s)

    def _is_over(self) -> bool:
        return monotonic() >= self.close_at or (not self._handlers and super()._is_over())

    def _fail(self, error: Exception) -> None:
        """End the messenger, because of an error in the loop itself."""
        if self.state is not State.CLOSED:
            self._note_failure(error)
            self._stop()
            if self._closer is None:
                self._start_closer()
            self._turned.set()

    def _stop(self) -> None:
        """End every message and give up all links."""
        self.state = State.CLOSED
        self._remove_all()
        self._handlers.discard_waiting()
        while self._exchange.calls:
            self._run_calls()
        inproc_names.unwatch(self)
        if self._timer is not None:
            self._timer.cancel()

    # Links.

    def _watch(self, descriptor: int) -> None:
        link = self._links.get(descriptor)
        if link is not None:
            self._event_loop.add_reader(descriptor, self._handle_input, link)
        else:
            self._event_loop.add_reader(descriptor, self._handle_news, descriptor)

    def _unwatch(self, descriptor: int) -> None:
        if not self._event_loop.is_closed():
            self._event_loop.remove_reader(descriptor)

    def ask_attention(self) -> None:
        """Have a turn soon. Any thread, no lock needed."""
        self.call_there(self._plan_turn)

    def call_there(self, function: Callable[[], object]) -> None:
        """Call a function on the event loop: now if that runs here, else soon. Any thread, no lock needed."""
        if not self.is_serving:
            return
        if asyncio._get_running_loop() is self._event_loop:
            function()
            return
        try:
            self._event_loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not self._event_loop.is_closed():
                raise

    def close_links(self, links: Sequence[SocketLink], linger_s: float = CLOSE_TIMEOUT_S) -> Awaitable[None]:
        """Close sockets that nobody uses any more; what is returned waits until their endpoints are free."""
        ends_at = monotonic() + max([link.begin_close(linger_s) for link in links], default=0.0)
        task = asyncio.Task(self._await_stop(links, ends_at), loop=self._event_loop)
        self._closing_sockets.add(task)

        def end_close(_: object) -> None:
            self._closing_sockets.discard(task)
            for link in links:
                link.end_close()

        # Also of a task that is cancelled before its first step.
        task.add_done_callback(end_close)
        return asyncio.shield(task)

    async def _await_stop(self, links: Sequence[SocketLink], ends_at: float) -> None:
        pause_s = SOCKET_POLL_S
        while not all([link.has_stopped() for link in links]) and monotonic() < ends_at:  # noqa: C419  # Ask all.
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, SOCKET_POLL_S_MAX)

    # Turns.

    def _plan_turn(self) -> None:
        if not self._is_turn_planned:
            self._is_turn_planned = True
            self._event_loop.call_soon(self._turn)

    def _plan_last_turn(self) -> None:
        if self.state is not State.CLOSED:
            self._plan_turn()

    def _turn(self) -> None:
        self._is_turn_planned = False
        self._have_turn(())

    def _have_turn(self, descriptors: Iterable[int]) -> None:
        try:
            self._take_input(descriptors)
            self._finish_turn()
        except Exception as error:
            self._fail(error)

    def _handle_news(self, descriptor: int) -> None:
        self._have_turn((descriptor,))

    def _handle_input(self, link: SocketLink) -> None:
        # Deadlines have the timer, and what else a turn looks after plans one; so this need not do all that they do.
        exchange = self._exchange
        self._spin.end()
        try:
            link.receive()
            self._touched.add(link)
            if exchange.is_urgent:
                exchange.flush(monotonic())
            if self._room_wanted_count:
                self._announce_room()  # Before a task can send, and overtake those that wait.
            if exchange.calls or self.state is not State.RUNNING:
                self._finish_turn()
            elif not (self._is_look_planned or self._is_turn_planned):
                # What came has settled futures, and the tasks that await them run before this does. If they send, that
                # answers what came, and the events are read once for both.
                self._is_look_planned = True
                self._event_loop.call_soon(self._look)
        except Exception as error:
            self._fail(error)

    def _look(self) -> None:
        self._is_look_planned = False
        try:
            self._look_again()
        except Exception as error:
            self._fail(error)

    def _handle_timer(self) -> None:
        self._timer = None
        self._timer_at = FOREVER
        self._turn()

    def _finish_turn(self) -> None:
        """Run callbacks and send, and see to it that there will be another turn if there is a reason."""
        if self.state is State.CLOSED:
            return
        try:
            self._run_calls()
        finally:
            self._callback_at = FOREVER
            if self._processed:
                self._note_processed()
            self._look_again()
        if self.asks:
            self.asks = False
            self._spin.begin(self._event_loop)
        if self.state is State.CLOSING:
            self._turned.set()

    def _look_again(self) -> None:
        """Read the events of what was used; plan a turn for input and callbacks, and set the timer for deadlines."""
        if self.state is State.CLOSED:
            return  # The event loop may have ended, too.
        exchange = self._exchange
        if self._read_events() or exchange.calls:
            self._plan_turn()
        deadline_at = exchange.next_deadline_at
        if deadline_at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline_at
            delay_s = min(max(TIMER_S_MIN, deadline_at - monotonic()), SLEEP_S_MAX)
            self._timer = self._event_loop.call_later(delay_s, self._handle_timer)

    def answer(self, message: Message, contents: bytes) -> Any:
        """Do what `send_message(message, contents)` does; see there."""
        if message.credit is not None and self.has_waiting(message):
            return self._messenger.send_message(message, contents)
        sent = super().answer(message, contents)
        return Sent(sent) if type(sent) is int else sent

    def poll(self, now: float) -> None:
        """Take input in the middle of a callback that is a plain function, if not long after the last time."""
        if now >= self._poll_at and self.state is not State.CLOSED:
            self._poll_at = now + POLL_S
            self._touched.update(self._links.values())
            self._read_events()
            self._take_input(())

    def announce_calls(self) -> None:
        """Have callbacks run in the next turn."""
        if self._exchange.calls and self.state is not State.CLOSED:
            self._plan_turn()

    # Sending.

    def flush(self) -> None:
        """Give what waits to the network."""
        self._exchange.flush(monotonic())
        if not self._is_look_planned:
            self._look_again()
        elif self._room_wanted_count:
            self._announce_room()

    def flush_soon(self, outlet: Outlet, now: float) -> None:
        """Send what was queued: at once if nothing is on its way there, else together with what follows.

        In a callback that is a plain function messages wait for the end of the turn, and so they do for one that is
        planned.
        """
        if self._is_turn_planned or self._callback_at != FOREVER:
            return
        if outlet.is_quiet:
            self.flush()
        elif not self._is_look_planned:
            self._plan_turn()

    def await_outcome(self, waiter: Response[Any], outlet: Outlet, deadline_at: float) -> None:
        """Send what was queued; the core settles the waiter."""
        if self._exchange.is_urgent:
            self.flush()
        elif not self._is_turn_planned:
            is_quiet = outlet.is_quiet
            self.flush_soon(outlet, 0.0)
            if is_quiet:
                self._spin.begin(self._event_loop)

    def wait_room(self, outlet: Outlet, deadline_at: float, message: Message | None = None) -> None:
        """Tell the caller to wait; a plain function cannot."""
        why = self._exchange.why_held_up(outlet, message)
        if self.is_own_thread():
            raise QueueFull(f"{why}, and a callback that is a plain function cannot wait; make it a coroutine function")
        raise NoRoom(outlet, message, deadline_at, why) from None

    async def await_part(self, parts: TaskParts, deadline_at: float) -> None:
        """Wait until there is something to take of a stream, or its deadline has ended it."""
        if parts.waiter is not None:
            raise RuntimeError("another task waits for the next part of this stream; give each task its own")
        self._exchange.await_part(parts, deadline_at)
        self._look_again()
        parts.waiter = self._event_loop.create_future()
        try:
            await parts.waiter
        finally:
            parts.waiter = None

    def make_future(self) -> Steps[Any]:
        """Return a future of the event loop."""
        return Steps(loop=self._event_loop)

    def send_later(self, full: NoRoom, future: asyncio.Future[Any], send: Callable[[], object]) -> None:
        """Call `send` when there is room, after those who wait already; settle the future if there is none in time.

        Raises:
            QueueFull: Too many wait already.
        """
        waiting = self._room_wanted.setdefault((full.outlet, full.message), OrderedDict())
        if len(waiting) >= self._endpoints.limits.queue_msgs_max:
            raise QueueFull(f"{len(waiting)} calls wait for room in the queue to {full.outlet}, that is queue_msgs_max")
        waiting[future] = send
        self._room_wanted_count += 1

        def expire() -> None:
            if not future.done():
                future.set_exception(full)

        def forget(_: object) -> None:
            timer.cancel()
            if waiting.pop(future, None) is not None:
                self._room_wanted_count -= 1

        timer = self._event_loop.call_later(min(max(0.0, full.deadline_at - monotonic()), SLEEP_S_MAX), expire)
        future.add_done_callback(forget)

    def has_waiting(self, message: Message) -> bool:
        """Return whether parts of the response to a message wait for room, so that the next must wait behind them."""
        return bool(self._room_wanted.get((message.link, message)))

    def let_go(self, message: Message) -> None:
        """Count a message as processed though its task goes on."""
        self._handlers.let_go(message)

    def _announce_room(self) -> None:
        """Send for those who wait for room, as far as there is."""
        if self._event_loop.is_closed():
            self._room_wanted.clear()  # Nobody waits any more.
        # What is sent here does not come back here.
        self._room_wanted_count = 0
        for place, waiting in list(self._room_wanted.items()):
            while waiting and (self.state is not State.RUNNING or not self._exchange.is_held_up(*place)):
                future, send = waiting.popitem(last=False)
                if future.done():
                    continue
                try:
                    send()
                except NoRoom:
                    waiting[future] = send
                    waiting.move_to_end(future, last=False)
                    break
                except Exception as error:
                    future.set_exception(error)
            if not waiting:
                del self._room_wanted[place]
        self._room_wanted_count = sum(map(len, self._room_wanted.values()))

    def _take_result(self, callback: Any, argument: Any, result: Any) -> None:
        """Run a coroutine that a callback has returned."""
        if type(result) is not CoroutineType:
            refuse_generator(callback, result)
        self._handlers.take_result(callback, argument, result)

    def _report(self, callback: Any, argument: Message | DeliveryError, error: BaseException) -> None:
        """Tell of a callback that raised. A Ctrl-C goes on to the event loop, whose it is."""
        super()._report(callback, argument, error)
        if isinstance(error, KeyboardInterrupt):
            raise error
