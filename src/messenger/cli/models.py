"""The commands on models: serve, manage, train, infer, list, load, status, cancel.

`manage` runs a manager, `serve` one more server for it, and the others are clients of the manager at `--at`.
"""

import contextlib
import csv
import functools
import importlib.util
import io
import json
import logging
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec

from messenger import MessengerError, NotDelivered, OutcomeUnknown

from .keys import new_messenger, secure, security
from .terminal import (
    FAILED,
    INTERRUPTED,
    NOT_DELIVERED,
    UNKNOWN,
    complain,
    end_on,
    number_between,
    option,
    parse_place,
    printable,
    seconds,
    standard_input,
    told_once,
    wait,
    write,
)

if TYPE_CHECKING:
    import click

    from messenger.models import Job, ModelClient, Progress

DEFAULT_PORT = "15446"
# What `[models]` brings and a server needs.
EXTRA = ("lightgbm", "numpy", "onnx", "onnxruntime", "pyarrow", "skl2onnx", "sklearn")
# Rows of a file that travel together, and how many such parts are under way at a time.
CHUNK_ROWS = 1_000
CHUNKS_MAX = 4
# How a missing value may be written in a CSV: what the reader of trainings, pyarrow, takes for one.
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL"),
    *("NaN", "n/a", "nan", "null"),
}
# A training may take a day, but nobody waits so long for a manager.
FIND_S = 30.0
# A server that was told to end is killed after this; less than what a command has after a signal.
END_S = 0.8
STATUSES = """\b
Exit status:
  0    done
  1    unknown: the server or the manager was lost; it may have run
  2    wrong usage
  3    it certainly did not run: nobody was there
  4    it failed; the line on stderr says why
  130  Ctrl-C, or it was cancelled"""
RUN_STATUSES = """\b
Exit status:
  0    Ctrl-C or SIGTERM ended it
  2    wrong usage
  4    it failed; the line on stderr says why"""


def make_commands() -> "list[click.Command]":
    """Return the commands, whose help texts are the docstrings."""
    import click

    at = option("--at", metavar="DEST", default=DEFAULT_PORT, help="Where the manager listens.")
    as_json = option("--json", "as_json", is_flag=True, help="Print JSON.")
    folder = option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Of the models.")
    timeout = option("--timeout", type=seconds(), default=30.0, help="Seconds to wait for the answer.")
    part = number_between(0, 1, min_open=True, max_open=True)
    name = click.Argument(["name"])
    client: list[click.Parameter] = [at, as_json, timeout]
    train: list[click.Parameter] = [
        *(name, at, as_json),
        option("--data", required=True, metavar="FILE", help="A CSV with a header, or a Parquet file."),
        option("--target", required=True, metavar="COLUMN", help="What to predict."),
        option(
            "--method", default="lightgbm", help="lightgbm, linear, random_forest, gradient_boosting, neural_network."
        ),
        option(
            "--task", type=click.Choice(["classification", "regression"]), help="By default guessed from the target."
        ),
        option("--features", metavar="A,B,…", help="Columns to predict from; by default all others."),
        option("--param", "params", multiple=True, metavar="NAME=VALUE", help="Of the method; steps=N for its length."),
        option("--validation", type=part, default=0.2, help="Part of the rows held back."),
        option("--seed", type=int, default=0, help="Of all random numbers."),
        option("--no-activate", is_flag=True, help="Do not serve the new version yet."),
        option("--job", metavar="ID", help="By which cancel finds it; by default one that is unique."),
        option("--timeout", type=seconds(), default=86_400.0, help="Seconds to wait for the end."),
    ]
    infer: list[click.Parameter] = [
        *(name, click.Argument(["file"], default="-"), at, as_json),
        option("--version", type=click.IntRange(1), help="By default the one that is served."),
        option("--timeout", type=seconds(), default=30.0, help="Seconds to wait for each part."),
    ]
    manage: list[click.Parameter] = [
        *(at, folder),
        option("--servers", type=click.IntRange(0, 64), default=1, help="How many to start."),
        option("--command", metavar="CMD", help="The program to start in place of our server; see the document."),
    ]
    load: list[click.Parameter] = [click.Argument(["version"], type=click.IntRange(1), required=False), *client]
    works: list[tuple[str, Callable[..., int], list[click.Parameter]]] = [
        ("manage", _manage, manage),
        ("serve", _serve, [at, folder]),
        ("train", _guard(_train), train),
        ("infer", _guard(_infer), infer),
        ("list", _guard(_list), client),
        ("load", _guard(_load), [name, *load]),
        ("status", _guard(_status), client),
        ("cancel", _guard(_cancel), [click.Argument(["job"]), *client]),
    ]
    return [_make_command(*work) for work in works]


def _make_command(word: str, work: Callable[..., int], params: "list[click.Parameter]") -> "click.Command":
    import click

    statuses = RUN_STATUSES if word in ("manage", "serve") else STATUSES
    command = click.Command(word, callback=work, params=list(params), help=work.__doc__, epilog=statuses)
    return secure(command, listens=word == "manage")


