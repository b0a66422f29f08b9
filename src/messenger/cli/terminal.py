"""What every command does with the terminal: print, complain, show progress, end on a signal.

What must never happen here: bytes of a peer that reach a terminal as control sequences; a traceback because of a
signal or a closed pipe.

How a command ends. The first SIGINT (for some also SIGTERM) raises `KeyboardInterrupt` in the main thread, as soon as
the library is whole; where a command waits, that is at once. Later signals are ignored, and `END_S_MAX` later the
process is gone.
Python runs no handler while SQLite runs a statement, so commands that run SQL also have `end_in_time`.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from messenger import Destination, DestinationInvalid, interrupts

if TYPE_CHECKING:
    import click

T = TypeVar("T")

# Exit statuses; what each command means by them stands in its help.
UNKNOWN, USAGE, NOT_DELIVERED, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 128 + 2, 128 + 13
END_S_MAX = 2  # After a signal: more than the second that `Messenger.close` may take.
WAIT_SLICE_S = 1.0
SECONDS_MAX = 86_400  # What a user may ask to wait. Beyond some weeks ZeroMQ's milliseconds overflow.
BAR_COUNT_MIN = 100  # From so many steps on a terminal shows a progress bar.


def option(*names: str, **settings: Any) -> "click.Option":
    """Return an option whose help shows its default."""
    import click

    return click.Option(names, show_default=not settings.get("is_flag"), **settings)


def seconds(*, min_open: bool = True) -> "click.FloatRange":
    """Return the type of an option that is a time: from 0, which itself may be left out, to a day."""
    return number_between(0, SECONDS_MAX, min_open=min_open)


def number_between(low: float, high: float, *, min_open: bool = False, max_open: bool = False) -> "click.FloatRange":
    """Return the type of an option that is a number, which nan is not: click lets it pass any range."""
    import click

    class Number(click.FloatRange):
        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            number = super().convert(value, param, ctx)
            if math.isnan(number):
                self.fail(f"{value} is no number.", param, ctx)
            return number

    return Number(low, high, min_open=min_open, max_open=max_open)


@contextlib.contextmanager
def show_progress(count: int, title: str) -> Iterator[Callable[[], None] | None]:
    """Show a bar of `count` steps on stderr and give what moves it; None for few steps or without a terminal."""
    if count < BAR_COUNT_MIN or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=count)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def show_amount() -> Iterator[Callable[[str, int, int], None] | None]:
    """Give what shows, as a bar on stderr, a title, how much is done, and of how much; None without a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda title, done, total: bar.update(task, description=title, completed=done, total=total)


def parse_place(text: str) -> Destination:
    """Return the destination that a user named."""
    place = Destination.parse(text)
    if place.transport == "inproc":
        raise DestinationInvalid(f"{text!r}: inproc stays within one process, which this command has: give another")
    return place


def printable(text: str, keep: str = "") -> str:
    """Escape what a terminal would not print."""
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def standard_input() -> TextIO:
    """Return stdin; a program can be started without one."""
    if sys.stdin is None:
        raise OSError("stdin is closed")
    return sys.stdin


def write(output: str | bytes) -> None:
    """Write to stdout at once, whatever encoding it has."""
    if sys.stdout is None:
        raise OSError("stdout is closed")
    data = output.encode(sys.stdout.encoding, "backslashreplace") if isinstance(output, str) else output
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        _give_up(sys.stdout)
        raise OSError(error.errno, f"cannot write to stdout: {error.strerror}") from error


def complain(text: str) -> None:
    """Write one line to stderr. If nobody can read it, the exit status still tells."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(f"messenger: {printable(text)}\n")
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Write no more to it: what is still buffered would fail once more when the interpreter ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Leave out warnings of the library about what ends the command with an error that says the same."""
    logger = logging.getLogger("messenger")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def wait(items: SimpleQueue[T]) -> T:
    """Return the next item. Python misses a signal that comes just before an endless wait, so the wait has an end."""
    while True:
        try:
            return items.get(timeout=WAIT_SLICE_S)
        except Empty:
            continue


def end_on(number: signal.Signals) -> None:
    """Have the main thread end when this signal comes."""
    if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and & in scripts, ignore some on purpose.
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Make the main thread end, as soon as the core is whole; nothing may delay or disturb that."""
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:  # Else it was deferred, and has come again.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
        signal.alarm(END_S_MAX)
    try:
        interrupts.handle(number, frame)
    except KeyboardInterrupt:
        for other in (signal.SIGINT, signal.SIGTERM):
            # Not SIG_IGN: Python complains about a signal that came before that and is handled after it.
            signal.signal(other, lambda *_: None)
        raise


@contextlib.contextmanager
def end_in_time() -> Iterator[None]:
    """Have the process gone `END_S_MAX` after SIGINT or SIGTERM, also if no handler gets to run."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end() -> None:
        while numbers := os.read(reader, 1):
            if numbers[0] in (signal.SIGINT, signal.SIGTERM):
                time.sleep(END_S_MAX)
                os._exit(128 + numbers[0])
        os.close(reader)

    before = signal.set_wakeup_fd(writer)  # Written to when a signal comes, whatever Python is doing.
    threading.Thread(target=end, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
