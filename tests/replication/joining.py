"""How long writes wait while a replica joins a large database by a snapshot.

`python -m tests.replication.joining --mib 120` fills a database, commits 200 transactions a second at a steady pace,
lets a replica in another process join, and prints how long the join took and the longest wait of a write, counted from
when it was due. The exit status is 1 if one waited longer than 100 ms.
"""

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from messenger import Messenger
from messenger.replication import Primary, ReplicaState, verify
from tests.conftest import free_port
from tests.replication.programs import start

WAIT_S_MAX = 0.1
JOIN_S_MAX = 120.0
ROW_BYTES = 4_000
ROWS_AT_A_TIME = 2_000


class Joined(NamedTuple):
    """What was measured.

    Attributes:
        size_bytes: Of the primary's file.
        join_s: From the start of the replica's process until it streams.
        waits_s: Of each write meanwhile, from when it was due until it was committed.
        baseline_s: The same before the replica came.
        is_equal: Whether both files hold the same in the end.
    """

    size_bytes: int
    join_s: float
    waits_s: list[float]
    baseline_s: list[float]
    is_equal: bool

    def describe(self) -> str:
        """Return all of it as a line."""
        late_count = sum(wait_s > WAIT_S_MAX for wait_s in self.waits_s)
        size_mib = self.size_bytes / 2**20
        return (
            f"{size_mib:.0f} MiB joined in {self.join_s:.1f} s, with {len(self.waits_s)} writes meanwhile; "
            f"the longest waited {max(self.waits_s) * 1e3:.1f} ms (before: {max(self.baseline_s) * 1e3:.1f} ms), "
            f"{late_count} over {WAIT_S_MAX * 1e3:.0f} ms; the files are {'equal' if self.is_equal else 'DIFFERENT'}"
        )


class Pace:
    """Commits at a steady pace on a thread of its own, and notes how long each commit waits."""

    def __init__(self, primary: Primary, rate: float, clock: Callable[[], float]) -> None:
        self.waits_s: list[float] = []
        self._primary = primary
        self._clock = clock
        self._period_s = 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due_at = self._clock()
        while not self._stop.is_set():
            # What the machine is too slow for begins later; only who is held up counts.
            due_at = max(due_at + self._period_s, self._clock())
            time.sleep(max(0.0, due_at - self._clock()))
            self._primary.execute("INSERT INTO orders (book) VALUES (?)", ("Dune",), commit="local", timeout=30)
            self.waits_s.append(self._clock() - due_at)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def fill(primary: Primary, size_bytes: int) -> None:
    """Make a database of so many bytes, of rows that do not compress."""
    primary.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, book TEXT)", commit="local")
    primary.execute("CREATE TABLE scans (id INTEGER PRIMARY KEY, page BLOB)", commit="local")
    for _ in range(max(1, size_bytes // (ROW_BYTES * ROWS_AT_A_TIME))):
        primary.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO scans (page) SELECT randomblob(?) FROM n",
            (ROWS_AT_A_TIME, ROW_BYTES),
            commit="local",
            timeout=60,
        )


def measure(
    folder: Path, size_bytes: int, rate: float = 200.0, clock: Callable[[], float] = time.perf_counter
) -> Joined:
    """Let a replica join a database of that size while so many transactions a second go on."""
    port = free_port()
    path, replica_path = folder / "primary.db", folder / "replica.db"
    with Messenger("primary") as messenger, Primary(path, messenger, port) as primary, contextlib.ExitStack() as stack:
        fill(primary, size_bytes)
        pace = Pace(primary, rate, clock)
        stack.callback(pace.stop)
        time.sleep(2)
        baseline_count = len(pace.waits_s)
        started_at = time.monotonic()
        program = start("replica", replica_path, port)
        stack.callback(program.kill)
        while not any(replica.state is ReplicaState.STREAMING for replica in primary.status().replicas):
            assert time.monotonic() - started_at < JOIN_S_MAX, f"it did not join: {primary.status()}"
            time.sleep(0.01)
        join_s = time.monotonic() - started_at
        pace.stop()
        deadline_at = time.monotonic() + JOIN_S_MAX
        while primary.status().replicas[0].applied_lsn < primary.position.lsn:
            assert time.monotonic() < deadline_at, f"it does not catch up: {primary.status()}"
            time.sleep(0.01)
        baseline_s, waits_s = pace.waits_s[:baseline_count], pace.waits_s[baseline_count:]
        is_equal = verify(path, replica_path).is_equal
        return Joined(path.stat().st_size, join_s, waits_s, baseline_s, is_equal)


def main() -> None:
    """Measure as the words say."""
    parser = argparse.ArgumentParser(prog="tests.replication.joining", description=__doc__)
    parser.add_argument("--mib", type=int, default=120)
    parser.add_argument("--rate", type=float, default=200.0, help="transactions a second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="joining-") as folder:
        joined = measure(Path(folder), options.mib * 2**20, options.rate)
    print(joined.describe())
    sys.exit(not joined.is_equal or max(joined.waits_s) > WAIT_S_MAX)


if __name__ == "__main__":
    main()
