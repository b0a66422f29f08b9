"""A manager with our servers, in real processes: commands, trainings, versions, joined calls, overload."""

import itertools
import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from messenger import CalledFromCallback, KeyPair, QueueFull, Security
from messenger.models import (
    BadAnswer,
    CommandFailed,
    Inference,
    Job,
    ManagerStopped,
    ModelClient,
    ModelFileInvalid,
    ModelServerManager,
    NoServer,
    Overloaded,
    Progress,
    Training,
    TrainingDataInvalid,
)
from messenger.models.limits import CALL_TIMEOUT_S
from messenger.models.peers import Call, Server, as_timeout
from messenger.models.protocol import decode_answer
from messenger.models.server import ModelServer
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeer,
    PlainPeers,
    StandingClock,
    free_port,
    quickest,
    wait_until,
)
from tests.models.conftest import Data, NewManager, make_linear, write_csv

TRAIN_S = 50.0
# Grows for minutes, and reports on the way.
ENDLESS: dict[str, Any] = {"method": "lightgbm", "target": "class", "params": {"steps": 100_000}}


def test_the_contract(new_manager: NewManager, wine: Data) -> None:
    manager = new_manager()
    progress: Inbox[Progress] = Inbox()
    done: Inbox[Any] = Inbox()
    job = manager.train("wine", method="lightgbm", data=wine.path, target="class", on_progress=progress)
    job.add_done_callback(done)
    training = job.result(timeout=TRAIN_S)
    assert (training.name, training.version, training.rows) == ("wine", 1, 178)
    assert training.metrics["accuracy"] > 0.9
    assert done.wait() == [job]
    assert job.done()
    steps = [(each.step, each.of, each.metric) for each in progress.wait(2)]
    assert steps[-1] == (100, 100, "multi_logloss")
    assert steps == sorted(steps)
    # The server imports LightGBM first, which takes as long as a training.
    inference = manager.infer("wine", wine.rows[:3]).result(timeout=TRAIN_S)
    assert (inference.name, inference.version, inference.predictions) == ("wine", 1, [0, 0, 0])
    answer = manager.command("PRINT", {"message": "hello"}).result(timeout=TIMEOUT_S)
    assert answer == {"action": 0, "result": "MODEL_REPLY_hello", "success": True, "err": ""}
    assert manager.print_message("hello").result(timeout=TIMEOUT_S) == "MODEL_REPLY_hello"
    (listed,) = manager.list_models().result(timeout=TIMEOUT_S)
    assert (listed.name, listed.version, listed.versions) == ("wine", 1, [1])


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_each_transport(transport: str, new_manager: NewManager, new_destination: Any) -> None:
    manager = new_manager(new_destination(transport))
    assert manager.print_message("x").result(timeout=TIMEOUT_S) == "MODEL_REPLY_x"