def _guard(command: Callable[..., int]) -> Callable[..., int]:
    """Have what became of a call decide the exit status, without the hints that are for messages."""

    @functools.wraps(command)
    def guarded(**options: Any) -> int:
        try:
            return command(**options)
        except CancelledError:
            complain("the job was cancelled")
            return INTERRUPTED
        except MessengerError as error:
            complain(str(error))
            if isinstance(error, OutcomeUnknown):
                return UNKNOWN
            return NOT_DELIVERED if isinstance(error, NotDelivered) else FAILED

    return guarded


@contextlib.contextmanager
def _connect(at: str) -> "Iterator[ModelClient]":
    from messenger.models import ModelClient

    with told_once(), new_messenger() as messenger:
        yield ModelClient(messenger, parse_place(at))


def _result(job: "Job[Any]") -> Any:
    """Return what came of a job; the wait can be interrupted."""
    ended: SimpleQueue[Any] = SimpleQueue()
    job.add_done_callback(ended.put)
    wait(ended)
    return job.result()


def _require_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise MessengerError(f"models need {', '.join(missing)}: pip install 'messenger-zmq[models]'")


def _manage(at: str, folder: Path | None, servers: int, command: str | None) -> int:
    """Listen for servers and clients, and start servers, until Ctrl-C or SIGTERM."""
    from messenger.models import ModelServerManager

    if command is None and servers:
        _require_extra()
    try:
        words = None if command is None else shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--command {command!r}: {error}") from error
    end_on(signal.SIGTERM)
    logging.basicConfig(format="messenger: %(message)s", level=logging.WARNING)
    forever: SimpleQueue[None] = SimpleQueue()
    with (
        contextlib.suppress(KeyboardInterrupt),
        new_messenger() as messenger,
        ModelServerManager(messenger, parse_place(at), servers=servers, command=words, folder=folder) as manager,
    ):
        complain(f"the manager listens on {', '.join(manager.listener.endpoints)}; models in {manager.folder}")
        try:
            wait(forever)
        finally:
            manager.stop(END_S)
    return 0


def _serve(at: str, folder: Path | None) -> int:
    """Be a server for the manager at DEST, which need not be there yet, until Ctrl-C or SIGTERM."""
    from messenger.models.server import serve

    _require_extra()
    return serve(parse_place(at), folder, security=security())


def _train(
    name: str,
    at: str,
    as_json: bool,
    data: str,
    target: str,
    method: str,
    task: str | None,
    features: str | None,
    params: Sequence[str],
    validation: float,
    seed: int,
    no_activate: bool,
    job: str | None,
    timeout: float,
) -> int:
    """Train a new version of model NAME and print its metrics. A terminal shows a progress bar; Ctrl-C cancels."""
    if not Path(data).is_file():
        raise ValueError(f"--data {data!r} is no file")
    job_id = job or secrets.token_hex(8)
    with _connect(at) as client, _show_training(f"training {name}") as on_progress:
        _result(client.status(timeout=min(timeout, FIND_S)))
        try:
            training = _result(
                client.train(
                    name,
                    data=data,
                    target=target,
                    method=method,
                    task=task,
                    features=features.split(",") if features else None,
                    params=dict(map(_parse_param, params)),
                    validation=validation,
                    seed=seed,
                    activate=not no_activate,
                    job_id=job_id,
                    timeout=timeout,
                    on_progress=on_progress,
                )
            )
        except KeyboardInterrupt:
            client.job(job_id).cancel()  # By its id: it may be sent before there is something to hold it by.
            raise
    write((msgspec.json.encode(training).decode() if as_json else printable(str(training))) + "\n")
    return 0


def _parse_param(text: str) -> tuple[str, Any]:
    """Return the name and value of `name=value`; the value is JSON, or else text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"--param {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextlib.contextmanager
def _show_training(title: str) -> "Iterator[Callable[[Progress], object] | None]":
    """Show a bar on stderr and give what moves it; None without a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(title, total=None, state="")
        yield lambda progress: bar.update(task, completed=progress.step, total=progress.of, state=str(progress))


def _infer(name: str, file: str, at: str, as_json: bool, version: int | None, timeout: float) -> int:
    """Predict each row of FILE (a CSV with a header; - is stdin) and print it with the column "prediction" behind.

    With --json print one object: name, version, predictions.
    """
    with contextlib.ExitStack() as stack:
        source = standard_input().buffer if file == "-" else stack.enter_context(open(file, "rb"))
        shown = "stdin" if file == "-" else file
        reader = csv.DictReader(_decode_lines(shown, source), strict=True)
        columns = _read_header(shown, reader)
        client = stack.enter_context(_connect(at))
        predictions: list[Any] = []
        used = version or 0
        if not as_json:
            write(_csv_line([*columns, "prediction"]))
        for rows, inference in _infer_chunks(client, reader, name, used, timeout):
            used = inference.version
            if as_json:
                predictions += inference.predictions
            else:
                lines = zip(rows, inference.predictions, strict=True)
                write(b"".join(_csv_line([*(row[column] for column in columns), value]) for row, value in lines))
    if as_json:
        write(json.dumps({"name": name, "version": used, "predictions": predictions}) + "\n")
    return 0


