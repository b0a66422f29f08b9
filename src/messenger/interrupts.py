"""Ctrl-C that never tears the core: SIGINT waits as long as the main thread is inside of it.

Python raises `KeyboardInterrupt` between any two instructions of the main thread: also after a lock was taken and
before the `try` that gives it back, and between the two halves of a change. A check at each call would cost every
message. So the handler looks at what it interrupts: in the core, but for the functions that only sleep, the signal is
deferred until the main thread gives the lock back (`threads.py`), and if it does not, is sent again a moment later.
A callback that the main thread runs for the core (`Messenger.wait`) belongs to the core. Everywhere else it is raised
as ever.

It takes the place of Python's own handler only, when the first messenger starts in the main thread, and stays. A
handler of the user's is left alone; if that raises, it may tear a messenger that is just sending, unless it does so by
`handle`.

What must never happen here: a signal that is lost, or raised twice; a lock that is taken (the main thread may hold it).
"""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

AGAIN_S = 0.02
_PACKAGE = __name__.partition(".")[0]
# These use the core as anybody does.
_USERS = {f"{_PACKAGE}.{name}" for name in ("cli", "models", "replication")}
# What the core calls that is not its own.
_CALLED = {"enum", "logging", "threading", "zmq"}
_sleeps: set[CodeType] = set()
_shields: set[CodeType] = set()
# The signal while it is deferred; whoever pops it raises it.
_deferred: list[int] = []
_on_defer: list[Callable[[], None]] = []

F = TypeVar("F", bound=Callable[..., Any])


def sleeps(function: F) -> F:
    """Mark a function of the core that leaves everything whole wherever it is interrupted."""
    _sleeps.add(function.__code__)
    return function


def shields(function: F) -> F:
    """Mark a function that runs callbacks, or that must be whole: nothing that it calls is interrupted."""
    _shields.add(function.__code__)
    return function


def on_defer(defer: Callable[[], None]) -> None:
    """Call something in the handler when a signal is deferred: it has `take` called when the main thread goes on."""
    _on_defer.append(defer)


def install() -> None:
    """Take the place of Python's own handler, if this is the main thread and no other handler is there."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


def handle(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, now or as soon as the core is whole; then SIGINT is sent again, for its handler."""
    if not _is_inside(frame):
        signal.default_int_handler(number, frame)
    if not _deferred:
        _deferred.append(number)
        for defer in _on_defer:
            defer()
        # Not `threading.Thread`, whose start takes locks.
        _thread.start_new_thread(_send_again, ())


def take() -> bool:
    """Return whether a signal was deferred; the caller, in the main thread, raises it."""
    try:
        _deferred.pop()
    except IndexError:
        return False
    return True


def raise_deferred() -> None:
    """Raise a deferred Ctrl-C: for a function that shields, where it is whole, unless another around it shields too."""
    is_main = threading.current_thread() is threading.main_thread()
    if _deferred and is_main and _count_shields(sys._getframe()) == 1 and take():
        raise KeyboardInterrupt


def _count_shields(frame: FrameType | None) -> int:
    count = 0
    while frame is not None:
        count += frame.f_code in _shields
        frame = frame.f_back
    return count


def _is_inside(frame: FrameType | None) -> bool:
    """Return whether the innermost frame that is not of a library is the core's, and does not sleep."""
    if is_shielded(frame):
        return True
    while frame is not None:
        names = frame.f_globals.get("__name__", "").split(".")
        if names[0] == _PACKAGE and ".".join(names[:2]) not in _USERS:
            return frame.f_code not in _sleeps
        if names[0] not in _CALLED:
            return False
        frame = frame.f_back
    return False


def is_shielded(frame: FrameType | None) -> bool:
    """Return whether a frame was called, however indirectly, by a function that shields."""
    while frame is not None:
        if frame.f_code in _shields:
            return True
        frame = frame.f_back
    return False


def _send_again() -> None:
    time.sleep(AGAIN_S)
    if take():
        # To that thread, so that it ends a sleep there.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