def test_callbacks_run_without_a_wait(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager()
    results: Inbox[Any] = Inbox()
    for number in range(100):
        manager.infer("sum", [[number, 1]]).add_done_callback(results)
    jobs = results.wait(100)
    assert sorted(job.result().predictions[0] for job in jobs) == [number + 1.0 for number in range(100)]


def test_unknown_commands_and_models_are_refused(new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(CommandFailed, match="'DANCE' is unknown"):
        manager.command("DANCE").result(timeout=TIMEOUT_S)
    with pytest.raises(CommandFailed, match="there is no model 'nothing'"):
        manager.infer("nothing", [[1]]).result(timeout=TIMEOUT_S)
    with pytest.raises(ModelFileInvalid, match="no name of a model"):
        manager.command("LOAD", {"name": "../../etc", "version": 1}).result(timeout=TIMEOUT_S)
    with pytest.raises(CommandFailed, match="the data of PRINT are not what it takes"):
        manager.command("PRINT", 5).result(timeout=TIMEOUT_S)
    with pytest.raises(TrainingDataInvalid, match="no column"):
        manager.train("m", data={"x": [1] * 20}, target="y").result(timeout=TRAIN_S)
    assert manager.print_message("alive").result(timeout=TIMEOUT_S) == "MODEL_REPLY_alive"


@pytest.mark.parametrize(
    "data",
    [
        None,
        5,
        {},
        {"name": 5},
        {"name": "sum", "rows": "x"},
        {"name": "sum", "rows": [[1, 2]], "parts": [2]},
        {"name": "sum", "rows": [[1, 2]], "parts": []},
        {"name": "sum", "rows": [[1, 2]], "parts": [-1, 2]},
        {"name": "sum", "rows": [[1, 2]], "version": "x"},
        {"name": "sum", "rows": [[1, 2]], "version": 77},
        {"name": "sum", "rows": [[1, 2, 3]]},
        {"name": "sum", "rows": [[1, "x"]]},
        {"name": "sum", "rows": [[1, [2]]]},
        {"name": "sum", "rows": [{"x0": 1}]},
        {"name": "sum", "rows": [{"x0": 1, "x1": 1}, 5]},
        {"name": "sum"},
    ],
    ids=str,
)
def test_bad_inference_is_refused(new_manager: NewManager, folder: Path, data: Any) -> None:
    make_linear(folder)
    manager = new_manager()
    with pytest.raises((CommandFailed, ModelFileInvalid)):
        manager.command("INFER", data).result(timeout=TIMEOUT_S)
    assert manager.infer("sum", [{"x1": 1, "x0": 2}]).result(timeout=TIMEOUT_S).predictions == [3.0]


def test_matrices_travel_as_binary(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager()
    rows = np.arange(20_000.0).reshape(10_000, 2)
    predictions = manager.infer("sum", rows).result(timeout=TIMEOUT_S).predictions
    assert isinstance(predictions, np.ndarray)
    np.testing.assert_allclose(predictions, rows.sum(axis=1), rtol=1e-6)
    small = manager.infer("sum", rows[:2].astype(np.float32)).result(timeout=TIMEOUT_S).predictions
    assert isinstance(small, np.ndarray)
    assert small.tolist() == [1.0, 5.0]
    listed = manager.infer("sum", rows.tolist()).result(timeout=TIMEOUT_S).predictions
    assert listed == predictions.tolist()


def test_a_bad_input_fails_its_own_caller_only(new_manager: NewManager, folder: Path) -> None:
    """64 callers at once, every seventh with rows that the model cannot take; no answer goes to another."""
    make_linear(folder)
    manager = new_manager()
    manager.infer("sum", [[0, 0]]).result(timeout=TIMEOUT_S)
    wrong: list[str] = []

    def call(caller: int) -> None:
        for number in range(30):
            row: list[Any] = [caller * 1_000, number]
            is_bad = (caller + number) % 7 == 0
            if is_bad:
                row[1] = "x"
            try:
                got = manager.infer("sum", [row]).result(timeout=TIMEOUT_S).predictions
                if is_bad or got != [caller * 1_000.0 + number]:
                    wrong.append(f"{row}: {got}")
            except CommandFailed as error:
                if not is_bad:
                    wrong.append(f"{row}: {error}")

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TRAIN_S)
    assert not wrong


def test_rows_that_cannot_be_sent_end_their_call(new_manager: NewManager, folder: Path) -> None:
    """Rows that hold themselves left their call at the server for ever, and two such calls stopped all inference."""
    make_linear(folder)
    manager = new_manager()
    manager.wait_ready()
    endless: list[Any] = [[1, 2]]
    endless.append(endless)
    for _ in range(4):
        with pytest.raises(RecursionError):
            manager.infer("sum", endless).result(timeout=TIMEOUT_S)
    assert manager.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S).predictions == [3.0]


def test_rows_that_cannot_be_sent_harm_no_call_that_waits_with_them(new_manager: NewManager, plain: PlainPeers) -> None:
    manager = new_manager(servers=0)
    dealer = plain.dealer(manager.listener.destination)
    about = {"life": "x", "batches": True}
    hello = {"action": 1, "result": "", "success": True, "err": "", "server": about}
    dealer.send(b"", b"0-0-" + json.dumps(hello).encode())
    wait_until(lambda: manager.is_ready)
    # Two are under way, the others wait and are joined.
    jobs = [manager.infer("m", [[row]]) for row in (1, 2, 3, 4j, 5)]
    answered = 0
    while answered < 4:
        callback_id, destination_id, contents = dealer.receive()[-1].split(b"-", 2)
        if destination_id == b"0":
            rows = json.loads(contents)["data"]["rows"]
            answer = {"action": 0, "result": {"predictions": rows}, "success": True, "err": ""}
            dealer.send(b"", b"0-%b-" % callback_id + json.dumps(answer).encode())
            answered += len(rows)
    for number in (0, 1, 2, 4):
        assert jobs[number].result(timeout=TIMEOUT_S).predictions == [[number + 1]]
    with pytest.raises(TypeError, match="complex cannot be sent"):
        jobs[3].result(timeout=TIMEOUT_S)


def test_a_switch_of_versions_fails_no_call(new_manager: NewManager, folder: Path) -> None:
    """While callers infer, versions 1 and 2 are loaded in turn; every answer is right for the version it names."""
    make_linear(folder, factor=1.0)
    make_linear(folder, factor=10.0)
    manager = new_manager(servers=2)
    manager.load("sum", 1).result(timeout=TIMEOUT_S)
    stop = threading.Event()
    answers: Inbox[tuple[int, float, int]] = Inbox()
    failures: Inbox[BaseException] = Inbox()

    def call() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            try:
                inference = manager.infer("sum", [[number, 0]]).result(timeout=TIMEOUT_S)
                answers((number, inference.predictions[0], inference.version))
            except Exception as error:
                failures(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    took_s = []
    try:
        for version in [2, 1] * 10:
            started_at = time.monotonic()
            manifest = manager.load("sum", version).result(timeout=TIMEOUT_S)
            assert manifest.version == version
            assert manager.is_ready
            took_s.append(time.monotonic() - started_at)
            # What is asked after the switch is answered by the new version.
            assert manager.infer("sum", [[1, 0]]).result(timeout=TIMEOUT_S).version == version
            answers.wait(len(answers) + 20)
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert not failures.wait(0)
    assert statistics.median(took_s) < 1.0
    came = answers.wait(0)
    assert {version for _, _, version in came} == {1, 2}
    assert all(prediction == number * (1.0 if version == 1 else 10.0) for number, prediction, version in came)


def test_a_training_makes_the_next_version_and_rolls_back(new_manager: NewManager, wine: Data) -> None:
    manager = new_manager()
    given: dict[str, Any] = {"method": "linear", "data": wine.path, "target": "class"}
    assert manager.train("wine", **given).result(timeout=TRAIN_S).version == 1
    assert manager.train("wine", **given, activate=False).result(timeout=TRAIN_S).version == 2
    assert manager.infer("wine", wine.rows[:1]).result(timeout=TIMEOUT_S).version == 1
    assert manager.infer("wine", wine.rows[:1], version=2).result(timeout=TIMEOUT_S).version == 2
    assert manager.load("wine").result(timeout=TIMEOUT_S).version == 2
    assert manager.infer("wine", wine.rows[:1]).result(timeout=TIMEOUT_S).version == 2
    assert manager.load("wine", 1).result(timeout=TIMEOUT_S).metrics["accuracy"] > 0.9
    assert manager.infer("wine", wine.rows[:1]).result(timeout=TIMEOUT_S).version == 1
    assert manager.unload("wine").result(timeout=TIMEOUT_S) is None
    assert manager.infer("wine", wine.rows[:1]).result(timeout=TIMEOUT_S).version == 1
    assert manager.status().served == {"wine": 1}
    with pytest.raises(ModelFileInvalid, match="has no version 9"):
        manager.load("wine", 9).result(timeout=TIMEOUT_S)


def test_rows_in_the_command(new_manager: NewManager, wine: Data) -> None:
    manager = new_manager()
    training = manager.train("wine", method="linear", data=wine.as_dicts(), target="class").result(timeout=TRAIN_S)
    assert training.rows == 178


class Sample(msgspec.Struct):
    """A row that is no dictionary."""

    x: float
    y: float


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ([{"x": 1.0, "y": NAN}, {"x": 2.0, "y": INF}], "column 'y' has an infinite value in row 1 "),
        (({"x": None, "y": 1}, {"x": -INF, "y": 1}), "column 'x' has an infinite value in row 1 "),
        ([{"x": np.float32(-INF), "y": 1}], "column 'x' has an infinite value in row 0 "),
        ({"x": [1.0, None, INF], "y": [1, 2, 3]}, "column 'x' has an infinite value in row 2 "),
        ({"x": (1.0, 2.0), "y": np.array([NAN, -INF])}, "column 'y' has an infinite value in row 1 "),
        ({1: [1.0, INF], "y": [1, 2]}, "column '1' has an infinite value in row 1 "),
        ([Sample(1, INF)], "column 'y' has an infinite value in row 0 "),
    ],
)
def test_infinite_training_data_is_refused(
    new_manager: NewManager, messenger: MessengerFactory, data: Any, place: str
) -> None:
    """JSON has no infinity: such values arrived as missing ones, and nobody was told."""
    manager = new_manager(servers=0)
    for calls in (manager, ModelClient(messenger(), manager.listener.destination)):
        with pytest.raises(ValueError, match="infinite value") as caught:
            calls.train("m", data=data, target="y")
        assert str(caught.value).startswith(place)
        assert "give the data as a file" in str(caught.value)
    assert manager.status().jobs == {}


