"""The examples, run as a user runs them. They use the default ports, so one after the other."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from messenger import Messenger
from tests.conftest import free_port, is_port_free, wait_until

EXAMPLES = Path(__file__).parents[1] / "examples"
PORT = 15445

pytestmark = [pytest.mark.usefixtures("fixed_ports"), pytest.mark.timeout(120)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def test_the_main_job_is_well() -> None:
    finished = run(EXAMPLES / "main_job.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = (re.split(" {2,}", line.strip(), maxsplit=1) for line in finished.stdout.splitlines())
    table = {row[0]: row[1] for row in rows if len(row) == 2}
    assert table["replicas that equal the primary"] == "2 of 2"
    assert table["inferences, stored"] == "360, 360"
    assert table["lost"] == "0"


def test_every_line_is_checked_on_every_transport(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"a line of five words\n\n1-0-x\n\xff\0\n" * 500)
    finished = run(EXAMPLES / "every_line.py", text)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines()[-3:]]
    assert [row[:5] for row in rows] == [[name, "2,000", "2,000", "0", "0"] for name in ("inproc", "ipc", "tcp")]


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot read the text"), (b"", "has no lines")])
def test_no_text_says_so(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    finished = run(EXAMPLES / "every_line.py", tmp_path / "text")
    assert finished.returncode == 1
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(("name", "reason"), [("every_line", "name a text"), ("plain_dealer", "plain_dealer.py 15445")])
def test_an_example_without_its_arguments_says_what_it_wants(tmp_path: Path, name: str, reason: str) -> None:
    """Also where it is alone, and not in a clone."""
    (tmp_path / "examples").mkdir()
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path / "examples")
    finished = run(tmp_path / "examples" / f"{name}.py")
    assert finished.returncode == 1
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_taken_port_says_so(tmp_path: Path) -> None:
    with Messenger() as messenger:
        messenger.listen_for_connection(PORT, None)
        finished = run(EXAMPLES / "every_line.py", EXAMPLES / "every_line.py")
    assert finished.returncode == 1
    assert f"is port {PORT} in use?" in finished.stderr


def test_two_processes_talk() -> None:
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "two_processes.py", "serve"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert "serving" in server.stdout.readline()
            finished = run(EXAMPLES / "two_processes.py", "ask")
        finally:
            server.terminate()
    assert finished.returncode == 0, finished.stderr
    # Two threads print, so their lines may run into each other.
    for answer in ("b'applied record 1'", "b'applied record 2'", "b'potato'"):
        assert finished.stdout.count(answer) == 1


def test_threads_and_asyncio_talk() -> None:
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "threads_and_asyncio.py", "asyncio"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert "serving" in server.stdout.readline()
            finished = run(EXAMPLES / "threads_and_asyncio.py", "threads")
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0
            assert server.stdout.read() == "bye\n"
        finally:
            server.kill()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "12 squared is 144\n100 squares, the sum is 328350\n"


def test_a_typed_service_keeps_accounts() -> None:
    finished = run(EXAMPLES / "typed_service.py")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [
        "deposited: 2000",
        "left after the transfer: Balance(account='account 0', cents=1500)",
        "refused, ValueError: account 0 has only 1500 cents",
        "refused, ContentsInvalid: contents of 24 bytes do not decode as __main__.Deposit | __main__.Transfer: "
        "Object missing required field `cents`",
    ]


def test_a_web_app_awaits_requests() -> None:
    port = free_port()

    def get(path: str) -> tuple[int, Any]:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    with subprocess.Popen([sys.executable, EXAMPLES / "web_app.py", str(port)], stderr=subprocess.PIPE) as server:
        try:
            wait_until(lambda: not is_port_free(port), 20)
            with ThreadPoolExecutor(20) as threads:
                answers = list(threads.map(lambda pieces: get(f"/price/tea?pieces={pieces}"), range(100)))
            assert answers == [(200, {"price": 3.5 * pieces}) for pieces in range(100)]
            status, answer = get("/price/gold")
            assert (status, "KeyError" in answer["error"]) == (404, True)
            status, answer = get("/price/tea?pieces=x")
            assert (status, "'x'" in answer["error"]) == (400, True)
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) in (0, -signal.SIGTERM)
        finally:
            server.kill()


def test_a_plain_dealer_is_answered() -> None:
    with Messenger("server") as messenger:
        listener = messenger.listen_for_connection(
            "tcp://127.0.0.1:0", lambda message: message.reply(f"{message.sender} said ".encode() + message.contents)
        )
        finished = run(EXAMPLES / "plain_dealer.py", str(listener.port), "hello")
    assert finished.stdout == "[b'server', b'', b'0-1024-plain-dealer said hello']\n"
