"""Comparing the content of a primary and its replicas at one LSN, while both go on.

A check is an entry of the log without changes. The primary opens a read transaction right behind it, each replica does
so when it has applied it: so all look at the same moment, however far the replica is behind and whatever is written
meanwhile. Each sums its buckets (`content.py`); the primary compares, and asks for the rows of the first bucket that
differs, to name the row. A replica that differs is told so, and takes nothing more.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import apsw

from messenger import MessengerError

from .content import Difference, Sums, compare_buckets, different_buckets, read_bucket, sum_content
from .database import open_reader
from .errors import ReplicationError
from .limits import CHECK_PINNED_S
from .records import AskBucket, BucketRows, CheckSums, FromReplica

logger = logging.getLogger("messenger.replication")


def pin(path: str) -> apsw.Connection:
    """Return a connection that sees the database as it is now, until it is closed."""
    reader = open_reader(path)
    try:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    except BaseException:
        reader.close(force=True)
        raise
    return reader


class ReplicaCheck:
    """One check at a replica, on a thread of its own, until the primary needs no more, or has not asked for long.

    Args:
        reader: Sees the database at the check's LSN; is closed in the end.
        send: Sends to the primary.
    """

    def __init__(
        self, stream: int, lsn: int, reader: apsw.Connection, send: Callable[[FromReplica], None], name: str
    ) -> None:
        self.lsn = lsn
        self._stream = stream
        self._reader = reader
        self._send = send
        self._questions: SimpleQueue[AskBucket | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"replication-check-{name}", daemon=True)

    def start(self) -> None:
        """Begin. Questions must reach this check from then on."""
        self._thread.start()

    def ask(self, question: AskBucket) -> None:
        """Answer this, later."""
        self._questions.put(question)

    def end(self) -> None:
        """Nothing more is needed; does not wait."""
        self._questions.put(None)

    def _run(self) -> None:
        try:
            self._send(CheckSums(self._stream, self.lsn, sum_content(self._reader)))
            while (question := self._questions.get(timeout=CHECK_PINNED_S)) is not None:
                rows = read_bucket(self._reader, question.table, question.bucket)
                self._send(BucketRows(self._stream, self.lsn, question.table, question.bucket, rows))
        except Empty:
            logger.info("= the check at LSN %d ended without a word of the primary", self.lsn)
        except (apsw.Error, OSError, MessengerError) as error:
            logger.error("! the content cannot be summed at LSN %d: %s", self.lsn, error)
        finally:
            self._reader.close(force=True)


class PrimaryCheck:
    """One check at the primary. Answers come on the messenger's thread, the caller of `check` waits for them.

    Args:
        lsn: Of the check.
        path: The primary's file.
    """

    def __init__(self, lsn: int, path: str) -> None:
        self.lsn = lsn
        self._path = path
        self._reader: apsw.Connection | None = None
        self._condition = threading.Condition()
        self._sums: dict[str, Sums] = {}
        self._rows: dict[tuple[str, str, int], dict[str, bytes]] = {}
        self._own: Sums = {}
        self._is_cancelled = False

    def cancel(self) -> None:
        """Wait for nobody any more."""
        with self._condition:
            self._is_cancelled = True
            self._condition.notify_all()

    def _wait(self, deadline_at: float) -> bool:
        """Wait a moment for news, and return whether there is still time; the condition is held."""
        left_s = deadline_at - time.monotonic()
        if left_s <= 0 or self._is_cancelled:
            return False
        self._condition.wait(min(left_s, 0.2))
        return True

    def note_sums(self, name: str, sums: Sums) -> None:
        """A replica has answered."""
        with self._condition:
            self._sums[name] = sums
            self._condition.notify_all()

    def note_rows(self, name: str, answer: BucketRows) -> None:
        """A replica has told the rows of a bucket."""
        with self._condition:
            self._rows[name, answer.table, answer.bucket] = answer.rows
            self._condition.notify_all()

    def pin(self) -> None:
        """See the database as it is now, which must be at the check's LSN."""
        self._reader = pin(self._path)

    def close(self) -> None:
        """Let go of that moment."""
        if self._reader is not None:
            self._reader.close(force=True)

    def sum(self) -> None:
        """Sum the primary's own content."""
        self._own = sum_content(self._require_pinned())

    def _require_pinned(self) -> apsw.Connection:
        if self._reader is None:
            raise ReplicationError(f"the check of LSN {self.lsn} sees no moment")
        return self._reader

    def wait_sums(self, names: Callable[[], set[str]], deadline_at: float) -> list[str]:
        """Return the replicas that have answered, once all have that are there, or it is time."""
        with self._condition:
            while not names() <= self._sums.keys() and self._wait(deadline_at):
                pass
            return sorted(self._sums)

    def compare(self, name: str, ask: Callable[[str, int], None], deadline_at: float) -> Difference | None:
        """Return the first row that a replica does not have alike, or None if there is none.

        Args:
            ask: Asks the replica for the rows of a bucket of a table.
        """
        found = next(different_buckets(self._own, self._sums[name]), None)
        if found is None:
            return None
        ask(*found)
        with self._condition:
            while (name, *found) not in self._rows and self._wait(deadline_at):
                pass
            there = self._rows.get((name, *found))
        table, bucket = found
        if there is None:
            return Difference(table, "", "differs; the row is not known, the replica did not answer in time")
        here = read_bucket(self._require_pinned(), table, bucket)
        # "Here" is the replica, for whoever reads it there.
        return next(compare_buckets(table, there, here), Difference(table, "", "differs"))


class PeriodicCheck:
    """Checks again and again, on a thread of its own, until `stop`.

    Args:
        interval_s: Seconds from the end of one to the beginning of the next.
        check: Does it; what it raises is logged, and the next one tries again.
    """

    def __init__(self, interval_s: float, check: Callable[[], dict[str, str]]) -> None:
        self._interval_s = interval_s
        self._check = check
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replication-checks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Check no more; waits for one that is under way."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.wait(self._interval_s):
            try:
                found = self._check()
            except Exception as error:  # Whatever it is, the next check may succeed.
                logger.error("! a check of the content failed: %s: %s", type(error).__name__, error)
            else:
                logger.info("= checked the content of %d replicas", len(found))