def test_missing_training_data_is_sent(new_manager: NewManager, wine: Data) -> None:
    """None and NaN; and an infinite value where nobody looks at it harms nothing."""
    manager = new_manager()
    rows: list[dict[str, Any]] = [{**row, "note": "null", "far": INF} for row in wine.as_dicts()]
    rows[0][wine.features[0]], rows[1][wine.features[0]] = None, NAN
    training = manager.train("wine", data=rows, target="class", features=wine.features).result(timeout=TRAIN_S)
    assert training.rows == 178


def test_infinite_values_of_a_file_are_trained_on(new_manager: NewManager, wine: Data, tmp_path: Path) -> None:
    names = [*wine.features, wine.target]
    rows = [list(row.values()) for row in wine.as_dicts()]
    rows[0][0] = INF
    path = write_csv(tmp_path / "far.csv", names, rows)
    assert new_manager().train("wine", data=path, target="class").result(timeout=TRAIN_S).rows == 178


def wait_progress(manager: ModelServerManager, name: str, wine: Data) -> Job[Training]:
    """Starts a training that would take minutes, and returns its job when it has come some way."""
    progress: Inbox[Progress] = Inbox()
    job = manager.train(name, data=wine.path, on_progress=progress, **ENDLESS)
    progress.wait(2, timeout=TRAIN_S)
    return job


