"""Compare the content of two files, each as it stands in one snapshot, whoever writes there meanwhile.

Tables are read side by side in the order of their keys, so that nothing is held in memory and the first row that
differs can be named.
"""

import itertools
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import apsw
import msgspec

from .content import read_rows, with_any_text
from .database import OWN_PREFIX, has_own_tables, open_reader, quote
from .log import read_head
from .records import Position

_SCHEMA = "the schema"
_VALUE_CHARS_MAX = 80


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference of a table.

    Attributes:
        table: Its name, or `the schema`.
        key: Of the first row that differs, or the name of what differs in the schema.
        a, b: What each file has there; empty if nothing.
    """

    table: str
    key: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.table}, {self.key}: {self.a or 'nothing'} / {self.b or 'nothing'}"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What two files have in common.

    Attributes:
        is_equal: Whether they have the same tables, indices, views and triggers, and the same rows.
        position_a, position_b: The (term, LSN) of each; None if it was never replicated.
        table_count, row_count: How many were compared.
        differences: The first of each table.
    """

    is_equal: bool
    position_a: Position | None
    position_b: Position | None
    table_count: int
    row_count: int
    differences: tuple[Difference, ...]


def verify(path_a: str | os.PathLike[str], path_b: str | os.PathLike[str]) -> Comparison:
    """Compare the content of two databases. Files that stand at different positions differ, of course.

    Raises:
        apsw.Error: One cannot be read.

    Thread: any.
    """
    a, b = open_reader(os.fspath(path_a)), open_reader(os.fspath(path_b))
    try:
        a.execute("BEGIN")
        b.execute("BEGIN")
        differences = _compare_schemas(a, b)
        tables = [name for name in _tables(a) if name in set(_tables(b))]
        row_count = 0
        for table in tables:
            count, difference = with_any_text(partial(_compare_rows, a, b, table))
            row_count += count
            differences += [difference] if difference is not None else []
        return Comparison(
            is_equal=not differences,
            position_a=_position(a),
            position_b=_position(b),
            table_count=len(tables),
            row_count=row_count,
            differences=tuple(differences),
        )
    finally:
        a.close(force=True)
        b.close(force=True)


def _position(connection: apsw.Connection) -> Position | None:
    return read_head(connection).position if has_own_tables(connection) else None


def _compare_schemas(a: apsw.Connection, b: apsw.Connection) -> list[Difference]:
    mine, others = _schema(a), _schema(b)
    return [
        Difference(table=_SCHEMA, key=name, a=mine.get(name, ""), b=others.get(name, ""))
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    ]


def _schema(connection: apsw.Connection) -> dict[str, str]:
    rows: list[Any] = connection.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE substr(tbl_name, 1, ?) <> ?", (len(OWN_PREFIX), OWN_PREFIX)
    ).fetchall()
    # What ANALYZE collects is no content.
    return {f"{kind} {name}": sql or name for kind, name, sql in rows if not name.startswith("sqlite_stat")}


def _tables(connection: apsw.Connection) -> list[str]:
    """Return the names of the tables that hold rows; virtual tables keep theirs in others."""
    rows: list[Any] = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type IN ('table', 'shadow') "
        "AND substr(name, 1, ?) <> ? AND name <> 'sqlite_schema' AND name NOT LIKE 'sqlite_stat%' ORDER BY name",
        (len(OWN_PREFIX), OWN_PREFIX),
    ).fetchall()
    return [name for (name,) in rows]


def _compare_rows(a: apsw.Connection, b: apsw.Connection, table: str, is_utf_8: bool) -> tuple[int, Difference | None]:
    """Return how many rows are equal from the start, and the first difference."""
    count = 0
    keys = _key(a, table)
    for row_a, row_b in itertools.zip_longest(*(_rows(one, table, keys, is_utf_8) for one in (a, b))):
        if row_a is None or row_b is None or row_a != row_b or list(map(type, row_a)) != list(map(type, row_b)):
            key = ", ".join(map(repr, (row_b if row_a is None else row_a)[: len(keys)]))
            shown_a, shown_b = (_show(row, len(keys)) for row in (row_a, row_b))
            return count, Difference(table=table, key=key, a=shown_a, b=shown_b)
        count += 1
    return count, None


def _key(connection: apsw.Connection, table: str) -> list[str]:
    """Return what rows are told apart by, as SQL: the primary key, or the rowid where there is none."""
    if table == "sqlite_sequence":
        return ["name"]
    rows: list[Any] = connection.execute(
        "SELECT name FROM pragma_table_info(?) WHERE pk ORDER BY pk", (table,)
    ).fetchall()
    return [quote(name) for (name,) in rows] or ["rowid"]


def _rows(connection: apsw.Connection, table: str, keys: list[str], is_utf_8: bool) -> Iterator[tuple[Any, ...]]:
    """Yield the rows in the order of their keys, which come first."""
    columns = ", ".join(keys)
    sql = f"SELECT {columns}, * FROM {quote(table)} ORDER BY {columns}"  # noqa: S608  # Names, quoted.
    yield from read_rows(connection, sql, is_utf_8=is_utf_8, order=len(keys))


def _show(row: tuple[Any, ...] | None, key_count: int) -> str:
    shown = "" if row is None else repr(row[key_count:])
    return shown if len(shown) <= _VALUE_CHARS_MAX else f"{shown[:_VALUE_CHARS_MAX]}…"
