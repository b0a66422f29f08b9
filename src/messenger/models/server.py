"""Our model server: connects to a manager, trains, keeps models, and answers inference from memory.

Commands arrive on the messenger's thread. What is in memory and small is predicted there and then, since a switch of
threads takes longer than a small prediction; loads and large predictions run on a few threads, trainings in processes.

What must never happen here: a load or a long prediction that holds up the messenger's thread; a command without
exactly one answer; an answer to `QUIT`.

Source: docs/models.md, "The protocol".
"""

import argparse
import itertools
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from messenger import DeliveryError, Destination, Message, Messenger, MessengerError, Security

from .errors import CommandFailed, TrainingCancelled
from .jobs import Progress
from .limits import HELLO_S, INLINE_VALUES_MAX, LOADED_MODELS_MAX, NPY_VALUES_MIN
from .protocol import (
    ANSWER,
    CONNECTED,
    PROGRESS,
    REPLY_PREFIX,
    Answer,
    ReceivedCommand,
    ServerHello,
    decode_command,
    encode,
    encode_failure,
    show_error,
)
from .scoring import LoadedModels, Model
from .store import Store, as_dict, check_name, default_folder
from .table import Request
from .trainer import Task, Trainer

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger("messenger.models")
THREADS = 2


class Print(msgspec.Struct):
    """The data of `PRINT`."""

    message: str


class Infer(msgspec.Struct):
    """The data of `INFER`.

    Attributes:
        name: Of the model.
        version: 0 for the one that is served.
        rows: As `Model.predict` takes them; absent if they came as an array.
        parts: Of a batch: how many of the rows belong to each call.
    """

    name: str
    version: int = 0
    rows: Any = None
    parts: list[int] | None = None


class Named(msgspec.Struct):
    """The data of `LOAD` and `UNLOAD`; version 0 is the newest, or of `UNLOAD` all."""

    name: str
    version: int = 0
    activate: bool = True


class OfJob(msgspec.Struct):
    """The data of `JOB` and `CANCEL`."""

    job: str


