"""The documents tell the truth: their Python blocks run and print what they say, their commands exist.

A block whose first line is `# terminal 1` is kept running in a process of its own while the next block whose first line
is `# terminal 2` runs against it, as a reader does it in two terminals. A text block right behind a Python block is its
output.
"""

import contextlib
import functools
import inspect
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from messenger import Limits, Messenger

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if path.exists()]
BLOCK_TIMEOUT_S = 60.0
SERVER_TIMEOUT_S = 10.0

pytestmark = pytest.mark.timeout(2 * BLOCK_TIMEOUT_S)


@dataclass(frozen=True)
class Block:
    """One fenced block; `output` is the text block right behind it, `line` that of its opening fence."""

    document: str
    line: int
    language: str
    text: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def terminal(self) -> str | None:
        match = re.match(r"# terminal ([12])\s*\n", self.text)
        return match[1] if match else None


@dataclass(frozen=True)
class Script:
    """What a reader runs at a time: one block, or a client block in terminal 2 and the server block in terminal 1."""

    block: Block
    server: Block | None = None


FENCED = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n`]*\n(?P<text>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE
)


def read_blocks(document: str, text: str) -> list[Block]:
    """Returns the fenced blocks in order; the output of a block stays in the list as a block of its own too."""
    matches = list(FENCED.finditer(text))
    blocks = []
    for match, behind in itertools.zip_longest(matches, matches[1:]):
        adjoining = behind and behind["language"] == "text" and not text[match.end() : behind.start()].strip()
        output = textwrap.dedent(behind["text"]) if behind and adjoining else None
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(document, line, match["language"], textwrap.dedent(match["text"]), output))
    return blocks


def pair_terminals(blocks: list[Block]) -> tuple[list[Script], list[Block]]:
    """Returns what can be run, and the terminal blocks of one document that lack their other half."""
    scripts, lonely = [], []
    server: Block | None = None
    for block in blocks:
        if block.language != "python":
            continue
        if block.terminal == "1":
            lonely += [server] if server else []
            server = block
        elif block.terminal == "2":
            lonely += [] if server else [block]
            scripts += [Script(block, server)] if server else []
            server = None
        else:
            scripts.append(Script(block))
    return scripts, lonely + ([server] if server else [])


def plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


BLOCKS_BY_DOCUMENT = [read_blocks(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in DOCUMENTS]
BLOCKS = [block for blocks in BLOCKS_BY_DOCUMENT for block in blocks]
PAIRED = [pair_terminals(blocks) for blocks in BLOCKS_BY_DOCUMENT]
SCRIPTS = [script for scripts, _ in PAIRED for script in scripts]


class Terminal:
    """One block in a process group of its own; its output goes to files, so that no pipe fills up or is held open."""

    def __init__(self, block: Block, folder: Path, environment: dict[str, str]) -> None:
        self.block = block
        self.out, self.err = folder / f"{block.line}.out", folder / f"{block.line}.err"
        path = folder / f"{block.line}.py"
        # The empty lines make the line numbers in a traceback those of the document.
        path.write_text("\n" * block.line + block.text, "utf-8")
        with self.out.open("wb") as out, self.err.open("wb") as err:
            # A pipe that stays open is the terminal of somebody who types nothing.
            self.process = subprocess.Popen(
                [sys.executable, path.name],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def transcript(self) -> str:
        out, err = self.out.read_text("utf-8"), self.err.read_text("utf-8")
        return f"{self.block.place}: exit status {self.process.poll()}\n--- stdout\n{out}\n--- stderr\n{err}"

    def printed_as_shown(self) -> bool:
        return self.block.output is None or plain(self.out.read_text("utf-8")) == plain(self.block.output)

    def wait(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(BLOCK_TIMEOUT_S)
        return self.process.poll()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            pass


Start = Callable[[Block], Terminal]


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline_at = time.monotonic() + SERVER_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_at:
            return False
        time.sleep(0.02)
    return True


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def start(tmp_path: Path, fixed_ports: None) -> Iterator[Start]:
    """Starts blocks that share a working folder and a runtime folder, and ends them after the test.

    They use the default ports, so they run one after the other.
    """
    with contextlib.ExitStack() as stack:
        # The path of an ipc socket has at most 107 bytes, so the runtime folder needs a shorter path than tmp_path.
        runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="run-"))
        environment = os.environ | {"XDG_RUNTIME_DIR": runtime, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}

        def start_block(block: Block) -> Terminal:
            terminal = Terminal(block, tmp_path, environment)
            stack.callback(terminal.close)
            return terminal

        yield start_block


def run_script(script: Script, start: Start) -> None:
    server = start(script.server) if script.server else None
    if server:
        for port in re.findall(r"\b154\d\d\b", server.block.text):
            is_open = wait_until(functools.partial(is_listening, int(port)))
            assert is_open, f"port {port} is not open\n{server.transcript()}"
    terminal = start(script.block)
    status = terminal.wait()
    transcript = terminal.transcript() + (server.transcript() if server else "")
    assert status == 0, transcript
    assert terminal.printed_as_shown(), f"the document shows\n{terminal.block.output}\n{transcript}"
    if server:
        # The server may print its last line after the client has its answer.
        assert wait_until(server.printed_as_shown), f"the document shows\n{server.block.output}\n{server.transcript()}"
        assert server.process.poll() in (None, 0), server.transcript()


def test_readme_is_seen() -> None:
    seen = {script.block.document for script in SCRIPTS}
    assert "README.md" in seen, "README.md is missing or has no Python block"


def test_no_terminal_is_alone() -> None:
    lonely = [block.place for _, blocks in PAIRED for block in blocks]
    assert not lonely, f"terminal 1 or 2 without the other: {lonely}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.block.place)
def test_python_block(script: Script, start: Start) -> None:
    run_script(script, start)


def read_commands(blocks: list[Block]) -> Iterator[tuple[str, list[str]]]:
    """Yields the place and the words of each `make` and `messenger` command."""
    for block in blocks:
        if block.language in ("sh", "console"):
            for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
                command = line.strip().removeprefix("$ ")
                if command.startswith(("make ", "messenger ")):
                    yield f"{block.document}:{number}", shlex.split(command, comments=True)


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))


def unknown_targets(words: list[str], targets: set[str]) -> set[str]:
    return {word for word in words[1:] if "=" not in word and not word.startswith("-")} - targets


def test_make_targets_exist() -> None:
    targets = make_targets((ROOT / "Makefile").read_text("utf-8"))
    commands = [(place, words) for place, words in read_commands(BLOCKS) if words[0] == "make"]
    assert commands, "no document shows a make command"
    for place, words in commands:
        unknown = unknown_targets(words, targets)
        assert not unknown, f"{place}: make has no target {unknown}"


def test_subcommands_exist() -> None:
    places: dict[str, str] = {}
    for place, words in read_commands(BLOCKS):
        if words[0] == "messenger" and len(words) > 1:
            places.setdefault(words[1], place)
    assert places, "no document shows a messenger command"
    for subcommand, place in places.items():
        command = [sys.executable, "-m", "messenger", subcommand, "--help"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, f"{place}: messenger {subcommand}\n{result.stderr}"


# From here on, the checks are checked.

DOCUMENT = """\
# Title

```python
print("one")
```

```text
one
```

1. In a list:

   ```python
   # terminal 1
   print("served")
   input()
   ```

Between.

```python
# terminal 2
print("client")
```

Not its output:

```text
other
```

```console
$ make run FILE="a b" -j
$ messenger send 15445 - # comment
output of make run
```
"""


# The tables of docs/operations.md.

OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
KIND = re.compile(r'(?:drop|count_drop|_drop_rest|handle_unsendable)\((?:[\w.]+, )*"(\w+)"|dropped\["(\w+)"\]')


def test_every_limit_is_listed() -> None:
    limits = Limits()
    for name in Limits.__struct_fields__:
        assert f"| `{name}` | {getattr(limits, name):,} |" in OPERATIONS, name


def test_every_call_is_listed() -> None:
    section = (ROOT / "docs/services.md").read_text("utf-8").partition("## The calls")[2].partition("\n\n`to`")[0]
    calls = re.findall(r"`(\w+)\(([^`]*)\)`", section)
    listed = {
        name: [word.partition("=")[0] for word in words.split(", ") if word not in ("", "*")] for name, words in calls
    }
    public = {name: value for name, value in inspect.getmembers(Messenger, callable) if not name.startswith("_")}
    signatures = {name: inspect.signature(call) for name, call in (public | {"Messenger": Messenger.__init__}).items()}
    assert listed == {name: list(signature.parameters)[1:] for name, signature in signatures.items()}


def test_every_kind_of_drop_is_listed() -> None:
    core = [*ROOT.glob("src/messenger/*.py"), *ROOT.glob("src/messenger/transports/*.py")]
    source = "\n".join(path.read_text("utf-8") for path in core)
    used = {one or other for one, other in KIND.findall(source)}
    section = OPERATIONS.partition("## What is dropped and counted")[2].partition("## Limits")[0]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(used) > 20
    assert used <= listed
    assert all(f'"{name}"' in source for name in listed)


def test_blocks_are_read() -> None:
    blocks = read_blocks("d.md", DOCUMENT)
    assert [(block.place, block.language) for block in blocks] == [
        *(("d.md:3", "python"), ("d.md:7", "text"), ("d.md:13", "python"), ("d.md:21", "python")),
        *(("d.md:28", "text"), ("d.md:32", "console")),
    ]
    assert [block.output for block in blocks] == ["one\n", None, None, None, None, None]
    assert [block.terminal for block in blocks] == [None, None, "1", "2", None, None]
    assert list(read_commands(blocks)) == [
        ("d.md:33", ["make", "run", "FILE=a b", "-j"]),
        ("d.md:34", ["messenger", "send", "15445", "-"]),
    ]


def test_terminals_are_paired() -> None:
    one, text, server, client = read_blocks("d.md", DOCUMENT)[:4]
    pair = Script(client, server)
    assert pair_terminals([one, text, server, one, client]) == ([Script(one), Script(one), pair], [])
    assert pair_terminals([client, server, server, client, server]) == ([pair], [client, server, server])


def test_unknown_target_is_found() -> None:
    targets = make_targets("run: x\n\techo\ntest-all:\nPYTHON := y\n")
    assert targets == {"run", "test-all"}
    assert unknown_targets(["make", "run", "tset", "FILE=x", "-j"], targets) == {"tset"}


SERVER = "# terminal 1\nprint('served')\ninput()\n"


@pytest.mark.parametrize(
    ("block", "server"),
    [
        (Block("d.md", 1, "python", "print(1)", "1  \n\n"), None),
        (Block("d.md", 9, "python", "print(1)"), Block("d.md", 1, "python", SERVER, "served\n")),
    ],
)
def test_true_block_passes(block: Block, server: Block | None, start: Start) -> None:
    run_script(Script(block, server), start)


@pytest.mark.parametrize(
    ("block", "server", "complaint"),
    [
        (Block("d.md", 1, "python", "print(1)", "2"), None, "the document shows"),
        (Block("d.md", 7, "python", "x\n1 / 0"), None, "line 8"),
        (Block("d.md", 1, "python", "raise SystemExit(3)"), None, "exit status 3"),
        (Block("d.md", 9, "python", ""), Block("d.md", 1, "python", SERVER, "other"), "the document shows"),
        (Block("d.md", 9, "python", ""), Block("d.md", 1, "python", "1 / 0", "never"), "ZeroDivisionError"),
        (Block("d.md", 9, "python", ""), Block("d.md", 1, "python", "input(15499)"), "port 15499 is not open"),
    ],
)
def test_false_block_fails(
    monkeypatch: pytest.MonkeyPatch, block: Block, server: Block | None, complaint: str, start: Start
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SERVER_TIMEOUT_S", 1.0)
    with pytest.raises(AssertionError, match=complaint):
        run_script(Script(block, server), start)