def test_on_progress_that_raises_harms_nobody(new_manager: NewManager, wine: Data) -> None:
    manager = new_manager()
    progress: Inbox[Progress] = Inbox()
    job = manager.train("wine", data=wine.as_dicts(), target="class", on_progress=lambda _: 1 / 0, job_id="mine")
    manager.watch("mine", progress)
    assert job.result(timeout=TRAIN_S).version == 1
    assert progress.wait(1)
    # The rows that were trained on are not kept.
    assert manager._known["mine"].call is None


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_a_cancelled_training_ends_within_two_seconds(new_manager: NewManager, folder: Path, wine: Data) -> None:
    manager = new_manager()

    def cancel() -> float:
        job = wait_progress(manager, "wine", wine)
        cancelled_at = time.monotonic()
        assert job.cancel()
        wait_until(job.done)
        took_s = time.monotonic() - cancelled_at
        assert job.cancelled()
        assert not left_behind(folder)
        assert manager.list_models().result(timeout=TIMEOUT_S) == []
        assert manager.status().jobs[job.id] == "cancelled"
        assert not job.settle(None)  # type: ignore[arg-type]  # It must not even be tried.
        return took_s

    assert quickest(cancel, 2.0) < 2.0


def test_a_training_that_waits_behind_another_is_cancelled_too(new_manager: NewManager, wine: Data) -> None:
    manager = new_manager()
    first = wait_progress(manager, "first", wine)
    second = manager.train("second", data=wine.path, **ENDLESS)
    assert manager.cancel(second.id)
    wait_until(second.cancelled)
    assert not first.done()
    assert manager.cancel(first.id)
    wait_until(first.cancelled)
    assert not manager.cancel("nobody")


class Pause:
    """Stops whoever comes by, until `goes_on`."""

    def __init__(self) -> None:
        self.comes = threading.Event()
        self.goes_on = threading.Event()

    def __call__(self) -> None:
        self.comes.set()
        assert self.goes_on.wait(TIMEOUT_S)


