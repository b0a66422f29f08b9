"""Calls that are joined and parted, alone: no server, no clock."""

import json
from typing import Any

import numpy as np
import pytest

from messenger.models.batching import Batch, Batcher, InferCall
from messenger.models.calls import as_rows
from messenger.models.errors import BadAnswer, CommandFailed, Overloaded
from messenger.models.jobs import Inference, Job
from messenger.models.limits import QUEUED_CALLS_MAX
from messenger.models.protocol import decode_command
from tests.models.conftest import ok


def call_of(given: Any, deadline_at: float = 100.0) -> InferCall:
    rows, count, kind = as_rows(given)
    job: Job[Inference] = Job()
    return InferCall(job, rows, count, kind, 0.0, deadline_at)


def batcher_of(*calls: InferCall, rows_max: int = 100) -> Batcher:
    batcher = Batcher(rows_max, 0.05, 1.0)
    for call in calls:
        batcher.add("m", 0, call, 1)
    return batcher


def warm_up(batcher: Batcher, row_s: float) -> None:
    """Lets one row be answered, slowly as for a model that is not loaded, and one more in `row_s`."""
    for sent_at, done_at in ((0.0, 50.0), (60.0, 60.0 + row_s)):
        if not batcher.call_count:
            batcher.add("m", 0, call_of([[1.0]]), 1)
        batch = batcher.take(sent_at, None)
        assert batch is not None
        batcher.note_done(batch, done_at, joins=False)


def predictions_of(call: InferCall) -> Any:
    return call.job.result(0).predictions


def test_calls_are_joined_and_each_gets_its_own() -> None:
    calls = [call_of([[1.0], [2.0]]), call_of([[3.0]]), call_of([[4.0], [5.0], [6.0]])]
    batch = batcher_of(*calls).take(0.0, None)
    assert batch is not None
    sent = json.loads(batch.encode(npy=True))
    assert sent["data"] == {"name": "m", "parts": [2, 1, 3], "rows": [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]}
    batch.settle(ok({"version": 7, "predictions": [1, 2, 3, 4, 5, 6]}), None)
    assert [predictions_of(call) for call in calls] == [[1, 2], [3], [4, 5, 6]]
    assert calls[0].job.result(0).version == 7


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_values_do_not_arrive_as_missing_ones(value: float) -> None:
    for rows in ([[1.0, None], [value, 1.0]], [{"x": None}, {"x": value}]):
        with pytest.raises(ValueError, match="infinite values cannot be sent as JSON"):
            Batch("m", 0, [call_of(rows)]).encode(npy=True)
    batch = Batch("m", 0, [call_of(np.array([[1.0, value]]))])
    _, array = decode_command(batch.encode(npy=True))
    assert array is not None
    assert array.tolist() == [[1.0, value]]
    with pytest.raises(ValueError, match="infinite values cannot be sent as JSON"):
        batch.encode(npy=False)
    missing = Batch("m", 0, [call_of([[1.0, None], [float("nan"), 1.0]])])
    assert json.loads(missing.encode(npy=True))["data"]["rows"] == [[1.0, None], [None, 1.0]]


def test_a_single_call_is_sent_as_the_contract_says() -> None:
    batch = batcher_of(call_of([[1.0, 2.0]])).take(0.0, None)
    assert batch is not None
    assert json.loads(batch.encode(npy=True)) == {"cmd": "INFER", "data": {"name": "m", "rows": [[1.0, 2.0]]}}


def test_matrices_are_joined_as_binary_and_stay_matrices() -> None:
    calls = [call_of(np.full((300, 2), 1.0)), call_of(np.full((300, 2), 2.0, np.float32))]
    batch = batcher_of(*calls, rows_max=1_000).take(0.0, None)
    assert batch is not None
    _, array = decode_command(batch.encode(npy=True))
    assert array is not None
    assert array.shape == (600, 2)
    plain, array = decode_command(batch.encode(npy=False))
    assert array is None
    assert len(plain.data_as(dict)["rows"]) == 600
    batch.settle(ok({"version": 1}), np.arange(600))
    np.testing.assert_array_equal(predictions_of(calls[1]), np.arange(300, 600))


