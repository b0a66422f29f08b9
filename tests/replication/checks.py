"""What must hold after every fault: both files are whole, the replica is a prefix, nothing confirmed is lost."""

from pathlib import Path
from typing import NamedTuple

import apsw


class Content(NamedTuple):
    """What a database of `programs.py` holds: the rows behind the first `after`, and what it has counted."""

    after: int
    ids: list[int]
    counted: int


def read(path: Path, after: int = 0) -> Content:
    """Return what a file holds, all in one snapshot, as somebody may be writing; all of a file is also checked."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    try:
        with connection:
            if not after:
                [(verdict,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
                assert verdict == "ok", f"{path.name}: {verdict}"
            if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'total'").fetchall():
                return Content(after, [], 0)
            ids = [
                number for (number,) in connection.execute("SELECT id FROM orders WHERE id > ? ORDER BY id", (after,))
            ]
            counted = connection.execute("SELECT orders FROM total").get
    finally:
        connection.close()
    return Content(after, ids, int(counted) if isinstance(counted, int) else 0)


def check_whole(path: Path, after: int = 0) -> int:
    """Check that a file is some state that the primary was in; return how many transactions that has."""
    if not path.exists():
        return 0
    content = read(path, after)
    count = after + len(content.ids)
    assert content.ids == list(range(after + 1, count + 1)), f"{path.name} has a gap in {content.ids[-20:]}"
    assert content.counted == count, f"{path.name}: there are {count} rows, but {content.counted} were counted"
    return count


def read_confirmed(path: Path) -> list[int]:
    """Return what the primary was told to be confirmed. A line that a kill has cut off does not count."""
    numbers = [int(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    assert len(numbers) == len(set(numbers)), "a transaction was confirmed twice"
    return numbers


def check_pair(primary: Path, replica: Path, confirmed: Path, after: int = 0) -> tuple[int, int]:
    """Check both files and what was confirmed; return how many transactions each has.

    Args:
        after: So many transactions were checked before, at both; 0 checks everything.
    """
    # In this order, as both may live and go on: what was confirmed, then the replica, then the primary.
    promised_count = max(read_confirmed(confirmed), default=0)
    replica_count = check_whole(replica, after)
    primary_count = check_whole(primary, after)
    assert replica_count <= primary_count, f"the replica has {replica_count}, the primary only {primary_count}"
    # Both are 1 to their count without a gap, so the last number tells.
    assert promised_count <= replica_count, f"{promised_count} is confirmed, but the replica has {replica_count}"
    return primary_count, replica_count
