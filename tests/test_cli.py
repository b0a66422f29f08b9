"""The command `messenger` as users run it: real processes, their output, their exit status, and signals.

A listener takes port 0 and says on stderr which one it got, so that tests can run beside each other and beside a user.
"""

import base64
import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import messenger
from messenger.cli import main
from messenger.cli.messages import _Server
from messenger.link import Outlet

COMMAND = [sys.executable, "-m", "messenger"]
TIMEOUT_S = 20.0
TIMEOUT_MS = 20_000
# A command to a terminal, markup to rich, another direction to a reader, a new line to a line-based tool.
HOSTILE = "\x1b[2J[bold red]x[/]\u202e\x9b31m\r\n"


class Listening:
    """A running `messenger listen 0 …`; `endpoints` are what it says that it listens on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        ready = self.read_error()
        self.endpoints = ready.rpartition("listens on ")[2].split(", ")
        match = re.search(r":(\d+)$", ready)
        assert match, ready
        self.port = match[1]

    def read_line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().rstrip("\n")

    def read_error(self) -> str:
        assert self.process.stderr
        return self.process.stderr.readline().decode().rstrip("\n")

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Returns the exit status and what had not been read of stdout and stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, (out or b"").decode(), err.decode()


Start = Callable[..., subprocess.Popen[bytes]]
Listen = Callable[..., Listening]
Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    # The path of an ipc socket has at most 107 bytes, so the runtime folder needs a shorter path than tmp_path.
    with tempfile.TemporaryDirectory(prefix="cli-", dir="/tmp") as runtime:
        yield os.environ | {"XDG_RUNTIME_DIR": runtime, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Starts a command; what still runs at the end of the test is killed."""
    with contextlib.ExitStack() as stack:

        def start_command(*words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [*COMMAND, *words], env=environment, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start_command


@pytest.fixture
def listen(start: Start) -> Listen:
    return lambda *options, **settings: Listening(start("listen", "0", *options, **settings))


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Runs a command to its end."""

    def run_command(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, *words], env=environment, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False
        )

    return run_command


@pytest.fixture
def free_port() -> Iterator[str]:
    """Gives a port that nobody listens on, held so that nobody takes it: bound, but not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield str(holder.getsockname()[1])


@pytest.fixture
def signals() -> Iterator[None]:
    """Gives the signals back that `main` takes, for tests that call it in this process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def error_line(text: str | bytes) -> str:
    """Returns the one line that an error is."""
    text = text if isinstance(text, str) else text.decode()
    assert re.fullmatch(r"messenger: [^\n]+\n", text), text
    return text


# listen and send


def test_listen_prints_and_echoes(listen: Listen, run: Run) -> None:
    server = listen("--echo", "--identity", "server")
    assert [endpoint.partition(":")[0] for endpoint in server.endpoints] == ["inproc", "ipc", "tcp"]
    result = run("send", server.port, "record 1", "--identity", "replica1")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"record 1\n", b"")
    assert re.fullmatch(r"'replica1' \d{4,}-0 'record 1'", server.read_line())
    for endpoint in server.endpoints[1:]:
        assert run("send", endpoint, "by address").stdout == b"by address\n"
    status, _, err = server.end()
    assert (status, err) == (0, "")


def test_listen_replies_with_a_text(listen: Listen, run: Run) -> None:
    server = listen("--reply", "applied")
    assert run("send", server.port, "x").stdout == b"applied\n"
    assert run("send", server.port, "x", "--dialect", "basic").stdout == b"applied\n"


def test_listen_without_an_answer(listen: Listen, run: Run) -> None:
    server = listen()
    result = run("send", server.port, "x", "--timeout", "0.2")
    assert (result.returncode, result.stdout) == (1, b"")
    assert "no response came" in error_line(result.stderr)
    assert server.read_line().endswith(" 'x'")


def test_listen_ends_after_count(listen: Listen, run: Run) -> None:
    server = listen("--echo", "--count", "2")
    assert [run("send", server.port, text).stdout for text in ("a", "b")] == [b"a\n", b"b\n"]
    status, out, _ = server.wait()
    assert status == 0
    assert [line.split()[-1] for line in out.splitlines()] == ["'a'", "'b'"]


def test_listen_json(listen: Listen, run: Run) -> None:
    server = listen("--json", "--reply", "")
    assert run("send", server.port, HOSTILE, "--identity", "naïve", "--callback", "77").returncode == 0
    described = json.loads(server.read_line())
    assert described.pop("source_callback_id") >= 1024
    assert described == {"sender": "naïve", "dest_callback_id": 77, "contents": HOSTILE}
    assert run("send", server.port, "-", stdin=b"\xff\0").returncode == 0
    described = json.loads(server.read_line())
    assert base64.b64decode(described["contents_base64"]) == b"\xff\0"
    assert "contents" not in described


def test_listen_exec(listen: Listen, run: Run) -> None:
    server = listen("--exec", "tr 'a-z' A-Z")
    assert run("send", server.port, "-", stdin=b"it's $HOME").stdout == b"IT'S $HOME\n"
    assert run("send", server.port, "-", stdin=bytes(range(256)) * 50).returncode == 0


def test_listen_exec_runs_several_at_a_time(listen: Listen, start: Start, tmp_path: Path) -> None:
    # Each program waits until the other has started, so they end only if both run at one time.
    script = (
        f"read name; touch {tmp_path}/$name; while [ $(ls {tmp_path} | wc -l) -lt 2 ]; do sleep 0.01; done; echo $name"
    )
    server = listen("--exec", f"sh -c '{script}'", "--workers", "2", "--count", "2")
    senders = [start("send", server.port, name + "\n", "--timeout", "10") for name in ("a", "b")]
    assert [sender.communicate(timeout=TIMEOUT_S)[0] for sender in senders] == [b"a\n", b"b\n"]
    assert server.wait()[0] == 0


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("false", "'false' ended with status 1"),
        # Its child holds stdout open, and must not hold us up.
        ("sh -c 'sleep 60; echo'", "'sh' took longer than --exec-timeout 0.2"),
    ],
)
def test_listen_exec_that_fails_is_not_answered(listen: Listen, run: Run, program: str, complaint: str) -> None:
    server = listen("--exec", program, "--exec-timeout", "0.2", "--count", "1")
    assert run("send", server.port, "x", "--timeout", "0.5").returncode == 1
    status, _, err = server.wait()
    assert status == 0
    assert re.fullmatch(rf"messenger: message \d+ of '.+' is not answered: {complaint}\n", err)


def test_listen_kills_its_programs(listen: Listen, run: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    server = listen("--exec", f"sh -c 'exec 3> {pipe}; echo started >&3; sleep 60; echo'")
    assert run("send", server.port, "x", "--no-wait").returncode == 0
    with pipe.open() as reader:
        assert reader.readline() == "started\n"
        assert server.end(signal.SIGTERM)[0] == 0
        # The end of the pipe comes when all that holds it is dead, the program's own child included.
        assert reader.read() == ""


def test_hostile_peer_is_printed_escaped(listen: Listen) -> None:
    server = listen("--echo")
    routing_id = b"\x1b]0;x\x07\n[red]"
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.routing_id = routing_id
        dealer.connect(f"tcp://127.0.0.1:{server.port}")
        for contents in (HOSTILE.encode(), b"\xff\x1b[2J"):
            dealer.send_multipart([b"", b"5-0-" + contents])
            assert dealer.poll(TIMEOUT_MS)
            assert dealer.recv_multipart()[1:] == [b"", b"0-5-" + contents]
        dealer.send_multipart([b"", b"not a message"])
        dealer.send_multipart([b"", b"6-1-echo"])
        assert dealer.poll(TIMEOUT_MS)
        assert dealer.recv_multipart()[2] == b"0-6-echo"
    lines = [server.read_line() for _ in range(3)]
    sender = r"'\x1b]0;x\x07\n[red]'"
    assert lines == [
        rf"{sender} 5-0 '\x1b[2J[bold red]x[/]\u202e\x9b31m\r\n'",
        rf"{sender} 5-0 b'\xff\x1b[2J'",
        rf"{sender} 6-1 'echo'",
    ]
    # The built-in has answered the last one, so --echo did not do it a second time.
    assert server.end() == (0, "", "")


def test_send_reads_stdin_and_prints_the_very_bytes(listen: Listen, run: Run) -> None:
    server = listen("--echo")
    assert run("send", server.port, "-", stdin=b"\x1b[2J\xff\0").stdout == b"\x1b[2J\xff\0"
    assert run("send", server.port, "-", stdin=b"two\nlines\n").stdout == b"two\nlines\n"
    assert run("send", server.port, "-", stdin=b"").stdout == b"\n"
    assert run("send", server.port, "--", "-x").stdout == b"-x\n"


def test_send_to_a_terminal_escapes(listen: Listen, start: Start) -> None:
    server = listen("--echo")
    parent, child = pty.openpty()
    try:
        process = start("send", server.port, f"tab\t{HOSTILE}", stdout=child)
        assert process.wait(TIMEOUT_S) == 0
        # The terminal itself makes \n into \r\n.
        assert os.read(parent, 1000) == rb"tab" + b"\t" + rb"\x1b[2J[bold red]x[/]\u202e\x9b31m\r" + b"\r\n"
    finally:
        os.close(parent)
        os.close(child)


def test_send_json(listen: Listen, run: Run) -> None:
    server = listen("--reply", "applied", "--identity", "server")
    described = json.loads(run("send", server.port, "x", "--json").stdout)
    assert described.pop("dest_callback_id") >= 1024
    assert described == {"sender": "server", "source_callback_id": 0, "contents": "applied"}


def test_send_names_a_callback(listen: Listen, run: Run) -> None:
    server = listen()
    assert run("send", server.port, "potato", "--callback", "echo").stdout == b"potato\n"
    assert run("send", server.port, "potato", "--callback", "1").stdout == b"potato\n"
    assert run("send", server.port, "x", "--callback", "18446744073709551615", "--no-wait").returncode == 0
    assert [server.read_line().split()[1].partition("-")[2] for _ in range(3)] == ["1", "1", str(2**64 - 1)]


def test_send_no_wait(listen: Listen, run: Run, free_port: str) -> None:
    server = listen()
    result = run("send", server.port, "x", "--no-wait")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert re.fullmatch(r"'.+' 0-0 'x'", server.read_line())
    result = run("send", free_port, "x", "--no-wait", "--timeout", "0.2")
    assert result.returncode == 3
    assert "nobody was there" in error_line(result.stderr)


def test_listen_replies_only_to_who_waits() -> None:
    replies: list[bytes] = []

    class FakeMessage(messenger.Message):
        def reply(self, contents: Any, *_: Any, **__: Any) -> None:
            replies.append(contents)

    server = _Server(False, None, lambda contents: b"answer to " + contents)
    for source_callback_id in (0, 1024):
        contents = b"%d" % source_callback_id
        server.take(FakeMessage(None, contents, source_callback_id, 0, Outlet("listener", None), b"client"))
    assert replies == [b"answer to 1024"]


def test_send_speaks_to_a_plain_router(run: Run) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            peer, empty, data = router.recv_multipart()
            source_callback_id, _, contents = data.split(b"-", 2)
            router.send_multipart([peer, b"router", empty, b"0-%b-got %b" % (source_callback_id, contents)])

        thread = threading.Thread(target=serve)
        thread.start()
        result = run("send", str(port), "it", "--dialect", "basic", "--json")
        thread.join(TIMEOUT_S)
    assert json.loads(result.stdout)["contents"] == "got it"
    assert json.loads(result.stdout)["sender"] == "router"


def test_send_not_delivered(run: Run, free_port: str) -> None:
    result = run("send", free_port, "x", "--timeout", "0.2")
    assert result.returncode == 3
    assert free_port in error_line(result.stderr)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["send", "15445"], "Missing argument 'CONTENTS'"),
        (["send", "nowhere", "x"], "'nowhere' is no destination"),
        (["send", "99999", "x"], "the port is '99999'"),
        (["send", "0", "x"], "port 0"),
        (["send", "inproc://x", "x"], "'inproc://x': inproc stays within one process"),
        (["send", "15445", "x", "--callback", "ping"], "--callback 'ping' is neither"),
        (["send", "15445", "x", "--callback", "18446744073709551616"], "18446744073709551616, it must be 0 to"),
        (["send", "15445", "x", "--timeout", "0"], "--timeout"),
        (["send", "15445", "x", "--timeout", "nan"], "'--timeout': nan is no number"),
        (["ping", "15445", "--interval", "nan"], "'--interval': nan is no number"),
        (["listen", "0", "--exec", "cat", "--exec-timeout", "nan"], "'--exec-timeout': nan is no number"),
        (["models", "train", "m", "--data", "x", "--target", "y", "--validation", "nan"], "nan is no number"),
        (["send", "15445", "x", "--identity", ""], "identity '' is 0 bytes"),
        (["send", "\x1b[2J\n", "x"], r"'\x1b[2J\n' is no destination"),
        (["listen", "0", "--echo", "--reply", ""], "exclude each other"),
        (["listen", "0", "--reply", "x", "--exec", "cat"], "exclude each other"),
        (["listen", "0", "--exec", "cat 'x"], '--exec "cat \'x": No closing quotation'),
        (["listen", "0", "--exec", "/nonexistent -x"], "--exec '/nonexistent -x' names no program"),
        (["listen", "0.0.0.0:0"], "or --insecure if anybody may"),
        (["ping", "15445", "--size", "1000000000"], "'--size'"),
    ],
)
@pytest.mark.usefixtures("signals")
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], complaint: str) -> None:
    assert main(words) == 2
    assert complaint in error_line(capsys.readouterr().err)


def test_status_of_wrong_usage(run: Run) -> None:
    result = run("send", "nowhere", "x")
    assert (result.returncode, result.stdout) == (2, b"")
    assert "'nowhere' is no destination" in error_line(result.stderr)


def test_too_large(run: Run, free_port: str) -> None:
    result = run("send", free_port, "-", stdin=bytes(messenger.Limits().message_bytes_max + 1))
    assert result.returncode == 4
    assert "message_bytes_max" in error_line(result.stderr)


def test_destination_in_use(listen: Listen, run: Run) -> None:
    result = run("listen", listen().port)
    assert result.returncode == 4
    assert "another listener" in error_line(result.stderr)


def test_insecure_listens_on_all_addresses(start: Start) -> None:
    process = start("listen", "0.0.0.0:0", "--insecure")
    assert process.stderr
    # The library's warning comes first.
    assert b"without security" in process.stderr.readline()
    assert b" listens on " in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0


# ping and version


def test_ping(listen: Listen, run: Run) -> None:
    server = listen()
    result = run("ping", server.port, "--count", "3", "--interval", "0", "--size", "7")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0
    assert all(re.fullmatch(rf"{number}: \d+ µs", line) for number, line in enumerate(lines[:3], start=1))
    assert re.fullmatch(r"3 sent, 0 lost, min \d+ µs, median \d+ µs, p99 \d+ µs, max \d+ µs", lines[3])
    assert server.read_line().endswith("-1 'ping pi'")


def test_ping_json(listen: Listen, run: Run) -> None:
    result = run("ping", listen().port, "--count", "200", "--interval", "0", "--size", "0", "--json")
    summary = json.loads(result.stdout)
    times_us = sorted(summary["times_us"])
    assert (result.returncode, result.stderr) == (0, b"")
    assert (summary["sent"], summary["lost"], summary["size_bytes"]) == (200, 0, 0)
    assert (summary["min_us"], summary["p99_us"], summary["max_us"]) == (times_us[0], times_us[197], times_us[-1])
    assert times_us[99] <= summary["median_us"] <= times_us[100]


def test_ping_without_a_listener(run: Run, free_port: str) -> None:
    result = run("ping", free_port, "--count", "2", "--interval", "0", "--timeout", "0.1")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 1
    assert [line.split(":")[1] for line in lines[:2]] == [" lost", " lost"]
    assert lines[2] == "2 sent, 2 lost"
    summary = json.loads(run("ping", free_port, "--count", "1", "--timeout", "0.1", "--json").stdout)
    assert (summary["lost"], summary["times_us"]) == (1, [None])


def test_ping_shows_a_bar_on_a_terminal(listen: Listen, environment: dict[str, str]) -> None:
    server = listen(stdout=subprocess.DEVNULL)
    parent, child = pty.openpty()
    shown = b""
    try:
        words = [*COMMAND, "ping", server.port, "--count", "100", "--interval", "0"]
        process = subprocess.Popen(words, env=environment, stdout=child, stderr=child)
        os.close(child)
        # Reading a terminal whose other end is closed is an error on Linux.
        with contextlib.suppress(OSError):
            while chunk := os.read(parent, 10_000):
                shown += chunk
        assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(parent)
    assert b"100%" in shown
    assert b"100 sent, 0 lost, min " in shown
    assert b"\n7: " not in shown


def test_version(run: Run) -> None:
    assert run("version").stdout.decode().splitlines()[:3] == [
        f"messenger {messenger.__version__}",
        f"pyzmq {zmq.__version__}",
        f"libzmq {zmq.zmq_version()}",
    ]
    assert set(json.loads(run("version", "--json").stdout)) == {"messenger", "pyzmq", "libzmq", "python"}


def test_version_does_not_import_rich(environment: dict[str, str]) -> None:
    script = "import sys; from messenger.cli import main; main(['version']); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode == 0


def test_help_is_given_without_a_command(run: Run) -> None:
    result = run()
    assert result.returncode == 0
    assert b"listen" in result.stdout
    assert b"130  Ctrl-C" in run("send", "--help").stdout


def test_missing_click_is_named(environment: dict[str, str]) -> None:
    script = "import sys; sys.modules['click'] = None; from messenger.cli import main; sys.exit(main(['version']))"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert result.returncode == 4
    assert "pip install 'messenger-zmq[cli]'" in error_line(result.stderr)


# How it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_listen_ends_cleanly(listen: Listen, run: Run, number: int) -> None:
    server = listen()
    assert server.end(number) == (0, "", "")
    assert run("listen", server.port, "--echo", "--exec", "x").returncode == 2


def test_repeated_signals_do_not_disturb_the_end(listen: Listen) -> None:
    server = listen()
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == (0, "", "")


def test_ctrl_c_ends_send(listen: Listen, start: Start) -> None:
    server = listen()
    process = start("send", server.port, "x")
    server.read_line()  # The message has arrived, so the sender waits for the response.
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT_S) == (b"", b"")
    assert process.returncode == 130


def test_ctrl_c_ends_ping_with_what_it_has(listen: Listen, start: Start) -> None:
    process = start("ping", listen().port, "--interval", "60")
    assert process.stdout
    assert process.stdout.readline().startswith(b"1: ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, b"")
    assert out.startswith(b"1 sent, 0 lost, min ")


def test_listen_ends_when_nobody_reads_its_output(listen: Listen, run: Run) -> None:
    server = listen("--echo")
    assert server.process.stdout
    server.process.stdout.close()
    assert run("send", server.port, "x", "--timeout", "0.2").returncode != 0
    assert server.process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    assert server.process.stderr
    assert server.process.stderr.read() == b""


def test_closed_stdin_is_told(environment: dict[str, str], free_port: str) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, "send", free_port, "-"]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert (result.returncode, result.stderr) == (4, b"messenger: stdin is closed\n")


def test_status_tells_when_stderr_cannot(environment: dict[str, str]) -> None:
    """A complaint that nobody could read ended the command with 1, which means something else."""
    with open("/dev/full", "wb") as full:
        for stderr in (full.fileno(), _broken_pipe()):
            result = subprocess.run([*COMMAND, "send", "nowhere", "x"], env=environment, stderr=stderr, check=False)
            assert result.returncode == 2


def _broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_full_disk_is_told(listen: Listen, run: Run) -> None:
    with open("/dev/full", "wb") as full:
        server = listen(stdout=full.fileno())
    run("send", server.port, "x", "--no-wait", "--timeout", "1")
    status, _, err = server.wait()
    assert (status, err) == (4, "messenger: cannot write to stdout: No space left on device\n")


def test_blocked_output_does_not_hold_up_the_end(listen: Listen, run: Run) -> None:
    server = listen()
    # More than a pipe takes, and nobody reads it.
    assert run("send", server.port, "-", "--no-wait", stdin=bytes(200_000)).returncode == 0
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(TIMEOUT_S) in (0, 130)
