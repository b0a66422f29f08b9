"""Calls of `infer` that wait, and how they are joined.

There is no timer: while a server is busy with one batch, what comes meanwhile is the next one, up to a number of rows
and to a time that its prediction should take. So a single caller waits for nobody, and many callers share each message
and each call of the model.

Pure: no sockets, threads or clock. What must never happen here: an answer that goes to another call than its own; a
queue that grows without an end, or a wait of which the caller is not warned.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import BadAnswer, CommandFailed, Overloaded
from .jobs import Inference, Job
from .limits import NPY_VALUES_MIN, QUEUED_CALLS_MAX
from .protocol import Answer, Command, encode

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Weight of the newest batch in the time that a row takes.
SMOOTHING = 0.2
SLOWER_MAX = 4.0
# The time of a batch of few rows is that of its way, which more rows would share.
LEARNED_ROWS_MIN = 32
RETRY_S_MIN = 0.01


class InferCall(msgspec.Struct, eq=False):
    """One call of `infer`.

    Attributes:
        job: The caller's.
        rows: A list, or a matrix.
        row_count: Of the rows.
        kind: Calls of one kind can be joined: the type of the rows, and of a matrix its columns.
        queued_at, deadline_at: Instants.
        attempts: How often it was given to a server.
    """

    job: Job[Inference]
    rows: Any
    row_count: int
    kind: Any
    queued_at: float
    deadline_at: float
    attempts: int = 0


class Batch(msgspec.Struct, eq=False):
    """Calls that go to a server in one message.

    Attributes:
        name, version: Of the model; version 0 if the server chooses.
        calls: At least one.
        sent_at: When it was.
    """

    name: str
    version: int
    calls: list[InferCall]
    sent_at: float = 0.0

    @property
    def row_count(self) -> int:
        """Of all calls."""
        calls = self.calls
        return calls[0].row_count if len(calls) == 1 else sum([call.row_count for call in calls])

    def encode(self, npy: bool) -> bytes:
        """Return the command; `npy` says whether the server takes arrays as binary.

        Raises:
            TypeError, ValueError: The rows cannot be sent.
        """
        data: dict[str, Any] = {"name": self.name}
        if self.version:
            data["version"] = self.version
        if len(self.calls) > 1:
            data["parts"] = [call.row_count for call in self.calls]
        rows = self.calls[0].rows
        if len(self.calls) > 1 and isinstance(rows, list):
            rows = [row for call in self.calls for row in call.rows]
        elif len(self.calls) > 1:
            import numpy as np

            rows = np.concatenate([call.rows for call in self.calls])
        return encode_infer(data, rows, npy)

    def settle(self, answer: Answer, array: "NDArray[Any] | None") -> None:
        """Give each call its part of an answer.

        Raises:
            BadAnswer: The answer does not fit. Then no call has got anything.
        """
        result = answer.result
        if not isinstance(result, dict):
            raise BadAnswer(f"the result of INFER is {str(result)[:80]!r}, not an object")
        version = result.get("version", 0)
        if isinstance(version, bool) or not isinstance(version, int):
            raise BadAnswer(f"the version in the result of INFER is {str(version)[:80]!r}, not a number")
        if "results" in result:
            self._settle_parts(result["results"], version)
            return
        predictions: Any = array if array is not None else result.get("predictions")
        is_table = isinstance(predictions, list) or (array is not None and array.ndim > 0)
        if not is_table or len(predictions) != self.row_count:
            raise BadAnswer(f"the result of INFER for {self.row_count} rows has not as many predictions")
        start = 0
        outcomes: list[Any] = []
        for call in self.calls:
            end = start + call.row_count
            outcomes.append(_shape(call, predictions[start:end]))
            start = end
        self._give(outcomes, version)

    def _settle_parts(self, results: Any, version: int) -> None:
        if not isinstance(results, list) or len(results) != len(self.calls):
            raise BadAnswer(f"the result of INFER for {len(self.calls)} calls has not as many results")
        outcomes: list[Any] = []
        for call, result in zip(self.calls, results, strict=True):
            predictions = result.get("predictions") if isinstance(result, dict) else None
            if isinstance(predictions, list) and len(predictions) == call.row_count:
                outcomes.append(_shape(call, predictions))
            elif isinstance(result, dict) and isinstance(result.get("err"), str):
                outcomes.append(CommandFailed(result["err"]))
            else:
                raise BadAnswer("a part of the result of INFER is neither predictions nor an error")
        self._give(outcomes, version)

    def _give(self, outcomes: list[Any], version: int) -> None:
        for call, outcome in zip(self.calls, outcomes, strict=True):
            if isinstance(outcome, CommandFailed):
                call.job.settle_error(outcome)
            else:
                call.job.settle(Inference(self.name, version, outcome))


def encode_infer(data: dict[str, Any], rows: Any, npy: bool, takes_npy: bool = False) -> bytes:
    """Return an `INFER` with its rows: many values of a matrix as binary, if `npy` says so, and others as JSON.

    Raises:
        TypeError: The rows cannot be sent.
        ValueError: There are infinite values among them, which JSON has not: they would arrive as missing ones.
    """
    is_list = isinstance(rows, list)
    if is_list or not npy or rows.size <= NPY_VALUES_MIN:
        plain = rows if is_list else rows.tolist()
        contents = encode(Command(cmd="INFER", data={**data, "rows": plain}, npy=takes_npy))
        # Only in what has missing values can there be infinite ones, so most rows need no closer look.
        if b"null" not in contents or not has_infinity(plain):
            return contents
        if is_list or not npy:
            raise ValueError(
                "infinite values cannot be sent as JSON: give the rows as a NumPy matrix, or leave them out"
            )
    return encode(Command(cmd="INFER", data=data, npy=True), rows)


def has_infinity(rows: Iterable[Any]) -> bool:
    """Return whether a value in lists of values, or in dictionaries of them, is infinite."""
    for row in rows:
        values = row.values() if isinstance(row, dict) else row
        if isinstance(values, Iterable) and not isinstance(values, str) and (inf in values or -inf in values):
            return True
    return False


def _shape(call: InferCall, predictions: Any) -> Any:
    """Return predictions as the caller gave its rows: as a list, or as an array.

    Raises:
        BadAnswer: They cannot be an array.
    """
    is_list = isinstance(predictions, list)
    if isinstance(call.rows, list):
        return predictions if is_list else predictions.tolist()
    if not is_list:
        return predictions
    import numpy as np

    try:
        return np.array(predictions)
    except ValueError as error:
        raise BadAnswer(f"the predictions are no array: {error}") from error


class _Queue:
    def __init__(self) -> None:
        self.calls: deque[InferCall] = deque()
        self.row_count = 0
        self.row_s = 0.0
        self.done_at = 0.0


class Batcher:
    """The calls that wait, by model.

    Args:
        rows_max: Of a batch; a call that has more goes alone.
        batch_s_max: Seconds that a batch should take; as many calls are joined as are predicted to take that.
        queue_s_max: Beyond this predicted wait, in seconds, calls are refused.
    """

    def __init__(self, rows_max: int, batch_s_max: float, queue_s_max: float) -> None:
        self._rows_max = rows_max
        self._batch_s_max = batch_s_max
        self._queue_s_max = queue_s_max
        self._queues: OrderedDict[tuple[str, int], _Queue] = OrderedDict()
        self.call_count = 0

    def add(self, name: str, version: int, call: InferCall, server_count: int) -> None:
        """Queue a call.

        Raises:
            Overloaded: It would have to wait too long behind the others.
        """
        queue = self._queues.get((name, version))
        if queue is None:
            queue = self._queues[name, version] = _Queue()
        wait_s = queue.row_count * queue.row_s / max(1, server_count)
        if self.call_count >= QUEUED_CALLS_MAX or wait_s > self._queue_s_max:
            raise Overloaded(
                f"{self.call_count} calls wait, those of model {name!r} for {wait_s:.2f} s; the limits are "
                f"{QUEUED_CALLS_MAX} and {self._queue_s_max:g} s",
                max(wait_s, RETRY_S_MIN),
            )
        self._push(queue, call)

    def put_back(self, batch: Batch) -> None:
        """Queue the calls of a batch again, in front."""
        queue = self._queues.setdefault((batch.name, batch.version), _Queue())
        for call in reversed(batch.calls):
            self._push(queue, call, in_front=True)

    def _push(self, queue: _Queue, call: InferCall, in_front: bool = False) -> None:
        queue.calls.appendleft(call) if in_front else queue.calls.append(call)
        queue.row_count += call.row_count
        self.call_count += 1

    def take(self, now: float, calls_max: int | None) -> Batch | None:
        """Return the next batch, of the model whose turn it is; None if there is nothing."""
        for key, queue in self._queues.items():
            if queue.calls and (batch := self._take_of(key, queue, now, calls_max)):
                self._queues.move_to_end(key)
                return batch
        return None

    def _take_of(self, key: tuple[str, int], queue: _Queue, now: float, calls_max: int | None) -> Batch | None:
        rows_max = self._rows_max
        if queue.row_s:
            rows_max = min(rows_max, int(self._batch_s_max / queue.row_s))
        calls: list[InferCall] = []
        row_count = 0
        while queue.calls and len(calls) != calls_max:
            call = queue.calls[0]
            if calls and (row_count + call.row_count > rows_max or call.kind != calls[0].kind):
                break
            queue.calls.popleft()
            queue.row_count -= call.row_count
            self.call_count -= 1
            if not call.job.done():  # It may have been cancelled.
                call.attempts += 1
                calls.append(call)
                row_count += call.row_count
        return Batch(*key, calls, now) if calls else None

    def note_done(self, batch: Batch, now: float, joins: bool = True) -> None:
        """Learn from a batch how long a row takes; `joins` says whether the server takes several calls at once."""
        key = (batch.name, batch.version)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue()
        if queue.done_at:  # The first batch has waited until the model was loaded, so it teaches nothing.
            row_s = (now - max(batch.sent_at, queue.done_at)) / max(batch.row_count, LEARNED_ROWS_MIN if joins else 1)
            is_faster = not queue.row_s or row_s < queue.row_s
            # So does, now and then, a later one at another server: faster is believed at once, slower by and by.
            slower = SMOOTHING * (min(row_s, SLOWER_MAX * queue.row_s) - queue.row_s)
            queue.row_s = row_s if is_faster else queue.row_s + slower
        queue.done_at = now

    def expire(self, now: float) -> list[InferCall]:
        """Return the calls whose deadline has come, and wait for them no more; forget models that nobody asks for."""
        expired: list[InferCall] = []
        for key, queue in list(self._queues.items()):
            late = [call for call in queue.calls if call.deadline_at <= now or call.job.done()]
            if late:
                self._drop(queue, late)
                expired += late
            if not queue.calls and now - queue.done_at > 60.0:
                del self._queues[key]
        return expired

    def take_all(self) -> list[InferCall]:
        """Return all calls, and wait for none any more."""
        calls = [call for queue in self._queues.values() for call in queue.calls]
        self._queues.clear()
        self.call_count = 0
        return calls

    def _drop(self, queue: _Queue, calls: Iterable[InferCall]) -> None:
        gone = {id(call) for call in calls}
        queue.calls = deque(call for call in queue.calls if id(call) not in gone)
        queue.row_count = sum(call.row_count for call in queue.calls)
        self.call_count -= len(gone)