@pytest.mark.parametrize("place", ["not queued", "taken, not sent", "sent, not noted"])
def test_a_cancel_in_the_instant_of_the_sending_is_not_lost(
    new_manager: NewManager, wine: Data, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It overtook the command, so that the server knew of no such training, and the training went on to its end."""
    manager = new_manager()
    manager.wait_ready()
    dispatcher, pause = manager._dispatcher, Pause()
    submit, send_message = dispatcher.submit, dispatcher._messenger.send_message

    def submit_slowly(call: Call, server: Server | None = None) -> None:
        if call.cmd == "TRAIN" and place == "not queued":
            pause()
        submit(call, server)

    def send_slowly(to: Any, contents: bytes, *arguments: Any, **options: Any) -> int:
        is_it = b'"TRAIN"' in contents
        if is_it and place == "taken, not sent":
            pause()
        message_id = send_message(to, contents, *arguments, **options)
        if is_it and place == "sent, not noted":
            pause()
        return message_id

    monkeypatch.setattr(dispatcher, "submit", submit_slowly)
    monkeypatch.setattr(dispatcher._messenger, "send_message", send_slowly)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(manager.train, "wine", data=wine.path, job_id="mine", **ENDLESS)
        assert pause.comes.wait(TIMEOUT_S)
        assert manager.cancel("mine")
        # What the cancel has sent by now the server has taken when it answers this.
        assert manager.print_message("x").result(timeout=TIMEOUT_S)
        pause.goes_on.set()
        job = training.result(timeout=TIMEOUT_S)
    wait_until(job.done)
    assert job.cancelled()
    assert manager.command("STATUS").result(timeout=TIMEOUT_S)["result"]["jobs"].get("mine") in (None, "CANCELLED")


def test_a_cancelled_training_that_cannot_be_sent_is_cancelled(
    new_manager: NewManager, wine: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    manager.wait_ready()
    messenger = manager._dispatcher._messenger
    send_message = messenger.send_message

    def refuse(to: Any, contents: bytes, *arguments: Any, **options: Any) -> int:
        if b'"TRAIN"' not in contents:
            return send_message(to, contents, *arguments, **options)
        assert manager.cancel("mine")
        raise QueueFull("planted")

    monkeypatch.setattr(messenger, "send_message", refuse)
    assert manager.train("wine", data=wine.path, job_id="mine", **ENDLESS).cancelled()


def test_a_cancel_and_an_end_at_once_have_one_outcome(new_manager: NewManager, folder: Path, wine: Data) -> None:
    """Cancels come at all times around the end of a training: a job is cancelled, or there is its version."""
    manager = new_manager()
    outcomes = []
    for number in range(4):
        progress: Inbox[Progress] = Inbox()
        job = manager.train(f"m{number}", data=wine.path, target="class", params={"steps": 30}, on_progress=progress)
        while (last := progress.wait(1, timeout=TRAIN_S)[-1]).step < last.of:
            progress.wait(len(progress) + 1, timeout=TRAIN_S)
        time.sleep(number * 0.03)
        job.cancel()
        wait_until(job.done)
        outcomes.append((f"m{number}", job.cancelled()))
    versions = {listed.name: listed.versions for listed in manager.list_models().result(timeout=TIMEOUT_S)}
    assert versions == {name: [1] for name, was_cancelled in outcomes if not was_cancelled}
    assert not left_behind(folder)


def test_inference_goes_on_while_a_model_is_trained(new_manager: NewManager, folder: Path, wine: Data) -> None:
    make_linear(folder)
    manager = new_manager()
    job = wait_progress(manager, "wine", wine)
    for number in range(50):
        inference = manager.infer("sum", [[number, 0]])
        assert inference.result(timeout=TIMEOUT_S).predictions == [float(number)]
        assert inference._is_fetched  # The training, for which nobody waits here, makes no second caller.
    assert not job.done()
    assert job.cancel()


def test_a_job_is_found_again_by_its_id(new_manager: NewManager, messenger: MessengerFactory, wine: Data) -> None:
    """A client starts a training and goes; another one finds it, hears of its progress, and cancels it."""
    manager = new_manager()
    destination = manager.listener.destination
    first = messenger()
    started = ModelClient(first, destination).train("wine", data=wine.path, job_id="my-job", **ENDLESS)
    wait_until(lambda: manager.status().jobs == {"my-job": "open"})
    first.close(0)
    assert started.exception(TIMEOUT_S) is not None
    second = ModelClient(messenger(), destination)
    progress: Inbox[Progress] = Inbox()
    found = second.job("my-job", on_progress=progress)
    assert progress.wait(1, timeout=TRAIN_S)[0].job == "my-job"
    assert second.cancel("my-job")
    wait_until(found.cancelled)
    assert second.status().result(TIMEOUT_S)["jobs"] == {"my-job": "cancelled"}
    with pytest.raises(CommandFailed, match="no job 'other'"):
        second.job("other").result(TIMEOUT_S)


@pytest.fixture
def orphan(
    new_manager: NewManager, messenger: MessengerFactory, folder: Path, wine: Data, new_destination: Any
) -> Iterator[tuple[Any, str]]:
    """Gives the destination of a manager that has stopped, and the job of a training that runs on at a server."""
    destination = new_destination("port")
    first = new_manager(destination, servers=0)
    server = ModelServer(messenger(), destination, folder=folder)
    try:
        job = wait_progress(first, "wine", wine)
        first.stop()
        assert job.exception(TIMEOUT_S) is not None
        yield destination, job.id
    finally:
        server.close()


def test_a_new_manager_finds_the_jobs_of_servers_that_went_on(new_manager: NewManager, orphan: tuple[Any, str]) -> None:
    """A server that was started by hand outlives its manager, says hello to the next, and still has its training."""
    destination, job_id = orphan
    second = new_manager(destination, servers=0)
    found = second.job(job_id)
    assert second.print_message("x").result(TIMEOUT_S) == "MODEL_REPLY_x"
    assert second.command("CANCEL", {"job": job_id}).result(TIMEOUT_S)["result"] is True
    wait_until(found.cancelled)


@pytest.mark.parametrize("by_id", [False, True])
def test_a_client_cancels_a_training_that_its_manager_does_not_know(
    new_manager: NewManager, messenger: MessengerFactory, orphan: tuple[Any, str], by_id: bool
) -> None:
    """It was told that the training ends, and nobody told the server."""
    destination, job_id = orphan
    manager = new_manager(destination, servers=0)
    client = ModelClient(messenger(), destination)
    assert not client.cancel("nobody")  # Also while no server is there.
    found = client.job(job_id)
    manager.wait_ready()
    assert client.cancel(job_id) if by_id else found.cancel()
    wait_until(found.cancelled)
    assert not client.cancel(job_id)
    assert not client.cancel("nobody")


def test_a_job_is_found_at_whichever_server_has_it(new_manager: NewManager, plain: PlainPeers) -> None:
    """One server alone was asked, which as a rule was another one."""
    manager = new_manager(servers=0)
    dealers = [plain.dealer(manager.listener.destination, name) for name in (b"one", b"two")]
    for dealer in dealers:
        dealer.send(b"", b'0-0-{"action": 1, "result": "", "success": true, "err": ""}')
    wait_until(lambda: len(manager.status().servers) == 2)

    def answer(dealer: PlainPeer, cmd: str, **fields: Any) -> None:
        callback_id, _, contents = dealer.receive()[-1].split(b"-", 2)
        assert json.loads(contents) == {"cmd": cmd, "data": {"job": "monday"}}
        body = json.dumps({"action": 0, "result": "", "success": False, "err": "", **fields}).encode()
        dealer.send(b"", b"0-%b-" % callback_id + body)

    training = {"name": "m", "version": 1, "method": "linear", "task": "regression", "metrics": {}}
    training |= {"rows": 9, "features": ["x"], "elapsed_s": 1.0, "job": "monday"}
    for first, second in (dealers, dealers[::-1]):
        job = manager.job("monday")
        answer(first, "JOB", err="there is no job", kind="JobUnknown")
        assert job.cancel()
        answer(second, "JOB", result=training, success=True)
        for dealer in dealers:
            answer(dealer, "CANCEL", result=False, success=True)
        assert job.result(timeout=TIMEOUT_S).version == 1
        job = manager.job("monday")
        answer(first, "JOB", err="there is no job", kind="JobUnknown")
        answer(second, "JOB", err="it failed", kind="TrainingDataInvalid")
        with pytest.raises(TrainingDataInvalid, match="it failed"):
            job.result(timeout=TIMEOUT_S)
        job = manager.job("monday")
        answer(first, "JOB", err="there is no job", kind="JobUnknown")
        answer(second, "JOB", err="cancelled", kind="TrainingCancelled")
        with pytest.raises(CancelledError):
            job.result(timeout=TIMEOUT_S)
        job = manager.job("monday")
        for dealer in dealers:
            answer(dealer, "JOB", err="there is no job", kind="JobUnknown")
        with pytest.raises(CommandFailed, match="there is no job"):
            job.result(timeout=TIMEOUT_S)


def test_a_client_has_the_same_calls(new_manager: NewManager, messenger: MessengerFactory, wine: Data) -> None:
    manager = new_manager()
    client = ModelClient(messenger(), manager.listener.destination)
    progress: Inbox[Progress] = Inbox()
    training = client.train("wine", data=wine.path, target="class", on_progress=progress).result(timeout=TRAIN_S)
    assert training.version == 1
    assert progress.wait(1)[0].job == training.job
    assert client.infer("wine", wine.rows[:3]).result(TRAIN_S).predictions == [0, 0, 0]
    many = client.infer("wine", np.array(wine.rows)).result(TIMEOUT_S)
    assert isinstance(many.predictions, np.ndarray)
    assert len(many.predictions) == 178
    assert client.print_message("hello").result(TIMEOUT_S) == "MODEL_REPLY_hello"
    assert client.load("wine", 1).result(TIMEOUT_S).name == "wine"
    assert client.list_models().result(TIMEOUT_S)[0].name == "wine"
    assert client.unload("wine").result(TIMEOUT_S) is None
    assert client.status().result(TIMEOUT_S)["ready"] is True
    with pytest.raises(CommandFailed, match="the rows have the shape"):
        client.infer("wine", [[1.0]]).result(TIMEOUT_S)
    with pytest.raises(CommandFailed, match="cannot end servers"):
        client.command("QUIT").result(TIMEOUT_S)
    with pytest.raises(TrainingDataInvalid):
        client.train("wine", data=wine.path, target="nothing").result(TRAIN_S)


@pytest.mark.parametrize(
    "result",
    [
        5,
        {"predictions": 5},
        {"predictions": {"0": 1, "1": 2}},
        {"predictions": [[1], [2, 3]]},
        {"predictions": [1, 2], "version": "x"},
        {"predictions": [1, 2], "version": [1]},
    ],
    ids=str,
)
def test_garbage_for_an_answer_is_told_to_a_client(messenger: MessengerFactory, result: Any) -> None:
    """Whatever answers at the manager's port: each call ends."""
    contents = json.dumps({"action": 0, "result": result, "success": True, "err": ""}).encode()
    listener = messenger().listen_for_connection(0, lambda message: message.reply(contents), responses=False)
    client = ModelClient(messenger(), listener.destination)
    with pytest.raises(BadAnswer):
        client.infer("m", np.array([[1.0], [2.0]])).result(TIMEOUT_S)


def test_a_plain_program_can_be_a_client(new_manager: NewManager, folder: Path, plain: PlainPeers) -> None:
    make_linear(folder)
    manager = new_manager()
    dealer = plain.dealer(manager.listener.destination)
    dealer.send(b"", b'7-0-{"cmd": "INFER", "data": {"name": "sum", "rows": [[1, 2]]}}')
    message = dealer.receive()[-1]
    assert message.startswith(b"0-7-{")
    assert json.loads(message[4:])["result"] == {"name": "sum", "version": 1, "predictions": [3.0]}
    for contents, reason in ((b'{"cmd": "LOAD", "data": 5}', "object"), (b'{"cmd": "INFER", "data": {}}', "name")):
        dealer.send(b"", b"8-0-" + contents)
        answer, _ = decode_answer(dealer.receive()[-1].split(b"-", 2)[2])
        assert not answer.success
        assert reason in answer.err


def test_garbage_at_the_managers_door_is_counted(new_manager: NewManager, plain: PlainPeers) -> None:
    manager = new_manager()
    dealer = plain.dealer(manager.listener.destination)
    garbage = [
        *(b"", b"not JSON", b"[]", b"{}", b"\x01\x02", b"\x80\x04."),
        *(b'{"action": 9, "result": 0, "success": true, "err": ""}', b'{"action": 1}'),
        b'{"action": 2, "result": {"job": 5}, "success": true, "err": ""}',
        b'{"action": 1, "result": "", "success": true, "err": "", "server": 5}',
    ]
    for contents in garbage:
        dealer.send(b"", b"0-0-" + contents)
    wait_until(lambda: manager.status().counts.get("garbage") == len(garbage))
    assert manager.print_message("x").result(timeout=TIMEOUT_S) == "MODEL_REPLY_x"


def test_overload_is_shed(new_manager: NewManager, folder: Path, standing_clock: StandingClock) -> None:
    """More is asked than can be answered: some calls end at once as Overloaded, the others are answered in time."""
    make_linear(folder, width=200)
    manager = new_manager(queue_s_max=0.1, batch_rows_max=500)
    rows = np.zeros((500, 200))
    for _ in range(5):
        manager.infer("sum", rows).result(timeout=TIMEOUT_S)
    waits: Inbox[float] = Inbox()
    shed: Inbox[Overloaded] = Inbox()

    def start() -> None:
        started_at = standing_clock.now()

        def on_end(job: Any) -> None:
            error = job.exception()
            if error is None:
                waits(standing_clock.now() - started_at)
            else:
                assert isinstance(error, Overloaded)
                shed(error)

        manager.infer("sum", rows).add_done_callback(on_end)

    for _ in range(600):
        start()
    wait_until(lambda: len(waits) + len(shed) == 600, timeout=TRAIN_S)
    # How many depends on how long the calls before took, and so on pauses of the machine.
    assert len(waits) >= 1
    assert all(0 < error.retry_after_s < 60 for error in shed.wait(1))
    assert max(waits.wait()) < 2.0
    assert manager.status().counts["overloaded"] == len(shed)
    assert manager.infer("sum", rows).result(timeout=TIMEOUT_S).version == 1


def test_quit_ends_a_server_for_good(new_manager: NewManager) -> None:
    manager = new_manager()
    manager.wait_ready()
    answer = manager.command("QUIT", "").result(timeout=TIMEOUT_S)
    assert answer["success"] is True
    (server,) = manager.status().servers
    assert server.state == "stopped"
    assert "told to end" in server.reason
    assert server.reason.endswith("with status 0")
    assert not manager.is_ready
    with pytest.raises(NoServer, match="ended with status 0"):
        manager.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S)


