"""What one transaction changes, as parts that a replica can apply: changesets, and SQL of the schema in its place.

SQLite's session extension records rows by primary key, and by rowid where there is none. What it cannot see is done
here: statements that change the schema are noted as text; a virtual table such as FTS5 is made to write its shadow
tables before the changeset is taken; AUTOINCREMENT counters are compared; and a NULL in a primary key, which the
extension would pass over silently, is refused by a temporary trigger (`guards.py`).

What must never happen here: a change that is committed and not recorded.
"""

import functools
import re
from collections.abc import Container, Iterator
from enum import Enum, auto
from typing import Any

import apsw

from .database import OWN_PREFIX, quote
from .errors import StatementRefused
from .guards import guard_recording
from .records import Part, PartKind, SequenceRow, encode


class Kind(Enum):
    """What a statement is, for replication."""

    DATA = auto()
    READ = auto()
    SCHEMA = auto()
    SETTING = auto()
    TEMPORARY = auto()


_WORDS = {
    **dict.fromkeys(("INSERT", "UPDATE", "DELETE", "REPLACE", "WITH", "EXPLAIN"), Kind.DATA),
    **dict.fromkeys(("SELECT", "VALUES"), Kind.READ),
    **dict.fromkeys(("CREATE", "DROP", "ALTER", "REINDEX", "ANALYZE"), Kind.SCHEMA),
}
_REFUSED = {
    **dict.fromkeys(
        ("BEGIN", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE"), "use `with primary.transaction() as tx:`"
    ),
    "VACUUM": "it may change rowids, by which tables without a primary key are replicated",
    "ATTACH": "another file would not be replicated",
    "DETACH": "nothing can be attached",
}
# Settings that live in the file's first page and travel as SQL; those of the connection; all others are refused.
_TRAVELLING_PRAGMAS = {"user_version", "application_id"}
_LOCAL_PRAGMAS = {"foreign_keys", "cache_size", "recursive_triggers", "case_sensitive_like", "defer_foreign_keys"}
# Of those that take an argument, these only ask.
_ASKING_PRAGMAS = {
    *("table_info", "table_xinfo", "table_list", "index_info", "index_xinfo", "index_list", "foreign_key_list"),
    *("foreign_key_check", "integrity_check", "quick_check"),
}
_DENIED_ACTIONS = {
    apsw.SQLITE_ATTACH: "ATTACH",
    apsw.SQLITE_DETACH: "DETACH",
}
_WRITING_ACTIONS = {
    *(apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE, apsw.SQLITE_DROP_TABLE, apsw.SQLITE_ALTER_TABLE),
    *(apsw.SQLITE_CREATE_TABLE, apsw.SQLITE_CREATE_VTABLE, apsw.SQLITE_CREATE_VIEW, apsw.SQLITE_CREATE_TRIGGER),
    apsw.SQLITE_CREATE_INDEX,
}
_BLANK = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$)|;)+", re.DOTALL)
_WORD = re.compile(r"\w+")
_NOISE = re.compile(r"--[^\n]*|/\*.*?(?:\*/|$)|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]", re.DOTALL)
_TEMPORARY = re.compile(r"(?:CREATE|DROP)\s+(?:TEMP|TEMPORARY)\b|CREATE\s+\w+\s+(?:IF\s+NOT\s+EXISTS\s+)?temp\.", re.I)
_AS_SELECT = re.compile(r"CREATE\s+TABLE\s+[^(]*?\bAS\s+(?:SELECT|VALUES|WITH)\b", re.I | re.DOTALL)
_PRAGMA = re.compile(r"PRAGMA\s+(?:main\s*\.\s*)?(\w+)\s*([=(]?)", re.I)
_SQL_SHOWN_MAX = 80


