"""Servers that are not ours: plain ZeroMQ programs, which crash, hang, lie and talk garbage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from messenger import NotDelivered, OutcomeUnknown
from messenger.models import BadAnswer, CommandFailed, ModelServerManager, NoServer, ServerLost
from tests.conftest import TIMEOUT_S, NewDestination, PlainPeers, free_port, wait_until
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
ECHO_PID = """json.dumps({"action": 0, "result": os.getpid(), "success": True, "err": ""}).encode()"""
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
    monkeypatch.setattr("messenger.models.supervisor.START_S", 0.3)
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


def test_a_server_that_cannot_be_reached_gets_nothing_more(new_manager: NewManager, plain: PlainPeers) -> None:
    """One that is gone was taken for ready for ever, and as it had nothing to do, it got most of what was asked."""
    manager = new_manager(servers=0)
    dealers = [plain.dealer(manager.listener.destination, name) for name in (b"one", b"two")]
    for dealer in dealers:
        dealer.send(b"", HELLO)
    wait_until(lambda: len(manager.status().servers) == 2)
    dealers[0].close()

    def is_gone() -> bool:
        manager.command("ANY", timeout=0.1)
        return [server.identity for server in manager.status().servers] == ["two"]

    wait_until(is_gone)
    job = manager.infer("m", [[1]])
    while True:
        callback_id, _, contents = dealers[1].receive()[-1].split(b"-", 2)
        if json.loads(contents)["cmd"] == "INFER":
            break
    answer = b'{"action": 0, "result": {"predictions": [5]}, "success": true, "err": ""}'
    dealers[1].send(b"", b"0-%b-" % callback_id + answer)
    assert job.result(timeout=TIMEOUT_S).predictions == [5]


def test_a_program_that_hangs_up_is_started_again(new_manager: NewManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messenger.models.supervisor.START_S", 0.3)
    script = "import sys, time, zmq; dealer = zmq.Context().socket(zmq.DEALER); dealer.connect(sys.argv[1])\n"
    script += f"dealer.send_multipart([b'', {HELLO!r}]); dealer.recv_multipart(); dealer.close(); time.sleep(600)"
    manager = new_manager(command=[sys.executable, "-c", script, "{endpoint}"])

    def is_started_again() -> bool:
        if manager.is_ready:
            manager.command("ANY", timeout=0.1)
        return manager.status().servers[0].restarts > 0

    wait_until(is_started_again)


def test_a_stranger_takes_no_place_of_our_servers(new_manager: NewManager, plain: PlainPeers) -> None:
    """Its hello that came while ours was starting made it the one whose process was watched."""
    manager = new_manager()
    dealer = plain.dealer(manager.listener.destination, b"stranger")
    dealer.send(b"", HELLO)
    wait_until(lambda: len(manager.status().servers) == 2 and manager.status().servers[0].state == "ready")
    ours, stranger = manager.status().servers
    assert (ours.slot, stranger.slot, stranger.identity) == (0, -1, "stranger")
    os.kill(ours.pid, signal.SIGKILL)
    wait_until(lambda: manager.status().servers[0].pid not in (0, ours.pid))
    wait_until(lambda: manager.status().servers[0].state == "ready")
    assert [server.slot for server in manager.status().servers] == [0, -1]


def test_a_late_hello_of_a_process_that_has_ended_is_none(new_manager: NewManager, plain: PlainPeers) -> None:
    manager = new_manager(servers=0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    dealer = plain.dealer(manager.listener.destination)
    about = {"pid": ended.pid, "life": "x", "slot": 0, "npy": True, "batches": True}
    dealer.send(b"", HELLO[:-1] + b', "server": ' + json.dumps(about).encode() + b"}")
    dealer.send(b"", b"0-0-garbage")
    wait_until(lambda: manager.status().counts.get("garbage"))
    assert manager.status().servers == []


def test_our_server_may_be_the_command(new_manager: NewManager, new_destination: NewDestination, folder: Path) -> None:
    """It was taken for one that was started by hand, so its place said `starting`, and it was killed after a minute."""
    place = new_destination("tcp")
    words = [sys.executable, "-m", "messenger.models.server", str(place), "--folder", folder]
    manager = new_manager(place, command=["sh", "-c", '"$@"; exit $?', "sh", *words])
    manager.wait_ready(timeout=TIMEOUT_S)
    (server,) = manager.status().servers
    assert (server.slot, server.state) == (0, "ready")


def test_a_program_that_does_not_end_after_quit_is_killed(new_manager: NewManager) -> None:
    """It gets nothing more meanwhile; and the job of QUIT, which has no answer, ends."""
    stubborn = SERVER.replace("sys.exit(0)", "continue")
    manager = new_manager(command=[sys.executable, "-c", stubborn, "{endpoint}", ECHO_PID], servers=2)
    wait_until(lambda: all(server.state == "ready" for server in manager.status().servers))
    told_to_end = manager.command("QUIT", timeout=1.0)
    pids = {manager.command("ANY").result(timeout=TIMEOUT_S)["result"] for _ in range(10)}
    assert len(pids) == 1
    assert told_to_end.result(timeout=TIMEOUT_S)["success"] is True
    (stopped,) = [server for server in manager.status().servers if server.pid not in pids]
    assert (stopped.state, stopped.reason) == ("stopped", "it was told to end, and it did not end after QUIT")


def test_the_end_of_a_process_is_that_of_its_own_server(foreign: Callable[..., ModelServerManager]) -> None:
    """Several that started at once were told apart by whose hello came first, so another one was taken for lost."""
    manager = foreign(ECHO_PID, servers=3)
    wait_until(lambda: all(server.state == "ready" for server in manager.status().servers))
    killed = manager.status().servers[1]
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: killed.identity not in [server.identity for server in manager.status().servers])
    pids = {server.pid for server in manager.status().servers if server.slot != killed.slot}
    wait_until(lambda: all(server.state == "ready" for server in manager.status().servers))
    pids |= {server.pid for server in manager.status().servers}
    jobs = [manager.command("ANY") for _ in range(12)]
    assert {job.result(timeout=TIMEOUT_S)["result"] for job in jobs} == pids


def test_what_no_server_took_says_what_the_servers_do(new_manager: NewManager) -> None:
    manager = new_manager(command=["sleep", "60"])
    with pytest.raises(NoServer, match=r"before its deadline: server 0: process \d+ is starting"):
        manager.print_message("x", timeout=0.1).result(timeout=TIMEOUT_S)


@pytest.mark.parametrize("word", [5, None, b"x", "a\0b"])
def test_what_is_no_word_is_refused_and_leaves_nothing(new_manager: NewManager, word: Any) -> None:
    """With a path in the command, or a number, the listener stayed; a NUL character ended the supervisor."""
    place = free_port()
    with pytest.raises(ValueError, match=r"command is|NUL"):
        new_manager(place, command=[sys.executable, word])
    manager = new_manager(place, command=[Path(sys.executable), "-c", SERVER, "{endpoint}", ECHO_DATA])
    assert manager.command("ANY", 1).result(timeout=TIMEOUT_S)["result"] == 1