def test_a_list_gets_a_list_and_a_matrix_an_array() -> None:
    as_list, as_matrix = call_of([[1.0]]), call_of(np.ones((1, 1)))
    for call, predictions in ((as_list, np.array([5])), (as_matrix, [5])):
        batch = batcher_of(call).take(0.0, None)
        assert batch is not None
        given = isinstance(predictions, list)
        batch.settle(ok({"predictions": predictions if given else None}), None if given else np.array([5]))
    assert predictions_of(as_list) == [5]
    assert isinstance(predictions_of(as_matrix), np.ndarray)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([[1.0]], [[1.0, 2.0]]),
        ([[1.0]], [{"a": 1.0}]),
        ([[1.0]], np.ones((1, 1))),
        (np.ones((1, 1)), np.ones((1, 2))),
        ([[1.0]] * 60, [[1.0]] * 60),
    ],
)
def test_what_does_not_fit_is_not_joined(first: Any, second: Any) -> None:
    batcher = batcher_of(call_of(first), call_of(second))
    for _ in range(2):
        batch = batcher.take(0.0, None)
        assert batch is not None
        assert len(batch.calls) == 1
    assert batcher.take(0.0, None) is None
    assert batcher.call_count == 0


def test_a_call_above_the_limit_goes_alone() -> None:
    batch = batcher_of(call_of([[1.0]] * 500), call_of([[1.0]])).take(0.0, None)
    assert batch is not None
    assert batch.row_count == 500


def test_a_foreign_server_gets_one_call_at_a_time() -> None:
    batch = batcher_of(call_of([[1.0]]), call_of([[2.0]])).take(0.0, 1)
    assert batch is not None
    assert len(batch.calls) == 1


def test_a_batch_takes_no_longer_than_the_limit() -> None:
    batcher = batcher_of(call_of([[1.0]]), rows_max=100)
    warm_up(batcher, 0.01)  # A row takes 10 ms, so five make 50 ms.
    for number in range(10):
        batcher.add("m", 0, call_of([[float(number)]]), 1)
    batch = batcher.take(61.0, None)
    assert batch is not None
    assert len(batch.calls) == 5


def test_models_take_turns() -> None:
    batcher = Batcher(100, 0.05, 1.0)
    for name in ("a", "a", "b"):
        batcher.add(name, 0, call_of([[1.0]]), 1)
    names = []
    while batch := batcher.take(0.0, 1):
        names.append(batch.name)
    assert names == ["a", "b", "a"]


def test_a_part_that_is_bad_fails_alone() -> None:
    good, bad = call_of([[1.0]]), call_of([["x"]])
    batch = batcher_of(good, bad).take(0.0, None)
    assert batch is not None
    batch.settle(ok({"version": 1, "results": [{"predictions": [5]}, {"err": "no number"}]}), None)
    assert predictions_of(good) == [5]
    with pytest.raises(CommandFailed, match="no number"):
        bad.job.result(0)


@pytest.mark.parametrize(
    "result",
    [
        None,
        [],
        {},
        {"predictions": [1]},
        {"predictions": [1, 2, 3]},
        {"predictions": "ab"},
        {"predictions": {"0": 1, "1": 2}},
        {"version": "1", "predictions": [1, 2]},
        {"results": [{"predictions": [1]}]},
        {"results": [{"predictions": [1]}, {"predictions": []}]},
        {"results": [{"predictions": [1]}, 5]},
        {"results": 5},
    ],
)
def test_an_answer_that_does_not_fit_gives_nothing_to_anybody(result: Any) -> None:
    calls = [call_of([[1.0]]), call_of([[2.0]])]
    batch = batcher_of(*calls).take(0.0, None)
    assert batch is not None
    with pytest.raises(BadAnswer):
        batch.settle(ok(result), None)
    assert not any(call.job.done() for call in calls)


def test_predictions_that_are_no_array_give_nothing_to_anybody() -> None:
    calls = [call_of(np.zeros((1, 1))), call_of(np.zeros((2, 1)))]
    batch = batcher_of(*calls).take(0.0, None)
    assert batch is not None
    for result in ({"predictions": [1, 2, [3]]}, {"results": [{"predictions": [1]}, {"predictions": [2, [3]]}]}):
        with pytest.raises(BadAnswer, match="no array"):
            batch.settle(ok(result), None)
    assert not any(call.job.done() for call in calls)


@pytest.mark.parametrize("rows", [[[1.0]], np.zeros((1, 1))], ids=["list", "array"])
def test_a_single_number_is_no_predictions(rows: Any) -> None:
    """An array without dimensions has no length."""
    call = call_of(rows)
    batch = batcher_of(call).take(0.0, None)
    assert batch is not None
    with pytest.raises(BadAnswer, match="not as many predictions"):
        batch.settle(ok({}), np.array(3.0))
    assert not call.job.done()


