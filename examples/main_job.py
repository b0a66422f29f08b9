"""The main job (`make run`): one messenger with both server loops, and everything checked.

A primary at port 15445 replicates a database to two replicas, each in a process of its own; a manager at port 15446 has
a model server, a further process. Handwritten digits that come with scikit-learn are stored in the database, a model is
trained on what is stored, each digit that was held back is predicted by a call of its own, and the predictions are
stored beside the digits. Every transaction is applied at both replicas before it counts. The exit status is 0 only if
nothing was lost, all predictions were stored, and both replicas equal the primary, row by row.
"""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

from messenger import Messenger, MessengerError
from messenger.models import Job, ModelServerManager
from messenger.models import Progress as TrainingProgress
from messenger.replication import Primary, Replica, verify

REPLICAS = ("replica1", "replica2")
HELD_BACK_EVERY = 5
ROWS_PER_TRANSACTION = 25
CALLS_IN_FLIGHT_MAX = 32
START_TIMEOUT_S = 60.0
ACCURACY_MIN = 0.9
PIXELS = [f"p{number}" for number in range(64)]


class Prediction(NamedTuple):
    """What one call of `infer` gave."""

    sample: int
    label: int
    version: int
    elapsed_s: float


def be_replica(name: str, folder: str) -> None:
    """Keep a copy of the database until standard input is closed."""
    with Messenger(name) as messenger, Replica(Path(folder, f"{name}.db"), messenger, 15445):
        print("ready", flush=True)
        sys.stdin.read()


