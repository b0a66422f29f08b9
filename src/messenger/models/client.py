"""`ModelClient`: the calls of a `ModelServerManager`, from another process, to the manager that listens there.

Source: docs/models.md.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from messenger import Connection, DeliveryError, Destination, Message, Messenger, MessengerError

from .batching import Batch, InferCall, encode_infer
from .calls import Convert, ModelCalls, OnProgress, as_rows, as_training
from .errors import TrainingCancelled, error_of
from .jobs import Inference, Job, Progress, Training
from .limits import CALL_TIMEOUT_S, TRAIN_TIMEOUT_S
from .protocol import PROGRESS, Answer, Command, decode_answer, encode

# After a server's deadline its answer is still on its way.
ANSWER_S = 1.0


class ModelClient(ModelCalls):
    """Calls a manager in another process.

    Args:
        messenger: That it connects with.
        destination: Of the manager.

    Thread: any. Close the messenger to end it.
    """

    def __init__(self, messenger: Messenger, destination: Destination | str | int = 15446) -> None:
        self._messenger = messenger
        self._watchers: dict[str, OnProgress] = {}
        # Of `infer`, those without an outcome.
        self._open: set[Job[Any]] = set()
        self._connection: Connection = messenger.make_connection(destination, callback=self._take, responses=False)

    def infer(self, name: str, rows: Any, *, version: int = 0, timeout: float = CALL_TIMEOUT_S) -> Job[Inference]:
        """Predict; see `ModelCalls.infer`."""
        rows, row_count, kind = as_rows(rows)
        data: dict[str, Any] = {"name": name, "version": version, "timeout": timeout}
        contents = encode_infer(data, rows, npy=True, takes_npy=not isinstance(rows, list))
        job: Job[Inference] = Job()
        now = time.monotonic()
        batch = Batch(name, version, [InferCall(job, rows, row_count, kind, now, now + timeout)])
        self._open.add(job)
        message_id = self._send(job, contents, batch.settle, timeout + ANSWER_S)
        if len(self._open) == 1:
            # As at the manager: of several that wait the messenger's thread takes the answers faster.
            job.may_fetch(self._messenger, message_id)
        return job

    def status(self, *, timeout: float = CALL_TIMEOUT_S) -> Job[dict[str, Any]]:
        """Ask the manager what it knows; the result has the fields of `ManagerStatus`."""
        return self._call("STATUS", "", lambda answer: answer.result, timeout)

    def job(
        self, job_id: str, *, timeout: float = TRAIN_TIMEOUT_S, on_progress: OnProgress | None = None
    ) -> Job[Training]:
        """Return the job with an id, of this client or of an earlier one; see `ModelCalls.job`."""
        job: Job[Training] = Job(job_id, self._cancel_job)
        return self._call("JOB", {"job": job_id}, as_training, timeout, job, on_progress)

    def cancel(self, job: str | Job[Any], *, timeout: float = CALL_TIMEOUT_S) -> bool:
        """Cancel a job; see `ModelCalls.cancel`. Of an id it waits for the manager's word, so not in a callback."""
        if isinstance(job, str):
            asked = self._call("CANCEL", {"job": job}, lambda answer: bool(answer.result), timeout)
            return bool(asked.result())
        return job.cancel()

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
        if on_progress is not None:
            self._watchers[job.id] = on_progress
            job.add_done_callback(lambda each: self._watchers.pop(job.id, None))
        self._send(job, encode(Command(cmd=cmd, data=data)), lambda answer, _: job.settle(convert(answer)), timeout)
        return job

    def _cancel_job(self, job: Job[Any]) -> bool:
        # It wants no response: what does is not started for who has said goodbye, as after a Ctrl-C.
        self._messenger.send_message(self._connection, encode(Command(cmd="CANCEL", data={"job": job.id})))
        return True

    def _send(self, job: Job[Any], contents: bytes, settle: Callable[[Answer, Any], object], timeout: float) -> int:
        def on_answer(message: Message) -> None:
            self._open.discard(job)
            try:
                answer, array = decode_answer(message.contents)
                if not answer.success:
                    raise error_of(answer.kind, answer.err, answer.retry_after_s)
                settle(answer, array)
            except TrainingCancelled:
                job.settle_cancelled()
            except MessengerError as error:
                job.settle_error(error)

        def on_error(error: DeliveryError) -> None:
            self._open.discard(job)
            job.settle_error(error)

        try:
            return self._messenger.send_message(
                self._connection, contents, on_answer, on_error=on_error, timeout=timeout
            )
        except BaseException:
            self._open.discard(job)
            raise

    def _take(self, message: Message) -> None:
        """Take reports of progress, which are no answers."""
        if message.dest_callback_id:
            return
        answer, _ = decode_answer(message.contents)
        if answer.action == PROGRESS:
            progress = msgspec.convert(answer.result, Progress)
            watcher = self._watchers.get(progress.job)
            if watcher is not None:
                watcher(progress)