@functools.lru_cache(1024)
def classify(sql: str) -> Kind:
    """Return what a statement is.

    Raises:
        StatementRefused: It cannot be replicated.
    """
    text = _strip(sql)
    first = _first_word(sql)
    shown = text[:_SQL_SHOWN_MAX]
    if first in _REFUSED:
        raise StatementRefused(f"{shown!r} is refused: {_REFUSED[first]}")
    kind = _WORDS.get(first, Kind.DATA)
    if first == "PRAGMA":
        kind = _classify_pragma(text, shown)
    # Without comments, and with a mere x for each name or text in quotation marks.
    plain = _NOISE.sub(lambda found: " " if found[0][0] in "-/" else "x", text) if kind is Kind.SCHEMA else ""
    if _TEMPORARY.match(plain):
        return Kind.TEMPORARY
    if _AS_SELECT.match(plain):
        raise StatementRefused(f"{shown!r} is refused: create the table, then INSERT INTO … SELECT")
    return kind


def _strip(sql: str) -> str:
    """Return a statement without what stands before it."""
    blank = _BLANK.match(sql)
    return sql[blank.end() :] if blank else sql


def _first_word(sql: str) -> str:
    word = _WORD.match(_strip(sql))
    return word[0].upper() if word else ""


def _classify_pragma(text: str, shown: str) -> Kind:
    match = _PRAGMA.match(text)
    name, sets = (match[1].lower(), match[2]) if match else ("", "")
    if name in _TRAVELLING_PRAGMAS and sets:
        return Kind.SCHEMA
    if name in _LOCAL_PRAGMAS and sets:
        return Kind.SETTING
    if not sets or name in _ASKING_PRAGMAS:
        return Kind.READ
    raise StatementRefused(
        f"{shown!r} is refused: of what PRAGMA can set, {', '.join(sorted(_TRAVELLING_PRAGMAS | _LOCAL_PRAGMAS))} "
        "are allowed here"
    )


def check_setting(cursor: Any, sql: str, bindings: Any) -> bool:
    """Refuse a statement that is no setting of the connection. For `apsw.Cursor.exec_trace`."""
    if classify(sql) not in (Kind.SETTING, Kind.READ):
        raise StatementRefused(f"{sql[:_SQL_SHOWN_MAX]!r} is refused behind a PRAGMA that sets: execute each by itself")
    return True


