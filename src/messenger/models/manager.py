"""`ModelServerManager`: starts model servers, hands them commands, and gives results to callbacks.

It listens; servers connect and say hello. `supervisor.py` keeps their processes running, `dispatch.py` says which
server gets what, `batching.py` joins inferences, `desk.py` serves clients of other processes. This module is the public
face of all of them.

Source: docs/models.md.
"""

import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from messenger import Destination, Listener, Messenger

from .batching import Batcher, InferCall
from .calls import Convert, ModelCalls, OnProgress, as_rows, as_training
from .desk import Desk
from .dispatch import Dispatcher, make_cancel
from .errors import JobUnknown
from .jobs import Inference, Job, Progress, Training
from .limits import (
    BATCH_ROWS_MAX,
    BATCH_S_MAX,
    CALL_TIMEOUT_S,
    CRASHES_MAX,
    FINISHED_JOBS_MAX,
    QUEUE_S_MAX,
    STOP_S,
    TRAIN_TIMEOUT_S,
    WATCHERS_MAX,
)
from .peers import Call, ManagerStatus, Server, ServerStatus
from .protocol import Answer, Command, encode
from .store import Manifest, default_folder
from .supervisor import Slot, SlotState, Supervisor

logger = logging.getLogger("messenger.models")
SERVER_MODULE = "messenger.models.server"


class _Known:
    """A training that the manager remembers."""

    def __init__(self, job: Job[Training], on_progress: OnProgress | None) -> None:
        self.job = job
        self.call: Call | None = None
        self.watchers: list[OnProgress] = [] if on_progress is None else [on_progress]

    def note_end(self, job: Any) -> None:
        """Let go of the command, which may hold all rows that were trained on."""
        self.call = None

    @property
    def state(self) -> str:
        if not self.job.done():
            return "open"
        if self.job.cancelled():
            return "cancelled"
        return "failed" if self.job.exception() else "done"


