"""The database side of a replica: entries and snapshots into its file, and what of its own no other has, out of it.

Entries that come together are applied together: their changesets are joined, as far as nothing of another kind comes
between, and one transaction holds their changes and their rows of the log. If one conflicts, the transaction is undone
and they are applied one by one, so that all before the one that conflicts are there.

A changeset is applied with triggers off and foreign keys not acted on: what they did at the primary is in it already.

What must never happen here: a change without its entry in the log, or an entry without its change; a conflict that is
passed over.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec

from . import copies, database
from .check import pin
from .errors import DatabaseRefused
from .guards import drop_guards, guard_conflicts
from .limits import BUSY_MS, CATCH_UP_BYTES, CATCH_UP_TRANSACTIONS, ReplicationLimits
from .log import Log, begin_term, find_head, read_entries, read_term
from .lost import save_lost
from .records import Entry, Head, MalformedRecord, Part, PartKind, decode_parts, decode_sequences, does_follow
from .snapshot import SnapshotFailed, SnapshotSink, remove_leftovers

logger = logging.getLogger("messenger.replication")

_ABORT = apsw.SQLITE_CHANGESET_ABORT
_ALONE = (PartKind.SQL, PartKind.SQL_FOREIGN_KEYS, PartKind.CHECK)
_FLAGS = apsw.SQLITE_CHANGESETAPPLY_NOSAVEPOINT
# Makes SQLite read the schema anew each time, so only where foreign keys are on.
_FLAGS_FOREIGN_KEYS = _FLAGS | apsw.SQLITE_CHANGESETAPPLY_FKNOACTION
_REASONS = {
    apsw.SQLITE_CHANGESET_DATA: "the row is another one than at the primary",
    apsw.SQLITE_CHANGESET_NOTFOUND: "the row is missing",
    apsw.SQLITE_CHANGESET_CONFLICT: "the row is there already",
    apsw.SQLITE_CHANGESET_CONSTRAINT: "a constraint forbids it",
    apsw.SQLITE_CHANGESET_FOREIGN_KEY: "a foreign key forbids it",
}


class Divergence(msgspec.Struct, frozen=True):
    """Where a replica differs from its primary.

    Attributes:
        lsn: Of the entry that could not be applied, or at which the contents were compared.
        table, key: The first row that differs; empty if it is not known.
        reason: What is wrong with it.
    """

    lsn: int
    table: str
    key: str
    reason: str

    def __str__(self) -> str:
        where = f" in table {self.table}" if self.table else ""
        where += f", key {self.key}" if self.key else ""
        return f"at LSN {self.lsn}{where}: {self.reason}"


class DivergenceFound(Exception):
    """An entry does not fit this database."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(str(divergence))
        self.divergence = divergence


class NoCopy(Exception):
    """There is no file yet."""


