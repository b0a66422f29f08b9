"""Runs the trainings of a server, one at a time, each in a process of its own, so that a cancel can end any of them.

| state | becomes | when |
|---|---|---|
| QUEUED | RUNNING, CANCELLED | its turn comes; it is cancelled |
| RUNNING | DONE, FAILED, CANCELLED | its version is published; it cannot be trained; it is cancelled |

The others are final. The version is published with the lock held, so a training is either cancelled or done.

What must never happen here: a training that outlives its server; a version of a training that was cancelled.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

import msgspec

from . import child
from .errors import CommandFailed, JobUnknown, ModelError, TrainingDataInvalid
from .jobs import Progress, Training
from .limits import ERROR_CHARS_MAX, FINISHED_JOBS_MAX, TRAININGS_QUEUED_MAX
from .protocol import show_error
from .store import Manifest, Store
from .table import Request
from .training import Line, Made

State = Literal["QUEUED", "RUNNING", "DONE", "FAILED", "CANCELLED"]
FINAL = ("DONE", "FAILED", "CANCELLED")


class Task(msgspec.Struct, kw_only=True):
    """A training at a server.

    Attributes:
        request: What is trained.
        state: See the module.
        progress: What was reported last.
        training: What came of it.
        error, kind: Why nothing did, and the name of the error's class.
        watchers: Told when the state is final, once.
        process: Of the training that runs.
    """

    request: Request
    on_progress: Callable[[Progress], None]
    state: State = "QUEUED"
    progress: Progress | None = None
    training: Training | None = None
    error: str = ""
    kind: str = ""
    watchers: "list[Callable[[Task], None]]" = msgspec.field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None


class Trainer:
    """The trainings of one server. Thread: any."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Condition()
        self._tasks: OrderedDict[str, Task] = OrderedDict()
        self._queue: deque[Task] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="model-trainer", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_progress: Callable[[Progress], None], on_end: Callable[[Task], None]) -> None:
        """Queue a training. Both callbacks run on the trainer's thread.

        Raises:
            CommandFailed: Too many wait, or the id is taken.
        """
        with self._lock:
            if request.job in self._tasks:
                raise CommandFailed(f"there is a job {request.job!r} already")
            if len(self._queue) >= TRAININGS_QUEUED_MAX:
                raise CommandFailed(f"{TRAININGS_QUEUED_MAX} trainings wait already")
            task = Task(request=request, on_progress=on_progress, watchers=[on_end])
            self._tasks[request.job] = task
            self._queue.append(task)
            self._lock.notify_all()

    def watch(self, job_id: str, on_end: Callable[[Task], None]) -> Task:
        """Return a training, and be told when it has ended, at once if it has.

        Raises:
            JobUnknown: There is no such job.
        """
        with self._lock:
            task = self._tasks.get(job_id)
            if task is None:
                raise JobUnknown(f"there is no job {job_id!r} here")
            is_final = task.state in FINAL
            if not is_final:
                task.watchers.append(on_end)
        if is_final:
            on_end(task)
        return task

    def cancel(self, job_id: str) -> bool:
        """End a training, and return whether it had not ended yet.

        Raises:
            JobUnknown: There is no such job.
        """
        with self._lock:
            task = self._tasks.get(job_id)
            if task is None:
                raise JobUnknown(f"there is no job {job_id!r} here")
            if task.state in FINAL:
                return False
            was_queued = task.state == "QUEUED"
            task.state = "CANCELLED"
            if was_queued:
                self._queue.remove(task)
            elif task.process is not None:
                task.process.kill()
        if was_queued:
            self._end(task)
        return True

    def states(self) -> dict[str, str]:
        """Return the state of each job that is remembered."""
        with self._lock:
            return {job_id: task.state for job_id, task in self._tasks.items()}

    def stop(self) -> None:
        """Cancel all that has not ended, and take no more."""
        with self._lock:
            self._stopped = True
            open_ids = [job_id for job_id, task in self._tasks.items() if task.state not in FINAL]
            self._lock.notify_all()
        for job_id in open_ids:
            self.cancel(job_id)
        self._thread.join(2)

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._stopped:
                    self._lock.wait()
                if self._stopped:
                    return
                task = self._queue.popleft()
                task.state = "RUNNING"
            try:
                self._run(task)
            except Exception as error:
                # Such as a full disk. The next training may do better.
                with self._lock:
                    if task.state == "RUNNING":
                        task.state, task.error, task.kind = "FAILED", show_error(error), type(error).__name__
            self._end(task)

    def _end(self, task: Task) -> None:
        with self._lock:
            watchers, task.watchers = task.watchers, []
            finished = [job_id for job_id, other in self._tasks.items() if other.state in FINAL]
            for job_id in finished[: max(0, len(finished) - FINISHED_JOBS_MAX)]:
                del self._tasks[job_id]
        # The rows of the data are not kept.
        task.request = msgspec.structs.replace(task.request, data="")
        for watcher in watchers:
            watcher(task)

    def _run(self, task: Task) -> None:
        started_at = time.monotonic()
        folder = self._store.make_temporary()
        try:
            with tempfile.TemporaryFile() as errors:
                made = self._run_process(task, folder, errors)
            if made is None:
                return
            manifest = _describe(task.request, made)
            with self._lock:
                if task.state != "RUNNING":
                    return
                manifest = self._store.publish(folder, manifest)
                if task.request.activate:
                    self._store.activate(manifest.name, manifest.version)
                task.training = Training(
                    name=manifest.name,
                    version=manifest.version,
                    method=manifest.method,
                    task=manifest.task,
                    metrics=manifest.metrics,
                    rows=manifest.rows,
                    features=manifest.features,
                    elapsed_s=round(time.monotonic() - started_at, 3),
                    job=manifest.job,
                )
                task.state = "DONE"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run_process(self, task: Task, folder: Path, errors: IO[bytes]) -> Made | None:
        """Return what the process made, None if it was cancelled.

        Raises:
            ModelError: Why there is nothing.
        """
        own = [sys.executable, "-P", "-m", "messenger.models.training", str(folder)]
        # The kernel ends it with this thread, which ends with the process.
        command = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), *own]
        with self._lock:
            if task.state != "RUNNING":
                return None
            process = task.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        last = Line()
        with process:
            try:
                process.stdin.write(msgspec.json.encode(task.request))  # type: ignore[union-attr]  # It is a pipe.
                process.stdin.close()  # type: ignore[union-attr]
            except BrokenPipeError:
                process.kill()
            for text in process.stdout or ():
                last = msgspec.json.decode(text, type=Line)
                if last.of:
                    self._report(task, last)
        with self._lock:
            task.process = None
            if task.state != "RUNNING":
                return None
        if last.error:
            raise ModelError(last.error) if last.is_local else TrainingDataInvalid(last.error)
        if process.returncode or last.made is None:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - ERROR_CHARS_MAX // 2))
            said = errors.read().decode(errors="replace").strip()
            raise ModelError(f"the training's process ended with status {process.returncode}: {said}")
        return last.made

    def _report(self, task: Task, line: Line) -> None:
        task.progress = Progress(job=task.request.job, step=line.step, of=line.of, metric=line.metric, value=line.value)
        if task.state == "RUNNING":
            task.on_progress(task.progress)


def _describe(request: Request, made: Made) -> Manifest:
    return Manifest(
        name=request.name,
        version=0,
        method=request.method,
        task=made.task,
        target=request.target,
        features=made.features,
        classes=made.classes,
        metrics=made.metrics,
        rows=made.rows,
        format=made.format,
        bytes=0,
        sha256="",
        versions=made.versions,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        job=request.job,
    )
