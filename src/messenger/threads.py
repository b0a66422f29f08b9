"""The server loop of a `Messenger`: a thread of its own, the lock, and who leads.

One lock guards the core and all sockets; whoever holds it may use them. Any thread sends by itself, without waking the
loop. A thread that waits for an outcome **leads** meanwhile, if nobody else does: it takes the input itself
(`transports/wakeup.py`), which saves two thread switches. Callbacks run on the loop's own thread, so that what they may
rely on does not depend on who waits; only that of a message that a thread waits for by `Messenger.wait` runs there.
While they hold up the loop, one thread of the process looks at what comes by tcp, so that no peer can make use of it,
and sends what waits.

What must never happen here: a socket that two threads use without the lock.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from . import interrupts
from .endpoint import Endpoints
from .errors import DeliveryError, QueueFull
from .exchange import Exchange
from .limits import ACK_DELAY_S, CLOSE_TIMEOUT_S, FLUSH_S, HELD_UP_S, POLL_S, STAND_IN_S
from .link import FOREVER, Outlet
from .loop import Loop, State, started
from .message import Message
from .transports.local import inproc_names
from .transports.wakeup import SLEEP_S_MAX, Wakeup
from .waiting import ThreadParts, ThreadWaiter

logger = logging.getLogger("messenger")


class _Guard:
    """The lock for `with`, given back as by `release`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        self._loop.acquire()

    def __exit__(self, *_: object) -> None:
        self._loop.release()


