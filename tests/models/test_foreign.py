"""Servers that are not ours: plain ZeroMQ programs, which crash, hang, lie and talk garbage."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from messenger import NotDelivered, OutcomeUnknown
from messenger.models import BadAnswer, CommandFailed, ModelServerManager, NoServer, ServerLost
from tests.conftest import TIMEOUT_S, NewDestination, PlainPeers, wait_until
from tests.models.conftest import NewManager

EXAMPLE = str(Path(__file__).parents[2] / "examples/plain_model_server.py")
HELLO = b'0-0-{"action": 1, "result": "", "success": true, "err": ""}'

# Says hello, then answers each command with the answer that its second argument names; QUIT ends it.
SERVER = """
import json, os, sys, time, zmq
dealer = zmq.Context().socket(zmq.DEALER)
if len(sys.argv) > 3:
    dealer.setsockopt(zmq.ROUTING_ID, sys.argv[3].encode())
dealer.connect(sys.argv[1])
def send(destination, contents):
    dealer.send_multipart([b"", b"0-%d-" % destination + contents])
send(0, json.dumps({"action": 1, "result": "", "success": True, "err": ""}).encode())
while True:
    contents = dealer.recv_multipart()[-1]
    source, _, contents = contents.split(b"-", 2)
    command = json.loads(contents)
    if command["cmd"] == "QUIT":
        sys.exit(0)
    if command["cmd"] == "DIE":
        sys.exit("it was told to die")
    answer = eval(sys.argv[2])
    if answer is not None:
        send(int(source), answer)
