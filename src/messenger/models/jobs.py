"""What callers are given: jobs, and what comes of them."""

import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

import msgspec

from messenger import Messenger

T = TypeVar("T")


class Job(Future[T]):
    """A call that was made, as a future: `result(timeout)`, `done()`, `exception(timeout)`, `add_done_callback(fn)`.

    It ends exactly once: with a result, with an error, or cancelled. Callbacks run on the messenger's thread and must
    not block; one that is added while a thread waits in `result` may run on that thread. It can be awaited, too; who is
    cancelled while awaiting it gives it up. A `timeout` of `result` only ends that wait.

    Attributes:
        id: By which `manager.job(id)` and `messenger models status` find it; only trainings have one.
    """

    def __init__(self, job_id: str = "", on_cancel: "Callable[[Job[Any]], bool] | None" = None) -> None:
        super().__init__()
        self.id = job_id
        self._on_cancel = on_cancel
        self._messenger: Messenger | None = None
        self._message_id = 0
        self._has_callbacks = self._is_fetched = False

    def may_fetch(self, messenger: Messenger, message_id: int) -> None:
        """Let a thread that asks for the outcome run the callback of the message that brings it. For who made the job.

        It does not if the job has callbacks, which are not for that thread to run.
        """
        self._message_id = message_id
        self._messenger = messenger

    def result(self, timeout: float | None = None) -> T:
        """Return the result, once it is there, or raise the error; `TimeoutError` after `timeout` seconds."""
        return super().result(self._fetch(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the error, once it is there, or None; `TimeoutError` after `timeout` seconds."""
        return super().exception(self._fetch(timeout))

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call a function with the job when it has ended."""
        self._has_callbacks = True
        super().add_done_callback(fn)

    def _fetch(self, timeout: float | None) -> float | None:
        """Wait for the message, which may end the job; return what is left of the time."""
        if self._messenger is None or self._has_callbacks:
            return timeout
        started_at = time.monotonic()
        self._is_fetched = True  # Before it looks whether it is done: `cancel` does this in the other order.
        if not self.done():
            self._messenger.wait(self._message_id, timeout)
        return None if timeout is None else timeout + started_at - time.monotonic()

    def __await__(self) -> Generator[Any, None, T]:
        """Wait on the event loop that runs, for the result."""
        import asyncio

        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Give the job up. Only a training that runs takes time to end, at most 2 s, and may yet be completed.

        Returns:
            Whether it had not ended yet.

        Thread: any.
        """
        if self.done():
            return self.cancelled()
        if self._on_cancel is not None:
            return self._on_cancel(self)
        is_cancelled = self.settle_cancelled()
        if self._is_fetched and self._messenger is not None:
            self._messenger.cancel(self._message_id)  # Which wakes the thread that waits for it.
        return is_cancelled

    def settle(self, result: T) -> bool:
        """End with a result; return whether it had not ended yet. For whoever made the job."""
        try:
            self.set_result(result)
        except InvalidStateError:
            return False
        return True

    def settle_error(self, error: BaseException) -> bool:
        """End with an error; return whether it had not ended yet."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            return False
        return True

    def settle_cancelled(self) -> bool:
        """End as cancelled; return whether it had not ended yet."""
        return not self.cancelled() and super().cancel()


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a training is.

    Attributes:
        job: The job's id.
        step, of: What is done, and what there is to do.
        metric: The name of the figure.
        value: Of the metric, on the rows held back unless that is `train_loss`; None if it is not known yet.
    """

    job: str
    step: int
    of: int
    metric: str = ""
    value: float | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f", {self.metric} {self.value:.4g}"
        return f"{self.step} of {self.of}{value}"


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a training.

    Attributes:
        name, version: Of the model.
        method, task: Such as `"lightgbm"`, and `"classification"` or `"regression"`.
        metrics: On the rows that were held back.
        rows: All rows of the data.
        features: In the order in which rows without names are given.
        elapsed_s: Seconds.
        job: The job's id.
    """

    name: str
    version: int
    method: str
    task: str
    metrics: Mapping[str, float]
    rows: int
    features: list[str]
    elapsed_s: float
    job: str

    def __str__(self) -> str:
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"{self.name} version {self.version}: {self.method} {self.task} on {self.rows} rows{metrics}"


class Inference(msgspec.Struct, frozen=True, eq=False):
    """What came of an inference.

    Attributes:
        name, version: Of the model that answered.
        predictions: One for each row, in their order: a list if the rows were one, else a NumPy array.
    """

    name: str
    version: int
    predictions: Any
