"""PostgreSQL with one streaming standby, made anew for each sample in a temporary folder and removed with it.

Debian's package, or whatever has its programs in the PATH. The servers refuse to run as root, so root runs them as
`nobody`. They end with the process that started them, however that ends.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, LiteralString

from .contender import Contender, Measured, serve_nothing
from .transactions import Commit, ask, child, compare_reads, run_threads, temporary_folder, time_reads

PROGRAMS = ("initdb", "postgres", "pg_basebackup")
NAME = "PostgreSQL"
CREATE: LiteralString = "CREATE TABLE orders (id bigserial PRIMARY KEY, book text)"
INSERT: LiteralString = "INSERT INTO orders (book) VALUES (%s)"
SELECT: LiteralString = "SELECT book FROM orders WHERE id = %s"
# What its commit waits for, beside the level of ours that promises as much.
LEVELS = {"local": "local", "received": "remote_write", "durable": "on", "applied": "remote_apply"}
START_TIMEOUT_S = 30.0
# Only the names of the Unix sockets in the folder tell them apart.
PRIMARY_PORT, STANDBY_PORT = 5_432, 5_433
NOBODY_ID = 65_534


def programs_folder() -> Path | None:
    """Return where the programs are, the newest release first."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which(PROGRAMS[0])
    candidates = [*folders, *([Path(on_path).parent] if on_path else [])]
    return next((folder for folder in candidates if all((folder / name).exists() for name in PROGRAMS)), None)


def version() -> str:
    """Return what the server says of its version, or nothing."""
    folder = programs_folder()
    if folder is None:
        return ""
    said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition(f"({NAME})")[2].split()[0]


def connect(folder: Path, port: int) -> Any:
    """Return a connection that commits each statement; waits until the server takes connections."""
    import psycopg

    deadline_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return psycopg.connect(host=str(folder), port=port, user="postgres", dbname="postgres", autocommit=True)
        except psycopg.OperationalError:
            if time.monotonic() > deadline_at:
                raise
            time.sleep(0.02)


class Cluster:
    """A primary and a standby on this machine; clients come by a Unix socket in `folder`."""

    def __init__(self, folder: Path, level: str) -> None:
        programs = programs_folder()
        if programs is None:
            raise RuntimeError(f"PostgreSQL is not installed: {', '.join(PROGRAMS)} were not found")
        self._programs = programs
        self._folder = folder
        self._level = level
        self._servers: list[subprocess.Popen[bytes]] = []

    def _command(self, program: str, *words: str) -> list[str]:
        # SIGQUIT stops a server at once, with all its processes.
        command = ["setpriv", "--pdeathsig", "QUIT"]
        if os.geteuid() == 0:
            command += [f"--reuid={NOBODY_ID}", f"--regid={NOBODY_ID}", "--clear-groups"]
        return [*command, str(self._programs / program), *words]

    def _run(self, program: str, *words: str) -> None:
        command = self._command(program, *words)
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip().splitlines()[-1:]}")

    def _start(self, name: str, port: int, settings: dict[str, str]) -> None:
        words = [f"--{key}={value}" for key, value in settings.items()]
        log = (self._folder / f"{name}.log").open("wb")
        command = self._command("postgres", "-D", name, "-p", str(port), "-k", str(self._folder), *words)
        with log:
            self._servers.append(subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log))

    def start(self) -> None:
        """Make and start both; the settings are the defaults but for what replication needs."""
        if os.geteuid() == 0:
            os.chown(self._folder, NOBODY_ID, NOBODY_ID)
        self._run("initdb", "-D", "primary", "-U", "postgres", "--auth=trust", "--no-sync")
        # Without TCP: both servers and all clients are on this machine.
        shared = {"listen_addresses": "", "fsync": "on", "synchronous_commit": LEVELS[self._level]}
        self._start("primary", PRIMARY_PORT, {**shared, "synchronous_standby_names": "*"})
        with connect(self._folder, PRIMARY_PORT) as connection:
            # Nobody is there yet who could confirm.
            connection.execute("SET synchronous_commit = local")
            connection.execute(CREATE)
            connection.execute(INSERT, ("first",))
        place = f"host={self._folder} port={PRIMARY_PORT} user=postgres"
        self._run("pg_basebackup", "-D", "standby", "-d", place, "--write-recovery-conf", "--checkpoint=fast")
        self._start("standby", STANDBY_PORT, shared)
        self._wait_streaming()

    def _wait_streaming(self) -> None:
        query = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
        deadline_at = time.monotonic() + START_TIMEOUT_S
        with connect(self._folder, PRIMARY_PORT) as connection:
            while connection.execute(query).fetchone() != (1,):
                if time.monotonic() > deadline_at:
                    raise RuntimeError(f"the standby does not stream within {START_TIMEOUT_S} s")
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop both at once."""
        for server in self._servers:
            server.send_signal(signal.SIGQUIT)
        for server in self._servers:
            server.wait()


@contextlib.contextmanager
def running(level: str) -> Iterator[Path]:
    """Run a primary and its standby; give the folder of their sockets."""
    with temporary_folder() as folder:
        cluster = Cluster(folder, level)
        try:
            cluster.start()
            yield folder
        finally:
            cluster.stop()


def open_commit(folder: Path, text: str) -> Commit:
    """Return what commits one row, by a connection of its own."""
    connection = connect(folder, PRIMARY_PORT)
    return lambda: connection.execute(INSERT, (text,), prepare=True)


def serve_standby_client(folder: Path, pipe: Connection) -> None:
    """Be a client of the standby. A position is answered when it is applied there, None with the p99 of reads."""
    connection = connect(folder, STANDBY_PORT)
    while True:
        position = pipe.recv()
        if position is None:
            pipe.send(time_reads(lambda: connection.execute(SELECT, (1,), prepare=True).fetchall()))
            continue
        query: LiteralString = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        while connection.execute(query, (position,)).fetchone() != (True,):
            time.sleep(0.001)
        pipe.send(None)


def measure_postgresql(endpoint: str, size_bytes: int, window: int, count: int, level: str) -> Measured:
    """Commit into a server that one standby follows, a connection a thread, the statement prepared."""
    with running(level) as folder:
        return run_threads(lambda: open_commit(folder, "x" * size_bytes), window, count)


def measure_catch_up(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Commit at full speed; the figure is the part of the time until all is applied that the commits took."""
    with running("local") as folder, child(serve_standby_client, folder) as client:
        measured = run_threads(lambda: open_commit(folder, "x" * size_bytes), window, count)
        committed_at = time.perf_counter()
        with connect(folder, PRIMARY_PORT) as connection:
            [position] = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        ask(client, position)
        lag_s = time.perf_counter() - committed_at
        return measured._replace(figure=measured.total_s / (measured.total_s + lag_s))


def measure_reads(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Read at the standby, idle and while it applies at full speed."""
    with running("applied") as folder, child(serve_standby_client, folder) as client:
        return compare_reads(client, lambda: open_commit(folder, "x" * size_bytes), window)


def _contender(measure: Callable[..., Measured]) -> Contender:
    return Contender(serve_nothing, measure, "none", ("psycopg", NAME))


CONTENDERS = {
    **{
        f"PostgreSQL {setting}": _contender(partial(measure_postgresql, level=level))
        for level, setting in LEVELS.items()
    },
    "PostgreSQL, standby keeps up": _contender(measure_catch_up),
    "PostgreSQL, reads at the standby": _contender(measure_reads),
}