class Guard:
    """Refuses, while a user's statement is prepared, what may not even be begun: some PRAGMAs act already then.

    Attributes:
        is_on: Whether what is prepared is a user's.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self.is_on = False
        connection.authorizer = self._authorize

    def _authorize(self, action: int, name: str | None, value: str | None, schema: str | None, _: str | None) -> int:
        if self.is_on:
            if action in _DENIED_ACTIONS:
                classify(_DENIED_ACTIONS[action])
            elif action == apsw.SQLITE_PRAGMA and value is not None:
                classify(f"PRAGMA {name}({value})" if name in _ASKING_PRAGMAS else f"PRAGMA {name} = {value}")
            elif action in _WRITING_ACTIONS and schema == "main":
                for table in (name, value):
                    if table is not None and table.lower().startswith(OWN_PREFIX):
                        raise StatementRefused(
                            f"{table} is refused: names that begin with {OWN_PREFIX} are replication's"
                        )
        return apsw.SQLITE_OK


class Schema:
    """What must be known of the tables to record their changes; read anew after each change of the schema.

    Attributes:
        sequences: The rows of `sqlite_sequence`, or None if no table has AUTOINCREMENT.
        loose_keys: Of tables whose primary keys can be equal and not the same, the names in UTF-8.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.guard = Guard(connection)
        # While there is no session, SQLite prepares a DELETE without WHERE so that it is never recorded.
        self._session = apsw.Session(connection, "main")
        self._session.enabled = False
        self.has_virtual_tables = False
        self.sequences: list[SequenceRow] | None = None
        self.loose_keys: dict[str, bytes] = {}
        # Of tables with AUTOINCREMENT, the columns that count up.
        self._counted: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the schema, and refuse what cannot be recorded."""
        connection = self._connection
        self.has_virtual_tables = bool(
            connection.execute(
                "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
            ).fetchall()
        )
        self.sequences = self.read_sequences()
        self._counted = {} if self.sequences is None else dict(self._read_counted())
        self.loose_keys = {table: table.encode() for table in guard_recording(connection)}

    def read_sequences(self) -> list[SequenceRow] | None:
        """Return the values of AUTOINCREMENT counters, or None if there are no such tables."""
        if not self._connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_sequence'").fetchall():
            return None
        # Temporary tables can have counters of their own.
        sql = "SELECT name, seq FROM main.sqlite_sequence ORDER BY rowid"
        rows: list[Any] = self._connection.execute(sql).fetchall()
        return rows

    def _read_counted(self) -> Iterator[tuple[str, str]]:
        rows: list[Any] = self._connection.execute(
            "SELECT list.name, info.name FROM sqlite_schema AS list, pragma_table_info(list.name, 'main') AS info "
            "WHERE list.type = 'table' AND list.sql LIKE '%autoincrement%' AND info.pk"
        ).fetchall()
        for table, column in rows:
            if self._connection.column_metadata("main", table, column)[4]:
                yield table, column

    def is_beyond_counter(self, parts: list[Part]) -> bool:
        """Return whether a table that was changed holds a row beyond its counter: where it is inserted, that moves."""
        for table, column in self._counted.items():
            if any(part.kind is PartKind.CHANGES and table.encode() in part.data for part in parts):
                sql = (
                    f"SELECT max({quote(column)}) > coalesce((SELECT seq FROM main.sqlite_sequence WHERE name = ?), 0) "  # noqa: S608
                    f"FROM main.{quote(table)}"
                )
                if self._connection.execute(sql, (table,)).get:
                    return True
        return False

    def has_temporary(self) -> bool:
        """Return whether the user has made anything temporary."""
        sql = "SELECT 1 FROM sqlite_temp_schema WHERE substr(name, 1, ?) <> ? LIMIT 1"
        return bool(self._connection.execute(sql, (len(OWN_PREFIX), OWN_PREFIX)).fetchall())


class Capture:
    """Records one transaction. Made within it, on the connection that writes; `finish` before the commit."""

    def __init__(self, connection: apsw.Connection, schema: Schema) -> None:
        self._connection = connection
        self._schema = schema
        self._parts: list[Part] = []
        self._pending: Part | None = None
        self.changed_schema = False
        self._schema_count = 0
        self._schema_version = 0
        self._session = self._open_session()
        schema.guard.is_on = True

    def _open_session(self) -> apsw.Session:
        session = apsw.Session(self._connection, "main")
        session.config(apsw.SQLITE_SESSION_OBJCONFIG_ROWID, 1)
        session.table_filter(_is_users)
        return session

    @property
    def change_count(self) -> int:
        """Grows with each statement that may have changed something: with its rows, or because it is of the schema."""
        return self._connection.total_changes() + self._schema_count

    def on_statement(self, cursor: Any, sql: str, bindings: Any) -> bool:
        """Note a statement that is about to run. For `apsw.Cursor.exec_trace`."""
        check_open(self._connection)
        kind = classify(sql)
        if self._pending is not None:
            self._note_schema_done()
        if kind is Kind.SCHEMA:
            if bindings:
                raise StatementRefused(f"{sql[:_SQL_SHOWN_MAX]!r} is refused: it takes no bindings")
            self._schema_count += 1
            self.changed_schema = True
            self._take_changes()
            self._session.close()
            with_foreign_keys = self._connection.pragma("foreign_keys")
            self._schema_version = self._read_schema_version()
            self._pending = Part(PartKind.SQL_FOREIGN_KEYS if with_foreign_keys else PartKind.SQL, sql.encode())
        elif kind is Kind.SETTING:
            raise StatementRefused(f"{sql[:_SQL_SHOWN_MAX]!r} is refused: use primary.execute, not a transaction")
        return True

    def forget_pending(self) -> None:
        """A statement failed: if it was to change the schema, it did not."""
        if self._pending is not None:
            self._pending = None
            self._session = self._open_session()

    def finish(self) -> list[Part]:
        """Return the parts of the transaction, none if it changed nothing; the capture is closed then."""
        self._schema.guard.is_on = False
        if self._pending is not None:
            self._note_schema_done()
        if self._schema.has_virtual_tables:
            # They write what they have kept back when a savepoint is set.
            self._connection.execute("SAVEPOINT _messenger_flush; RELEASE _messenger_flush")
        self._take_changes()
        if self._schema.sequences is not None:
            self._take_sequences()
        self.close()
        return self._parts

    def close(self) -> None:
        """Record no more."""
        self._schema.guard.is_on = False
        self._session.close()

    def undo(self) -> None:
        """Forget what was recorded, after the transaction was rolled back."""
        self.close()
        if self.changed_schema or self._schema.sequences is not None:
            self._schema.refresh()

    def _note_schema_done(self) -> None:
        if self._pending is not None:
            if self._is_of_file(self._pending):
                self._parts.append(self._pending)
            self._pending = None
            before = self._schema.sequences or []
            self._schema.refresh()
            if self._schema.sequences is not None:
                self._schema.sequences = before  # The values are still to be compared.
        self._session = self._open_session()

    def _read_schema_version(self) -> int:
        return int(self._connection.pragma("schema_version", schema="main"))

    def _is_of_file(self, part: Part) -> bool:
        """Return whether a statement that was run is to be run at the replicas.

        Not if all that it changed is temporary: a table there can hide one of the file, so its name does not tell.
        """
        word = _first_word(part.data.decode())
        if word in ("ANALYZE", "REINDEX"):
            return not self._schema.has_temporary()
        return word == "PRAGMA" or self._read_schema_version() != self._schema_version

    def _take_changes(self) -> None:
        if not self._session.is_empty and (changes := self._session.changeset()):
            loose_keys = self._schema.loose_keys
            if loose_keys and any(name in changes for name in loose_keys.values()):
                _check_keys(changes, loose_keys)
            self._parts.append(Part(PartKind.CHANGES, changes))

    def _take_sequences(self) -> None:
        now = self._schema.read_sequences() or []
        if now != self._schema.sequences or self._schema.is_beyond_counter(self._parts):
            if any(isinstance(value, bytes) for row in now for value in row):
                raise StatementRefused("table sqlite_sequence: a blob there cannot be replicated")
            self._parts.append(Part(PartKind.SEQUENCES, encode(now)))
            self._schema.sequences = now


def check_open(connection: apsw.Connection) -> None:
    """Refuse what comes after SQLite has ended a transaction by itself: outside of one, it would be committed at once.

    Raises:
        StatementRefused.
    """
    if not connection.in_transaction:
        raise StatementRefused(
            "the transaction is over: SQLite has rolled it back, as after OR ROLLBACK or when the disk is full, and "
            "the error was passed over; nothing of it was committed"
        )


def _check_keys(changes: bytes, tables: Container[str]) -> None:
    """Refuse changes of a key to an equal one that is not the same, as of 'a' to 'A': the session mixes them up.

    It looks up each row that was changed by its key, and finds for either the one that is there.

    Raises:
        StatementRefused.
    """
    seen: set[tuple[Any, ...]] = set()
    for change in apsw.Changeset.iter(changes):
        if change.name not in tables:
            continue
        try:
            old, new = change.old, change.new
        except UnicodeDecodeError:
            continue
        numbers = sorted(change.pk_columns)
        before = [old[number] for number in numbers] if old is not None else []
        after = [new[number] for number in numbers] if new is not None else []
        key = [*before] if apsw.no_change in after or not after else after
        if (change.op == "UPDATE" and apsw.no_change not in after) or (change.name, *key) in seen:
            raise StatementRefused(
                f"table {change.name}, key {', '.join(map(repr, key))}: a key that takes the place of an equal one, as "
                "'A' of 'a' where case does not matter, or 1.0 of 1, cannot be replicated; delete the old row in a "
                "transaction before"
            )
        seen.add((change.name, *key))


def _is_users(table: str) -> bool:
    return not table.lower().startswith((OWN_PREFIX, "sqlite_"))