@contextmanager
def replica_process(name: str, folder: Path) -> Iterator[None]:
    """Run a replica in a process of its own."""
    command = [sys.executable, __file__, name, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise SystemExit(f"{name} ended with status {process.wait()}")
        yield
    finally:
        process.communicate()  # Closes its standard input, which ends it.


def wait_streaming(primary: Primary) -> None:
    """Wait until both replicas follow the primary."""
    deadline_at = time.monotonic() + START_TIMEOUT_S
    while sum(replica.state == "streaming" for replica in primary.status().replicas) < len(REPLICAS):
        if time.monotonic() > deadline_at:
            raise SystemExit(f"the replicas do not follow within {START_TIMEOUT_S} s: {primary.status().replicas}")
        time.sleep(0.05)


def store_digits(primary: Primary, progress: Progress) -> None:
    """Store all digits, some of them marked as held back, in transactions that both replicas apply."""
    digits = load_digits()
    rows = list(zip(digits.target.tolist(), digits.data.tolist(), strict=True))
    columns = ", ".join(f"{pixel} REAL" for pixel in PIXELS)
    primary.execute(f"CREATE TABLE digits (id INTEGER PRIMARY KEY, held_back INT, label INT, {columns})")
    primary.execute("CREATE TABLE predictions (digit INTEGER PRIMARY KEY, label INT, version INT)")
    insert = f"INSERT INTO digits VALUES (?, ?, ?, {', '.join('?' * len(PIXELS))})"  # noqa: S608
    task = progress.add_task("digits stored, applied at both replicas", total=len(rows))
    for start in range(0, len(rows), ROWS_PER_TRANSACTION):
        with primary.transaction() as tx:
            for number, (label, pixels) in enumerate(rows[start : start + ROWS_PER_TRANSACTION], start):
                tx.execute(insert, (number, number % HELD_BACK_EVERY == 0, label, *pixels))
        progress.update(task, completed=min(start + ROWS_PER_TRANSACTION, len(rows)))


def train(primary: Primary, manager: ModelServerManager, progress: Progress) -> float:
    """Train on the digits that are stored and not held back; return the accuracy that the server measured."""
    select = f"SELECT label, {', '.join(PIXELS)} FROM digits WHERE NOT held_back"  # noqa: S608
    rows = [dict(zip(["label", *PIXELS], row, strict=True)) for row in primary.execute(select).fetchall()]
    task = progress.add_task("training", total=None)

    def show(report: TrainingProgress) -> None:
        progress.update(task, completed=report.step, total=report.of)

    training = manager.train("digits", method="lightgbm", data=rows, target="label", on_progress=show).result(120)
    manager.load("digits").result(START_TIMEOUT_S)  # Else the first call waits for it.
    return training.metrics["accuracy"]


def predict(primary: Primary, manager: ModelServerManager, progress: Progress) -> list[Prediction]:
    """Predict each digit that was held back, by calls that are under way at one time; return what came of them."""
    select = f"SELECT id, {', '.join(PIXELS)} FROM digits WHERE held_back"  # noqa: S608
    rows = primary.execute(select).fetchall()
    task = progress.add_task("digits predicted", total=len(rows))
    room = threading.Semaphore(CALLS_IN_FLIGHT_MAX)
    predictions: list[Prediction] = []

    def ask(sample: int, pixels: list[float]) -> None:
        asked_at = time.perf_counter()

        def note(job: Job[Any]) -> None:
            if job.exception() is None:
                [label] = job.result().predictions
                elapsed_s = time.perf_counter() - asked_at
                predictions.append(Prediction(sample, int(label), job.result().version, elapsed_s))
            progress.advance(task)
            room.release()

        manager.infer("digits", [pixels]).add_done_callback(note)  # type: ignore[arg-type]  # It gets the job.

    for sample, *pixels in rows:
        room.acquire()
        ask(sample, pixels)
    for _ in range(CALLS_IN_FLIGHT_MAX):
        room.acquire()
    return predictions


def store_predictions(primary: Primary, predictions: list[Prediction], progress: Progress) -> None:
    """Store what was predicted beside the digits."""
    task = progress.add_task("predictions stored, applied at both replicas", total=len(predictions))
    for start in range(0, len(predictions), ROWS_PER_TRANSACTION):
        some = predictions[start : start + ROWS_PER_TRANSACTION]
        with primary.transaction() as tx:
            for prediction in some:
                tx.execute("INSERT INTO predictions VALUES (?, ?, ?)", prediction[:3])
        progress.advance(task, len(some))


def report(
    console: Console,
    messenger: Messenger,
    primary: Primary,
    folder: Path,
    accuracy: float,
    predictions: list[Prediction],
) -> bool:
    """Check everything, print one table, and return whether all is well."""
    counts, status = messenger.statistics(), primary.status()
    (asked_count,) = primary.execute("SELECT count(*) FROM digits WHERE held_back").fetchone() or (0,)
    joined = "SELECT count(*), sum(digits.label = predictions.label) FROM digits JOIN predictions ON id = digit"
    stored_count, right_count = primary.execute(joined).fetchone() or (0, 0)
    comparisons = {name: verify(folder / "primary.db", folder / f"{name}.db") for name in REPLICAS}
    cuts = statistics.quantiles([prediction.elapsed_s for prediction in predictions], n=100)
    lost_count = counts.not_delivered_msgs + counts.outcome_unknown_msgs + asked_count - len(predictions)
    table = Table(box=None, pad_edge=False, show_header=False)
    lag = ", ".join(f"{replica.lag_transactions} ({replica.lag_s:.3f} s)" for replica in status.replicas)
    for what, value in (
        ("messages sent, received", f"{counts.sent_msgs:,}, {counts.received_msgs:,}"),
        ("transactions, applied at both replicas", f"{status.transaction_count:,}"),
        ("lag of the replicas, in transactions", lag),
        (
            "replicas that equal the primary",
            f"{sum(each.is_equal for each in comparisons.values())} of {len(REPLICAS)}",
        ),
        ("trainings", f"1, accuracy {accuracy:.1%} on rows it held back"),
        ("inferences, stored", f"{len(predictions):,}, {stored_count:,}"),
        ("digits recognised of those held back", f"{right_count / max(stored_count, 1):.1%}"),
        ("inference p50, p99", f"{cuts[49] * 1e3:.2f} ms, {cuts[98] * 1e3:.2f} ms"),
        ("lost", f"{lost_count}"),
    ):
        table.add_row(what, value)
    console.print(table)
    return (
        lost_count == 0
        and stored_count == asked_count
        and right_count >= ACCURACY_MIN * stored_count
        and all(each.is_equal and each.row_count for each in comparisons.values())
    )


def main() -> int:
    """Run all of it."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="messenger-")))
        for name in REPLICAS:
            stack.enter_context(replica_process(name, folder))
        messenger = stack.enter_context(Messenger("primary"))
        promise = {"commit": "applied", "acknowledgements": len(REPLICAS), "timeout": 30.0}
        primary = stack.enter_context(Primary(folder / "primary.db", messenger, 15445, **promise))  # type: ignore[arg-type]
        manager = stack.enter_context(ModelServerManager(messenger, 15446, servers=1, folder=folder / "models"))
        wait_streaming(primary)
        with Progress(*columns, console=console) as progress:
            store_digits(primary, progress)
            accuracy = train(primary, manager, progress)
            predictions = predict(primary, manager, progress)
            store_predictions(primary, predictions, progress)
        is_well = report(console, messenger, primary, folder, accuracy, predictions)
    return 0 if is_well else 1


if __name__ == "__main__":
    try:
        if sys.argv[1:]:
            be_replica(*sys.argv[1:])
        else:
            sys.exit(main())
    except MessengerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
