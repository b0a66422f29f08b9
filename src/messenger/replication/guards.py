"""Temporary triggers that refuse what SQLite's session extension would pass over without a word.

At the primary these are rows whose changes it does not record. At a replica they are rows that would run into another
one in a table with an ON CONFLICT clause: applying a change would then replace the other row, leave the new one out, or
end the transaction, where any other table reports a conflict. The triggers live in the connection that writes, not in
the file; they are made for the schema as it is, and made again when it has changed.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apsw

from .database import OWN_PREFIX, quote

# Whatever is stored in a column of such a type has one form: 1 and 1.0 are not both there.
_ONE_FORM = ("INT", "CHAR", "CLOB", "TEXT", "REAL", "FLOA", "DOUB")
_KEY_COLUMNS = """
    SELECT list.name, info.name, upper(info.type), NOT list.wr AND NOT info."notnull", key.coll
    FROM pragma_table_list AS list
    JOIN pragma_index_list(list.name, 'main') AS keys ON keys.origin = 'pk'
    JOIN pragma_index_xinfo(keys.name, 'main') AS key ON key.key
    JOIN pragma_table_info(list.name, 'main') AS info ON info.cid = key.cid
    WHERE list.schema = 'main' AND list.type = 'table'"""
# SQLite's session extension records tables without a primary key by this name of the rowid.
_HIDDEN_ROWIDS = """
    SELECT list.name FROM pragma_table_list AS list
    JOIN pragma_table_xinfo(list.name, 'main') AS info ON lower(info.name) = '_rowid_'
    WHERE list.schema = 'main' AND list.type = 'table'
    AND NOT EXISTS (SELECT 1 FROM pragma_table_info(list.name, 'main') WHERE pk)"""
_UNIQUE_COLUMNS = """
    SELECT keys.name, info.name, key.coll FROM pragma_index_list(?1, 'main') AS keys
    JOIN pragma_index_xinfo(keys.name, 'main') AS key ON key.key
    JOIN pragma_table_xinfo(?1, 'main') AS info ON info.cid = key.cid
    WHERE keys."unique" AND keys.origin <> 'c'"""


class _KeyColumn(NamedTuple):
    """A column of a primary key that has an index of its own, so is not the rowid."""

    table: str
    name: str
    type: str
    is_nullable: bool
    collation: str


def guard_recording(connection: apsw.Connection) -> set[str]:
    """Refuse changes that could not be recorded, at a primary.

    Returns:
        The tables where two primary keys can be equal and not the same, as 'a' and 'A', or 1 and 1.0.
    """
    columns = [_KeyColumn(*row) for row in _rows(connection, _KEY_COLUMNS) if not row[0].startswith(OWN_PREFIX)]
    refused = {
        table: "it has no primary key, and a column named _rowid_" for (table,) in _rows(connection, _HIDDEN_ROWIDS)
    }
    loose: set[str] = set()
    nullable: dict[str, list[str]] = {}
    for column in columns:
        collation = connection.column_metadata("main", column.table, column.name)[1]
        if collation.upper() != column.collation.upper():
            refused[column.table] = f"column {column.name} has another collation than the primary key"
        if collation.upper() != "BINARY" or not any(part in column.type for part in _ONE_FORM):
            loose.add(column.table)
        if column.is_nullable:
            nullable.setdefault(column.table, []).append(quote(column.name))
    wanted: dict[str, str] = {}
    for table, names in nullable.items():
        old = " OR ".join(f"OLD.{name} IS NULL" for name in names)
        new = " OR ".join(f"NEW.{name} IS NULL" for name in names)
        text = f"table {table}: a row with NULL in its primary key cannot be replicated"
        conditions = {"INSERT": new, "UPDATE": f"{old} OR {new}", "DELETE": old}
        wanted.update(_trigger(table, verb, condition, text) for verb, condition in conditions.items())
    for table, why in refused.items():
        text = f"table {table} cannot be replicated: {why}"
        wanted.update(_trigger(table, verb, "1", text) for verb in ("INSERT", "UPDATE", "DELETE"))
    _set(connection, wanted)
    return loose


def guard_conflicts(connection: apsw.Connection) -> None:
    """Let rows that run into another one be conflicts in all tables, at a replica; within or without a transaction."""
    tables = _rows(
        connection,
        "SELECT list.name FROM sqlite_schema JOIN pragma_table_list AS list ON list.name = sqlite_schema.name "
        "WHERE list.schema = 'main' AND list.type = 'table' AND sqlite_schema.sql LIKE '%conflict%'",
    )
    wanted: dict[str, str] = {}
    for (table,) in tables:
        text = f"table {table}: another row is in the way"
        taken = list(_taken(connection, table))
        if taken:
            key = _identity(connection, table)
            insert = " OR ".join(f"EXISTS ({select})" for select in taken)
            update = " OR ".join(f"EXISTS ({select} AND NOT ({key}))" for select in taken)
            wanted.update([_trigger(table, "INSERT", insert, text), _trigger(table, "UPDATE", update, text)])
    _set(connection, wanted)


def drop_guards(connection: apsw.Connection) -> None:
    """Take all guards away, so that they are in the way of no change of the schema."""
    _set(connection, {})


def _taken(connection: apsw.Connection, table: str) -> Iterator[str]:
    """Yield for each unique key of a table a SELECT of the row that has the new one's values there."""
    keys: dict[str, list[str]] = {}
    for key, column, collation in _rows(connection, _UNIQUE_COLUMNS, (table,)):
        name = quote(column)
        keys.setdefault(key, []).append(f"here.{name} COLLATE {quote(collation)} = NEW.{name}")
    columns = _primary_key(connection, table)
    if len(columns) == 1:
        # A rowid under another name has no index; for any other key this is once more what stands above.
        keys["primary key"] = [f"here.{columns[0]} = NEW.{columns[0]}"]
    for conditions in keys.values():
        yield f"SELECT 1 FROM main.{quote(table)} AS here WHERE {' AND '.join(conditions)}"  # noqa: S608  # Quoted.


