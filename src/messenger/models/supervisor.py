"""Starts server processes, sees them end, starts them again.

One thread starts all of them, because the kernel ends them with the thread that started them (`child.py`), and sleeps
on a descriptor for each process, which tells of its end at once.

| state | becomes | when |
|---|---|---|
| STARTING | RUNNING | its server has said hello |
| RUNNING | STARTING | its server cannot be reached any more, though the process runs |
| STARTING, RUNNING | WAITING | its process has ended, with whatever status |
| STARTING, RUNNING | STOPPED | its process has ended after it was told to |
| WAITING | STARTING | the back-off is over |
| WAITING | FAILED | `crashes_max` ends within CRASH_WINDOW_S |

What must never happen here: a process that outlives its manager; a fork of this process, whose threads and sockets the
child could not use.
"""

import errno
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
    STAGGER_S,
    START_S,
    STDERR_LINE_BYTES_MAX,
    STDERR_LINES,
)
from .protocol import ServerHello

logger = logging.getLogger("messenger.models")
# After the end of a process, for what it has written to be read; another process may hold the pipe open.
READ_S = 0.2
# What this process, or the machine, has too few of for a while: no fault of the program, which is not given up for it.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


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
        if self.state in (SlotState.STARTING, SlotState.RUNNING):
            return f"process {self.pid} is {self.state.value}, after {self.start_count - 1} restarts"
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
        self._stopping = self._is_own = False
        # Of the states, which another thread changes than that which starts processes.
        self._lock = threading.Lock()
        self._kill_at = float("inf")
        self._thread = threading.Thread(target=self._work, name="model-supervisor", daemon=True)

    def start(self, words: list[str], is_own: bool) -> None:
        """Start the processes.

        Args:
            words: Of the program; `{slot}` becomes the number of each.
            is_own: Whether it is our server, which tells its process id.
        """
        self._words, self._is_own = words, is_own
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.POLLIN)
        self._thread.start()

    def note_ready(self, slot: Slot) -> None:
        """Note that a slot's server has said hello."""
        with self._lock:
            if slot.state is SlotState.STARTING:
                slot.state, slot.mute_count = SlotState.RUNNING, 0

    def note_gone(self, slot: Slot) -> None:
        """Note that a slot's server cannot be reached; unless it says hello again its process will be ended."""
        with self._lock:
            if slot.state is SlotState.RUNNING:
                slot.state, slot.started_at = SlotState.STARTING, time.monotonic()

    def find_slot(self, about: ServerHello) -> Slot | None:
        """Return the slot that a server was started for.

        It is the one in whose process group it is; of a program that does not tell its process id, one that waits for a
        hello. None if it was started by somebody else.
        """
        if about.pid > 0:
            try:
                group = os.getpgid(about.pid)
            except (OSError, OverflowError):
                return None
            return next((slot for slot in self.slots if slot.pid == group), None)
        if self._is_own:
            return None
        starting = [slot for slot in self.slots if slot.state is SlotState.STARTING]
        return min(starting, key=lambda slot: slot.started_at, default=None)

    def describe(self) -> str:
        """Return of each slot why there is no server."""
        described = "; ".join(f"server {slot.number}: {slot.describe()}" for slot in self.slots)
        return described or "none was started here, and no other is there"

    def kill(self, slot: Slot, reason: str) -> None:
        """End a slot's process, because it does not do what it should; it is started again."""
        if slot.process is not None and slot.process.poll() is None:
            slot.reason = reason
            logger.error("! model server %d (process %d) is killed: %s", slot.number, slot.pid, reason)
            _kill(slot.process)

    def kill_mute(self, now: float) -> None:
        """End processes that should have said hello by now."""
        for slot in self.slots:
            if slot.state is SlotState.STARTING and now - slot.started_at > START_S:
                self.kill(slot, f"it said no hello within {START_S:.0f} s")

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
                self._start_due(now)
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

    def _start_due(self, now: float) -> None:
        """Start what is due; of programs that do not tell their process id one after the other.

        Whose hello comes is then known by the order of the starts, and with it whose end each process's end is.
        """
        for slot in self.slots:
            if slot.state is SlotState.WAITING and now >= slot.next_start_at:
                if not self._is_own and any(
                    each.state is SlotState.STARTING and now - each.started_at < STAGGER_S for each in self.slots
                ):
                    slot.next_start_at = now + BACKOFF_S_MIN
                else:
                    self._start(slot, now)

    def _start(self, slot: Slot, now: float) -> None:
        words = [word.replace("{slot}", str(slot.number)) for word in self._words]
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *words]
        slot.started_at, slot.reason = now, ""
        slot.stderr = deque(maxlen=STDERR_LINES)
        slot.start_count += 1
        process = None
        try:
            # A group of its own: Ctrl-C at a terminal reaches only the manager, and what it starts ends with it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            descriptor = os.pidfd_open(process.pid)
        except OSError as error:
            if process is not None:
                with process:
                    _kill(process)
            with self._lock:
                self._note_crash(slot, f"no process could be made: {error.strerror}", now, error.errno not in SHORTAGES)
            return
        slot.process, slot.state = process, SlotState.STARTING
        slot.reader = threading.Thread(
            target=_keep_lines, args=(process.stderr, slot.stderr), name="model-stderr", daemon=True
        )
        slot.reader.start()
        self._descriptors[descriptor] = slot
        self._poll.register(descriptor, select.POLLIN)
        logger.info("= model server %d is started as process %d", slot.number, slot.pid)

    def _note_end(self, slot: Slot, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._descriptors[descriptor]
        os.close(descriptor)
        process = slot.process
        if process is None:
            return
        # While the slot still has it: a hello that comes just now belongs to it, and is taken back by `_on_end`.
        status = process.wait()
        slot.process = None
        # What it had started in its group goes with it.
        _kill(process)
        if slot.reader is not None:
            slot.reader.join(READ_S)
        now = time.monotonic()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        reason = slot.reason or f"process {process.pid} ended {how}"
        with self._lock:
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

    def _note_crash(self, slot: Slot, reason: str, now: float, is_its_own: bool = True) -> None:
        slot.reason = reason
        slot.mute_count += slot.state is not SlotState.RUNNING
        slot.crashes.extend([now] if is_its_own else [])
        while slot.crashes and slot.crashes[0] < now - CRASH_WINDOW_S:
            slot.crashes.popleft()
        if len(slot.crashes) >= self._crashes_max:
            slot.state = SlotState.FAILED
            slot.reason = f"{len(slot.crashes)} crashes in {CRASH_WINDOW_S:.0f} s, the last: {reason}"
            logger.error("! model server %d is given up: %s", slot.number, slot.describe())
            return
        slot.state = SlotState.WAITING
        slot.next_start_at = now + min(BACKOFF_S_MIN * 2 ** min(slot.mute_count, 20), BACKOFF_S_MAX)
        logger.warning("! model server %d: %s; it is started again", slot.number, slot.describe())


def is_over(about: ServerHello) -> bool:
    """Return whether a hello comes of a process that a manager had started and that has ended meanwhile."""
    return about.slot >= 0 and not os.path.exists(f"/proc/{about.pid}")


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
