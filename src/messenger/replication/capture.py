"""What one transaction changes, as parts that a replica can apply: changesets, and SQL of the schema in its place.

SQLite's session extension records rows by primary key, and by rowid where there is none. What it cannot see is done
here: statements that change the schema are noted as text; a virtual table such as FTS5 is made to write its shadow
tables before the changeset is taken; AUTOINCREMENT counters are compared; and a NULL in a primary key, which the
extension would pass over silently, is refused by a temporary trigger.

What must never happen here: a change that is committed and not recorded.
"""

import functools
import re
from enum import Enum, auto
from typing import Any

import apsw

from .database import OWN_PREFIX
from .errors import StatementRefused
from .records import Part, PartKind, encode


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
    blank = _BLANK.match(sql)
    text = sql[blank.end() :] if blank else sql
    word = _WORD.match(text)
    first = word[0].upper() if word else ""
    shown = text[:_SQL_SHOWN_MAX]
    if first in _REFUSED:
        raise StatementRefused(f"{shown!r} is refused: {_REFUSED[first]}")
    kind = _WORDS.get(first, Kind.DATA)
    if first == "PRAGMA":
        kind = _classify_pragma(text, shown)
    if kind is Kind.SCHEMA and _TEMPORARY.match(text):
        return Kind.TEMPORARY
    if first == "CREATE" and _AS_SELECT.match(text):
        raise StatementRefused(f"{shown!r} is refused: create the table, then INSERT INTO … SELECT")
    return kind


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
    """What must be known of the tables to record their changes; read anew after each change of the schema."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.guard = Guard(connection)
        self.has_virtual_tables = False
        self.sequences: dict[str, int] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the schema, and guard primary keys that allow NULL."""
        connection = self._connection
        self.has_virtual_tables = bool(
            connection.execute(
                "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
            ).fetchall()
        )
        self.sequences = self.read_sequences()
        for name, columns in self._nullable_keys():
            self._guard(name, columns)

    def read_sequences(self) -> dict[str, int] | None:
        """Return the values of AUTOINCREMENT counters, or None if there are no such tables."""
        if not self._connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_sequence'").fetchall():
            return None
        rows: list[Any] = self._connection.execute(
            "SELECT name, seq FROM sqlite_sequence WHERE seq IS NOT NULL"
        ).fetchall()
        return dict(rows)

    def _nullable_keys(self) -> list[tuple[str, list[str]]]:
        """Return the tables whose primary key is no rowid and may hold NULL, with those columns."""
        rows: list[Any] = self._connection.execute(
            "SELECT list.name, info.name FROM pragma_table_list AS list, pragma_table_info(list.name) AS info "
            "WHERE list.schema = 'main' AND list.type = 'table' AND NOT list.wr AND info.pk AND NOT info.\"notnull\" "
            "AND substr(list.name, 1, 7) <> 'sqlite_' AND substr(list.name, 1, 11) <> ? "
            "AND NOT (upper(info.type) = 'INTEGER' AND "
            "(SELECT count(*) FROM pragma_table_info(list.name) WHERE pk) = 1)",
            (OWN_PREFIX,),
        ).fetchall()
        tables: dict[str, list[str]] = {}
        for table, column in rows:
            tables.setdefault(table, []).append(column)
        return list(tables.items())

    def _guard(self, table: str, columns: list[str]) -> None:
        quoted = quote(table)
        old = " OR ".join(f"OLD.{quote(column)} IS NULL" for column in columns)
        new = " OR ".join(f"NEW.{quote(column)} IS NULL" for column in columns)
        text = f"table {table}: a row with NULL in its primary key cannot be replicated".replace("'", "''")
        for verb, condition in (("INSERT", new), ("UPDATE", f"{old} OR {new}"), ("DELETE", old)):
            trigger = quote(f"{OWN_PREFIX}{verb}_{table}")
            self._connection.execute(
                f"CREATE TEMP TRIGGER IF NOT EXISTS {trigger} BEFORE {verb} ON main.{quoted} "
                f"WHEN {condition} BEGIN SELECT RAISE(ABORT, '{text}'); END"
            )


class Capture:
    """Records one transaction. Made within it, on the connection that writes; `finish` before the commit."""

    def __init__(self, connection: apsw.Connection, schema: Schema) -> None:
        self._connection = connection
        self._schema = schema
        self._parts: list[Part] = []
        self._pending: Part | None = None
        self.changed_schema = False
        self._schema_count = 0
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
        kind = classify(sql)
        if self._pending is not None:
            self._note_schema_done()
        if kind is Kind.SCHEMA:
            if bindings:
                raise StatementRefused(f"{sql[:_SQL_SHOWN_MAX]!r} is refused: it takes no bindings")
            self._schema_count += 1
            self._take_changes()
            self._session.close()
            with_foreign_keys = self._connection.pragma("foreign_keys")
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
            self._parts.append(self._pending)
            self._pending = None
            self.changed_schema = True
            before = self._schema.sequences or {}
            self._schema.refresh()
            if self._schema.sequences is not None:
                self._schema.sequences = before  # The values are still to be compared.
        self._session = self._open_session()

    def _take_changes(self) -> None:
        if not self._session.is_empty and (changes := self._session.changeset()):
            self._parts.append(Part(PartKind.CHANGES, changes))

    def _take_sequences(self) -> None:
        now = self._schema.read_sequences() or {}
        if now != self._schema.sequences:
            self._parts.append(Part(PartKind.SEQUENCES, encode(sorted(now.items()))))
            self._schema.sequences = now


def _is_users(table: str) -> bool:
    return not table.lower().startswith((OWN_PREFIX, "sqlite_"))


def quote(name: str) -> str:
    """Return a name of SQL in quotation marks."""
    return '"' + name.replace('"', '""') + '"'