class ModelServer:
    """A server of models at a manager.

    Args:
        messenger: That it connects with.
        destination: Of the manager, which need not be there yet.
        folder: Of the models; by default that of the user.
        slot: The number that a manager gives to what it starts.

    Thread: any. It serves from its making on until `close`.
    """

    def __init__(
        self,
        messenger: Messenger,
        destination: Destination | str | int = 15446,
        *,
        folder: str | Path | None = None,
        slot: int = -1,
    ) -> None:
        self.ended = threading.Event()
        self._messenger = messenger
        self._store = Store(folder or default_folder())
        self._store.remove_stale()
        self._loaded = LoadedModels(self._store)
        self._trainer = Trainer(self._store)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="model-server")
        self._npy = False
        self._inferred_rows = 0
        self._handlers: dict[str, Callable[[Message, ReceivedCommand, Any], None]] = {
            "PRINT": self._print,
            "QUIT": self._quit,
            "TRAIN": self._train,
            "INFER": self._infer,
            "LOAD": self._load,
            "UNLOAD": self._unload,
            "LIST": self._list,
            "STATUS": self._status,
            "CANCEL": self._cancel,
            "JOB": self._job,
        }
        hello = ServerHello(pid=os.getpid(), life=secrets.token_hex(8), slot=slot, npy=True, batches=True)
        self._hello = encode(Answer(action=CONNECTED, result="", success=True, err="", server=hello))
        self._connection = messenger.make_connection(destination, callback=self._take)
        self._say_hello()
        self._pool.submit(self._warm_up)

    def close(self) -> None:
        """End what is being trained, and serve no more. Twice is fine."""
        self.ended.set()
        self._trainer.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._connection.close()

    # Being there.

    def _say_hello(self) -> None:
        """Tell the manager that we are here, then wait for its end: the second message is never answered."""
        self._messenger.send_message(self._connection, self._hello)
        self._messenger.send_message(
            self._connection, self._hello, lambda _: None, on_error=self._on_manager_gone, timeout=HELLO_S
        )

    def _on_manager_gone(self, error: DeliveryError) -> None:
        """The manager's process has ended, or it is time to say hello again. The next one may know nothing of us."""
        if self.ended.is_set():
            return
        self._npy = False
        try:
            self._say_hello()
        except MessengerError as closed:
            logger.warning("! no hello to the manager: %s", closed)

    def _warm_up(self) -> None:
        """Load what is served, so that the first callers need not wait for it."""
        for listed in self._store.list_all()[:LOADED_MODELS_MAX]:
            if listed.version:
                self._load_ahead(listed.name, listed.version)

    def _load_ahead(self, name: str, version: int) -> None:
        try:
            self._loaded.load(name, version)
        except Exception as error:  # Whoever asks for it is told.
            logger.warning("! model %s version %d is not loaded: %s", name, version, error)

    # Answers.

    def _take(self, message: Message) -> None:
        if message.dest_callback_id:
            return  # A ping, which the messenger itself has answered, or an answer.
        try:
            command, array = decode_command(message.contents)
        except (ValueError, RecursionError) as error:
            self._fail(message, CommandFailed(f"this is no command: {error}"))
            return
        self._npy = self._npy or command.npy
        handler = self._handlers.get(command.cmd)
        if handler is None:
            self._fail(message, CommandFailed(f"the command {command.cmd!r} is unknown"))
            return
        self._run(handler, message, command, array)

    def _run(self, handler: Callable[..., None], message: Message, *arguments: Any) -> None:
        """Call what answers a message, and answer with its error if it raises."""
        try:
            handler(message, *arguments)
        except Exception as error:
            # Whatever a model's library raises on some input, it must not end the server.
            if not isinstance(error, MessengerError | ValueError):
                logger.error("! a command failed: %r", message, exc_info=error)
            self._fail(message, error)

    def _later(self, handler: Callable[..., None], message: Message, *arguments: Any) -> None:
        self._pool.submit(self._run, handler, message, *arguments)

    def _answer(self, message: Message, result: Any, array: "NDArray[Any] | None" = None) -> None:
        self._reply(message, encode(Answer(action=ANSWER, result=result, success=True, err=""), array))

    def _fail(self, message: Message, error: BaseException) -> None:
        self._reply(message, encode_failure(show_error(error), type(error).__name__))

    def _reply(self, message: Message, contents: bytes) -> None:
        if message.source_callback_id and not self.ended.is_set():
            message.reply(contents)

    # Commands.

    def _print(self, message: Message, command: ReceivedCommand, array: object) -> None:
        self._answer(message, REPLY_PREFIX + command.data_as(Print).message)

    def _quit(self, message: Message, command: ReceivedCommand, array: object) -> None:
        self.ended.set()

    def _infer(self, message: Message, command: ReceivedCommand, array: "NDArray[Any] | None") -> None:
        request = command.data_as(Infer)
        if array is not None:
            request.rows = array
        version = request.version or self._store.current(request.name)
        model = self._loaded.find(request.name, version)
        rows = request.rows
        is_sized = isinstance(rows, list) or array is not None
        if request.parts is not None and not (is_sized and min(request.parts) > 0 and sum(request.parts) == len(rows)):
            raise CommandFailed("the parts are not those of the rows")
        if model is not None and is_sized and len(rows) * model.width <= INLINE_VALUES_MAX:
            self._predict(message, request, model)
        else:
            self._later(self._load_and_predict, message, request, version)

    def _load_and_predict(self, message: Message, request: Infer, version: int) -> None:
        self._predict(message, request, self._find(request.name, version))

    def _find(self, name: str, version: int) -> Model:
        if not version:
            known = self._store.versions(name)
            raise CommandFailed(
                f"no version of model {name!r} is served: load one of {known}"
                if known
                else f"there is no model {name!r}"
            )
        return self._loaded.load(name, version)

    def _predict(self, message: Message, request: Infer, model: Model) -> None:
        result: dict[str, Any] = {"name": request.name, "version": model.manifest.version}
        try:
            scores = model.score(request.rows)
        except CommandFailed:
            if request.parts is None or len(request.parts) == 1:
                raise
            # One of the calls is bad; the others must not suffer.
            result["results"] = [_predict_part(model, rows) for rows in _split(request.rows, request.parts)]
            self._answer(message, result)
            return
        self._inferred_rows += len(scores)
        if self._npy and len(scores) > NPY_VALUES_MIN:
            self._answer(message, result, model.as_array(scores))
        else:
            result["predictions"] = model.as_list(scores)
            self._answer(message, result)

    def _load(self, message: Message, command: ReceivedCommand, array: object) -> None:
        self._later(self._load_now, message, command.data_as(Named))

    def _load_now(self, message: Message, named: Named) -> None:
        model = self._find(named.name, named.version or max(self._store.versions(named.name), default=0))
        if named.activate:
            self._store.activate(named.name, model.manifest.version)
        self._answer(message, as_dict(model.manifest))

    def _unload(self, message: Message, command: ReceivedCommand, array: object) -> None:
        named = command.data_as(Named)
        count = self._loaded.unload(check_name(named.name), named.version)
        self._answer(message, {"name": named.name, "unloaded": count})

    def _list(self, message: Message, command: ReceivedCommand, array: object) -> None:
        self._answer(message, [msgspec.to_builtins(listed) for listed in self._store.list_all()])

    def _status(self, message: Message, command: ReceivedCommand, array: object) -> None:
        status = {
            "pid": os.getpid(),
            "folder": str(self._store.folder),
            "loaded": [{"name": name, "version": version} for name, version in self._loaded.keys()],  # noqa: SIM118
            "jobs": self._trainer.states(),
            "inferred_rows": self._inferred_rows,
        }
        self._answer(message, status)

    # Trainings.

    def _train(self, message: Message, command: ReceivedCommand, array: object) -> None:
        request = command.data_as(Request)
        check_name(request.name)
        if not request.job:
            request.job = secrets.token_hex(8)
        self._trainer.submit(request, self._report, lambda task: self._tell_end(message, task))

    def _report(self, progress: Progress) -> None:
        contents = encode(Answer(action=PROGRESS, result=msgspec.to_builtins(progress), success=True, err=""))
        try:
            self._messenger.send_message(self._connection, contents)
        except MessengerError as error:
            logger.warning("! progress is not told: %s", error)

    def _tell_end(self, message: Message, task: Task) -> None:
        if task.training is not None and task.request.activate:
            # Whoever hears of it asks for predictions at once, and the first model of a kind imports its library.
            self._load_ahead(task.training.name, task.training.version)
        try:
            if task.training is not None:
                self._answer(message, msgspec.to_builtins(task.training))
            elif task.state == "CANCELLED":
                self._reply(message, encode_failure("the training was cancelled", TrainingCancelled.__name__))
            else:
                self._reply(message, encode_failure(task.error, task.kind))
        except MessengerError as error:
            logger.warning("! the end of job %s is not told: %s", task.request.job, error)

    def _cancel(self, message: Message, command: ReceivedCommand, array: object) -> None:
        self._answer(message, self._trainer.cancel(command.data_as(OfJob).job))

    def _job(self, message: Message, command: ReceivedCommand, array: object) -> None:
        job = command.data_as(OfJob).job
        self._trainer.watch(job, lambda task: self._tell_end(message, task))