def test_a_stop_ends_what_is_open(new_manager: NewManager, folder: Path, wine: Data) -> None:
    manager = new_manager()
    job = wait_progress(manager, "wine", wine)
    (server,) = manager.status().servers
    manager.stop()
    assert job.exception(TIMEOUT_S) is not None
    assert not os.path.exists(f"/proc/{server.pid}")
    assert not left_behind(folder)
    for late in (manager.infer("sum", [[1, 2]]), manager.print_message("x")):
        with pytest.raises(ManagerStopped):
            late.result(timeout=TIMEOUT_S)
    manager.stop()


def test_nobody_there_is_told_at_the_deadline(new_manager: NewManager) -> None:
    manager = new_manager(servers=0)
    assert not manager.is_ready
    jobs: list[Job[Any]] = [manager.print_message("x", timeout=0.3), manager.infer("sum", [[1, 2]], timeout=0.3)]
    for job in jobs:
        with pytest.raises(NoServer, match="no server was ready"):
            job.result(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    "options",
    [{"servers": -1}, {"crashes_max": 0}, {"batch_rows_max": 0}, {"queue_s_max": 0}, {"command": "x"}, {"command": []}],
)
def test_bad_options_are_refused(new_manager: NewManager, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        new_manager(**options)


def test_what_no_server_could_reach_is_refused(new_manager: NewManager, new_destination: Any) -> None:
    with pytest.raises(ValueError, match="no server could connect"):
        new_manager(new_destination("inproc"))
    with pytest.raises(ValueError, match="has no ipc endpoint"):
        new_manager(new_destination("tcp"), command=["x", "{ipc_path}"])


def test_servers_of_ours_are_not_started_where_they_would_need_a_key(messenger: MessengerFactory, folder: Path) -> None:
    pair = KeyPair.generate("primary")
    one = messenger("primary", security=Security(key=pair, allow={pair.public: "client"}))
    place = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match="our servers have none"):
        ModelServerManager(one, place, folder=folder)
    ModelServerManager(one, place, folder=folder, servers=0).stop()
    with ModelServerManager(one, free_port(), folder=folder) as manager:
        manager.wait_ready(TIMEOUT_S)
        assert manager.print_message("x").result(TIMEOUT_S) == "MODEL_REPLY_x"


