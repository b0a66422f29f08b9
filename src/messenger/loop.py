"""The server loop of a `Messenger`, and the lock and the threads around it.

The loop's own thread repeats: receive what is there, process, flush, run callbacks with no lock held, sleep until the
next deadline or wake-up. One lock guards the core and all sockets; whoever holds it may use them. Any thread sends by
itself, without waking the loop. A thread that waits for an outcome **leads** meanwhile, if nobody else does: it takes
the input itself (`transports/wakeup.py`), which saves two thread switches. Callbacks always run on the loop's own
thread, so that what a callback may rely on does not depend on who waits.

What must never happen here: a callback that runs with the lock held; a sleep with a touched link whose events were
not read again; a socket that two threads use without the lock.
"""

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from time import monotonic
from typing import Any

from .errors import DeliveryError, QueueFull
from .exchange import BATCH_PROCESSED, Exchange
from .limits import ACK_DELAY_S, CLOSE_TIMEOUT_S, FLUSH_S, POLL_S
from .link import FOREVER, Outlet
from .message import Message
from .transports.local import inproc_names
from .transports.wakeup import SLEEP_S_MAX, Wakeup
from .transports.zeromq import SocketLink
from .waiting import ThreadWaiter

logger = logging.getLogger("messenger")


class State(Enum):
    """Of a loop, and so of its messenger."""

    NEW = "new"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"
    FORKED = "forked"