def _split(rows: Any, parts: list[int]) -> list[Any]:
    ends = list(itertools.accumulate(parts))
    return [rows[end - count : end] for count, end in zip(parts, ends, strict=True)]


def _predict_part(model: Model, rows: Any) -> dict[str, Any]:
    try:
        return {"predictions": model.as_list(model.score(rows))}
    except CommandFailed as error:
        return {"err": show_error(error)}


def main(words: list[str] | None = None) -> int:
    """Serve until QUIT, SIGTERM or SIGINT: `python -m messenger.models.server DEST --folder PATH --slot N`."""
    parser = argparse.ArgumentParser(prog="messenger.models.server", description=main.__doc__)
    parser.add_argument("destination")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--slot", type=int, default=-1)
    options = parser.parse_args(words)
    return serve(options.destination, options.folder, options.slot)


def serve(
    destination: Destination | str, folder: Path | None = None, slot: int = -1, *, security: Security | None = None
) -> int:
    """Run a server until it is told to end, in the main thread, and return the exit status."""
    # With a key, the key says who it is.
    has_key = security is not None and security.key is not None
    identity = None if has_key else f"model-server-{os.getpid()}-{secrets.token_hex(4)}"
    with Messenger(identity, security=security) as messenger:
        server = ModelServer(messenger, destination, folder=folder, slot=slot)

        def end(number: int, frame: FrameType | None) -> None:
            server.ended.set()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        # Python misses a signal that comes just before an endless wait, so the wait has an end.
        while not server.ended.wait(1.0):
            continue
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