def _identity(connection: apsw.Connection, table: str) -> str:
    """Return the condition that a row is the one that is changed."""
    columns = _primary_key(connection, table) or ["_rowid_"]
    return " AND ".join(f"here.{name} COLLATE BINARY IS OLD.{name}" for name in columns)


def _primary_key(connection: apsw.Connection, table: str) -> list[str]:
    sql = "SELECT name FROM pragma_table_info(?, 'main') WHERE pk ORDER BY pk"
    return [quote(name) for (name,) in _rows(connection, sql, (table,))]


def _trigger(table: str, verb: str, condition: str, text: str) -> tuple[str, str]:
    """Return the name of a trigger that refuses a row, and what makes it, as SQLite keeps it."""
    name = f"{OWN_PREFIX}{verb}_{table}"
    text = text.replace("'", "''")
    return name, (
        f"CREATE TRIGGER {quote(name)} BEFORE {verb} ON main.{quote(table)} "
        f"WHEN {condition} BEGIN SELECT RAISE(ABORT, '{text}'); END"
    )


def _set(connection: apsw.Connection, wanted: dict[str, str]) -> None:
    """Have these triggers and no others of ours; whatever stands already is left, as a change costs every statement."""
    sql = "SELECT name, sql FROM sqlite_temp_schema WHERE type = 'trigger' AND substr(name, 1, ?) = ?"
    there = dict(_rows(connection, sql, (len(OWN_PREFIX), OWN_PREFIX)))
    for name, text in there.items():
        if wanted.get(name) != text:
            connection.execute(f"DROP TRIGGER temp.{quote(name)}")
    for name, text in wanted.items():
        if there.get(name) != text:
            connection.execute(text.replace("CREATE", "CREATE TEMP", 1))


def _rows(connection: apsw.Connection, sql: str, bindings: Iterable[Any] = ()) -> list[Any]:
    return connection.execute(sql, tuple(bindings)).fetchall()