class Loop:
    """The thread, the lock and the links of one messenger. Methods are called with `lock` held unless they say
    otherwise.

    Args:
        name: Of the thread.
        exchange: The core that it drives.
        attach_links: Called when an inproc listener has come or gone.
        is_idle: Asked while closing: whether nothing is going on outside of the core.
        on_stop: Called once, without the lock, on the loop's thread, to close the links within so many seconds.
    """

    def __init__(
        self,
        name: str,
        exchange: Exchange,
        attach_links: Callable[[], None],
        is_idle: Callable[[], bool],
        on_stop: Callable[[float], None],
    ) -> None:
        self._set_lock()
        self.state = State.NEW
        self.close_at = FOREVER
        self._exchange = exchange
        self._attach_links = attach_links
        self._is_idle = is_idle
        self._on_stop = on_stop
        self.thread_id = 0
        self._own_thread = threading.Thread(target=self._serve, name=name, daemon=True)
        # Notified when a full queue gets room, and when a leader leaves while the messenger closes.
        self._changed = threading.Condition(self.lock)
        self._wakeup: Wakeup
        # By descriptor: of the sockets, and of their monitors.
        self._links: dict[int, SocketLink] = {}
        self._monitored: dict[int, SocketLink] = {}
        # Links whose events must be read before a sleep, and links that are known to have input.
        self._touched: set[SocketLink] = set()
        self._readable: set[SocketLink] = set()
        self._leader: ThreadWaiter | None = None
        self._followers: deque[ThreadWaiter] = deque()
        # Whether the leader, and the loop's thread, sleep; only then need they be woken.
        self._leader_sleeps = False
        self._thread_sleeps = False
        self._wake_at = FOREVER
        self._thread_wake_at = FOREVER
        # What `note_processed` is to be called with.
        self._processed: list[Any] = []
        # When the callback that runs now began.
        self._callback_at = FOREVER
        self._must_attach = False
        self._poll_at = 0.0
        self._room_wanted_count = 0

    def _set_lock(self) -> None:
        self.lock = threading.Lock()
        self.acquire, self.release = self.lock.acquire, self.lock.release

    # Life.

    def start(self) -> None:
        """Start the thread."""
        self._wakeup = Wakeup()
        self.state = State.RUNNING
        _started.add(self)
        self._own_thread.start()
        self.thread_id = self._own_thread.ident or 0
        inproc_names.watch(self)

    def close(self, timeout: float) -> None:
        """Stop when all is settled or `timeout` is over. Called without the lock; waits, except in a callback."""
        self.begin_close(timeout)
        if self._own_thread.is_alive() and not self.is_own_thread():
            self._own_thread.join(min(timeout, SLEEP_S_MAX) + CLOSE_TIMEOUT_S)
            if self._own_thread.is_alive():
                logger.error(
                    "! %s: a callback still runs after the close; nothing is sent any more", self._own_thread.name
                )

    def begin_close(self, timeout: float) -> None:
        """Close as `close` does, but do not wait. Called without the lock."""
        with self.lock:
            if self.state is State.NEW:
                self.state = State.CLOSED
            if self.state is State.RUNNING:
                self.state = State.CLOSING
                self.close_at = monotonic() + timeout
                self._exchange.ask_all()
                self._changed.notify_all()
                self._wakeup.ask_attention()
                self._wakeup.announce_calls()

    def mark_forked(self) -> None:
        """Never work again: this is the child of a fork. The thread lives in the parent, and may hold the lock."""
        self._set_lock()
        self.state = State.FORKED

    def is_own_thread(self) -> bool:
        """Return whether the caller is a callback on the loop's thread. No lock needed."""
        return self.thread_id == threading.get_ident()

    # Links.

    def add(self, link: SocketLink) -> None:
        """Receive from a link from now on."""
        self._exchange.links.add(link)
        self._links[link.descriptor] = link
        self._monitored[link.monitor_descriptor] = link
        self._wakeup.add(link.descriptor)
        self._wakeup.add(link.monitor_descriptor)
        link.touch = self.touch
        self._touched.add(link)
        # A descriptor tells of nothing before the events were read once.
        link.read_news()
        self._wakeup.ask_attention()

    def remove(self, link: SocketLink, why: str) -> None:
        """Forget a link, before it is closed, and end its messages."""
        self._exchange.close_link(link, why, monotonic())
        self._wakeup.remove(link.descriptor)
        self._wakeup.remove(link.monitor_descriptor)
        del self._links[link.descriptor]
        del self._monitored[link.monitor_descriptor]
        self._touched.discard(link)
        self._readable.discard(link)
        self.announce_calls()
        self._changed.notify_all()

    def touch(self, link: SocketLink) -> None:
        """Have a link's events read before the next sleep."""
        self._touched.add(link)

    def notice_inproc_change(self) -> None:
        """Look again which inproc endpoints have a listener. For the transports; any thread, no lock held or taken."""
        self._must_attach = True
        if self.state in (State.RUNNING, State.CLOSING):
            self._wakeup.ask_attention()

    # Sending.

    def flush(self) -> None:
        """Give what waits to the network; whoever sleeps is woken if that brought work."""
        exchange = self._exchange
        exchange.flush(monotonic())
        # The flush may have used up the descriptor's signal for input that came meanwhile.
        if self._leader_sleeps and (self._read_events() or exchange.next_deadline_at < self._wake_at):
            self._wakeup.ask_attention()
        self.announce_calls()
        if self._room_wanted_count:
            self._changed.notify_all()

    def flush_soon(self, outlet: Outlet, now: float) -> None:
        """Send what another thread than the loop's has queued, or leave that to the loop's thread.

        In a callback messages wait for the end of the turn, so that one frame holds what it sends. In other threads
        they leave at once, but behind messages that are on their way they wait for the loop as well, so that a thread
        which sends in a tight loop fills frames; unless the loop is held up by a callback.
        """
        if outlet.is_quiet or now - self._callback_at > FLUSH_S:
            self.flush()
        elif self._thread_sleeps:
            self._thread_sleeps = False
            self._wakeup.announce_calls()

    def announce_calls(self) -> None:
        """Wake the loop's thread if it sleeps and there are callbacks to run."""
        if self._thread_sleeps and self._exchange.calls:
            self._thread_sleeps = False
            self._wakeup.announce_calls()

    def wait_room(self, outlet: Outlet, deadline_at: float) -> None:
        """Wait until a full queue takes a message. In a callback it raises at once, since it would wait for itself.

        Raises:
            QueueFull: There was no room before the deadline.
        """
        if self.is_own_thread():
            raise QueueFull(f"the queue to {outlet} is full ({len(outlet.queue)} messages), and a callback cannot wait")
        self._room_wanted_count += 1
        try:
            while self._exchange.is_full(outlet) and self.state is State.RUNNING:
                if not self._changed.wait(deadline_at - monotonic()):
                    raise QueueFull(f"the queue to {outlet} stayed full ({len(outlet.queue)} messages) to the timeout")
        finally:
            self._room_wanted_count -= 1

    # Receiving; only the leader calls these.

    def _take_input(self, descriptors: list[int]) -> None:
        """Receive what is there, of links with input and those with these descriptors, and end what has expired."""
        for descriptor in descriptors:
            link = self._links.get(descriptor)
            if link is not None:
                self._readable.add(link)
            elif descriptor in self._monitored:
                self._monitored[descriptor].read_news()
        exchange = self._exchange
        if self._readable:
            links, self._readable = self._readable, set()
            for link in links:
                link.receive()
            self._touched |= links
        if self._must_attach:
            self._must_attach = False
            self._attach_links()
        now = monotonic()
        if exchange.next_deadline_at <= now:
            exchange.handle_deadline(now)
        if exchange.is_urgent:
            # Acknowledgements that the other end waits for do not wait for callbacks.
            exchange.flush(now)
        if self._room_wanted_count:
            self._changed.notify_all()

    def _read_events(self) -> bool:
        """Send what waits and read touched links' events, as is due before a sleep; return whether there is input."""
        exchange = self._exchange
        while self._touched or exchange.is_dirty:
            if exchange.is_dirty:
                exchange.flush(monotonic())
            touched, self._touched = self._touched, set()
            for link in touched:
                if link.has_input():
                    self._readable.add(link)
        if self._room_wanted_count:
            self._changed.notify_all()
        return bool(self._readable)

    def poll(self, now: float) -> None:
        """Take input in the middle of a callback, if nobody else does and not long after the last time.

        What comes is processed, and what that runs waits for its turn. Called without the lock.
        """
        if now >= self._poll_at:
            self._poll_at = now + POLL_S
            with self.lock:
                if self._leader is None and self.state in (State.RUNNING, State.CLOSING):
                    self._read_events()
                    self._take_input(self._wakeup.wait_input(0))

    # Waiting in another thread.

    def await_outcome(self, waiter: ThreadWaiter, deadline_at: float) -> None:
        """Send what is queued and wait until a waiter is settled: lead if nobody does, else follow."""
        try:
            if self._leader is not None:
                self.flush()
            while not waiter.done:
                if self.state is not State.RUNNING:
                    # The loop's own thread ends everything now.
                    if self._leader is waiter:
                        self._leave_lead()
                    self._follow(waiter, deadline_at)
                    continue
                if self._leader is None:
                    self._leader = waiter
                    self._leader_sleeps = False
                    self._wakeup.take_lead()
                if self._leader is waiter:
                    self._lead(waiter)
                else:
                    self._follow(waiter, deadline_at)
        finally:
            if not waiter.done:
                self._exchange.forget(waiter)
                self.flush()
            if self._leader is waiter:
                self._leave_lead()

    def _lead(self, waiter: ThreadWaiter) -> None:
        """Take input once, if need be after a sleep until there is some."""
        if self._read_events():
            # What came may have to be answered, so nobody sleeps before the events were read again.
            self._take_input([])
            self.announce_calls()
            return
        self.announce_calls()
        self._wake_at = self._exchange.next_deadline_at
        self._leader_sleeps = True
        try:
            # In here, so that a Ctrl-C that is raised as it returns leaves with the lock taken, as all else expects.
            self.lock.release()
            descriptors = self._wakeup.wait_input(max(0.0, self._wake_at - monotonic()))
        finally:
            self.lock.acquire()
            self._leader_sleeps = False
        self._take_input(descriptors)

    def _follow(self, waiter: ThreadWaiter, deadline_at: float) -> None:
        """Sleep until the leader settles the waiter or hands the lead over, or the deadline is over."""
        wake = threading.Lock()
        wake.acquire()
        waiter.wake = wake
        self._followers.append(waiter)
        try:
            self.lock.release()
            wake.acquire(timeout=max(0.001, deadline_at - monotonic()))
        finally:
            self.lock.acquire()
            waiter.wake = None
            if waiter in self._followers:
                self._followers.remove(waiter)
        now = monotonic()
        if not waiter.done and now >= deadline_at:
            # Whoever leads may be in a long callback.
            self._exchange.handle_deadline(now)

    def _leave_lead(self) -> None:
        if self._followers and self.state is State.RUNNING:
            self._leader = self._followers.popleft()
            self._leader.wake_up()
            return
        self._leader = None
        has_input = self._read_events()
        self._wakeup.give_lead_back()
        # The loop's thread leads again; it may sleep on until the time that it chose when it went to sleep.
        self._leader_sleeps = self._thread_sleeps
        self._wake_at = self._thread_wake_at
        is_late = self._exchange.next_deadline_at < self._wake_at
        if has_input or is_late or self._exchange.calls or self.state is not State.RUNNING:
            self._wakeup.announce_calls()
            self._changed.notify_all()

    # The loop's own thread; called without the lock.

    def _serve(self) -> None:
        wake_at: float | None = 0.0
        while wake_at is not None:
            with self.lock:
                self._thread_sleeps = False
                if self._leader is None:
                    self._leader_sleeps = False
                    self._take_input(self._wakeup.wait_input(0))
            self._run_calls()
            with self.lock:
                wake_at = self._plan_sleep()
            if wake_at:
                self._wakeup.sleep(max(0.0, wake_at - monotonic()))
        self._stop()

    def _plan_sleep(self) -> float | None:
        """Return until when the thread may sleep, 0 if there is something to do, None if all is over."""
        self._note_processed()
        if self.state is State.CLOSING and self._is_over():
            return None
        leads = self._leader is None
        has_input = self._read_events()
        if has_input and self._leader_sleeps and not leads:
            self._wakeup.ask_attention()
        if self._exchange.calls or (leads and has_input):
            return 0.0
        deadline_at = self._exchange.next_deadline_at
        if leads:
            self._wake_at = wake_at = min(deadline_at, self.close_at)
            self._leader_sleeps = True
        else:
            # Whoever leads minds the deadlines. This thread wakes for them too, if not often: one that sleeps for ever
            # would have to be woken each time that the lead comes back with a deadline.
            now = monotonic()
            wake_at = min(deadline_at if deadline_at > now else now + ACK_DELAY_S, self.close_at)
        self._thread_wake_at = wake_at
        self._thread_sleeps = True
        return wake_at

    def _run_calls(self) -> None:
        calls = self._exchange.calls
        if not calls:
            return
        self._callback_at = now = monotonic()
        if now >= self._exchange.expires_at:
            with self.lock:
                self._exchange.drop_expired(now)
        flush_at = now + FLUSH_S
        # Only those that are there now: callbacks may add calls for ever, and input must have its turn.
        for _ in range(len(calls)):
            callback, argument = calls.popleft()
            if callback is BATCH_PROCESSED:
                self._processed.append(argument)
                continue
            try:
                callback(argument)
            except BaseException as error:
                self._report(callback, argument, error)
            self._callback_at = now = monotonic()
            if now >= flush_at:
                # What earlier callbacks sent must not wait for slow ones.
                with self.lock:
                    self._note_processed()
                    self.flush()
                if now >= self._exchange.expires_at:
                    break
                flush_at = now + FLUSH_S
        self._callback_at = FOREVER

    def _note_processed(self) -> None:
        """Have acknowledged what was run; with the lock, which is taken only once for all that a turn has to do."""
        for session, incarnation, number in self._processed:
            self._exchange.note_processed(session, incarnation, number)
        self._processed.clear()

    def run_in_worker(self, callback: Callable[[Message], object], message: Message) -> None:
        """Run a user's callback in a worker thread, survive it, and note that the message is processed."""
        if message.is_given_up(monotonic()) and not message.is_response:
            self.count_drop("expired")
        else:
            try:
                callback(message)
            except BaseException as error:
                self._report(callback, message, error)
        with self.lock:
            self._exchange.note_one_processed(message)
            if self.state in (State.RUNNING, State.CLOSING):
                self.flush()
                if self.state is State.CLOSING:
                    self._wakeup.announce_calls()

    def _report(self, callback: Any, argument: Message | DeliveryError, error: BaseException) -> None:
        """Tell of a callback that raised; whatever it was, the loop serves others and goes on."""
        logger.error("! a callback raised: %r on %r", callback, argument, exc_info=error)
        with self.lock:
            self._exchange.report_raised(argument, error)

    def count_drop(self, kind: str) -> None:
        """Count a message that goes no further."""
        with self.lock:
            self._exchange.drop(kind)

    def _is_over(self) -> bool:
        if monotonic() >= self.close_at:
            return True
        return self._is_idle() and self._exchange.is_settled

    def _stop(self) -> None:
        with self.lock:
            self.state = State.CLOSED
            for link in list(self._links.values()):
                self.remove(link, "the messenger was closed")
            self._wakeup.ask_attention()
            while self._leader is not None:
                self._changed.wait()
        while self._exchange.calls:
            self._run_calls()
        inproc_names.unwatch(self)
        self._on_stop(max(0.05, self.close_at - monotonic()))
        with self.lock:
            self._wakeup.close()
        _started.discard(self)


# Loops whose threads run.
_started: set[Loop] = set()


def _close_at_exit() -> None:
    loops = list(_started)
    # All at once, so that many do not take many seconds.
    for loop in loops:
        loop.begin_close(CLOSE_TIMEOUT_S)
    for loop in loops:
        loop.close(CLOSE_TIMEOUT_S)


def _mark_forked() -> None:
    for loop in _started:
        loop.mark_forked()
    _started.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_mark_forked)
