"""The one connection of a primary that writes: transactions become entries of the log, one after another.

Transactions of single statements that wait at the same time are written as a group: one thread leads, runs them one
after the other, and commits all as one entry with one write to the WAL; an error undoes only its own. What a group
costs hardly grows with its size: one changeset, one entry, one commit, one message to each replica, one fsync.

What must never happen here: an entry that is committed without its changes, or changes without their entry; a Ctrl-C
between the two halves of a change, or one that waits for as long as other transactions take.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apsw

from messenger import interrupts

from . import copies, database
from .capture import Capture, Schema, check_open, check_setting
from .confirm import Level, Waiter
from .errors import DatabaseRefused, DiskFailed, Fenced, StatementRefused, WriterBusy
from .limits import GROUP_MAX, INTERRUPTED_S, ReplicationLimits
from .log import Log, begin_term, read_term
from .records import Entry, Head, Part, PartKind, Position, encode, follow

logger = logging.getLogger("messenger.replication")

Bindings = Any


def wait_until(deadline_at: float, wait: Callable[[float], bool]) -> bool:
    """Wait by a function that takes a timeout, and return whether it succeeded by the deadline.

    In the main thread a Ctrl-C that is deferred is raised between two attempts: never when one has just succeeded.
    """
    attempt_s = INTERRUPTED_S if threading.current_thread() is threading.main_thread() else threading.TIMEOUT_MAX
    while True:
        left_s = max(0.0, deadline_at - time.monotonic())
        if wait(min(left_s, attempt_s)):
            return True
        if left_s <= attempt_s:
            return False
        interrupts.raise_deferred()


class Operation(Waiter):
    """One statement that is to be a transaction of its own, and the thread that waits for it."""

    __slots__ = ("bindings", "count", "has_changed", "leads", "level", "rows", "sql")

    def __init__(self, sql: str, bindings: Bindings, level: Level, count: int) -> None:
        super().__init__()
        self.sql = sql
        self.bindings = bindings
        self.level = level
        self.count = count
        self.rows: list[Any] = []
        self.has_changed = False
        self.leads = False


class Written:
    """What one commit brought: entries, and who waits for them."""

    __slots__ = ("entries", "waiters")

    def __init__(self, entries: list[Entry], waiters: Sequence[tuple[Waiter, Level, int]]) -> None:
        self.entries = entries
        self.waiters = waiters


class Writer:
    """The connection that writes, behind a lock.

    Args:
        path: The file; made if there is none, adopted if it was never replicated.
        limits: What the log may hold.
        promote: Whether the file may be a replica's; `promote` is to be called then.
        publish: Called under the lock with what each commit brought, in the order of LSNs; it must not wait.

    Raises:
        DatabaseRefused: The file is in use, or belongs to a replica.
    """

    def __init__(
        self, path: str, limits: ReplicationLimits, publish: Callable[[Written], None], *, promote: bool = False
    ) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.owner = 0
        self.fence: Fenced | None = None
        self.transaction_count = 0
        self.group_count = 0
        self.foreign_write_count = 0
        self._limits = limits
        self._publish = publish
        self._queue: deque[Operation] = deque()
        self._queue_lock = threading.Lock()
        self._has_leader = False
        self._file_lock = database.FileLock(path)
        self._connection: apsw.Connection | None = None
        try:
            self._connection = connection = database.open_writer(path)
            if not database.has_own_tables(connection):
                with database.transaction(connection):
                    database.create_own_tables(connection, secrets.token_hex(16), database.PRIMARY)
            database.add_own_tables(connection)
            self.state = database.read_state(connection)
            if self.state.role != database.PRIMARY and not promote:
                raise DatabaseRefused(f"{path} is a replica's; promote it to make it a primary")
            if self.state.diverged:
                raise DatabaseRefused(
                    f"{path} has diverged from its primary, so it cannot follow it: {self.state.diverged}"
                )
            self.log = Log(connection, limits)
            self.term, self.term_checksum = read_term(connection)
            self._schema = Schema(connection)
            self._cursor = connection.cursor()
            # `connection.execute` makes a cursor each time, which takes longer than most statements.
            self._run_own = connection.cursor().execute
            self._data_version = self._read_data_version()
            self.wal = database.WalSync(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "wal"):
            self.wal.close(self.log.head.lsn)
        if self._connection is not None:
            database.close_connection(self._connection)
            self._connection = None
        self._file_lock.release()

    @property
    def connection(self) -> apsw.Connection:
        """The connection. Used with the lock held."""
        if self._connection is None:
            raise database.closed_error(self.path)
        return self._connection

    # The lock.

    def acquire(self, deadline_at: float) -> None:
        """Take the lock.

        Raises:
            WriterBusy: Not by the deadline. StatementRefused: The calling thread has it, in an open transaction.
        """
        self.check_not_mine()
        lock = self.lock
        if not lock.acquire(False) and not wait_until(deadline_at, lambda timeout: lock.acquire(timeout=timeout)):
            raise WriterBusy(f"{self.path}: other transactions took all the time; nothing of this one was done")
        self.owner = threading.get_ident()

    def check_not_mine(self) -> None:
        """Refuse, by `StatementRefused`, what would wait for a transaction that the calling thread has open."""
        if self.owner == threading.get_ident():
            raise StatementRefused("a transaction is open in this thread; use its `tx`")

    def release(self) -> None:
        """Give the lock back."""
        self.owner = 0
        self.lock.release()

    # Transactions. The lock is held.

    def begin(self) -> None:
        """Begin a transaction. Raises `Fenced`, `DiskFailed`, `ReplicationClosed`."""
        self._check_fence()
        if self._connection is None:
            raise database.closed_error(self.path)
        if self.wal.failure is not None:
            raise DiskFailed(f"{self.path}: the disk failed before ({self.wal.failure}); nothing is committed any more")
        self._run_own("BEGIN IMMEDIATE")
        version = self._read_data_version()
        if version != self._data_version:
            self._data_version = version
            self.foreign_write_count += 1
            logger.error("! somebody else wrote to %s; what that was is not replicated, verify and resync", self.path)
            self._schema.refresh()

    def _check_fence(self) -> None:
        """Refuse to go on once another primary leads; that can be heard of while a transaction is open."""
        if self.fence is not None:
            raise Fenced(str(self.fence), self.fence.term, self.fence.destinations)

    def _read_data_version(self) -> int:
        """Return what changes when another connection commits."""
        return self._run_own("PRAGMA data_version").get  # type: ignore[no-any-return]

    def capture(self) -> Capture:
        """Record what the transaction does from here on."""
        return Capture(self.connection, self._schema)

    def make_entry(self, head: Head, parts: list[Part]) -> Entry:
        """Return the entry of a transaction that follows a head.

        Raises:
            StatementRefused: It is too large.
        """
        body = encode(parts)
        if len(body) > self._limits.transaction_bytes_max:
            raise StatementRefused(
                f"the transaction changes {len(body)} bytes, transaction_bytes_max is "
                f"{self._limits.transaction_bytes_max}; make it several"
            )
        return follow(head, self.term, time.time_ns() // 1_000, body)

    @interrupts.shields
    def commit(self, parts: list[Part], waiter: Waiter, level: Level, count: int) -> None:
        """Write an entry of these parts, if there are any, commit, and publish it."""
        check_open(self.connection)
        head = self.log.head
        entries = [self.make_entry(head, parts)] if parts else []
        self.log.append(entries)
        self._check_fence()
        self._run_own("COMMIT")
        waiter.note_written(Position(self.term, head.lsn + 1) if entries else head.position)
        self._note_committed(entries, [(waiter, level, count)] if entries else [])
        if not entries:
            waiter.settle(True)  # There is nothing to wait for.

    def _note_committed(self, entries: list[Entry], waiters: Sequence[tuple[Waiter, Level, int]]) -> None:
        if entries:
            self.log.note_committed(entries)
            self.transaction_count += len(waiters)
            self.group_count += 1
        self._publish(Written(entries, waiters))

    def roll_back(self) -> None:
        """Undo the transaction."""
        database.roll_back(self.connection)

    def keep_replicas(self, replicas: Sequence[copies.Known]) -> None:
        """Remember the replicas."""
        with database.transaction(self.connection):
            copies.remember_replicas(self.connection, replicas)

    def known_replicas(self) -> list[copies.Known]:
        """Return what `keep_replicas` remembered."""
        return copies.known_replicas(self.connection)

    def trim(self) -> None:
        """Forget the oldest entries, if there are too many."""
        if self.log.must_trim:
            try:
                self.log.trim()
            except apsw.Error as error:
                logger.error("! the log of %s cannot be trimmed: %s", self.path, error)

    def promote(self) -> None:
        """Lead from here on, under the next term, which begins with an entry of its own."""
        with self.lock:
            term = max(self.term, self.state.fenced_term) + 1
            entry = follow(self.log.head, term, time.time_ns() // 1_000, encode([]))
            with database.transaction(self.connection):
                begin_term(self.connection, entry)
                self.log.append([entry])
                database.write_state(self.connection, role=database.PRIMARY, fenced_term=0, fenced_by="[]")
                copies.forget_replicas(self.connection)
            self.log.note_committed([entry])
            self.term, self.term_checksum = term, entry.checksum

    def keep_fence(self, fence: Fenced, encoded_destinations: str) -> None:
        """Commit nothing more after a restart, either."""
        with self.lock:
            if self._connection is not None:
                with database.transaction(self._connection):
                    database.write_state(self._connection, fenced_term=fence.term, fenced_by=encoded_destinations)

    def set(self, sql: str) -> list[Any]:
        """Change settings of the connection, and return what that returned. The lock is held.

        Raises:
            StatementRefused: There is another statement among them, which would not be replicated.
        """
        cursor = self.connection.cursor()
        cursor.exec_trace = check_setting
        self._schema.guard.is_on = True
        try:
            return cursor.execute(sql).fetchall()
        finally:
            self._schema.guard.is_on = False

    # Groups.

    @interrupts.shields
    def write(
        self,
        operation: Operation,
        deadline_at: float,
        tidy: Callable[[], None],
        make_durable: Callable[[int], None],
    ) -> None:
        """Queue an operation, and return when it is written, or has its error.

        One thread leads and writes what waits; others wait in the queue meanwhile, and so become the next group.

        Args:
            tidy: Called with the lock held, after the commit.
            make_durable: Called by the thread that leads with the last LSN that it wrote, if it wrote any.

        Raises:
            WriterBusy: It was not written by the deadline.
        """
        self.check_not_mine()
        written_lsn = 0
        try:
            with self._queue_lock:
                self._queue.append(operation)
                if not self._has_leader:
                    self._has_leader = operation.leads = True
            if not operation.leads and not wait_until(deadline_at, operation.wait):
                self._give_up(operation)
            if operation.leads:
                written_lsn = self._lead(deadline_at, tidy)
        except BaseException:
            self._forget(operation)
            raise
        if operation.leads:
            try:
                if written_lsn:
                    make_durable(written_lsn)
            finally:
                self._pass_lead()

    def _forget(self, operation: Operation) -> None:
        """Take an operation of an interrupted thread out of the queue, so that the lead does not go, or stay, there.

        What the leader has taken out of the queue already is written, and nobody waits for it.
        """
        with self._queue_lock:
            if operation in self._queue:
                self._queue.remove(operation)
        if operation.leads:
            self._pass_lead()

    def _give_up(self, operation: Operation) -> None:
        """Take an operation out of the queue, or return if it is past that."""
        with self._queue_lock:
            if operation.leads:
                operation.wait(0)  # It was woken to lead in this very moment.
                return
            if operation not in self._queue:
                return
            self._queue.remove(operation)
        raise WriterBusy(f"{self.path}: other transactions took all the time; nothing of this one was done")

    def _pass_lead(self) -> None:
        """Let another thread write what waits."""
        with self._queue_lock:
            if self._queue:
                self._queue[0].leads = True
                self._queue[0].wake()
            else:
                self._has_leader = False

    def _lead(self, deadline_at: float, tidy: Callable[[], None]) -> int:
        """Write those that wait; each gets its position or its error, and with the error it is woken.

        Returns:
            The last LSN that was written, 0 if none was.
        """
        group: list[Operation] = []
        try:
            self.acquire(deadline_at)
            try:
                self._write_group(group)
                tidy()
            finally:
                self.release()
        except BaseException as error:
            if not group:
                with self._queue_lock:
                    group.append(self._queue.popleft())  # Only its own: the others may have more time.
            is_ours = isinstance(error, Exception)
            for operation in group:
                if operation.position is None and operation.error is None:
                    operation.error = error if is_ours else WriterBusy("the thread that wrote was interrupted")
            if not is_ours:
                raise
        finally:
            for operation in group:
                if operation.error is not None:
                    operation.settle(False)
        return max((operation.position.lsn for operation in group if operation.position is not None), default=0)

    def _take_queued(self, group: list[Operation]) -> Iterator[Operation]:
        """Take operations off the queue into a group, those too that come while the ones before them run."""
        while len(group) < GROUP_MAX:
            with self._queue_lock:
                if not self._queue:
                    return
                operation = self._queue.popleft()
            group.append(operation)
            yield operation

    def _write_group(self, group: list[Operation]) -> None:
        """Write the operations that wait in one transaction of SQLite; the group is empty before.

        Nearly always all of them succeed, so they first run without savepoints and are one entry: what recording and
        applying costs is then paid once for all. If one fails, all are undone, and run again, each as an entry of its
        own under a savepoint of its own. If only the commit fails, for a deferred foreign key, nobody knows whose it
        is, so each is committed alone.
        """
        try:
            self._write_all(group, self._run_together)
            return
        except Exception:
            if len(group) <= 1:  # None at all if the transaction could not begin.
                raise
        try:
            self._write_all(group, self._run_each)
        except apsw.ConstraintError:
            for operation in group:
                operation.error = None  # It may have been about a row that another one did not keep.
                try:
                    self._write_all([operation], self._run_each)
                except apsw.ConstraintError as error:
                    operation.error = error

    def _write_all(
        self,
        group: list[Operation],
        run: Callable[[list[Operation]], tuple[list[Entry], list[tuple[Operation, Position]]]],
    ) -> None:
        """Run operations in one transaction of SQLite, and commit it; if it raises, nothing was done."""
        self.begin()
        try:
            entries, written = run(group)
            if entries:
                self.log.append(entries)
            self._check_fence()
            self._run_own("COMMIT")
        except BaseException:
            self.roll_back()
            self._schema.refresh()
            raise
        for operation, position in written:
            operation.note_written(position)
        self._note_committed(entries, [(one, one.level, one.count) for one, _ in written if one.has_changed])
        for operation, _ in written:
            if not operation.has_changed:
                operation.settle(True)  # There is nothing of it to wait for.

    def _run_together(self, group: list[Operation]) -> tuple[list[Entry], list[tuple[Operation, Position]]]:
        """Return the one entry of all operations that wait, if they change anything, and the position of each."""
        capture = self.capture()
        self._cursor.exec_trace = capture.on_statement
        count = capture.change_count
        try:
            for operation in self._take_queued(group):
                operation.rows = self._cursor.execute(operation.sql, operation.bindings).fetchall()
                before, count = count, capture.change_count
                operation.has_changed = count != before
            parts = capture.finish()
            entries = [self.make_entry(self.log.head, parts)] if parts else []
        except BaseException:
            capture.close()
            raise
        if not entries:
            # What one of them did another has undone.
            for operation in group:
                operation.has_changed = False
        elif not all(operation.has_changed for operation in group) and parts[-1].kind is PartKind.SEQUENCES:
            # SQLite counts no row where an INSERT that is ignored moves the counter of AUTOINCREMENT: any may have.
            for operation in group:
                operation.has_changed = True
        position = Position(self.term, entries[0].lsn) if entries else self.log.head.position
        return entries, [(operation, position) for operation in group]

    def _run_each(self, group: list[Operation]) -> tuple[list[Entry], list[tuple[Operation, Position]]]:
        """Return the entries of operations, and the position of each that has no error."""
        head = self.log.head
        entries: list[Entry] = []
        written: list[tuple[Operation, Position]] = []
        for operation in group:
            entry = self._run_in_group(operation, head)
            operation.has_changed = entry is not None
            if entry is not None:
                entries.append(entry)
                head = Head(entry.term, entry.lsn, entry.checksum)
            if operation.error is None:
                written.append((operation, head.position))
        return entries, written

    def _run_in_group(self, operation: Operation, head: Head) -> Entry | None:
        """Run one of several; an error undoes this one only."""
        connection = self.connection
        connection.execute("SAVEPOINT _messenger_operation")
        capture = self.capture()
        entry = None
        try:
            entry = self._run(operation, head, capture)
        except Exception as error:
            if not connection.in_transaction:
                raise  # SQLite undid all, as when the disk is full.
            operation.error = error
            connection.execute("ROLLBACK TO _messenger_operation")
            capture.undo()
        connection.execute("RELEASE _messenger_operation")
        return entry

    def _run(self, operation: Operation, head: Head, capture: Capture) -> Entry | None:
        self._cursor.exec_trace = capture.on_statement
        try:
            operation.rows = self._cursor.execute(operation.sql, operation.bindings).fetchall()
            parts = capture.finish()
            return self.make_entry(head, parts) if parts else None
        except BaseException:
            capture.close()
            raise
