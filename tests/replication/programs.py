"""A primary under load and its replica, each in a process of its own that can be killed at any point.

Transaction k inserts row k and counts it in a second table, so that a database is right if and only if it holds the
rows 1 to k without a gap and has counted k: one that was lost, applied twice or applied in part shows. What the primary
was told to be confirmed goes into a file, which outlives a kill.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

from messenger import Messenger, Security
from messenger.replication import NotConfirmed, Primary, Replica, Transaction
from tests.processes.programs import Program
from tests.replication.faults import POINTS, Fault, FaultyDisk

ROOT = Path(__file__).parents[2]
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.replication.programs import main; main()"
CREATE = (
    "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, book TEXT)",
    "CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY, orders INTEGER)",
    "INSERT OR IGNORE INTO total VALUES (1, 0)",
)
INSERT = (
    "INSERT INTO orders (book) VALUES ('Dune, Dune Messiah, Children of Dune, God Emperor of Dune')",
    "UPDATE total SET orders = orders + 1",
    "SELECT orders FROM total",
)


def start(role: str, path: Path, destination: object, *options: object, prefix: tuple[str, ...] = ()) -> Program:
    """Start a `primary` or `replica`; it prints `ready`."""
    return Program(START, role, path, destination, *options, prefix=prefix)


def main() -> None:
    """Be what the words say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["primary", "replica"])
    parser.add_argument("path", type=Path)
    parser.add_argument("destination")
    parser.add_argument("--name", default="replica1")
    parser.add_argument("--confirmed", type=Path, help="where confirmed transactions are written down")
    parser.add_argument("--commit", default="applied")
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--count", type=int, default=0, help="transactions of each thread, 0 for no end")
    parser.add_argument("--resync", action="store_true")
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--fault", nargs=3, metavar=("ACTION", "KINDS", "NUMBER"))
    options = parser.parse_args()
    be = be_primary if options.role == "primary" else be_replica
    if options.point:
        POINTS[options.point].arm()
    if options.fault is None:
        be(options)
        return
    action, kinds, number = options.fault
    disk = FaultyDisk(Fault(action, kinds, int(number)))
    disk.fault.is_armed = True
    be(options)


def be_primary(options: argparse.Namespace) -> None:
    """Commit as fast as can be from several threads, write down what is confirmed."""
    security = Security(insecure=True)  # For tests that have a network of their own.
    with (
        Messenger("primary", security=security) as messenger,
        Primary(
            options.path, messenger, options.destination, commit=options.commit, acknowledgements=1,
            timeout=options.timeout,
        ) as primary,
    ):  # fmt: skip
        create_tables(primary)
        print("ready", flush=True)
        acks = os.open(options.confirmed, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        threads = [
            threading.Thread(target=commit_all, args=(primary, acks, options.count, number % 2 == 0))
            for number in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("done", flush=True)
        sys.stdin.read()


def commit_all(primary: Primary, acks: int, count: int, in_groups: bool) -> None:
    """Commit so many, write down each that is confirmed; one that is not may or may not be there."""
    done_count = 0
    while not count or done_count < count:
        done_count += 1
        try:
            if in_groups:
                [(number,)] = primary.execute("; ".join(INSERT))
            else:
                with primary.transaction() as tx:
                    number = insert(tx)
        except NotConfirmed:
            continue
        os.write(acks, b"%d\n" % number)


def create_tables(primary: Primary) -> None:
    """Make the tables if there are none, confirmed by nobody, as there may be no replica yet."""
    with primary.transaction(commit="local") as tx:
        for statement in CREATE:
            tx.execute(statement)


def insert(tx: Transaction) -> int:
    """Do the work of one transaction, return its number."""
    *writes, read = INSERT
    for statement in writes:
        tx.execute(statement)
    [(number,)] = tx.execute(read)
    return int(number)


def be_replica(options: argparse.Namespace) -> None:
    """Follow until standard input ends."""
    with (
        Messenger(options.name) as messenger,
        Replica(options.path, messenger, options.destination, resync=options.resync),
    ):
        print("ready", flush=True)
        sys.stdin.read()
