"""What the threads of a messenger sleep on.

One thread **leads**: it alone takes input off the sockets. Usually that is the messenger's own thread; a thread that
waits in `request` may lead in its stead, which saves two thread switches a round trip. Both sleep on descriptors,
never on ZeroMQ sockets, so that any thread may use a socket (under the messenger's lock) while they sleep.

    outer epoll (the messenger's thread) ── calls: run callbacks that somebody else received
        └── inner epoll (whoever leads) ── every socket's descriptor
                                        └── attention: something changed, look again

To lead, a caller takes the inner epoll out of the outer one (a system call, no thread switch) and sleeps on it himself.

A CPU that has gone idle takes longer to wake up than many an answer to come. So a caller whose last sleep was short
looks again and again for a moment before he sleeps, and gives way in between to whoever wants the CPU.
"""

import os
import select
from time import monotonic

from ..errors import LimitReached
from ..interrupts import sleeps
from ..limits import DESCRIPTORS_RESERVED, SPIN_S

# epoll takes whole milliseconds, in 31 bits; a longer sleep just wakes up once more.
SLEEP_S_MAX = 86_400.0
# A sleep that took longer was one: nothing was there when it began.
AWAITED_S = 0.00002
# So often in a row it is taken for granted at which socket input is.
GUESSES_MAX = 8


def check_descriptors() -> None:
    """Refuse to open anything when descriptors run out: libzmq aborts the process if it gets none in the middle.

    Raises:
        LimitReached: Fewer than `DESCRIPTORS_RESERVED` are left.
    """
    taken: list[int] = []
    try:
        taken.extend(os.eventfd(0, os.EFD_CLOEXEC) for _ in range(DESCRIPTORS_RESERVED))
    except OSError as error:
        text = f"fewer than {DESCRIPTORS_RESERVED} file descriptors are left; raise the limit (ulimit -n): {error}"
        raise LimitReached(text) from error
    finally:
        for descriptor in taken:
            os.close(descriptor)


def spin_s_max() -> float:
    """Return for how long to look before a sleep: `SPIN_S`, or 0 if whoever is to answer would have to wait for it."""
    return SPIN_S if len(os.sched_getaffinity(0)) > 1 else 0.0


class Wakeup:
    """Two nested epolls and two event descriptors. Methods that sleep are called without the messenger's lock."""

    def __init__(self) -> None:
        check_descriptors()
        self._inner = select.epoll()
        self._outer = select.epoll()
        self._attention = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inner.register(self._attention, select.EPOLLIN)
        self._outer.register(self._calls, select.EPOLLIN)
        self._inner_descriptor = self._inner.fileno()
        self._outer.register(self._inner_descriptor, select.EPOLLIN)
        self._spin_s_max = spin_s_max()
        self._spin_s = self._own_spin_s = 0.0
        # The descriptor that had input alone the last times, how often it may be guessed, and whether input has just
        # ended a sleep.
        self._usual, self._guesses_left = -1, 0
        self._is_awaited = False

    def add(self, descriptor: int) -> None:
        """Wake the leader when a socket's descriptor becomes readable."""
        self._inner.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        """Forget a socket's descriptor, before the socket is closed."""
        self._inner.unregister(descriptor)
        if descriptor == self._usual:
            self._guesses_left = 0  # Another socket may get its number.

    def take_lead(self) -> None:
        """Keep input from waking the messenger's thread."""
        self._outer.modify(self._inner_descriptor, 0)

    def give_lead_back(self) -> None:
        """Let input wake the messenger's thread again, at once if there is some."""
        self._outer.modify(self._inner_descriptor, select.EPOLLIN)

    def ask_attention(self) -> None:
        """Wake whoever leads."""
        os.eventfd_write(self._attention, 1)

    def announce_calls(self) -> None:
        """Wake the messenger's thread to run callbacks."""
        os.eventfd_write(self._calls, 1)

    def sleep(self, timeout: float, asks: bool) -> None:
        """Sleep on the messenger's thread until there is input, attention or a call to run, or `timeout` is over.

        If that is called after callbacks have asked somebody something (`asks`), it looks first, as a caller does.
        """
        began_at = monotonic()
        events = _poll(self._outer, min(timeout, SLEEP_S_MAX), min(timeout, self._own_spin_s) if asks else 0.0)
        slept_s = monotonic() - began_at
        self._own_spin_s = self._spin_s_max if slept_s < SPIN_S else 0.0
        self._is_awaited = False
        for descriptor, _ in events:
            if descriptor == self._calls:
                _clear(self._calls)
            else:
                self._is_awaited = slept_s > AWAITED_S

    def take_ready(self) -> list[int]:
        """Return the sockets' descriptors that are readable now, after `sleep`.

        When input has ended a sleep, nothing was there before, so it is most likely at the socket that it was at the
        last times, and nobody asks: that takes 5 microseconds of a round trip. What is at another one ends the next
        sleep at once, and then they are all asked.
        """
        if self._is_awaited and self._guesses_left:
            self._guesses_left -= 1
            return [self._usual]
        ready = self.wait_input(0)
        if len(ready) == 1 and ready[0] == self._usual:
            self._guesses_left = GUESSES_MAX
        elif ready:
            self._usual, self._guesses_left = ready[0], 0
        return ready

    def wait_input(self, timeout: float) -> list[int]:
        """Return the sockets' descriptors that are readable, after at most `timeout` seconds."""
        began_at = monotonic()
        events = _poll(self._inner, min(timeout, SLEEP_S_MAX), min(timeout, self._spin_s))
        if timeout:
            self._spin_s = self._spin_s_max if monotonic() - began_at < SPIN_S else 0.0
        ready = [descriptor for descriptor, _ in events]
        if self._attention in ready:
            ready.remove(self._attention)
            _clear(self._attention)
        return ready

    def close(self) -> None:
        """Close the descriptors. Nobody may sleep on them any more."""
        self._outer.close()
        self._inner.close()
        os.close(self._attention)
        os.close(self._calls)


@sleeps
def _poll(epoll: select.epoll, timeout: float, spin_s: float) -> list[tuple[int, int]]:
    if spin_s:
        spin_until = monotonic() + spin_s
        while monotonic() < spin_until:
            if events := epoll.poll(0):
                return events
            os.sched_yield()
    return epoll.poll(timeout)


def _clear(descriptor: int) -> None:
    try:
        os.eventfd_read(descriptor)
    except BlockingIOError:
        return  # Somebody else cleared it in between.