def test_a_job_can_be_awaited(new_manager: NewManager, folder: Path) -> None:
    import asyncio

    make_linear(folder)
    manager = new_manager()

    async def ask() -> list[Inference]:
        calls = [asyncio.wrap_future(manager.infer("sum", [[number, 0]])) for number in range(10)]
        return await asyncio.gather(*calls)

    assert [each.predictions for each in asyncio.run(ask())] == [[float(number)] for number in range(10)]


def test_a_callback_of_a_job_may_call_again(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager()
    results: Inbox[Any] = Inbox()

    def again(job: Any) -> None:
        value = job.result().predictions[0]
        if value < 20:
            manager.infer("sum", [[value, 1]]).add_done_callback(again)
        else:
            results(value)

    manager.infer("sum", [[0, 1]]).add_done_callback(again)
    assert results.wait() == [20.0]


def test_answers_are_no_garbage(new_manager: NewManager) -> None:
    """The SLC runs on answers too, after their own callbacks; it must leave them alone."""
    manager = new_manager()
    for number in range(10):
        assert manager.print_message(f"{number}").result(timeout=TIMEOUT_S) == f"MODEL_REPLY_{number}"
    assert manager.status().counts.get("garbage", 0) == 0


def test_a_job_with_a_callback_is_left_to_the_messengers_thread(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager()
    threads: Inbox[int] = Inbox()
    job = manager.infer("sum", [[1, 2]])
    job.add_done_callback(lambda _: threads(threading.get_ident()))
    assert job.result(timeout=TIMEOUT_S).predictions == [3]
    assert threads.wait() == [manager._dispatcher._messenger._loop.thread_id]


class Held:
    """A manager whose server is stopped, with a call that it has."""

    def __init__(self, manager: ModelServerManager, client: ModelClient | None = None) -> None:
        calls = client or manager
        calls.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S)
        self.pid = manager.status().servers[0].pid
        os.kill(self.pid, signal.SIGSTOP)
        status = Path(f"/proc/{self.pid}/status")
        wait_until(lambda: "State:\tT" in status.read_text())
        self.job = calls.infer("sum", [[1, 2]])

    def wait_in_thread(self) -> Inbox[BaseException]:
        ended: Inbox[BaseException] = Inbox()

        def wait() -> None:
            try:
                self.job.result(timeout=TIMEOUT_S)
            except BaseException as error:
                ended(error)

        self.thread = threading.Thread(target=wait)
        self.thread.start()
        wait_until(lambda: self.job._is_fetched)
        return ended


@pytest.mark.parametrize("is_client", [False, True], ids=["manager", "client"])
def test_a_thread_that_waits_alone_fetches_its_result_itself(
    new_manager: NewManager,
    messenger: MessengerFactory,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_client: bool,
) -> None:
    """The messenger's thread is not woken for it, which takes longer than the call itself."""
    make_linear(folder)
    manager = new_manager()
    own = messenger() if is_client else manager.listener.messenger
    held = Held(manager, ModelClient(own, manager.listener.destination) if is_client else None)
    settled_in: list[threading.Thread] = []

    def settle(job: Job[object], result: object) -> bool:
        if job is held.job:  # The manager of a client has one of its own.
            settled_in.append(threading.current_thread())
        return plain_settle(job, result)

    plain_settle = Job.settle
    monkeypatch.setattr(Job, "settle", settle)
    held.wait_in_thread()
    wait_until(lambda: own._loop._leader is not None and own._loop._leader_sleeps)
    os.kill(held.pid, signal.SIGCONT)
    held.thread.join(TIMEOUT_S)
    assert settled_in == [held.thread]


def test_a_cancel_ends_the_wait_of_another_thread(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    held = Held(new_manager())
    ended = held.wait_in_thread()
    assert held.job.cancel()
    assert [type(error) for error in ended.wait()] == [CancelledError]
    assert held.job.cancelled()
    os.kill(held.pid, signal.SIGCONT)


def test_a_wait_that_is_over_leaves_the_job_open(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    held = Held(new_manager())
    for _ in range(2):
        with pytest.raises(TimeoutError):
            held.job.result(timeout=0.02)
    os.kill(held.pid, signal.SIGCONT)
    assert held.job.result(timeout=TIMEOUT_S).predictions == [3]


def test_a_result_is_not_waited_for_in_a_callback(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager()
    raised: Inbox[BaseException] = Inbox()

    def call_again(_: object) -> None:
        try:
            manager.infer("sum", [[3, 4]]).result(timeout=TIMEOUT_S)
        except CalledFromCallback as error:
            raised(error)

    manager.infer("sum", [[1, 2]]).add_done_callback(call_again)
    raised.wait()


def test_the_default_timeout_stays_the_default_on_its_way() -> None:
    """Each message with another one takes the server 20 us more."""
    assert as_timeout(CALL_TIMEOUT_S - 0.000_01) == CALL_TIMEOUT_S
    assert as_timeout(CALL_TIMEOUT_S - 0.04) == CALL_TIMEOUT_S
    assert 1.0 <= as_timeout(1.0) <= 1.1
    assert as_timeout(-1.0) == 0.1