class Applier:
    """The file of a replica. Used by one thread at a time, but for `head` and the counts.

    Args:
        path: The file; it need not be there.

    Raises:
        DatabaseRefused: The file is in use, or holds a database that was never replicated.
    """

    def __init__(self, path: str, limits: ReplicationLimits) -> None:
        self.path = path
        self.database = ""
        # The id of the file, which it keeps from its first snapshot on.
        self.copy = secrets.token_hex(16)
        self.head = Head(0, 0, b"")
        self.durable_lsn = 0
        # Where the history ends that is on the disk, as a join says it: what it says counts as durable.
        self.durable_head = self.head
        self.diverged: Divergence | None = None
        self.transaction_count = 0
        self.group_count = 0
        self.lost_path = ""
        self.sink: SnapshotSink | None = None
        # Of the last check: its LSN, and a connection that sees the database at it.
        self.pinned: tuple[int, apsw.Connection] | None = None
        self._limits = limits
        self._connection: apsw.Connection | None = None
        self._log: Log | None = None
        self._wal: database.WalSync | None = None
        self._tables: set[str] | None = None
        # Of each table, the statement that inserts a row.
        self._inserts: dict[str, str] = {}
        self._found: Divergence | None = None
        # The table whose changes are being applied, and how many had been applied before.
        self._applying = "", 0
        # Off but for statements that change the schema and were run with them at the primary.
        self._has_foreign_keys = False
        self._file_lock = database.FileLock(path)
        try:
            remove_leftovers(path)
            if os.path.exists(path) and os.path.getsize(path):
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        connection = self._connection = database.open_writer(self.path)
        if not database.has_own_tables(connection):
            raise DatabaseRefused(
                f"{self.path} holds a database that is no replica, and would be overwritten; give a path that is free"
            )
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)
        connection.pragma("foreign_keys", False)
        state = database.read_state(connection)
        self.copy = copies.keep_copy(connection, self.copy)
        self._log = Log(connection, self._limits)
        self._wal = database.WalSync(self.path)
        self._tables = None
        self.database = state.database
        self.head = self._log.head
        self.diverged = msgspec.json.decode(state.diverged, type=Divergence) if state.diverged else None
        self.sync()

    def close(self) -> None:
        """Close the file, and let others have it."""
        if (pinned := self.take_pinned()) is not None:
            pinned[1].close(force=True)
        self._close_file()
        self.drop_snapshot()
        self._file_lock.release()

    def _close_file(self) -> None:
        if self._wal is not None:
            self._wal.close(self.head.lsn)
            self._wal = None
        if self._connection is not None:
            database.close_connection(self._connection)
            self._connection = None

    # Entries.

    def apply(self, entries: list[Entry]) -> None:
        """Apply entries that follow the head, and move it. Not durable before `sync`.

        Raises:
            DivergenceFound: One does not fit; those before it are applied.
            MalformedRecord: One does not follow the one before it; nothing is applied.
            apsw.Error: SQLite refused; nothing is applied.
        """
        head = self.head
        entries = self._drop_known(entries)
        for entry in entries:
            if not does_follow(head, entry):
                raise MalformedRecord(f"the entry for LSN {entry.lsn} does not follow {head.position}")
            head = Head(entry.term, entry.lsn, entry.checksum)
        batches = [(entry, decode_parts(entry.body)) for entry in entries]
        start = 0
        for number, (_, parts) in enumerate(batches):
            # The schema changes in a transaction of its own, as it may need other settings; a check must see its end.
            if any(part.kind in _ALONE for part in parts):
                self._apply_some(batches[start:number])
                self._apply_some(batches[number : number + 1])
                start = number + 1
                if parts[0].kind is PartKind.CHECK:
                    self._pin()
        self._apply_some(batches[start:])
        self._trim()

    def _drop_known(self, entries: list[Entry]) -> list[Entry]:
        """Return those that are not here: what was applied while a join was under way is sent again for that join."""
        count = sum(entry.lsn <= self.head.lsn for entry in entries)
        if count:
            last = entries[count - 1]
            # Maybe by another primary, in whose history it is another one; equal checksums mean an equal history.
            if find_head(self._require_open()[0], last.lsn) != (last.term, last.lsn, last.checksum):
                raise MalformedRecord(f"the entry for LSN {last.lsn} is another one than here")
        return entries[count:]

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Have `apply` raise `apsw.BusyError` at once, instead of waiting, where another process writes to the file."""
        connection = self._connection
        if connection is not None:
            connection.set_busy_timeout(0)
        try:
            yield
        finally:
            if connection is not None:
                connection.set_busy_timeout(BUSY_MS)

    def _pin(self) -> None:
        if self.pinned is not None:
            self.pinned[1].close(force=True)
        self.pinned = self.head.lsn, pin(self.path)

    def take_pinned(self) -> tuple[int, apsw.Connection] | None:
        """Return the last check that nobody took; the connection is the caller's then."""
        pinned, self.pinned = self.pinned, None
        return pinned

    def _apply_some(self, batches: list[tuple[Entry, list[Part]]]) -> None:
        if not batches:
            return
        try:
            self._apply_together(batches)
        except DivergenceFound:
            if len(batches) == 1:
                raise
            for batch in batches:
                self._apply_together([batch])

    def _apply_together(self, batches: list[tuple[Entry, list[Part]]]) -> None:
        connection, log = self._require_open()
        entries = [entry for entry, _ in batches]
        wants_foreign_keys = any(part.kind is PartKind.SQL_FOREIGN_KEYS for _, parts in batches for part in parts)
        if wants_foreign_keys:
            connection.pragma("foreign_keys", True)
            self._has_foreign_keys = True
        try:
            with database.transaction(connection, log.cursor):
                pending: list[bytes] = []
                for entry, parts in batches:
                    if entry.term > self.head.term:
                        self._note_term(connection, entry)
                    for part in parts:
                        if part.kind is PartKind.CHANGES:
                            pending.append(part.data)
                        else:
                            self._apply_changes(connection, pending, entry)
                            self._apply_part(connection, part, entry)
                self._apply_changes(connection, pending, entries[-1])
                log.append(entries)
        except BaseException:
            self._tables = None  # What was read of a schema that is undone.
            raise
        finally:
            if wants_foreign_keys:
                connection.pragma("foreign_keys", False)
                self._has_foreign_keys = False
        log.note_committed(entries)
        self.transaction_count += len(entries)
        self.group_count += 1
        self.head = log.head

    def _note_term(self, connection: apsw.Connection, entry: Entry) -> None:
        if read_term(connection)[0] < entry.term:
            begin_term(connection, entry)

    def _apply_changes(self, connection: apsw.Connection, pending: list[bytes], entry: Entry) -> None:
        """Apply joined changesets, and empty the list."""
        if not pending:
            return
        if self._tables is None:
            self._tables = self._read_schema(connection)
        changes = b"".join(pending)
        if self._insert_one(connection, changes):
            pending.clear()
            return
        flags = _FLAGS_FOREIGN_KEYS if self._has_foreign_keys else _FLAGS
        self._applying = "", 0
        try:
            apsw.Changeset.apply(changes, connection, filter=self._begin_table, conflict=self._on_conflict, flags=flags)
        except apsw.Error as error:
            found = self._take_found(entry)
            if found is None and isinstance(error, (apsw.CorruptError, apsw.SchemaChangeError, apsw.MisuseError)):
                found = Divergence(entry.lsn, "", "", f"the changes cannot be read: {error}")
            if found is None:
                raise
            raise DivergenceFound(found) from error
        self._end_table()
        found = self._take_found(entry)
        if found is not None:
            raise DivergenceFound(found)
        pending.clear()

    def _insert_one(self, connection: apsw.Connection, changes: bytes) -> bool:
        """Apply a changeset that inserts one row; return False, with nothing done, if it is another or does not fit.

        By the statement that `Changeset.apply` would prepare anew each time, with others; here it stays prepared.
        """
        table, row, key = "", None, set[int]()
        try:
            for change in apsw.Changeset.iter(changes):
                if row is not None or change.op != "INSERT":
                    return False
                table, row, key = change.name, change.new, change.pk_columns
            if row is None or not self._is_known(table):
                return False
            sql = self._inserts.get(table)
            if sql is None:
                sql = self._inserts[table] = database.make_insert(connection, table, len(row), key)
            if sql:
                self._require_open()[1].cursor.execute(sql, row)
        except (apsw.ConstraintError, apsw.CorruptError, apsw.BindingsError, UnicodeDecodeError):
            return False
        return bool(sql)

    def _take_found(self, entry: Entry) -> Divergence | None:
        """Return what the callbacks of SQLite found, since the last time."""
        found, self._found = self._found, None
        return None if found is None else msgspec.structs.replace(found, lsn=entry.lsn)

    def _read_schema(self, connection: apsw.Connection) -> set[str]:
        """Make ready for the tables that are here, and return their names."""
        self._inserts.clear()
        guard_conflicts(connection)
        rows: list[Any] = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        return {name for (name,) in rows}

    def _is_known(self, table: str) -> bool:
        """Refuse changes of our own tables, and of tables that are not here, which SQLite would pass over."""
        if table.lower().startswith(database.OWN_PREFIX):
            self._found = Divergence(0, table, "", "changes of replication's own tables are refused")
        elif self._tables is None or table not in self._tables:
            self._found = Divergence(0, table, "", "there is no such table here")
        else:
            return True
        return False

    def _begin_table(self, table: str) -> bool:
        """The changes of a table begin; return whether they are to be applied."""
        self._end_table()
        self._applying = table, self._require_open()[0].total_changes()
        return self._is_known(table)

    def _end_table(self) -> None:
        """The changes of a table end: SQLite passes over all of them if the table here has another key, say."""
        table, before_count = self._applying
        if table and self._found is None and self._require_open()[0].total_changes() == before_count:
            self._found = Divergence(0, table, "", "its columns are others than at the primary")

    def _on_conflict(self, reason: int, change: apsw.TableChange) -> int:
        try:
            values: Any = change.new if change.op == "INSERT" else change.old
        except UnicodeDecodeError:
            values = dict.fromkeys(change.pk_columns, apsw.no_change)  # The row cannot be shown.
        columns = sorted(change.pk_columns)
        shown = [values[column] for column in columns] if values is not None else []
        key = ", ".join("?" if value is apsw.no_change else repr(value) for value in shown)
        self._found = Divergence(0, change.name, key, f"{change.op}: {_REASONS.get(reason, str(reason))}")
        return _ABORT

    def _apply_part(self, connection: apsw.Connection, part: Part, entry: Entry) -> None:
        if part.kind is PartKind.SEQUENCES:
            connection.execute("DELETE FROM sqlite_sequence")
            connection.executemany("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", decode_sequences(part.data))
        elif part.kind in (PartKind.SQL, PartKind.SQL_FOREIGN_KEYS):
            self._tables = None
            drop_guards(connection)
            # What a DROP TABLE deletes by foreign keys can fire triggers at the primary, so it must here.
            connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, int(part.kind is PartKind.SQL_FOREIGN_KEYS))
            try:
                connection.execute(part.data.decode()).fetchall()
            except (apsw.SQLError, apsw.ConstraintError, UnicodeDecodeError) as error:
                reason = f"{part.data[:200]!r} failed: {error}"
                raise DivergenceFound(Divergence(entry.lsn, "", "", reason)) from error
            finally:
                connection.config(apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0)

    def _trim(self) -> None:
        _, log = self._require_open()
        if log.must_trim:
            log.trim()

    def sync(self) -> int:
        """Make what is applied durable, and return up to which LSN that is so.

        Raises:
            DiskFailed.
        """
        if self._wal is not None:
            self.durable_lsn = self._wal.sync(self.head.lsn, lambda: self.head.lsn)
            self.durable_head = self.head
        return self.durable_lsn

    def become_replica(self) -> None:
        """Mark the file as a replica's: it may have been a primary's before."""
        connection, _ = self._require_open()
        if database.read_state(connection).role != database.REPLICA:
            with database.transaction(connection):
                database.write_state(connection, role=database.REPLICA, fenced_term=0, fenced_by="[]")

    def save_lost(self, end: Head) -> str:
        """Save the entries that follow `end` in this history and not in the primary's, and return where.

        Raises:
            DivergenceFound: The histories part before `end` already. OSError: They cannot be saved.
        """
        connection, _ = self._require_open()
        known = find_head(connection, end.lsn)
        if known is not None and end.checksum and known.checksum != end.checksum:
            reason = f"its history up to LSN {end.lsn} is another one"
            raise DivergenceFound(Divergence(end.lsn, "", "", reason))
        self.lost_path = self._name_lost()
        save_lost(self.lost_path, _entries_after(connection, end.lsn))
        return self.lost_path

    def _save_own_term(self, connection: apsw.Connection) -> None:
        """Save all that this file got as a primary, if it is another history than the one that takes its place.

        So it is with two that were promoted to the same term: where they part is not known.
        """
        if self.diverged is not None and database.read_state(connection).role == database.PRIMARY:
            rows: list[Any] = connection.execute("SELECT max(first_lsn) FROM _messenger_terms").fetchall()
            path = self.lost_path = self._name_lost()
            save_lost(path, _entries_after(connection, rows[0][0] - 1))
            logger.error("! %s: all that it got under term %d was saved to %s", self.path, self.head.term, path)

    def _name_lost(self) -> str:
        return f"{self.path}-lost-{self.head.term}-{self.head.lsn}.jsonl"

    def note_diverged(self, divergence: Divergence) -> None:
        """Take nothing more, also after a restart, unless the file cannot be written to now."""
        connection, _ = self._require_open()
        self.diverged = divergence
        try:
            with database.transaction(connection):
                database.write_state(connection, diverged=msgspec.json.encode(divergence).decode())
        except apsw.Error as error:
            logger.error("! the next start of %s will not know that it has diverged: %s", self.path, error)

    def _require_open(self) -> tuple[apsw.Connection, Log]:
        if self._connection is None or self._log is None:
            raise NoCopy(f"{self.path} has no copy of the database yet")
        return self._connection, self._log

    # Snapshots.

    def begin_snapshot(self, bytes_total: int) -> None:
        """Take a new snapshot; one that was under way is dropped."""
        self.drop_snapshot()
        self.sink = SnapshotSink(self.path, bytes_total)

    def drop_snapshot(self) -> None:
        """Take a snapshot that is under way no further."""
        if self.sink is not None:
            self.sink.close()
            self.sink = None

    def install_snapshot(self, checksum: bytes) -> None:
        """Put the snapshot that was taken in place of what is here.

        Raises:
            SnapshotFailed, OSError, apsw.Error: What was here is unchanged.
        """
        sink = self.sink
        if sink is None:
            raise MalformedRecord("a snapshot ended that had not begun")
        sink.finish(checksum)
        self._prepare(sink.path)
        if self._connection is None:
            # Of a file that somebody removed; SQLite would play a WAL that is left into the new one.
            for suffix in ("-wal", "-shm"):
                Path(self.path + suffix).unlink(missing_ok=True)
            os.rename(sink.path, self.path)
        else:
            self._save_own_term(self._connection)
            self._replace_content(self._connection, sink.path)
            self._close_file()
        self.drop_snapshot()
        self._open()

    def _prepare(self, path: str) -> None:
        """Make the copy of a primary's file a replica's."""
        copy = apsw.Connection(path)
        try:
            copy.pragma("journal_mode", "delete")
            copy.pragma("synchronous", "full")
            database.read_state(copy)  # Raises if it is no such file.
            with database.transaction(copy):
                database.write_state(copy, role=database.REPLICA, diverged="")
                copies.begin_copy(copy, self.copy)
        finally:
            copy.close(force=True)

    def _replace_content(self, connection: apsw.Connection, path: str) -> None:
        copy = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
        try:
            own, other = connection.pragma("page_size"), copy.pragma("page_size")
            if own != other:
                raise SnapshotFailed(
                    f"{self.path} has pages of {own} bytes, the primary's file of {other}, and SQLite cannot change "
                    "that in place; close the replica, remove the file, and open it again"
                )
            with connection.backup("main", copy, "main") as backup:
                backup.step(-1)
            connection.pragma("wal_checkpoint", "passive")
        finally:
            copy.close(force=True)


def _entries_after(connection: apsw.Connection, lsn: int) -> Iterator[Entry]:
    while entries := read_entries(connection, lsn, CATCH_UP_TRANSACTIONS, CATCH_UP_BYTES):
        yield from entries
        lsn = entries[-1].lsn
