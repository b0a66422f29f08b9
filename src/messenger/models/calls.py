"""The calls that a manager and a client of a manager have in common."""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from .errors import BadAnswer
from .jobs import Inference, Job, Progress, Training
from .limits import CALL_TIMEOUT_S, TRAIN_TIMEOUT_S
from .protocol import NUMERIC_KINDS, Answer, as_builtins, encode_value
from .store import Listed, Manifest, check_name

Data = str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
# Makes the result of a job of an answer.
Convert = Callable[[Answer], Any]
OnProgress = Callable[[Progress], object]


class ModelCalls(ABC):
    """Calls to model servers. Each returns a job at once, and its callbacks run on the messenger's thread.

    Thread: any. A job's error is one of `CommandFailed` (the server says why), `NoServer` and `ManagerStopped` (it did
    not run), `ServerLost` and `OutcomeUnknown` (it may have run), `Overloaded` (it did not run, try again later),
    `BadAnswer`, or another `MessengerError`.
    """

    @abstractmethod
    def _call(
        self,
        cmd: str,
        data: Any,
        convert: Convert,
        timeout: float,
        job: Job[Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Job[Any]:
        """Have one server carry out a command."""

    @abstractmethod
    def infer(self, name: str, rows: Any, *, version: int = 0, timeout: float = CALL_TIMEOUT_S) -> Job[Inference]:
        """Predict. Calls of one model that come at the same time are joined; each gets its own predictions.

        Args:
            name: Of the model.
            rows: A list of rows in the order of the features, a list of dictionaries by their names, or a NumPy matrix.
                None and NaN are missing values.
            version: By default the one that is served.
            timeout: Seconds until it ends as `NoServer` or `OutcomeUnknown`, up to half a second late.

        Returns:
            A job whose result has `predictions` and the `version` that made them.
        """

    def train(
        self,
        name: str,
        *,
        method: str = "lightgbm",
        data: Data,
        target: str,
        on_progress: OnProgress | None = None,
        features: Sequence[str] | None = None,
        task: str | None = None,
        params: Mapping[str, Any] | None = None,
        validation: float = 0.2,
        seed: int = 0,
        activate: bool = True,
        job_id: str | None = None,
        timeout: float = TRAIN_TIMEOUT_S,
    ) -> Job[Training]:
        """Train a new version of a model.

        Args:
            name: Of the model: 1 to 64 of A-Z a-z 0-9 . _ -.
            method: `lightgbm`, `linear`, `random_forest`, `gradient_boosting` or `neural_network`.
            data: The path of a CSV or Parquet file that the server can read, a list of dictionaries, or a dictionary of
                columns. None and NaN are missing values.
            target: The column to predict.
            on_progress: Called with a `Progress` at most 20 times a second, on the messenger's thread.
            features: Columns to predict from; by default all others. They must be numbers.
            task: `classification` or `regression`. By default text, booleans and at most 20 whole numbers are classes.
            params: Of the method, as its library calls them, and `steps`: trees, or passes over the data.
            validation: The part of the rows, between 0 and 1, that is held back to measure the metrics.
            seed: Of all random numbers.
            activate: Whether the new version is served as soon as it is there.
            job_id: By which to find the job later; by default one that is unique.
            timeout: Seconds, until it ends as `OutcomeUnknown`.

        Returns:
            A job whose result has the version and the metrics. `cancel()` ends it within 2 s.

        Raises:
            ValueError: There are infinite values among the data. ModelFileInvalid: The name cannot be one. TypeError:
            Something cannot be sent.
        """
        used = None if features is None else {target, *features}
        request: dict[str, Any] = {
            "name": check_name(name),
            "method": method,
            "data": os.path.abspath(data) if isinstance(data, str | Path) else encode_data(data, used),
            "target": target,
            "features": None if features is None else list(features),
            "task": task,
            "params": dict(params or {}),
            "validation": validation,
            "seed": seed,
            "activate": activate,
            "job": job_id or secrets.token_hex(8),
        }
        job: Job[Training] = Job(request["job"], self._cancel_job)
        return self._call("TRAIN", request, _as_type(Training), timeout, job, on_progress)

    def print_message(self, message: str, *, timeout: float = CALL_TIMEOUT_S) -> Job[str]:
        """Send `PRINT`; the result is `"MODEL_REPLY_"` and the message."""
        return self._call("PRINT", {"message": message}, _as_type(str), timeout)

    def command(self, cmd: str, data: Any = "", *, timeout: float = CALL_TIMEOUT_S) -> Job[dict[str, Any]]:
        """Send any command to one server; the result is its answer, with `action`, `result`, `success` and `err`."""
        return self._call(cmd, data, as_dict, timeout)

    def load(self, name: str, version: int = 0, *, timeout: float = CALL_TIMEOUT_S) -> Job[Manifest]:
        """Serve a version, by default the newest, from now on; an older one is a roll-back. No call fails meanwhile.

        Returns:
            A job that ends when all servers have it in memory; its result is the version's manifest.
        """
        data = {"name": check_name(name), "version": version, "activate": True}
        return self._call("LOAD", data, _as_type(Manifest), timeout)

    def unload(self, name: str, *, timeout: float = CALL_TIMEOUT_S) -> Job[None]:
        """Drop a model from the servers' memory. The next `infer` loads it again."""
        return self._call("UNLOAD", {"name": check_name(name)}, lambda _: None, timeout)

    def list_models(self, *, timeout: float = CALL_TIMEOUT_S) -> Job[list[Listed]]:
        """List the models in the folder."""
        return self._call("LIST", "", _as_type(list[Listed]), timeout)

    @abstractmethod
    def cancel(self, job: str | Job[Any]) -> bool:
        """Cancel a job, also by its id; return whether it had not ended yet."""

    @abstractmethod
    def job(self, job_id: str, *, timeout: float = TRAIN_TIMEOUT_S) -> Job[Training]:
        """Return the job with an id, also one of an earlier caller; it ends with `CommandFailed` if there is none."""

    @abstractmethod
    def _cancel_job(self, job: Job[Any]) -> bool:
        """Have a training ended."""


def as_dict(answer: Answer) -> dict[str, Any]:
    """Return an answer as it stands on the wire."""
    return {"action": answer.action, "result": answer.result, "success": answer.success, "err": answer.err}


def as_training(answer: Answer) -> Training:
    """Return what came of a training."""
    training: Training = _as_type(Training)(answer)
    return training


def as_rows(rows: Any) -> tuple[Any, int, Any]:
    """Return rows as a list or a matrix, how many there are, and what only rows that can be joined have in common.

    Raises:
        ValueError: They are neither.
    """
    if isinstance(rows, tuple):
        rows = list(rows)
    if isinstance(rows, list) and rows:
        first = rows[0]
        return rows, len(rows), (type(first), len(first) if isinstance(first, list | tuple | dict) else 0)
    dtype = getattr(rows, "dtype", None)
    if dtype is not None and dtype.kind in NUMERIC_KINDS and rows.ndim == 2 and len(rows):
        return rows, len(rows), rows.shape[1]
    raise ValueError("rows must be a list of rows, or a matrix of numbers with two dimensions, and not empty")


def encode_data(data: Any, used: set[str] | None) -> msgspec.Raw:
    """Return data to train on as JSON.

    Args:
        used: The columns that matter; None for all.

    Raises:
        TypeError: Something in it cannot be sent.
        ValueError: There are infinite values among it, which JSON has not: they would arrive as missing ones.
    """
    encoded = encode_value(data)
    # Only in what has missing values can there be infinite ones, so most data need no closer look.
    place = _find_infinity(as_builtins(data), used) if b"null" in encoded else None
    if place is not None:
        raise ValueError(
            f"column {place[0]!r} has an infinite value in row {place[1]} (the first is row 0), and infinite values "
            "cannot be sent as JSON: give the data as a file, make it None, which is a missing value, or leave it out"
        )
    return msgspec.Raw(encoded)


def _find_infinity(data: Any, used: set[str] | None) -> tuple[str, int] | None:
    """Return the column and the row of an infinite value, in rows by column or columns by name."""
    if isinstance(data, dict):
        for name, values in data.items():
            if (
                isinstance(values, list | tuple)
                and (used is None or name in used)
                and (inf in values or -inf in values)
            ):
                return name, next(row for row, value in enumerate(values) if value in (inf, -inf))
    elif isinstance(data, list | tuple):
        for row, each in enumerate(data):
            if isinstance(each, dict) and (inf in each.values() or -inf in each.values()):
                for name, value in each.items():
                    if value in (inf, -inf) and (used is None or name in used):
                        return name, row
    return None


def _as_type(kind: Any) -> Convert:
    def convert(answer: Answer) -> Any:
        try:
            return msgspec.convert(answer.result, kind)
        except msgspec.ValidationError as error:
            raise BadAnswer(f"the result {str(answer.result)[:80]!r} is not what was asked for: {error}") from error

    return convert