class ThreadLoop(Loop):
    """The thread and the lock of one messenger. Methods are called with `lock` held unless they say otherwise."""

    uses_threads = True

    def __init__(self, name: str, exchange: Exchange, endpoints: Endpoints, attach_links: Callable[[], None]) -> None:
        super().__init__(name, exchange, endpoints, attach_links)
        self._own_thread = threading.Thread(target=self._serve, name=name, daemon=True)
        # Of threads that sleep until a full queue gets room, or a leader has left while the messenger closes.
        self._sleepers: list[threading.Lock] = []
        # Whether a close has not waited for a callback any longer.
        self._is_left = False
        self._wakeup: Wakeup
        self._leader: ThreadWaiter | ThreadParts | None = None
        self._followers: deque[ThreadWaiter | ThreadParts] = deque()
        # Whether the leader, and the loop's thread, sleep; only then need they be woken.
        self._leader_sleeps = False
        self._thread_sleeps = False
        # Whether its sleep is to be a short one, because other threads go on sending.
        self._naps = False
        self._wake_at = FOREVER
        self._thread_wake_at = FOREVER

    def _set_lock(self) -> None:
        self._lock = threading.Lock()
        self.lock = _Guard(self)
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def may_wait(self, timeout_s: float) -> bool:
        """Return whether this thread may wait for the lock: not a signal handler that has interrupted who holds it.

        Who has the lock for longer than `timeout_s` counts as such. Called without the lock.
        """
        if not self._lock.acquire(timeout=timeout_s):
            return False
        self.release()
        return True

    def interrupt_at_release(self) -> None:
        """Raise a deferred Ctrl-C when the main thread gives the lock back. For a signal handler: takes no lock."""

        def release() -> None:
            self._lock.release()
            is_main = threading.get_ident() == threading.main_thread().ident
            if is_main and not interrupts.is_shielded(sys._getframe()):
                self.release = self._lock.release
                if interrupts.take():
                    raise KeyboardInterrupt

        self.release = release

    # Life.

    def start(self) -> None:
        """Start the thread."""
        interrupts.install()
        self._wakeup = Wakeup()
        self.state = State.RUNNING
        started.add(self)
        self._own_thread.start()
        self.thread_id = self._own_thread.ident or 0
        _start_stand_in()
        inproc_names.watch(self)

    @interrupts.sleeps
    def close(self, timeout: float) -> None:
        """Stop when all is settled or `timeout` is over. Called without the lock; waits, except in a callback."""
        self.begin_close(timeout)
        if self.is_own_thread():
            return
        thread = self._own_thread
        for wait_s in (min(timeout, SLEEP_S_MAX), HELD_UP_S):
            if thread.is_alive():
                thread.join(wait_s)
        if thread.is_alive() and self._callback_at >= self.close_at:
            thread.join(CLOSE_TIMEOUT_S)  # It has begun to end, with callbacks that are told so.
        if thread.is_alive() and not self._is_left:
            self._is_left = True
            logger.error("! %s: a callback still runs after the close; nothing is sent any more", thread.name)

    def begin_close(self, timeout: float) -> None:
        """Close as `close` does, but do not wait. Called without the lock."""
        with self.lock:
            if self.state is State.NEW:
                self.state = State.CLOSED
            if self.state is State.RUNNING:
                self.state = State.CLOSING
                self.close_at = monotonic() + timeout
                self._exchange.ask_all()
                self._announce_room()
                self._wakeup.ask_attention()
                self._wakeup.announce_calls()

    def is_own_thread(self) -> bool:
        """Return whether the caller is a callback on the loop's thread. No lock needed."""
        return self.thread_id == threading.get_ident()

    def end_at_exit(self) -> None:
        """Wait for the thread, for a while, unless a close has done so in vain."""
        if not self._is_left:
            self.close(CLOSE_TIMEOUT_S)

    def look_if_held_up(self) -> None:
        """Look at the connections, and send what waits, if callbacks have kept the loop from it for long.

        Called without the lock.
        """
        if monotonic() < self._calls_at + STAND_IN_S:
            return
        with self.lock:
            if self.is_serving:
                for link in self._links.values():
                    if link.is_shared:
                        link.read_news()
                self._exchange.look_at = self._look_around(monotonic())
                self.flush()

    # What the loop sleeps on.

    def _watch(self, descriptor: int) -> None:
        self._wakeup.add(descriptor)

    def _unwatch(self, descriptor: int) -> None:
        self._wakeup.remove(descriptor)

    def ask_attention(self) -> None:
        """Wake whoever leads."""
        self._wakeup.ask_attention()

    def _announce_room(self) -> None:
        for wake in self._sleepers:
            wake.release()
        self._sleepers.clear()
        self._room_wanted_count = 0

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
            self._announce_room()

    def flush_soon(self, outlet: Outlet, now: float) -> None:
        """Send what another thread than the loop's has queued, or leave that to the loop's thread.

        In a callback messages wait for the end of the turn, so that one frame holds what it sends. In other threads
        they leave at once, but behind messages that are on their way they wait for the loop as well, so that a thread
        which sends in a tight loop fills frames; unless a callback has held the loop up for `FLUSH_S`. As long as they
        come, the loop's thread naps instead of sleeping: to be woken for some tens of messages each costs more than to
        send them.
        """
        if outlet.is_quiet or now - self._callback_at > FLUSH_S:
            self.flush()
        elif not self._flushes_soon:
            self._flushes_soon = self._naps = True
            self._thread_sleeps = False
            self._wakeup.announce_calls()

    def announce_calls(self) -> None:
        """Wake the loop's thread if it sleeps and there are callbacks to run, and a leader that has its outcome."""
        if self._thread_sleeps and self._exchange.calls:
            self._thread_sleeps = False
            self._wakeup.announce_calls()
        if self._leader_sleeps and self._leader is not None and self._leader.done:
            self._wakeup.ask_attention()  # It was settled by another thread, as by `cancel`.

    def wait_room(self, outlet: Outlet, deadline_at: float, message: Message | None = None) -> None:
        """Wait until a full queue takes a message, or a part of the response to a message.

        In a callback it raises at once, since it would wait for itself.

        Raises:
            QueueFull: There was no room before the deadline.
        """
        if self.is_own_thread():
            raise QueueFull(f"{self._exchange.why_held_up(outlet, message)}, and a callback cannot wait")
        if self._exchange.is_dirty:
            self.flush()  # That may make room.
        # When a close begins the caller looks whether it may still send; if so it waits on, until the close is over.
        state = self.state
        while self._exchange.is_held_up(outlet, message) and self.state is state:
            left_s = deadline_at - monotonic()
            if left_s <= 0:
                raise QueueFull(f"{self._exchange.why_held_up(outlet, message)}, and it stayed so to the timeout")
            self._sleep(left_s)

    def _sleep(self, timeout: float) -> None:
        """Sleep until something has changed, or `timeout` seconds are over."""
        wake = _locked()
        self._sleepers.append(wake)
        self._room_wanted_count = len(self._sleepers)
        self._give_way(wake, timeout)

    def _give_way(self, wake: threading.Lock, timeout: float) -> None:
        """Let others have the lock until `wake` is released, or `timeout` seconds are over."""
        try:
            self.release()
            _await(wake, timeout)
        finally:
            self.acquire()

    def poll(self, now: float) -> None:
        """Take input in the middle of a callback, if nobody else does and not long after the last time.

        What comes is processed, and what that runs waits for its turn. Called without the lock.
        """
        if now >= self._poll_at:
            self._poll_at = now + POLL_S
            with self._lock:
                if self._leader is None and self.is_serving:
                    self._read_events()
                    self._take_input(self._wakeup.wait_input(0))

    # Waiting in another thread.

    def await_outcome(self, waiter: ThreadWaiter | ThreadParts, outlet: Outlet, deadline_at: float) -> None:
        """Send what is queued and wait until a waiter is settled: lead if nobody does, else follow."""
        try:
            self.wait_for(waiter, deadline_at)
        finally:
            if not waiter.done:
                self._exchange.forget(waiter)
                self.flush()

    def wait_for(self, waiter: ThreadWaiter | ThreadParts, deadline_at: float, give_up_at: float = FOREVER) -> None:
        """Wait as `await_outcome` does, but no longer than to `give_up_at`; what is not settled then stays open."""
        try:
            if self._leader is not None:
                self.flush()
            while not waiter.done and monotonic() < give_up_at:
                if self.state is not State.RUNNING:
                    # The loop's own thread ends everything now.
                    if self._leader is waiter:
                        self._leave_lead()
                    self._follow(waiter, min(deadline_at, give_up_at))
                    continue
                if self._leader is None:
                    self._leader = waiter
                    self._leader_sleeps = False
                    self._wakeup.take_lead()
                if self._leader is waiter:
                    self._lead(waiter, give_up_at)
                else:
                    self._follow(waiter, min(deadline_at, give_up_at))
        finally:
            if self._leader is waiter:
                self._leave_lead()

    @interrupts.shields
    def run_here(self, callback: Callable[[Any], object], argument: Message | DeliveryError) -> None:
        """Run a callback in the thread that waited for it, and survive it, as the loop's own thread does.

        Called without the lock.
        """
        try:
            self._take_result(callback, argument, callback(argument))
        except BaseException as error:
            self._report(callback, argument, error)

    def _lead(self, waiter: ThreadWaiter | ThreadParts, give_up_at: float) -> None:
        """Take input once, if need be after a sleep until there is some, or until `give_up_at`."""
        if self._read_events():
            # What came may have to be answered, so nobody sleeps before the events were read again.
            self._take_input([])
            self.announce_calls()
            return
        self.announce_calls()
        if waiter.done:
            return  # What was to be sent could not be, which settled it.
        self._wake_at = min(self._exchange.next_deadline_at, give_up_at)
        self._leader_sleeps = True
        try:
            self.release()
            descriptors = self._wakeup.wait_input(max(0.0, self._wake_at - monotonic()))
        finally:
            self.acquire()
            self._leader_sleeps = False
        self._take_input(descriptors)

    def _follow(self, waiter: ThreadWaiter | ThreadParts, deadline_at: float) -> None:
        """Sleep until the leader settles the waiter or hands the lead over, or the deadline is over."""
        waiter.wake = _locked()
        self._followers.append(waiter)
        try:
            self._give_way(waiter.wake, max(0.001, deadline_at - monotonic()))
        finally:
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
            self._announce_room()

    # The loop's own thread; called without the lock.

    def _serve(self) -> None:
        try:
            self._serve_turns()
        except BaseException as error:
            self._note_failure(error)
        self._stop()

    def _serve_turns(self) -> None:
        wake_at: float | None = 0.0
        while wake_at is not None:
            with self._lock:
                self._thread_sleeps = False
                self._flushes_soon = True
                self._naps = self._naps and self._exchange.is_dirty
                if self._naps:
                    self._exchange.flush(monotonic())  # Before callbacks, which may take long.
                if self._leader is None:
                    self._leader_sleeps = False
                    self._take_input(self._wakeup.take_ready())
            self._run_calls()
            with self._lock:
                wake_at = self._plan_sleep()
            if wake_at:
                self._wakeup.sleep(max(0.0, wake_at - monotonic()), self.asks and self._leader is None)
                self.asks = False

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
        if self._naps:
            deadline_at = min(deadline_at, monotonic() + FLUSH_S)
        self._flushes_soon = self._naps
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

    def run_in_worker(self, callback: Callable[[Message], object], message: Message) -> None:
        """Run a user's callback in a worker thread, survive it, and note that the message is processed."""
        if message.is_given_up(monotonic()) and not message.is_response:
            self.count_drop("expired")
        else:
            try:
                self._take_result(callback, message, callback(message))
            except BaseException as error:
                self._report(callback, message, error)
        with self._lock:
            self._exchange.note_one_processed(message)
            if self.is_serving:
                self.flush()
                if self.state is State.CLOSING:
                    self._wakeup.announce_calls()

    def _stop(self) -> None:
        with self._lock:
            self.state = State.CLOSED
            self._remove_all()
            self._wakeup.ask_attention()
            while self._leader is not None:
                self._sleep(SLEEP_S_MAX)
        while self._exchange.calls:
            self._run_calls()
        inproc_names.unwatch(self)
        self._endpoints.close_all(max(0.05, self.close_at - monotonic()))
        with self._lock:
            self._wakeup.close()
        started.discard(self)


_stand_in: threading.Thread | None = None


def _start_stand_in() -> None:
    global _stand_in
    if _stand_in is None:
        _stand_in = threading.Thread(target=_stand_in_for_all, name="messenger-stand-in", daemon=True)
        _stand_in.start()


def _stand_in_for_all() -> None:
    while True:
        time.sleep(STAND_IN_S)
        for loop in list(started):
            if isinstance(loop, ThreadLoop):
                loop.look_if_held_up()


def _forget_stand_in() -> None:
    """The thread does not exist in the child of a fork."""
    global _stand_in
    _stand_in = None


os.register_at_fork(after_in_child=_forget_stand_in)


def _interrupt_at_release() -> None:
    for loop in list(started):
        if isinstance(loop, ThreadLoop):
            loop.interrupt_at_release()


interrupts.on_defer(_interrupt_at_release)


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@interrupts.sleeps
def _await(wake: threading.Lock, timeout: float) -> None:
    # Who waits looks again; `acquire` takes no more than some 300 years.
    wake.acquire(timeout=min(timeout, SLEEP_S_MAX))
