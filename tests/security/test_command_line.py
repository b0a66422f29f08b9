"""The two terminals of docs/security.md, as they stand there, and a server that is told of a new list."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.canary import CANARY, canary, shown_secrets
from tests.conftest import TIMEOUT_S, free_port, is_port_free, quickest, wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


def terminal(number: int) -> str:
    """Returns the commands of one terminal, as they stand in the document."""
    [commands] = re.findall(rf"```sh\n# terminal {number}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(commands)


class Shell:
    """Runs commands in a folder of their own; what they print goes to files."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder = folder
        binary = folder / "bin"
        binary.mkdir()
        (binary / "messenger").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m messenger "$@"\n')
        (binary / "messenger").chmod(0o755)
        self.environment = os.environ | {"PATH": f"{binary}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(runtime)}
        self.server: subprocess.Popen[bytes] | None = None

    def serve(self, commands: str) -> None:
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            # exec, so that signals reach the last command.
            *before, last = commands.strip().splitlines()
            # Many systems let the group write what users make.
            script = "\n".join(["set -e", "umask 002", *before, f"exec {last}"])
            self.server = subprocess.Popen(
                ["sh", "-c", script], cwd=self.folder, env=self.environment, stdout=out, stderr=err
            )
        wait_until(lambda: "listens on" in self.log, 2 * TIMEOUT_S)

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        result = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=30
        )
        assert not shown_secrets([result.stdout, result.stderr])
        return result

    @property
    def log(self) -> str:
        return (self.folder / "err").read_text()

    def key_of(self, name: str) -> str:
        return (self.folder / f"{name}.pub").read_text().split()[0]


@pytest.fixture
def shell(tmp_path: Path, runtime_folder: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, runtime_folder)
    yield shell
    if shell.server is not None:
        shell.server.kill()
        shell.server.wait()
        assert not shown_secrets([shell.log, (tmp_path / "out").read_text()])


def test_two_terminals(shell: Shell, fixed_ports: None) -> None:
    assert is_port_free(15_447)
    shell.serve(terminal(1))
    listed, unlisted = terminal(2).strip().splitlines()
    result = shell.run(listed)
    assert (result.returncode, result.stdout, result.stderr) == (0, "hello\n", "")
    key = shell.key_of("mallory")

    def refuse() -> float:
        began_at = time.monotonic()
        result = shell.run(unlisted)
        took_s = time.monotonic() - began_at
        assert result.returncode == 3, result.stderr
        [line] = result.stderr.splitlines()
        assert f"refused: our key {key} is not on the allow-list there" in line
        return took_s

    assert quickest(refuse, 2) < 2, "with the start of the program"
    result = shell.run(f"{unlisted} --no-wait")
    assert result.returncode == 3
    assert "message 1024 to tcp://127.0.0.1:15447: refused there; a send without --no-wait is told why" in result.stderr
    assert f"! server refused the key {key} from 127.0.0.1, which is not on the allow-list" in shell.log
    keys = "".join(f"{shell.key_of(name)} {name}\n" for name in ("server", "alice", "mallory"))
    assert (shell.folder / "out").read_text() == f"{keys}'alice' 1024-0 'hello'\n"


def test_a_server_reads_its_list_anew_on_a_hangup(shell: Shell) -> None:
    canary("server").save(shell.folder)
    port = free_port()
    for name in ("alice", "bob"):
        assert shell.run(f"messenger keygen {name}").returncode == 0
    shutil.copy(shell.folder / "alice.pub", shell.folder / "allowed")
    shell.serve(f"messenger listen tcp://127.0.0.1:{port} --key server.key --allow allowed --echo")
    sends = {
        name: f"messenger send tcp://127.0.0.1:{port} hello --key {name}.key --server-key server.pub"
        for name in ("alice", "bob")
    }
    assert [shell.run(send).returncode for send in sends.values()] == [0, 3]
    assert shell.server is not None
    (shell.folder / "allowed").write_text("")
    shell.server.send_signal(signal.SIGHUP)
    wait_until(lambda: "the old allow-list stays in force: the allow-list allowed is empty" in shell.log)
    shutil.copy(shell.folder / "bob.pub", shell.folder / "allowed")
    shell.server.send_signal(signal.SIGHUP)
    wait_until(lambda: "allowed was read: 1 may connect" in shell.log)
    assert [shell.run(send).returncode for send in sends.values()] == [3, 0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("listen tcp://0.0.0.0:0", "give --key and --allow"),
        ("listen tcp://0.0.0.0:0 --key open.key --allow allowed", "others can read or change open.key"),
        ("listen tcp://0.0.0.0:0 --key server.key --allow empty", "the allow-list empty is empty"),
        ("send 1 x --key server.key", "--key needs --server-key beside it"),
        ("send 1 x --server-key server.pub --key SECRET", "looks like a key itself, so it is not shown"),
        ("send 1 x --key nothing.key", "nothing.key cannot be read: No such file"),
        ("send 1 x --server-key server.pub", "--server-key need a key of our own: give --key FILE"),
        ("listen 1 --key server.key", "--key needs --allow beside it"),
        ("listen 1 --key server.key --insecure", "leave one of the two out"),
        ("models manage --key nothing.key --allow allowed", "nothing.key cannot be read"),
        ("replication primary x.db --key open.key --allow allowed", "others can read or change open.key"),
        ("keygen server", "is there already; nothing was written"),
    ],
)
def test_what_is_not_safe_is_refused_in_one_line(shell: Shell, words: str, complaint: str) -> None:
    canary("server").save(shell.folder)
    shutil.copy(shell.folder / "server.pub", shell.folder / "allowed")
    shutil.copy(shell.folder / "server.key", shell.folder / "open.key")
    (shell.folder / "open.key").chmod(0o644)
    (shell.folder / "empty").touch(0o600)
    words = words.replace("SECRET", shlex.quote(CANARY))  # Not in the name of the test.
    result = shell.run(f"messenger {words}")
    assert result.returncode in (2, 4)
    [line] = result.stderr.splitlines()
    assert complaint in line
    assert CANARY not in line
