"""The log of a replicated database: the newest entries, in the table `_messenger_log`, and where each term began.

An entry is written in the transaction that makes its changes. The log is bounded: its oldest entries are forgotten in
the same way, and the state then says where the history stood before the first that is left.
"""

import time
from collections.abc import Iterable
from typing import Any

import apsw

from .database import read_state, transaction
from .errors import Diverged
from .limits import TRIM_TRANSACTIONS, ReplicationLimits
from .records import Entry, Head, Position

_INSERT_ENTRY = "INSERT INTO _messenger_log (lsn, term, at_us, checksum, body) VALUES (?, ?, ?, ?, ?)"
_SELECT_ENTRY = "SELECT lsn, term, at_us, checksum, body FROM _messenger_log"
# A log that has too many bytes is cut by this part of what it may have, so that not every commit cuts a little.
TRIM_BYTES_PART = 16


class Log:
    """The log, on the connection that writes. Used within its transactions.

    Attributes:
        head: Where the history ends, as far as it is committed.
    """

    def __init__(self, connection: apsw.Connection, limits: ReplicationLimits) -> None:
        self._connection = connection
        self.cursor = connection.cursor()
        self._limits = limits
        self.head = read_head(connection)
        self.first_lsn = read_state(connection).base.lsn + 1
        rows: list[tuple[Any, ...]] = connection.execute(
            "SELECT coalesce(sum(length(body)), 0) FROM _messenger_log"
        ).fetchall()
        self.bytes = rows[0][0]

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries; `note_committed` when that is committed."""
        self.cursor.executemany(_INSERT_ENTRY, [(e.lsn, e.term, e.at_us, e.checksum, e.body) for e in entries])

    def note_committed(self, entries: list[Entry]) -> None:
        """The transaction of these entries is committed."""
        last = entries[-1]
        self.head = Head(last.term, last.lsn, last.checksum)
        self.bytes += sum(len(entry.body) for entry in entries)

    @property
    def must_trim(self) -> bool:
        """Whether the log is so far above its limits that `trim` is due."""
        count = self.head.lsn - self.first_lsn + 1
        limits = self._limits
        if count <= 1:
            return False
        return count >= limits.log_transactions_max + TRIM_TRANSACTIONS or self.bytes > limits.log_bytes_max

    def trim(self) -> None:
        """Forget the oldest entries, in a transaction of its own."""
        limits = self._limits
        last_lsn = self.head.lsn - limits.log_transactions_max
        bytes_max = limits.log_bytes_max - limits.log_bytes_max // TRIM_BYTES_PART
        bytes_left = self.bytes
        through = None
        rows = self._connection.execute("SELECT term, lsn, checksum, length(body) FROM _messenger_log ORDER BY lsn")
        for term, lsn, checksum, size_bytes in rows:
            if (lsn > last_lsn and bytes_left <= bytes_max) or lsn == self.head.lsn:
                break
            through = Head(term, lsn, checksum)
            bytes_left -= size_bytes
        if through is None:
            return
        with transaction(self._connection):
            self._connection.execute(
                "UPDATE _messenger_state SET base_term = ?, base_lsn = ?, base_checksum = ?", through
            )
            self._connection.execute("DELETE FROM _messenger_log WHERE lsn <= ?", (through.lsn,))
        self.first_lsn = through.lsn + 1
        self.bytes = bytes_left


def read_head(connection: apsw.Connection) -> Head:
    """Return where the history ends."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT term, lsn, checksum FROM _messenger_log ORDER BY lsn DESC LIMIT 1"
    ).fetchall()
    return Head(*rows[0]) if rows else read_state(connection).base


def read_entries(connection: apsw.Connection, after_lsn: int, count: int, bytes_max: int) -> list[Entry]:
    """Return entries that follow an LSN, in order: up to so many, and so many bytes, but at least one if there is."""
    entries: list[Entry] = []
    size_bytes = 0
    rows = connection.execute(f"{_SELECT_ENTRY} WHERE lsn > ? ORDER BY lsn LIMIT ?", (after_lsn, count))
    for row in rows:
        entry = Entry(*row)
        size_bytes += len(entry.body)
        if entries and size_bytes > bytes_max:
            break
        entries.append(entry)
    return entries


def read_age_s(connection: apsw.Connection, after_lsn: int) -> float | None:
    """Return for how long the oldest entry that follows an LSN has been committed, by the clock; None if none does."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT at_us FROM _messenger_log WHERE lsn > ? ORDER BY lsn LIMIT 1", (after_lsn,)
    ).fetchall()
    # The clock may have been set back since.
    return max(0.0, time.time() - rows[0][0] / 1e6) if rows else None


def find_head(connection: apsw.Connection, lsn: int) -> Head | None:
    """Return the place in the history with this LSN, or None if the log does not hold it (any more)."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT term, lsn, checksum FROM _messenger_log WHERE lsn = ?", (lsn,)
    ).fetchall()
    if rows:
        return Head(*rows[0])
    base = read_state(connection).base
    return base if base.lsn == lsn else None


# Terms.


def begin_term(connection: apsw.Connection, entry: Entry) -> None:
    """Note that a term begins with this entry; within its transaction."""
    connection.execute("INSERT INTO _messenger_terms VALUES (?, ?, ?)", (entry.term, entry.lsn, entry.checksum))


def read_term(connection: apsw.Connection) -> tuple[int, bytes]:
    """Return the newest term and the checksum that it began with."""
    rows: list[Any] = connection.execute(
        "SELECT term, checksum FROM _messenger_terms ORDER BY term DESC LIMIT 1"
    ).fetchall()
    return rows[0][0], rows[0][1]


def end_of_term(connection: apsw.Connection, term: int) -> int | None:
    """Return the last LSN of this history that is of this term or a lower one, or None if it goes on."""
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT min(first_lsn) - 1 FROM _messenger_terms WHERE term > ?", (term,)
    ).fetchall()
    return None if rows[0][0] is None else int(rows[0][0])


def check_in_history(connection: apsw.Connection, position: Position) -> None:
    """Check that a position that is not ahead is one of this history.

    Raises:
        Diverged: A later term began before it, so it was lost when a replica was promoted.
    """
    end = end_of_term(connection, position.term)
    if end is not None and position.lsn > end:
        raise Diverged(f"position {position} is not in this history: term {position.term} ended at LSN {end}")
