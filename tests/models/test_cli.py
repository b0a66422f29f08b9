"""`messenger models` as users run it: a manager in one process, its clients in others."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from messenger.models import ModelServerManager
from tests.conftest import free_port, wait_until
from tests.models.conftest import Data, NewManager, make_linear, write_csv

COMMAND = [sys.executable, "-m", "messenger", "models"]
TIMEOUT_S = 50.0

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_models(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    finished = subprocess.run(
        command, input=text.encode(errors="surrogateescape"), capture_output=True, timeout=TIMEOUT_S, check=False
    )
    return subprocess.CompletedProcess(command, finished.returncode, finished.stdout.decode(), finished.stderr.decode())


@pytest.fixture
def manager(new_manager: NewManager) -> ModelServerManager:
    return new_manager()


@pytest.fixture
def run(manager: ModelServerManager) -> Run:
    """Runs a client command to the manager."""
    return lambda *words, **options: run_models(*words, "--at", manager.listener.port, **options)


@pytest.fixture
def managing(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `messenger models manage`, and its port."""
    command = [*COMMAND, "manage", "--at", "0", "--folder", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            match = re.search(r":(\d+); models in", process.stderr.readline())
            assert match
            yield process, match[1]
        finally:
            process.kill()


def test_train_infer_and_the_rest(managing: tuple[subprocess.Popen[str], str], tmp_path: Path, wine: Data) -> None:
    """The whole path with commands alone, up to the end of the manager and its server by Ctrl-C."""
    process, port = managing

    def run(*words: object) -> str:
        finished = run_models(*words, "--at", port)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    trained = run("train", "wine", "--data", wine.path, "--target", "class", "--param", "steps=20", "--seed", 1)
    assert re.match(r"wine version 1: lightgbm classification on 178 rows, accuracy [01]", trained)
    again = json.loads(
        run("train", "wine", "--data", wine.path, "--target", "class", "--method", "linear", "--no-activate", "--json")
    )
    assert (again["version"], again["method"]) == (2, "linear")
    assert run("list") == "wine: version 1 is served, of 1, 2\n"
    table = list(csv.DictReader(io.StringIO(run("infer", "wine", wine.path))))
    assert len(table) == 178
    assert sum(row["prediction"] == row["class"] for row in table) > 165
    assert run("load", "wine") == "wine: version 2 is served\n"
    inferred = json.loads(run("infer", "wine", wine.path, "--json"))
    assert (inferred["version"], len(inferred["predictions"])) == (2, 178)
    status = json.loads(run("status", "--json"))
    server = status["servers"][0]["pid"]
    os.kill(server, signal.SIGKILL)
    assert json.loads(run("infer", "wine", wine.path, "--version", 1, "--json"))["version"] == 1
    said = run("status")
    assert said.startswith("ready\nserver ")
    assert "1 restarts" in said
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0
    finished = run_models("list", "--at", port, "--timeout", "0.3")
    assert finished.returncode == 3


def test_many_rows_are_sent_in_parts_and_stay_in_order(run: Run, folder: Path, tmp_path: Path) -> None:
    make_linear(folder)
    path = write_csv(tmp_path / "rows.csv", ["note", "x1", "x0"], [["a, b", 0.5, number] for number in range(7_500)])
    finished = run("infer", "sum", path)
    assert finished.returncode == 0, finished.stderr
    rows = list(csv.reader(io.StringIO(finished.stdout)))
    assert rows[0] == ["note", "x1", "x0", "prediction"]
    assert rows[1:] == [["a, b", "0.5", str(number), str(number + 0.5)] for number in range(7_500)]


def test_cells_are_read_as_a_training_reads_them(run: Run, folder: Path, tmp_path: Path) -> None:
    """A spreadsheet's mark in front of the header, truth values, ways to write that a value is missing."""
    make_linear(folder)
    text = "\ufeffx0,x1,note\n1,true,NA\n2,FALSE,yes\n"
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    for finished in (run("infer", "sum", path, "--json"), run("infer", "sum", "--json", text=text)):
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout)["predictions"] == [2.0, 2.0]
    finished = run("infer", "sum", text="x0,x1\n1,NA\n")
    assert finished.returncode == 4
    assert "values are missing" in finished.stderr


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("", 2, "has no header"),
        ("x0,x1\n1\n", 2, "line 2 has not as many cells"),
        ("x0,x1\n1,2,3\n", 2, "line 2 has not as many cells as the header: 3, not 2"),
        ("x0;x1\n1,5;2,5\n", 2, "line 2 has not as many cells as the header: 3, not 1; cells are parted by commas"),
        ('x0,x1\n"1,5",2\n', 4, "no table of numbers: could not convert string to float: '1,5'"),
        ("x0,x1,x1\n1,2,3\n", 2, "stdin has two columns 'x1'"),
        ("x0,x1\n1,2\n1,\udce9\n", 2, "stdin, line 3: byte 0xe9 is no UTF-8 text"),
        ("\udcff", 2, "stdin, line 1: byte 0xff is no UTF-8 text"),
        ('"x0', 2, "stdin: the header is no CSV"),
        ('x0,x1\n"1,2\n', 2, "is no CSV"),
        ("x0\n1\n", 4, "lacks the feature 'x1'"),
        ("x0,x1\n1,two\n", 4, "no table of numbers"),
    ],
)
def test_bad_rows_are_told(run: Run, folder: Path, text: str, status: int, said: str) -> None:
    make_linear(folder)
    finished = run("infer", "sum", text=text)
    assert finished.returncode == status
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train", "m", "--data", "nowhere.csv", "--target", "y"], 2, "is no file"),
        (["train", "../m", "--data", __file__, "--target", "y"], 4, "is no name of a model"),
        (["train", "m", "--data", __file__, "--target", "y"], 4, "neither .csv nor .parquet"),
        (["train", "m", "--data", __file__, "--target", "y", "--param", "x"], 2, "is not NAME=VALUE"),
        (["train", "m", "--data", __file__], 2, "--target"),
        (["load", "m"], 4, "there is no model 'm'"),
        (["load", "m", "0"], 2, "VERSION"),
        (["infer", "m", "nowhere.csv"], 4, "No such file"),
        (["cancel", "nobody"], 4, "there is no job 'nobody'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_told_in_one_line(run: Run, words: list[str], status: int, said: str) -> None:
    finished = run(*words)
    assert finished.returncode == status, finished.stderr
    assert said in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stdout == ""


def test_cells_come_out_as_they_went_in(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever encoding the terminal has, which may know neither."""
    make_linear(folder)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    finished = run("infer", "sum", text='x0,x1,a note\r\n1,2,"a\r\nb, ""c"""\r\n3,4,naïve\r\n')
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == 'x0,x1,a note,prediction\n1,2,"a\r\nb, ""c""",3.0\n3,4,naïve,7.0\n'
    assert run("infer", "sum", text="x0,x1\r1,2\r").stdout == "x0,x1,prediction\n1,2,3.0\n"


def test_cancel_waits_no_longer_than_it_was_told() -> None:
    port = free_port()
    finished = run_models("cancel", "monday", "--at", port, "--timeout", "0.3")
    assert finished.returncode == 3
    assert str(port) in finished.stderr


def run_train(change: str, wine: Data, port: int) -> subprocess.CompletedProcess[str]:
    """Trains for a long time by the command, of which something was changed."""
    words = ["models", "train", "m", "--data", str(wine.path), "--target", "class", "--param", "steps=100000"]
    imports = "import sys; from messenger.cli import main, models; from messenger.models import ModelClient"
    program = f"{imports}\n{textwrap.dedent(change)}\nsys.exit(main({[*words, '--at', str(port)]}))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_train_waits_for_a_manager_not_as_long_as_for_the_training(wine: Data) -> None:
    port = free_port()
    finished = run_train("models.FIND_S = 0.3", wine, port)
    assert finished.returncode == 3
    assert str(port) in finished.stderr


def test_ctrl_c_cancels_a_training_that_is_just_being_sent(manager: ModelServerManager, wine: Data) -> None:
    change = """
        def train(*args, send=ModelClient.train, **options):
            send(*args, **options)
            raise KeyboardInterrupt
        ModelClient.train = train
    """
    assert run_train(change, wine, manager.listener.port).returncode == 130
    wait_until(lambda: list(manager.status().jobs.values()) == ["cancelled"])


def test_infer_without_stdin_is_told() -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, "infer", "m"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (finished.returncode, finished.stderr) == (4, "messenger: stdin is closed\n")


def test_help_says_how_a_command_ends() -> None:
    assert "0    Ctrl-C or SIGTERM ended it" in run_models("manage", "--help").stdout
    assert "130  Ctrl-C, or it was cancelled" in run_models("infer", "--help").stdout


def start_training(manager: ModelServerManager, wine: Data, *words: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "train", "m", "--data", str(wine.path), "--target", "class", "--param", "steps=100000"]
    process = subprocess.Popen(
        [*command, *words, "--at", str(manager.listener.port)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: "open" in manager.status().jobs.values(), timeout=TIMEOUT_S)
    return process


def test_cancel_ends_a_training(manager: ModelServerManager, run: Run, wine: Data) -> None:
    process = start_training(manager, wine, "--job", "mine")
    finished = run("cancel", "mine", "--json")
    assert (finished.returncode, json.loads(finished.stdout)) == (0, {"job": "mine", "cancelled": True})
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (130, "", "messenger: the job was cancelled\n")
    assert "job mine: cancelled" in run("status").stdout


def test_ctrl_c_cancels_the_training(manager: ModelServerManager, wine: Data) -> None:
    process = start_training(manager, wine)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    wait_until(lambda: list(manager.status().jobs.values()) == ["cancelled"])


def test_a_server_of_ones_own(new_manager: NewManager, folder: Path) -> None:
    make_linear(folder)
    manager = new_manager(servers=0)
    command = [*COMMAND, "serve", "--at", str(manager.listener.port), "--folder", str(folder)]
    with subprocess.Popen(command) as process:
        try:
            assert manager.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S).predictions == [3.0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def test_status_says_not_ready(new_manager: NewManager) -> None:
    manager = new_manager(servers=0)
    finished = run_models("status", "--at", manager.listener.port)
    assert (finished.returncode, finished.stdout) == (4, "not ready\n0 calls wait; nothing was asked yet\n")


def test_help_needs_no_extra() -> None:
    """Neither NumPy nor what comes with it is imported for it."""
    script = (
        "import sys; from messenger.cli import main; status = main(['models', '--help']); "
        "sys.exit(status or any(name in sys.modules for name in ('numpy', 'sklearn', 'messenger.models')))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert finished.returncode == 0, finished.stderr
    for word in ("serve", "manage", "train", "infer", "list", "load", "status", "cancel"):
        assert f"  {word} " in finished.stdout


def test_a_missing_extra_is_told() -> None:
    script = "import sys; sys.modules['sklearn'] = None; from messenger.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "models", "serve"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert finished.returncode == 4
    assert "pip install 'messenger-zmq[models]'" in finished.stderr
