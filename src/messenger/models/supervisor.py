"""Starts server processes, sees them end, starts them again.

One thread starts all of them, because the kernel ends them with the thread that started them (`child.py`), and sleeps
on a descriptor for each process, which tells of its end at once.

| state | becomes | when |
|---|---|---|
| STARTING | RUNNING | its server has said hello |
| STARTING, RUNNING | WAITING | its process has ended, with whatever status |
| STARTING, RUNNING | STOPPED | its process has ended after it was told to |
| WAITING | STARTING | the back-off is over |
| WAITING | FAILED | `crashes_max` ends within CRASH_WINDOW_S |

What must never happen here: a process that outlives its manager; a fork of this process, whose threads and sockets the
child could not use.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import IO

import msgspec

from . import child
from .limits import (
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    CRASH_WINDOW_S,
    PING_S,
    STDERR_LINE_BYTES_MAX,
    STDERR_LINES,
)

logger = logging.getLogger("messenger.models")
# After the end of a process, for what it has written to be read; another process may hold the pipe open.
READ_S = 0.2


class SlotState(Enum):
    """Of a slot: see the module."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    FAILED = "failed"
    STOPPED = "stopped"


class Slot(msgspec.Struct, eq=False, kw_only=True):
    """A place for one process, again and again.

    Attributes:
        number: From 0.
        state: See the module.
        process: That runs now.
        started_at, next_start_at: Of the last process, and of the next.
        start_count: Processes so far.
        crashes: When processes crashed, within CRASH_WINDOW_S.
        mute_count: Processes in a row that crashed before they said hello; each doubles the back-off.
        is_told_to_end: Whether it is not to be started again.
        reason: Why the last one ended.
        stderr: The last lines of the last one.
    """

    number: int
    state: SlotState = SlotState.WAITING
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    next_start_at: float = 0.0
    start_count: int = 0
    crashes: deque[float] = msgspec.field(default_factory=deque)
    mute_count: int = 0
    is_told_to_end: bool = False
    reason: str = ""
    stderr: deque[str] = msgspec.field(default_factory=deque)
    reader: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs, 0 if none does."""
        return self.process.pid if self.process is not None else 0

    def describe(self) -> str:
        """Return why there is no server, with its last lines."""
        return f"{self.reason}; it said: {' / '.join(self.stderr) or 'nothing'}"


class Supervisor:
    """Keeps processes running.

    Args:
        count: Of processes.
        crashes_max: So many crashes within CRASH_WINDOW_S end a slot.
        on_end: Told when a slot's process has ended; the slot has its new state already.
        on_tick: Called at least every PING_S. Both run on the supervisor's thread.

    Thread: any.
    """

    def __init__(
        self,
        count: int,
        crashes_max: int,
        on_end: Callable[[Slot], None],
        on_tick: Callable[[], None],
    ) -> None:
        self.slots = [Slot(number=number) for number in range(count)]
        self._words: list[str] = []
        self._crashes_max = crashes_max
        self._on_end = on_end
        self._on_tick = on_tick
        self._poll = select.poll()
        self._descriptors: dict[int, Slot] = {}
        self._stopping = False
        self._kill_at = float("inf")
        self._thread = threading.Thread(target=self._work, name="model-supervisor", daemon=True)

    def start(self, words: list[str]) -> None:
        """Start the processes: the program's words, in which `{slot}` becomes the number of each."""
        self._words = words
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.POLLIN)
        self._thread.start()

    def note_ready(self, slot: Slot) -> None:
        """Note that a slot's server has said hello."""
        if slot.state is SlotState.STARTING:
            slot.state, slot.mute_count = SlotState.RUNNING, 0

    def kill(self, slot: Slot, reason: str) -> None:
        """End a slot's process, because it does not do what it should; it is started again."""
        if slot.process is not None and slot.process.poll() is None:
            slot.reason = reason
            logger.error("! model server %d (process %d) is killed: %s", slot.number, slot.pid, reason)
            _kill(slot.process)

    def is_over(self) -> bool:
        """Return whether no process will ever run again."""
        return all(slot.state in (SlotState.FAILED, SlotState.STOPPED) for slot in self.slots)

    def stop(self, timeout: float) -> None:
        """Start nothing more, give processes so many seconds to end, kill the rest, and wait for all."""
        self._kill_at = time.monotonic() + timeout
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout + 5.0)
        # Not by the thread, which may see `_stopping`, and end, before the descriptor was written to.
        if not self._thread.is_alive():
            os.close(self._wake)

    # The thread.

    def _work(self) -> None:
        ticked_at = 0.0
        while True:
            now = time.monotonic()
            if self._stopping:
                if now >= self._kill_at:
                    for slot in self._descriptors.values():
                        if slot.process is not None:
                            _kill(slot.process)
                if not self._descriptors:
                    break
            else:
                for slot in self.slots:
                    if slot.state is SlotState.WAITING and now >= slot.next_start_at:
                        self._start(slot, now)
            if now - ticked_at >= PING_S:
                ticked_at = now
                self._tell(self._on_tick)
            for descriptor, _ in self._poll.poll(self._sleep_ms(ticked_at)):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._note_end(self._descriptors[descriptor], descriptor)

    def _sleep_ms(self, ticked_at: float) -> int:
        wake_at = ticked_at + PING_S
        if self._stopping:
            wake_at = min(wake_at, self._kill_at)
        else:
            wake_at = min([wake_at, *(slot.next_start_at for slot in self.slots if slot.state is SlotState.WAITING)])
        return max(1, int((wake_at - time.monotonic()) * 1000) + 1)

    def _start(self, slot: Slot, now: float) -> None:
        words = [word.replace("{slot}", str(slot.number)) for word in self._words]
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *words]
        slot.started_at, slot.reason = now, ""
        slot.stderr = deque(maxlen=STDERR_LINES)
        slot.start_count += 1
        try:
            # A group of its own: Ctrl-C at a terminal reaches only the manager, and what it starts ends with it.
            slot.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            self._note_crash(slot, f"no process could be made: {error.strerror}", now)
            return
        slot.state = SlotState.STARTING
        slot.reader = threading.Thread(
            target=_keep_lines, args=(slot.process.stderr, slot.stderr), name="model-stderr", daemon=True
        )
        slot.reader.start()
        descriptor = os.pidfd_open(slot.process.pid)
        self._descriptors[descriptor] = slot
        self._poll.register(descriptor, select.POLLIN)
        logger.info("= model server %d is started as process %d", slot.number, slot.pid)

    def _note_end(self, slot: Slot, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._descriptors[descriptor]
        os.close(descriptor)
        process, slot.process = slot.process, None
        if process is None:
            return
        status = process.wait()
        # What it had started in its group goes with it.
        _kill(process)
        if slot.reader is not None:
            slot.reader.join(READ_S)
        now = time.monotonic()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        reason = slot.reason or f"process {process.pid} ended {how}"
        if slot.is_told_to_end or self._stopping:
            slot.state, slot.reason = SlotState.STOPPED, f"it was told to end, and {reason}"
        else:
            self._note_crash(slot, reason, now)
        self._tell(self._on_end, slot)

    def _tell(self, callback: Callable[..., None], *arguments: Slot) -> None:
        """Call back, and survive what it raises: nobody else would watch the processes."""
        try:
            callback(*arguments)
        except Exception:
            logger.exception("! the supervisor goes on after an error")

    def _note_crash(self, slot: Slot, reason: str, now: float) -> None:
        slot.reason = reason
        slot.mute_count += slot.state is not SlotState.RUNNING
        slot.crashes.append(now)
        while slot.crashes[0] < now - CRASH_WINDOW_S:
            slot.crashes.popleft()
        if len(slot.crashes) >= self._crashes_max:
            slot.state = SlotState.FAILED
            slot.reason = f"{len(slot.crashes)} crashes in {CRASH_WINDOW_S:.0f} s, the last: {reason}"
            logger.error("! model server %d is given up: %s", slot.number, slot.describe())
            return
        slot.state = SlotState.WAITING
        slot.next_start_at = now + min(BACKOFF_S_MIN * 2 ** min(slot.mute_count, 20), BACKOFF_S_MAX)
        logger.warning("! model server %d: %s; it is started again", slot.number, slot.describe())


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its group; the group may be gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        process.kill()


def _keep_lines(pipe: IO[bytes] | None, lines: deque[str]) -> None:
    """Read a process's standard error to its end, and keep the last lines."""
    if pipe is None:
        return
    with pipe:
        while line := pipe.readline(STDERR_LINE_BYTES_MAX):
            lines.append(line.decode(errors="replace").rstrip())
