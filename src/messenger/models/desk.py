"""Serves the clients of a manager: programs of other processes that send it commands in the servers' own format.

What must never happen here: a command without exactly one answer; a client that ends servers.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from messenger import Message, Messenger, MessengerError

from .errors import CommandFailed, Overloaded, TrainingCancelled
from .jobs import Inference, Job, Progress
from .limits import CALL_TIMEOUT_S, NPY_VALUES_MIN
from .protocol import ANSWER, PROGRESS, Answer, ReceivedCommand, encode, encode_failure, show_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .manager import ModelServerManager

logger = logging.getLogger("messenger.models")


class InferRequest(msgspec.Struct):
    """The data of `INFER`, as a client sends it."""

    name: str
    version: int = 0
    rows: Any = None
    timeout: float = CALL_TIMEOUT_S


class TrainRequest(msgspec.Struct, kw_only=True):
    """The data of `TRAIN`, as a client sends it; the server checks the rest."""

    name: str
    data: Any
    target: str
    method: str = "lightgbm"
    features: list[str] | None = None
    task: str | None = None
    params: dict[str, Any] = msgspec.field(default_factory=dict)
    validation: float = 0.2
    seed: int = 0
    activate: bool = True
    job: str | None = None


class OfJob(msgspec.Struct):
    """The data of `JOB` and `CANCEL`."""

    job: str


class OfModel(msgspec.Struct):
    """The data of `LOAD` and `UNLOAD`."""

    name: str
    version: int = 0


class Desk:
    """Takes commands of clients and answers them. On the messenger's thread."""

    def __init__(self, messenger: Messenger, manager: "ModelServerManager") -> None:
        self._messenger = messenger
        self._manager = manager
        self._handlers: dict[str, Callable[[Message, ReceivedCommand], Job[Any]]] = {
            "TRAIN": self._train,
            "JOB": self._job,
            "LIST": lambda *_: manager.list_models(),
            "LOAD": self._load,
            "UNLOAD": lambda _, command: manager.unload(command.data_as(OfModel).name),
        }

    def take(self, message: Message, command: ReceivedCommand, array: "NDArray[Any] | None") -> None:
        """Carry out a command and answer it when it is done."""
        try:
            if command.cmd == "INFER":
                self._infer(message, command, array)
            elif command.cmd == "STATUS":
                self._answer(message, msgspec.to_builtins(self._manager.status()))
            elif command.cmd == "CANCEL":
                self._answer_when_done(message, self._manager.cancel_for_client(command.data_as(OfJob).job))
            elif command.cmd == "QUIT":
                raise CommandFailed("a client cannot end servers: stop the manager")
            elif handler := self._handlers.get(command.cmd):
                self._answer_when_done(message, handler(message, command))
            else:
                job = self._manager.command(command.cmd, command.data_as(object))
                job.add_done_callback(lambda each: self._end(message, each, lambda answer: answer["result"]))
        except (MessengerError, ValueError, TypeError) as error:
            self._fail(message, error)

    def _infer(self, message: Message, command: ReceivedCommand, array: "NDArray[Any] | None") -> None:
        request = command.data_as(InferRequest)
        rows = request.rows if array is None else array
        job = self._manager.infer(request.name, rows, version=request.version, timeout=request.timeout)
        job.add_done_callback(lambda each: self._end_infer(message, each, command.npy))

    def _end_infer(self, message: Message, job: Any, npy: bool) -> None:
        if job.cancelled() or job.exception() is not None:
            self._end(message, job)
            return
        inference: Inference = job.result()
        result = {"name": inference.name, "version": inference.version}
        predictions = inference.predictions
        if npy and hasattr(predictions, "tolist") and predictions.size > NPY_VALUES_MIN:
            self._answer(message, result, predictions)
        else:
            self._answer(message, {**result, "predictions": predictions})

    def _train(self, message: Message, command: ReceivedCommand) -> Job[Any]:
        given = msgspec.to_builtins(command.data_as(TrainRequest))
        job_id = given.pop("job")
        return self._manager.train(
            given.pop("name"), job_id=job_id, on_progress=lambda progress: self._report(message, progress), **given
        )

    def _job(self, message: Message, command: ReceivedCommand) -> Job[Any]:
        job_id = command.data_as(OfJob).job
        self._manager.watch(job_id, lambda progress: self._report(message, progress))
        return self._manager.job(job_id)

    def _load(self, _: Message, command: ReceivedCommand) -> Job[Any]:
        named = command.data_as(OfModel)
        return self._manager.load(named.name, named.version)

    def _report(self, message: Message, progress: Progress) -> None:
        contents = encode(Answer(action=PROGRESS, result=msgspec.to_builtins(progress), success=True, err=""))
        try:
            # To the client, not as the answer to its message.
            self._messenger.send_message((self._manager.listener, message.sender), contents)
        except MessengerError as error:
            logger.warning("! progress is not told to %r: %s", message.sender, error)

    def _answer_when_done(self, message: Message, job: Job[Any]) -> None:
        job.add_done_callback(lambda each: self._end(message, each))

    def _end(self, message: Message, job: Any, pick: Callable[[Any], Any] = msgspec.to_builtins) -> None:
        if job.cancelled():
            self._reply(message, encode_failure("the job was cancelled", TrainingCancelled.__name__))
        elif (error := job.exception()) is not None:
            self._fail(message, error)
        else:
            self._answer(message, pick(job.result()))

    def _answer(self, message: Message, result: Any, array: "NDArray[Any] | None" = None) -> None:
        self._reply(message, encode(Answer(action=ANSWER, result=result, success=True, err=""), array))

    def _fail(self, message: Message, error: BaseException) -> None:
        retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
        self._reply(message, encode_failure(show_error(error), type(error).__name__, retry_after_s))

    def _reply(self, message: Message, contents: bytes) -> None:
        if not message.source_callback_id or message.is_sender_gone:
            return
        try:
            message.reply(contents)
        except MessengerError as error:
            # The client, or the manager, is gone; there is nobody to tell.
            logger.warning("! %r is not answered: %s", message.sender, error)