"""
ECHO_DATA = """json.dumps({"action": 0, "result": command["data"], "success": True, "err": ""}).encode()"""


@pytest.fixture
def foreign(new_manager: NewManager, new_destination: NewDestination) -> Callable[..., ModelServerManager]:
    """Starts a manager whose servers answer as a Python expression says."""

    def start(answer: str = ECHO_DATA, *words: str, transport: str = "port", **options: Any) -> ModelServerManager:
        place = "{endpoint}" if transport != "ipc" else "ipc://{ipc_path}"
        command = [sys.executable, "-c", SERVER, place, answer, *words]
        return new_manager(new_destination(transport), command=command, **options)

    return start


@pytest.mark.parametrize("transport", ["ipc", "tcp", "port"])
def test_the_example_is_a_server(transport: str, new_manager: NewManager, new_destination: NewDestination) -> None:
    manager = new_manager(new_destination(transport), command=[sys.executable, EXAMPLE, "{endpoint}"])
    assert manager.print_message("hello").result(timeout=TIMEOUT_S) == "MODEL_REPLY_hello"
    inference = manager.infer("any", [[1, 2], [3, 4]]).result(timeout=TIMEOUT_S)
    assert (inference.predictions, inference.version) == ([3, 7], 0)
    with pytest.raises(CommandFailed, match="'TRAIN' is unknown"):
        manager.train("m", data=[{"x": 1, "y": 1}], target="y").result(timeout=TIMEOUT_S)
    assert manager.command("QUIT").result(timeout=TIMEOUT_S)["success"] is True
    (server,) = manager.status().servers
    assert (server.state, server.restarts) == ("stopped", 0)


def test_the_ipc_path_is_filled_in(foreign: Callable[..., ModelServerManager]) -> None:
    assert foreign(transport="ipc").command("ANY", {"a": [1]}).result(timeout=TIMEOUT_S)["result"] == {"a": [1]}


def test_many_calls_each_get_their_own(foreign: Callable[..., ModelServerManager]) -> None:
    """A server of its own dialect gets one call a message, and answers in any order are told apart."""
    answer = '{"action": 0, "result": {"predictions": [row[0] for row in command["data"]["rows"]]}, '
    manager = foreign(f'json.dumps({answer} "success": True, "err": ""}}).encode()', servers=2)
    jobs = [manager.infer("m", [[number]]) for number in range(200)]
    assert [job.result(timeout=TIMEOUT_S).predictions for job in jobs] == [[number] for number in range(200)]


def test_a_routing_id_of_its_own(foreign: Callable[..., ModelServerManager]) -> None:
    manager = foreign(ECHO_DATA, "my-server")
    assert manager.command("ANY", 5).result(timeout=TIMEOUT_S)["result"] == 5
    assert manager.status().servers[0].identity == "my-server"
    with pytest.raises(ServerLost, match="ended with status 1"):
        manager.command("DIE").result(timeout=TIMEOUT_S)
    # Its next process has the same identity, and is served at once.
    assert manager.command("ANY", 6).result(timeout=TIMEOUT_S)["result"] == 6
    assert manager.status().servers[0].restarts == 1


@pytest.mark.parametrize(
    "answer",
    [
        'b"not JSON"',
        'b""',
        'b"\\x80\\x04."',
        'b"[]"',
        'b"{}"',
        'b\'{"action": 0, "result": "", "success": true}\'',
        'b\'{"action": "0", "result": "", "success": true, "err": ""}\'',
        'b\'{"action": 0, "result": "", "success": "yes", "err": ""}\'',
        'b\'{"action": 0, "result": 5, "success": true, "err": ""}\'',
        'b\'{"action": 0, "result": {"predictions": [1, 2, 3]}, "success": true, "err": ""}\'',
        'b"\\x01\\xff\\xff\\xff\\xff"',
        'b"\\x01\\x02\\x00\\x00\\x00{}\\x93NUMPY"',
    ],
)
def test_garbage_for_an_answer_is_told(foreign: Callable[..., ModelServerManager], answer: str) -> None:
    manager = foreign(answer)
    with pytest.raises(BadAnswer):
        manager.infer("m", [[1]]).result(timeout=TIMEOUT_S)
    with pytest.raises(BadAnswer):
        manager.list_models().result(timeout=TIMEOUT_S)
    assert manager.status().counts["bad_answers"] == 2
    assert manager.is_ready


@pytest.mark.parametrize("predictions", [[[1], [2, 3]], [1, [2]]], ids=str)
def test_predictions_that_are_no_array_are_told(foreign: Callable[..., ModelServerManager], predictions: Any) -> None:
    """The rows were a matrix, so they should become one; such a call once ended never."""
    answer = {"action": 0, "result": {"predictions": predictions}, "success": True, "err": ""}
    manager = foreign(f"json.dumps({answer}).encode()")
    with pytest.raises(BadAnswer, match="inhomogeneous"):
        manager.infer("m", np.array([[1.0], [2.0]])).result(timeout=TIMEOUT_S)


def test_a_command_may_be_called_as_ours_are(foreign: Callable[..., ModelServerManager]) -> None:
    """`command` gives any data to a server that knows what they mean, and returns its answer whole."""
    manager = foreign()
    for data in ({"name": "m"}, {"name": "m"}, "x"):
        assert manager.command("TRAIN", data).result(timeout=TIMEOUT_S)["result"] == data
    assert manager.status().jobs == {}


def test_what_is_no_message_is_dropped(new_manager: NewManager, plain: PlainPeers) -> None:
    manager = new_manager(servers=0)
    dealer = plain.dealer(manager.listener.destination)
    for frames in ([b"x"], [b"", b"x"], [b"", b"-1-0-x"], [b"", b"0-0-"], [b"", b"", b""]):
        dealer.send(*frames)
    dealer.send(b"", HELLO)
    wait_until(lambda: manager.is_ready)
    assert manager.status().servers[0].slot == -1


def test_a_server_that_hangs_is_told_by_the_deadline(foreign: Callable[..., ModelServerManager]) -> None:
    manager = foreign("None")
    wait_until(lambda: manager.is_ready)
    started_at = time.monotonic()
    for job in (manager.command("ANY", timeout=0.5), manager.infer("m", [[1]], timeout=0.5)):
        with pytest.raises(OutcomeUnknown):
            job.result(timeout=TIMEOUT_S)
    assert time.monotonic() - started_at < TIMEOUT_S


def test_an_answer_after_the_deadline_is_dropped(foreign: Callable[..., ModelServerManager]) -> None:
    manager = foreign(f"time.sleep(0.6) or {ECHO_DATA}")
    wait_until(lambda: manager.is_ready)
    with pytest.raises(OutcomeUnknown):
        manager.command("ANY", 1, timeout=0.3).result(timeout=TIMEOUT_S)
    assert manager.command("ANY", 2).result(timeout=TIMEOUT_S)["result"] == 2


def test_a_program_that_crashes_is_given_up_with_its_last_words(new_manager: NewManager) -> None:
    script = "import sys; print('first line', file=sys.stderr); sys.exit('no licence')"
    manager = new_manager(command=[sys.executable, "-c", script, "{endpoint}"])
    job = manager.print_message("x")
    with pytest.raises(NoServer, match=r"5 crashes in 60 s.*ended with status 1.*first line / no licence"):
        job.result(timeout=TIMEOUT_S)
    (server,) = manager.status().servers
    assert (server.state, server.restarts) == ("failed", 4)
    assert server.stderr == ["first line", "no licence"]
    with pytest.raises(NoServer, match="no licence"):
        manager.infer("m", [[1]]).result(timeout=TIMEOUT_S)


def test_a_program_that_is_not_there_is_given_up(new_manager: NewManager) -> None:
    manager = new_manager(command=["no-such-program", "{endpoint}"])
    with pytest.raises(NotDelivered, match="'no-such-program' cannot be started: No such file"):
        manager.print_message("x").result(timeout=TIMEOUT_S)


def test_a_program_that_says_no_hello_is_killed(new_manager: NewManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messenger.models.dispatch.START_S", 0.3)
    manager = new_manager(command=["sleep", "60"], crashes_max=1)
    with pytest.raises(NoServer, match="it said no hello within"):
        manager.print_message("x").result(timeout=TIMEOUT_S)


def test_endless_errors_do_not_fill_memory(new_manager: NewManager) -> None:
    script = "import sys\nfor n in range(300): print('x' * 10_000, n, file=sys.stderr)\nsys.exit(1)"
    manager = new_manager(command=[sys.executable, "-c", script], crashes_max=1)
    with pytest.raises(NoServer):
        manager.print_message("x").result(timeout=TIMEOUT_S)
    (server,) = manager.status().servers
    assert len(server.stderr) <= 20
    assert max(map(len, server.stderr)) <= 2_000
    assert server.stderr[-1].endswith("299")


def test_an_end_without_quit_is_a_crash_whatever_its_status(new_manager: NewManager) -> None:
    manager = new_manager(command=["true"])
    with pytest.raises(NoServer, match=r"5 crashes in 60 s.*ended with status 0"):
        manager.print_message("x").result(timeout=TIMEOUT_S)


def test_a_hello_again_of_the_same_server_changes_nothing(new_manager: NewManager, plain: PlainPeers) -> None:
    manager = new_manager(servers=0)
    dealer = plain.dealer(manager.listener.destination, b"again")
    for _ in range(3):
        dealer.send(b"", HELLO)
    job = manager.command("ANY", 1)
    callback_id, _, contents = dealer.receive()[-1].split(b"-", 2)
    assert contents == b'{"cmd":"ANY","data":1}'
    dealer.send(b"", HELLO)
    dealer.send(b"", b"0-%b-" % callback_id + b'{"action": 0, "result": 2, "success": true, "err": ""}')
    assert job.result(timeout=TIMEOUT_S)["result"] == 2
    assert len(manager.status().servers) == 1
