"""The examples, run as a user runs them. They use the default ports, so one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from messenger import Messenger

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


def test_a_plain_dealer_is_answered() -> None:
    with Messenger("server") as messenger:
        listener = messenger.listen_for_connection(
            "tcp://127.0.0.1:0", lambda message: message.reply(f"{message.sender} said ".encode() + message.contents)
        )
        finished = run(EXAMPLES / "plain_dealer.py", str(listener.port), "hello")
    assert finished.stdout == "[b'server', b'', b'0-1024-plain-dealer said hello']\n"