def _decode_lines(file: str, lines: Iterable[bytes]) -> Iterator[str]:
    """Yield lines as text, with their own line ends, which may stand in a cell."""
    for number, line in enumerate(lines, start=1):
        try:
            # Spreadsheets put a mark in front of the header, which a training passes over too.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: byte {line[error.start]:#04x} is no UTF-8 text") from error
        yield from io.StringIO(text, newline="")  # A \r alone ends a line too.


def _read_header(file: str, reader: "csv.DictReader[str]") -> list[str]:
    try:
        columns = list(reader.fieldnames or [])
    except csv.Error as error:
        raise ValueError(f"{file}: the header is no CSV: {error}") from error
    if not columns:
        raise ValueError(f"{file} has no header: the first line must name the columns")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise ValueError(f"{file} has two columns {twice!r}: rename one in the first line")
    return columns


def _infer_chunks(
    client: "ModelClient", reader: "csv.DictReader[str]", name: str, version: int, timeout: float
) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Yield the rows of a file with what was predicted for them; some parts are under way at a time."""
    open_parts: list[tuple[list[dict[str, Any]], Any]] = []
    try:
        for rows in _read_chunks(reader):
            numbers = [{key: _number(value) for key, value in row.items()} for row in rows]
            open_parts.append((rows, client.infer(name, numbers, version=version, timeout=timeout)))
            if len(open_parts) >= CHUNKS_MAX:
                rows, job = open_parts.pop(0)
                yield rows, _result(job)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no CSV: {error}") from error
    for rows, job in open_parts:
        yield rows, _result(job)


def _read_chunks(reader: "csv.DictReader[str]") -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in reader:
        if None in row or None in row.values():
            # More than the header has stand in a list under None; those that are missing are None.
            count = len(row) - 1 + len(row[None]) if None in row else sum(cell is not None for cell in row.values())
            header = reader.fieldnames or []
            raise ValueError(
                f"line {reader.line_num} has not as many cells as the header: {count}, not {len(header)}; cells are "
                "parted by commas, and one with a comma in it stands in quotation marks"
            )
        rows.append(row)
        if len(rows) == CHUNK_ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def _number(text: str) -> float | str | None:
    """Return a cell as the server takes it, and as a training read it.

    What is no number may stand in a column that is no feature.
    """
    if text in MISSING:
        return None
    if (truth := text.lower()) in ("true", "false"):
        return float(truth == "true")
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def _csv_line(cells: list[Any]) -> bytes:
    """Return a line in UTF-8, as they are read, whatever the terminal has."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _list(at: str, as_json: bool, timeout: float) -> int:
    """Print the models: the name, the version that is served, all versions."""
    with _connect(at) as client:
        models = _result(client.list_models(timeout=timeout))
    if as_json:
        write(msgspec.json.encode(models).decode() + "\n")
    else:
        for model in models:
            versions = ", ".join(map(str, model.versions))
            write(f"{model.name}: version {model.version or 'none'} is served, of {versions}\n")
    return 0


def _load(name: str, version: int | None, at: str, as_json: bool, timeout: float) -> int:
    """Serve VERSION of model NAME, by default the newest, from now on."""
    with _connect(at) as client:
        manifest = _result(client.load(name, version or 0, timeout=timeout))
    write(
        msgspec.json.encode(manifest).decode() + "\n" if as_json else f"{name}: version {manifest.version} is served\n"
    )
    return 0


def _status(at: str, as_json: bool, timeout: float) -> int:
    """Print what the manager knows: whether it is ready, its servers, jobs and counts. Status 4 if it is not ready."""
    with _connect(at) as client:
        status = _result(client.status(timeout=timeout))
    if as_json:
        write(json.dumps(status) + "\n")
    else:
        lines = ["ready" if status["ready"] else "not ready"]
        for server in status["servers"]:
            about = f"server {server['identity'] or server['slot']}: {server['state']}, process {server['pid']}"
            said = f": {' / '.join(server['stderr'])}" if server["stderr"] else ""
            why = f", {server['reason']}{said}" if server["reason"] else ""
            lines.append(f"{about}, {server['restarts']} restarts, {server['open_calls']} open calls{why}")
        lines += [f"job {job}: {state}" for job, state in status["jobs"].items()]
        counts = ", ".join(f"{value} {name}" for name, value in status["counts"].items())
        lines.append(f"{status['waiting_calls']} calls wait; {counts or 'nothing was asked yet'}")
        write("".join(printable(line) + "\n" for line in lines))
    return 0 if status["ready"] else FAILED


def _cancel(job: str, at: str, as_json: bool, timeout: float) -> int:
    """Cancel a training by its job's id. Status 4 if it had ended already, or there is none."""
    with _connect(at) as client:
        was_open = client.cancel(job, timeout=timeout)
    if as_json:
        write(json.dumps({"job": job, "cancelled": was_open}) + "\n")
    elif not was_open:
        complain(f"there is no job {job!r} that has not ended")
    return 0 if was_open else FAILED
