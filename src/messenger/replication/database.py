"""One SQLite file and what replication keeps in it: who it is, the log, the terms.

Five tables of our own, `_messenger_…`, stand in the user's file, because only what is written in the same transaction
as the change is there exactly if the change is. The file is in WAL mode with `synchronous=NORMAL`: a commit appends to
the WAL and does not wait for the disk. `WalSync` then makes what was committed durable, one `fdatasync` for all that
wait; SQLite itself syncs the WAL before a checkpoint moves it into the database file. So what was committed before an
`fdatasync` began is on the disk when it returns: in the WAL, or, if a checkpoint came between, in the file.

What must never happen here: two processes that replicate into one file (a lock file beside it); a second descriptor of
the database file itself, whose close would drop SQLite's locks.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import apsw
import msgspec

from .errors import DatabaseRefused, DiskFailed, ReplicationClosed
from .limits import BUSY_MS, CLOSE_READER_S
from .records import NO_CHECKSUM, Head

logger = logging.getLogger("messenger.replication")

OWN_PREFIX = "_messenger_"
PRIMARY, REPLICA = "primary", "replica"

_TABLES = """
CREATE TABLE IF NOT EXISTS _messenger_state (
    id INTEGER PRIMARY KEY CHECK (id = 0), format INTEGER NOT NULL, database TEXT NOT NULL, role TEXT NOT NULL,
    base_term INTEGER NOT NULL, base_lsn INTEGER NOT NULL, base_checksum BLOB NOT NULL,
    fenced_term INTEGER NOT NULL DEFAULT 0, fenced_by TEXT NOT NULL DEFAULT '[]', diverged TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS _messenger_log (
    lsn INTEGER PRIMARY KEY, term INTEGER NOT NULL, at_us INTEGER NOT NULL, checksum BLOB NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS _messenger_terms (
    term INTEGER PRIMARY KEY, first_lsn INTEGER NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS _messenger_replicas (
    name TEXT PRIMARY KEY, applied INTEGER NOT NULL, contact_at REAL NOT NULL, diverged TEXT NOT NULL DEFAULT '')
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _messenger_copies (replica TEXT UNIQUE, copy TEXT NOT NULL);
"""
FORMAT = 1


class State(msgspec.Struct, frozen=True):
    """What a file says about itself.

    Attributes:
        database: The random name of the replicated database, the same at the primary and all replicas.
        role: `primary` or `replica`.
        base: Where the history stood before the first entry that the log still holds.
        fenced_term, fenced_by: The term and destinations of the primary that was promoted over this one.
        diverged: Why this replica takes nothing more, or empty.
    """

    database: str
    role: str
    base: Head
    fenced_term: int
    fenced_by: str
    diverged: str


def open_writer(path: str) -> apsw.Connection:
    """Open the connection that writes, in WAL mode; the file is made if there is none."""
    connection = apsw.Connection(path)
    try:
        connection.set_busy_timeout(BUSY_MS)
        mode = connection.pragma("journal_mode", "wal")
        if mode != "wal":
            raise DatabaseRefused(f"{path} cannot be put into WAL mode, it stays in {mode}")
        connection.pragma("synchronous", "normal")
        connection.pragma("temp_store", "memory")
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: str) -> apsw.Connection:
    """Open a connection that only reads."""
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_MS)
    return connection


@contextlib.contextmanager
def transaction(connection: apsw.Connection, cursor: apsw.Cursor | None = None) -> Iterator[None]:
    """Run a block as one transaction that writes; an error rolls it back. A cursor at hand saves half of the time."""
    execute = (cursor or connection).execute
    execute("BEGIN IMMEDIATE")
    try:
        yield
        execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


def roll_back(connection: apsw.Connection) -> None:
    """Roll back, unless SQLite did so itself, as it does when the disk is full."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def has_own_tables(connection: apsw.Connection) -> bool:
    """Return whether replication has used this file before."""
    return bool(connection.execute("SELECT 1 FROM sqlite_schema WHERE name = '_messenger_state'").fetchall())


def add_own_tables(connection: apsw.Connection) -> None:
    """Add those of our tables that a file of an earlier version has not."""
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = '_messenger_copies'").fetchall():
        connection.execute(_TABLES)


def create_own_tables(connection: apsw.Connection, database: str, role: str) -> None:
    """Make a file a replicated database with an empty history; within a transaction."""
    connection.execute(_TABLES)
    connection.execute(
        "INSERT INTO _messenger_state (id, format, database, role, base_term, base_lsn, base_checksum) "
        "VALUES (0, ?, ?, ?, 1, 0, ?)",
        (FORMAT, database, role, NO_CHECKSUM),
    )
    connection.execute("INSERT INTO _messenger_terms VALUES (1, 1, ?)", (NO_CHECKSUM,))


def read_state(connection: apsw.Connection) -> State:
    """Return what the file says about itself.

    Raises:
        DatabaseRefused: It has no state, or one of another version.
    """
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT format, database, role, base_term, base_lsn, base_checksum, fenced_term, fenced_by, diverged "
        "FROM _messenger_state"
    ).fetchall()
    if len(rows) != 1 or rows[0][0] != FORMAT:
        raise DatabaseRefused(f"{connection.filename}: its replication tables are not of format {FORMAT}: {rows}")
    _, database, role, term, lsn, checksum, fenced_term, fenced_by, diverged = rows[0]
    return State(database, role, Head(term, lsn, checksum), fenced_term, fenced_by, diverged)


def write_state(connection: apsw.Connection, **values: str | int) -> None:
    """Change columns of the state; within a transaction."""
    for column, value in values.items():
        if column not in State.__struct_fields__:
            raise ValueError(f"there is no state {column!r}")
        connection.execute(f"UPDATE _messenger_state SET {column} = ?", (value,))  # noqa: S608  # A name from above.


def make_insert(connection: apsw.Connection, table: str, count: int, key: set[int]) -> str:
    """Return the statement that inserts so many values, or nothing if the table has not these columns and this key.

    So it is without a primary key, too, as the first value is then the rowid.
    """
    sql = "SELECT pk FROM pragma_table_xinfo(?, 'main') WHERE hidden = 0 ORDER BY cid"
    columns: list[Any] = connection.execute(sql, (table,)).fetchall()
    if len(columns) != count or {number for number, (pk,) in enumerate(columns) if pk} != key:
        return ""
    return f"INSERT OR ABORT INTO main.{quote(table)} VALUES ({', '.join('?' * count)})"  # noqa: S608


def close_connection(connection: apsw.Connection) -> None:
    """Close a connection. What fails then, as moving the WAL into the file, was committed and is done the next time."""
    path = connection.filename
    try:
        connection.close(force=True)
    except apsw.Error as error:
        logger.warning("! %s is closed, but: %s: %s", path, type(error).__name__, error)


class WalSync:
    """Makes commits durable, one `fdatasync` for all that wait.

    Args:
        path: Of the database, which has its WAL already.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._file = _identify(path)
        self._descriptor = os.open(f"{path}-wal", os.O_RDWR)
        # Where the kernel tells its name. `fstat` would tell how many names it has, but a file whose times were asked
        # for gets new ones with the next write (since Linux 6.13), and then an `fdatasync` took 175 µs in place of 97.
        self._name_at = f"/proc/self/fd/{self._descriptor}"
        self._name = os.readlink(self._name_at)
        self.durable_lsn = 0
        self.failure: OSError | None = None
        # The WAL's name must survive, too.
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def sync(self, lsn: int, newest_lsn: Callable[[], int]) -> int:
        """Return once all up to `lsn` is on the disk, and up to which LSN that is so.

        Args:
            newest_lsn: Returns the LSN of the newest commit; asked just before the disk is.

        Raises:
            DiskFailed: The disk refused, now or before, or the file is gone. What was written since the last success
                may be lost with the machine, and asking again could say yes without writing it.
        """
        with self._lock:
            if self.durable_lsn >= lsn:
                return self.durable_lsn
            if self.failure is None:
                through = newest_lsn()
                try:
                    os.fdatasync(self._descriptor)
                    self._check_there()
                except OSError as error:
                    self.failure = error
                else:
                    self.durable_lsn = through
                    return through
            raise DiskFailed(f"the disk did not confirm LSN {lsn}: {self.failure}")

    def _check_there(self) -> None:
        """Raise OSError if the file or its WAL has lost its name: all that is written then ends with the process."""
        if os.readlink(self._name_at) != self._name or _identify(self._path) != self._file:
            raise FileNotFoundError(
                f"{self._path} was removed, or another file was put in its place, while it was open"
            )

    def close(self, newest_lsn: int) -> None:
        """Make all durable for who still waits, and give the descriptor back; before SQLite closes and removes the WAL.

        Args:
            newest_lsn: Of the newest commit; there will be no other.
        """
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                if self.failure is None:
                    os.fdatasync(self._descriptor)
                    self.durable_lsn = newest_lsn
            except OSError as error:
                self.failure = error
            finally:
                os.close(self._descriptor)
            self._descriptor = -1
            self.failure = self.failure or OSError("the file is closed")


def _identify(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


class FileLock:
    """Keeps every other primary and replica, in any process, off a file while it is held."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise DatabaseRefused(f"{path} is open as a primary or replica already, here or elsewhere") from error

    def release(self) -> None:
        """Let others have the file. Twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class Readers:
    """A connection that only reads, for each thread that asks, until `close`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: dict[int, tuple[threading.Thread, apsw.Connection]] = {}
        self._is_closed = False

    def get(self) -> apsw.Connection:
        """Return the calling thread's connection.

        Raises:
            ReplicationClosed.
        """
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if self._is_closed:
            raise closed_error(self._path)
        if connection is None:
            connection = open_reader(self._path)
            with self._lock:
                if self._is_closed:
                    close_connection(connection)
                    raise closed_error(self._path)
                # Of threads that have ended, nobody else would close them.
                for key, (thread, gone) in list(self._open.items()):
                    if not thread.is_alive():
                        close_connection(gone)
                        del self._open[key]
                self._open[threading.get_ident()] = threading.current_thread(), connection
                self._local.connection = connection
        return connection

    def close(self) -> None:
        """Close them all, under whoever still reads, who gets `apsw.InterruptError`."""
        with self._lock:
            self._is_closed = True
            for _, connection in self._open.values():
                _close_in_use(connection, self._path)
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_in_use(connection: apsw.Connection, path: str) -> None:
    """Close a connection by which another thread may be reading at this moment; SQLite lets nobody do that."""
    deadline_at = time.monotonic() + CLOSE_READER_S
    while True:
        try:
            connection.interrupt()
            connection.close(force=True)
            return
        except apsw.ThreadingViolationError:
            if time.monotonic() > deadline_at:
                logger.warning("! a connection that reads %s is in use, and is closed when nobody has it", path)
                return
        except apsw.ConnectionClosedError:
            return
        time.sleep(CLOSE_READER_S / 1_000)


def resolve(path: str | os.PathLike[str]) -> str:
    """Return the path of a database as text, absolute, so that a later change of folder does not matter.

    Symbolic links are followed, as SQLite does: its WAL, and so our lock, stand beside the file itself.
    """
    text = os.fspath(path)
    if not text or text == ":memory:" or text.startswith("file:"):
        raise DatabaseRefused(f"{text!r} is no path of a file; a replicated database must be a file of its own")
    return os.path.realpath(text)


def quote(name: str) -> str:
    """Return a name of SQL in quotation marks."""
    return '"' + name.replace('"', '""') + '"'


def closed_error(path: str) -> ReplicationClosed:
    """Return the error of a call that came too late."""
    return ReplicationClosed(f"{path} is closed")
