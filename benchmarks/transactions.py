"""Transactions of one row each: in a plain SQLite file by apsw, and in one that Messenger replicates.

Commits wait for the disk, here and there. Each contender makes its databases in a temporary folder and starts the other
processes itself. A window of 8 means 8 threads that commit, each its next transaction when the last is confirmed.
"""

import contextlib
import math
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from messenger import Messenger

from .contender import ANSWER_TIMEOUT_S, Contender, Measured, free_port, serve_nothing
from .ours import serve_echo

CREATE = "CREATE TABLE orders (id INTEGER PRIMARY KEY, book TEXT)"
INSERT = "INSERT INTO orders (book) VALUES (?)"
SELECT = "SELECT book FROM orders WHERE id = ?"
LEVELS = ("local", "received", "durable", "applied")
WARM_UP_COUNT = 20
# The reads of a sample, and how long each waits for the next: a reader that never pauses measures only itself.
READ_COUNT, READ_PAUSE_S = 1_000, 0.002
# What is compared within a sample takes turns, in so many blocks.
BLOCK_COUNT = 10

Commit = Callable[[], object]


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a folder that is removed at the end, whatever still writes there."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_threads(open_commit: Callable[[], Commit], thread_count: int, count: int) -> Measured:
    """Commit `count` transactions from so many threads, each with a `commit` of its own; time each."""
    barrier = threading.Barrier(thread_count + 1)

    def run(share: int) -> list[float]:
        commit = open_commit()
        for _ in range(WARM_UP_COUNT):
            commit()
        each_s: list[float] = []
        barrier.wait(ANSWER_TIMEOUT_S)
        for _ in range(share):
            started_at = time.perf_counter()
            commit()
            each_s.append(time.perf_counter() - started_at)
        return each_s

    shares = [count // thread_count + (number < count % thread_count) for number in range(thread_count)]
    with ThreadPoolExecutor(thread_count) as pool:
        futures = [pool.submit(run, share) for share in shares]
        barrier.wait(ANSWER_TIMEOUT_S)
        started_at = time.perf_counter()
        each_s = [seconds for future in futures for seconds in future.result(ANSWER_TIMEOUT_S)]
        return Measured(time.perf_counter() - started_at, each_s)


def time_reads(read: Callable[[], object]) -> float:
    """Return the 99th percentile of reads that come one after another, with pauses, in seconds."""
    each_s: list[float] = []
    for _ in range(READ_COUNT):
        time.sleep(READ_PAUSE_S)
        started_at = time.perf_counter()
        read()
        each_s.append(time.perf_counter() - started_at)
    return sorted(each_s)[math.ceil(len(each_s) * 0.99) - 1]


@contextlib.contextmanager
def child(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Run a function in a process of its own, which ends with the block; its last argument is a pipe to the block."""
    spawn: Any = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        process.kill()
        process.join()


def ask(pipe: Connection, question: object) -> Any:
    """Return what the child answers."""
    pipe.send(question)
    if not pipe.poll(ANSWER_TIMEOUT_S):
        raise RuntimeError(f"no answer to {question!r}")
    return pipe.recv()


def compare_reads(reader: Connection, open_commit: Callable[[], Commit], thread_count: int) -> Measured:
    """Let the child read while nothing happens, and under load; the figure is the ratio of the two p99."""
    idle_s = ask(reader, None)
    with loaded(open_commit, thread_count):
        loaded_s = ask(reader, None)
    return Measured(0, [], figure=loaded_s / idle_s)


@contextlib.contextmanager
def loaded(open_commit: Callable[[], Commit], thread_count: int) -> Iterator[None]:
    """Commit from so many threads as fast as they can, as long as the block lasts."""
    stop = threading.Event()

    def run() -> None:
        commit = open_commit()
        while not stop.is_set():
            commit()

    with ThreadPoolExecutor(thread_count) as pool:
        futures = [pool.submit(run) for _ in range(thread_count)]
        try:
            yield
        finally:
            stop.set()
        for future in futures:
            future.result(ANSWER_TIMEOUT_S)


# Plain apsw.


def open_plain(folder: Path, text: str) -> Commit:
    """Return what commits one row into a new file. Threads take turns on one connection, which is faster than many."""
    import apsw

    connection = apsw.Connection(str(folder / "plain.db"))
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(CREATE)
    lock = threading.Lock()

    def commit() -> None:
        with lock:
            connection.execute(INSERT, (text,))

    return commit


def measure_plain(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Commit into a file that nobody replicates."""
    with temporary_folder() as folder:
        commit = open_plain(folder, "x" * size_bytes)
        return run_threads(lambda: commit, window, count)


# Messenger.


def serve_replica(path: str, endpoint: str, pipe: Connection) -> None:
    """Be the replica: answer a position when it is applied here, and None with the p99 of reads."""
    from messenger.replication import Replica

    with Messenger("replica") as messenger, Replica(path, messenger, endpoint) as replica:
        while True:
            position = pipe.recv()
            if position is None:
                pipe.send(time_reads(lambda: replica.execute(SELECT, (1,)).fetchall()))
            else:
                replica.wait_for(position, timeout=ANSWER_TIMEOUT_S)
                pipe.send(None)


def serve_reader(path: str, pipe: Connection) -> None:
    """Be somebody else who reads the replica's file: answer with the p99 of reads."""
    import apsw

    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    while True:
        pipe.recv()
        pipe.send(time_reads(lambda: connection.execute(SELECT, (1,)).fetchall()))


class Pair(NamedTuple):
    """A primary in this process, and its replica in another.

    Attributes:
        pipe: To `serve_replica`.
        replica_path: The replica's file.
    """

    primary: Any
    pipe: Connection
    replica_path: str

    def open_commit(self, text: str) -> Commit:
        """Return what commits one row, from any thread."""
        return lambda: self.primary.execute(INSERT, (text,))


@contextlib.contextmanager
def replicated(endpoint: str, level: str) -> Iterator[Pair]:
    """Give a primary whose one replica has the table and its first row."""
    from messenger.replication import Primary

    with temporary_folder() as folder, Messenger("primary") as messenger:
        replica_path = str(folder / "replica.db")
        with (
            Primary(folder / "primary.db", messenger, endpoint, commit=level, timeout=ANSWER_TIMEOUT_S) as primary,
            child(serve_replica, replica_path, endpoint) as pipe,
        ):
            with primary.transaction(commit="local") as tx:
                tx.execute(CREATE)
                tx.execute(INSERT, ("first",))
            ask(pipe, primary.position)
            yield Pair(primary, pipe, replica_path)


def measure_replicated(endpoint: str, size_bytes: int, window: int, count: int, level: str) -> Measured:
    """Commit into a file that one replica follows."""
    with replicated(endpoint, level) as pair:
        return run_threads(lambda: pair.open_commit("x" * size_bytes), window, count)


def measure_catch_up(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Commit at full speed; the figure is the part of the time until all is applied that the commits took."""
    with replicated(endpoint, "local") as pair:
        measured = run_threads(lambda: pair.open_commit("x" * size_bytes), window, count)
        committed_at = time.perf_counter()
        ask(pair.pipe, pair.primary.position)
        lag_s = time.perf_counter() - committed_at
        return measured._replace(figure=measured.total_s / (measured.total_s + lag_s))


def measure_reads(endpoint: str, size_bytes: int, window: int, count: int, in_third_process: bool = False) -> Measured:
    """Read at the replica, or in the replica's file from another process, idle and while it applies at full speed."""
    with replicated(endpoint, "applied") as pair, contextlib.ExitStack() as stack:
        reader = stack.enter_context(child(serve_reader, pair.replica_path)) if in_third_process else pair.pipe
        return compare_reads(reader, lambda: pair.open_commit("x" * size_bytes), window)


def serve_echo_until_killed(endpoint: str, _: Connection) -> None:
    """Be the echo of the other works."""
    serve_echo(endpoint)


def measure_added_latency(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Commit with and without a replica by turns; the figure is the difference of the medians, in round trips."""
    text = "x" * size_bytes
    echo_endpoint = f"tcp://127.0.0.1:{free_port()}"
    with (
        temporary_folder() as folder,
        replicated(endpoint, "applied") as pair,
        child(serve_echo_until_killed, echo_endpoint),
        Messenger("echo client") as messenger,
    ):
        connection = messenger.make_connection(echo_endpoint)
        steps: tuple[Commit, ...] = (
            open_plain(folder, text),
            pair.open_commit(text),
            lambda: messenger.request(connection, text),
        )
        each_s: list[list[float]] = [[] for _ in steps]
        for _ in range(BLOCK_COUNT):
            for times, step in zip(each_s, steps, strict=True):
                times += run_threads(partial(_same, step), 1, count // BLOCK_COUNT).each_s
        plain_s, replicated_s, echo_s = map(statistics.median, each_s)
        return Measured(0, [], figure=(replicated_s - plain_s) / echo_s)


def _same(commit: Commit) -> Commit:
    return commit


def _contender(measure: Callable[..., Measured]) -> Contender:
    return Contender(serve_nothing, measure, "none", ("apsw",))


CONTENDERS = {
    "apsw alone": _contender(measure_plain),
    **{f"messenger {level}": _contender(partial(measure_replicated, level=level)) for level in LEVELS},
    "messenger, added to a commit": _contender(measure_added_latency),
    "messenger, replica keeps up": _contender(measure_catch_up),
    "messenger, reads at the replica": _contender(measure_reads),
    "messenger, reads in a third process": _contender(partial(measure_reads, in_third_process=True)),
}