class ModelServerManager(ModelCalls):
    """Trains and serves models in processes of their own.

    A context manager; it starts its servers when it is made.

    Args:
        messenger: That it listens with. It must stay open until the manager is stopped.
        destination: That servers connect to, and clients of other processes.
        servers: How many processes to start.
        command: The program to start, word by word, in place of our server. `{endpoint}` becomes the ZeroMQ endpoint
            that it connects to (tcp if there is one), `{ipc_path}` the path of the ipc endpoint.
        folder: Of the models; by default `$XDG_DATA_HOME/messenger/models`.
        crashes_max: So many crashes of a server within 60 s, and it is not started again.
        batch_rows_max: Rows of calls that are joined.
        queue_s_max: Seconds; calls that would wait longer end as `Overloaded`.

    Raises:
        DestinationInUse, DestinationInvalid, ValueError.

    Thread: any. Source: docs/models.md.
    """

    def __init__(
        self,
        messenger: Messenger,
        destination: Destination | str | int = 15446,
        *,
        servers: int = 1,
        command: Sequence[str | Path] | None = None,
        folder: str | Path | None = None,
        crashes_max: int = CRASHES_MAX,
        batch_rows_max: int = BATCH_ROWS_MAX,
        queue_s_max: float = QUEUE_S_MAX,
    ) -> None:
        if servers < 0 or crashes_max < 1 or batch_rows_max < 1 or not queue_s_max > 0:
            raise ValueError(
                f"servers={servers} must be at least 0, crashes_max={crashes_max} and batch_rows_max={batch_rows_max} "
                f"at least 1, queue_s_max={queue_s_max} above 0"
            )
        self.folder = Path(folder or default_folder()).absolute()
        self._served: dict[str, int] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._ended = threading.Event()
        batcher = Batcher(batch_rows_max, BATCH_S_MAX, queue_s_max)
        self._batcher = batcher
        self._dispatcher = Dispatcher(messenger, batcher, self._note_progress, Desk(messenger, self).take)
        self._supervisor = Supervisor(servers, crashes_max, self._dispatcher.note_slot_end, self._dispatcher.tick)
        self._dispatcher.supervisor = self._supervisor
        self._listens = threading.Event()
        self.listener: Listener = messenger.listen_for_connection(destination, self._take, responses=False)
        self._listens.set()
        try:
            words = make_words(command, self.listener, self.folder, servers)
        except BaseException:
            self.listener.close()
            raise
        self._supervisor.start(words, is_own=command is None)

    # Calls beside those of `ModelCalls`.

    def infer(self, name: str, rows: Any, *, version: int = 0, timeout: float = CALL_TIMEOUT_S) -> Job[Inference]:
        """Predict; see `ModelCalls.infer`."""
        rows, row_count, kind = as_rows(rows)
        job: Job[Inference] = Job()
        now = time.monotonic()
        call = InferCall(job, rows, row_count, kind, now, now + timeout)
        self._dispatcher.submit_infer(name, version or self._served.get(name, 0), call)
        return job

    @property
    def is_ready(self) -> bool:
        """Whether a server takes commands now."""
        now = time.monotonic()
        with self._dispatcher.lock:
            return any(server.is_ready(now) for server in self._dispatcher.servers.values())

    def wait_ready(self, timeout: float = CALL_TIMEOUT_S) -> None:
        """Wait until a server takes commands.

        Raises:
            NoServer: None did within `timeout` seconds, or all were given up; the text says why.
        """
        self.print_message("", timeout=timeout).result()

    def status(self) -> ManagerStatus:
        """Return what the manager knows now."""
        now = time.monotonic()
        with self._dispatcher.lock:
            servers = list(self._dispatcher.servers.values())
            by_slot = {server.slot.number: server for server in servers if server.slot is not None}
            slots = [_describe(by_slot.get(slot.number), slot, now) for slot in self._supervisor.slots]
            others = [_describe(server, None, now) for server in servers if server.slot is None]
            return ManagerStatus(
                ready=any(server.is_ready(now) for server in servers),
                servers=slots + others,
                waiting_calls=len(self._dispatcher.waiting) + self._batcher.call_count,
                jobs={job_id: known.state for job_id, known in self._known.items()},
                served=dict(self._served),
                counts=dict(self._dispatcher.counts),
            )

    def job(self, job_id: str, *, timeout: float = TRAIN_TIMEOUT_S) -> Job[Training]:
        """Return the job with an id; see `ModelCalls.job`. One that it does not know is asked for at a server."""
        known = self._known.get(job_id)
        if known is not None:
            return known.job
        job: Job[Training] = Job(job_id, self._cancel_job)
        return self._call("JOB", {"job": job_id}, as_training, timeout, job)

    def watch(self, job_id: str, on_progress: OnProgress) -> None:
        """Have progress of a training reported to one more callback."""
        known = self._known.get(job_id)
        if known is not None:
            # Clients that come back again and again are not told to us when they go.
            known.watchers = [*known.watchers[-WATCHERS_MAX + 1 :], on_progress]

    def cancel(self, job: str | Job[Any]) -> bool:
        """Cancel a job; see `ModelCalls.cancel`. Of ids, only those that this manager knows."""
        if isinstance(job, str):
            known = self._known.get(job)
            return known is not None and known.job.cancel()
        return job.cancel()

    def cancel_for_client(self, job_id: str) -> Job[bool]:
        """Cancel a training by its id, at whichever server has it if it is not of this manager; for `Desk`.

        Returns:
            A job whose result is whether the training had not ended yet.
        """
        ended: Job[bool] = Job()
        if job_id in self._known or not self.is_ready:
            ended.settle(self.cancel(job_id))
            return ended

        def on_answer(asked: Any) -> None:
            error = None if asked.cancelled() else asked.exception()
            if error is None:
                # As cancelled it ends if that is what the server calls its answer.
                ended.settle(asked.cancelled() or bool(asked.result().result))
            elif isinstance(error, JobUnknown):
                ended.settle(False)
            else:
                ended.settle_error(error)

        asked: Job[Answer] = Job()
        asked.add_done_callback(on_answer)
        self._call_all(make_cancel(job_id, asked), one_does=True)
        return ended

    def stop(self, timeout: float = STOP_S) -> None:
        """End the servers that it has started, kill those that do not end in time, and listen no more. Twice is fine.

        Args:
            timeout: Seconds until the kill. Trainings that run are lost.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        for server in self._dispatcher.stop():
            if server.slot is not None:
                self._dispatcher.tell_to_end(server)
        self._supervisor.stop(timeout)
        self._dispatcher.end()
        self.listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<ModelServerManager on {self.listener.destination}, {len(self._dispatcher.servers)} servers>"

    # What `ModelCalls` needs.

    def _call(
        self,
        cmd: str,
        data: Any,
        convert: Convert,
        timeout: float,
        job: Job[Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Job[Any]:
        if job is None:
            job = Job()
        call = Call(
            cmd=cmd,
            contents=encode(Command(cmd=cmd, data=data)),
            deadline_at=time.monotonic() + timeout,
            job=job,
            convert=convert,
        )
        if cmd == "TRAIN" and job.id:  # By `train`; `command` may mean anything by it.
            self._remember(job, call, on_progress)
            call.convert = lambda answer: self._note_trained(convert(answer), bool(data.get("activate", True)))
        if cmd in ("LOAD", "UNLOAD"):
            self._call_all(call)
        elif cmd == "JOB" and job.id:  # Likewise by `job`. Any server may have it.
            self._call_all(call, one_does=True)
        else:
            self._dispatcher.submit(call)
        return job

    def _remember(self, job: Job[Any], call: Call, on_progress: OnProgress | None) -> None:
        known = _Known(job, on_progress)
        known.call = call
        with self._dispatcher.lock:
            if job.id in self._known:
                raise ValueError(f"there is a job {job.id!r} already")
            self._known[job.id] = known
            finished = [job_id for job_id, other in self._known.items() if other.job.done()]
            for job_id in finished[: max(0, len(finished) - FINISHED_JOBS_MAX)]:
                del self._known[job_id]
        job.add_done_callback(known.note_end)

    def _note_trained(self, training: Training, is_served: bool) -> Training:
        if is_served:
            self._served[training.name] = training.version
        return training

    def _call_all(self, call: Call, one_does: bool = False) -> None:
        """Have a command carried out by all servers that are there; with none, by the first that comes.

        Its job ends when all have answered, or, if `one_does`, with the first that could do it.
        """
        with self._dispatcher.lock:
            servers = [server for server in self._dispatcher.servers.values() if server.is_ready(time.monotonic())]
        job, convert = call.job, call.convert
        if job is None or convert is None:
            raise ValueError("a command for all servers needs a job")
        targets: list[Server | None] = [*servers] or [None]
        left, lock = len(targets), threading.Lock()
        errors: list[BaseException] = []

        def on_end(each: Job[Any]) -> None:
            nonlocal left
            if each.cancelled():
                job.settle_cancelled()
                return
            error = each.exception()
            with lock:
                left -= 1
                errors.extend([error] if error is not None else [])
                if left and not (one_does and error is None):
                    return
            if error is not None or (errors and not one_does):
                # That a server does not have a job says nothing if another has.
                job.settle_error(next((each for each in errors if not isinstance(each, JobUnknown)), errors[0]))
                return
            result = each.result()
            if isinstance(result, Manifest):
                self._served[result.name] = result.version
            job.settle(result)

        for server in targets:
            each: Job[Any] = Job()
            each.add_done_callback(on_end)  # type: ignore[arg-type]  # A future calls it with itself, which is a job.
            self._dispatcher.submit(
                Call(cmd=call.cmd, contents=call.contents, deadline_at=call.deadline_at, job=each, convert=convert),
                server,
            )

    def _cancel_job(self, job: Job[Any]) -> bool:
        known = self._known.get(job.id)
        if known is None:
            # It was found by its id, at one of the servers.
            self._call_all(make_cancel(job.id), one_does=True)
            return True
        call = known.call
        if call is not None:  # Else it has ended in this very moment.
            self._dispatcher.give_up(call)
        return call is not None

    # On the messenger's thread.

    def _take(self, message: Any) -> None:
        # Somebody may come before the constructor knows its listener.
        self._listens.wait()
        self._dispatcher.take(message)

    def _note_progress(self, progress: Progress) -> None:
        known = self._known.get(progress.job)
        if known is not None and not known.job.done():
            for watcher in list(known.watchers):
                try:
                    watcher(progress)
                except Exception:
                    logger.exception("! on_progress of job %r failed; others who watch it are told", progress.job)


def make_words(command: Sequence[str | Path] | None, listener: Listener, folder: Path, count: int) -> list[str]:
    """Return the words of the program that is to be started.

    Raises:
        ValueError: There is nothing to start, or it wants an endpoint that the listener does not have, or a key.
    """
    endpoints = [endpoint for endpoint in listener.endpoints if not endpoint.startswith("inproc:")]
    if not endpoints:
        raise ValueError(
            f"{listener.destination} stays within this process, so no server could connect: use ipc or tcp"
        )
    ipc_path = next((endpoint[len("ipc://") :] for endpoint in endpoints if endpoint.startswith("ipc:")), None)
    if command is None:
        if count and ipc_path is None and listener.messenger.security.key is not None:
            raise ValueError(
                f"{listener.destination} lets in only who has a key, and our servers have none: listen on a port or "
                "'host:port' without tcp://, which they reach by ipc, or start servers with keys of their own"
            )
        place = str(listener.destination)
        words = [sys.executable, "-P", "-m", SERVER_MODULE, place, "--folder", str(folder), "--slot", "{slot}"]
    else:
        words = [str(word) if isinstance(word, Path) else word for word in command]
        if isinstance(command, str) or not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f"command is {command!r}, it must be a list of words, each a text or a path")
        if ipc_path is None and any("{ipc_path}" in word for word in words):
            raise ValueError(f"the command wants {{ipc_path}}, but {listener.destination} has no ipc endpoint")
        words = [word.replace("{endpoint}", endpoints[-1]).replace("{ipc_path}", ipc_path or "") for word in words]
    if any("\0" in word for word in words):
        raise ValueError(f"no program can be started with a NUL character in {words}: it must be left out")
    return words


def _describe(server: Server | None, slot: Slot | None, now: float) -> ServerStatus:
    state = slot.state.value if slot is not None else ""
    if server is not None:
        state = "ready" if server.is_ready(now) else "silent"
    return ServerStatus(
        identity=server.identity if server else "",
        state=state,
        slot=slot.number if slot else -1,
        pid=slot.pid if slot else server.about.pid if server else 0,
        restarts=max(0, slot.start_count - 1) if slot else 0,
        open_calls=len(server.open) if server else 0,
        reason=slot.reason if slot else "",
        stderr=list(slot.stderr) if slot and slot.state not in (SlotState.STARTING, SlotState.RUNNING) else [],
    )