def test_a_cancelled_call_is_not_sent() -> None:
    first, second = call_of([[1.0]]), call_of([[2.0]])
    batcher = batcher_of(first, second)
    assert first.job.cancel()
    batch = batcher.take(0.0, None)
    assert batch is not None
    assert batch.calls == [second]
    assert first.job.cancelled()


def test_calls_expire_at_their_deadline() -> None:
    early, late = call_of([[1.0]], deadline_at=5.0), call_of([[2.0]], deadline_at=50.0)
    batcher = batcher_of(early, late)
    assert batcher.expire(4.9) == []
    assert batcher.expire(5.0) == [early]
    assert batcher.call_count == 1
    assert batcher.take_all() == [late]
    assert batcher.call_count == 0


def test_overload_is_told_before_the_wait() -> None:
    batcher = batcher_of(call_of([[1.0]]))
    warm_up(batcher, 0.5)  # A row takes half a second; two rows that wait make the limit of one.
    for _ in range(3):
        batcher.add("m", 0, call_of([[1.0]]), 1)
    with pytest.raises(Overloaded) as caught:
        batcher.add("m", 0, call_of([[1.0]]), 1)
    assert caught.value.retry_after_s == pytest.approx(1.5)
    batcher.add("m", 0, call_of([[1.0]]), 2)  # Two servers take half as long.
    batcher.add("other", 0, call_of([[1.0]]), 1)


def test_one_slow_batch_makes_no_overload() -> None:
    batcher = batcher_of(call_of([[1.0]]))
    warm_up(batcher, 0.001)
    batcher.add("m", 0, call_of([[1.0]]), 1)
    slow = batcher.take(70.0, None)
    assert slow is not None
    batcher.note_done(slow, 80.0)
    for _ in range(500):
        batcher.add("m", 0, call_of([[1.0]]), 1)


def test_a_slow_way_of_one_row_is_no_overload_for_many() -> None:
    """The first call after the model was loaded hangs for a moment; the 62 that wait behind it fit into one batch."""
    batcher = batcher_of(call_of([[1.0]]))
    for sent_at, done_at in ((0.0, 1.0), (2.0, 2.3)):
        if not batcher.call_count:
            batcher.add("m", 0, call_of([[1.0]]), 1)
        batch = batcher.take(sent_at, None)
        assert batch is not None
        batcher.note_done(batch, done_at)
    for _ in range(62):
        batcher.add("m", 0, call_of([[1.0]]), 1)


def test_the_queue_has_an_end() -> None:
    batcher = Batcher(100, 0.05, 1.0)
    for _ in range(QUEUED_CALLS_MAX):
        batcher.add("m", 0, call_of([[1.0]]), 1)
    with pytest.raises(Overloaded, match=f"{QUEUED_CALLS_MAX} calls wait"):
        batcher.add("m", 0, call_of([[1.0]]), 1)


def test_a_batch_that_is_put_back_comes_first_and_in_order() -> None:
    calls = [call_of([[float(number)]]) for number in range(3)]
    batcher = batcher_of(*calls, rows_max=2)
    batch = batcher.take(0.0, None)
    assert batch is not None
    batcher.put_back(batch)
    again = batcher.take(0.0, None)
    assert again is not None
    assert again.calls == calls[:2]
    assert [call.attempts for call in calls] == [2, 2, 0]


@pytest.mark.parametrize("rows", [[], "ab", 5, None, np.ones(3), np.empty((0, 3)), np.array([["a"]]), {"a": [1]}])
def test_what_are_no_rows_is_refused_at_once(rows: Any) -> None:
    with pytest.raises(ValueError, match="rows must be"):
        as_rows(rows)


class TestJob:
    def test_it_ends_once(self) -> None:
        job: Job[int] = Job()
        ends: list[Any] = []
        job.add_done_callback(ends.append)
        assert job.settle(1)
        assert not job.settle(2)
        assert not job.settle_error(ValueError())
        assert not job.settle_cancelled()
        assert job.cancel() is False
        assert (job.result(0), ends) == (1, [job])

    def test_a_cancelled_one_takes_no_result(self) -> None:
        job: Job[int] = Job()
        assert job.cancel()
        assert not job.settle(1)
        assert job.cancelled()

    def test_a_training_asks_before_it_is_cancelled(self) -> None:
        asked: list[Any] = []

        def ask(each: Any) -> bool:
            asked.append(each)
            return True

        job: Job[int] = Job("1", ask)
        assert job.cancel()
        assert asked == [job]
        assert not job.done()
        assert job.settle(5)
        assert not job.cancel()
