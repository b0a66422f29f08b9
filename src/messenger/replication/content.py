"""What a database holds, as checksums that two databases can compare, down to the row that differs.

Each row gets a checksum; by the checksum of its key it falls into one of a fixed number of buckets of its table, and a
bucket's sum is the sum of its rows' checksums. So no order is needed, a row that is missing changes one bucket only,
and what must be compared is small. Where a bucket differs, its rows are compared one by one. The schema and the
AUTOINCREMENT counters are compared as tables; replication's own tables are not.
"""

from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec

from .database import OWN_PREFIX, quote

BUCKET_COUNT = 1_024
_SUM_BYTES = 16
_SUM_MODULUS = 1 << (8 * _SUM_BYTES)
_PROGRESS_ROWS = 10_000

T = TypeVar("T")
Row = tuple[Any, ...]
Sums = dict[str, dict[int, bytes]]

_SCHEMA = (
    "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE substr(name, 1, 11) <> '_messenger_' "
    "AND substr(tbl_name, 1, 11) <> '_messenger_' AND name NOT LIKE 'sqlite\\_stat%' ESCAPE '\\'"
)
_SEQUENCES = "SELECT name, seq FROM sqlite_sequence"
_encode = msgspec.msgpack.Encoder().encode
# How text is encoded that is not UTF-8.
_Text = partial(msgspec.msgpack.Ext, 1)


class Difference(NamedTuple):
    """A row that two databases do not have alike.

    Attributes:
        table, key: Where; the key as SQL values are shown, a rowid where there is no primary key.
        what: `missing here`, `missing there`, or `differs`.
    """

    table: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"table {self.table}, key {self.key}: {self.what}"


def _tables(connection: apsw.Connection) -> dict[str, tuple[str, list[int]]]:
    """Return for each table how it is read, and the numbers of the columns that are its key."""
    tables: dict[str, tuple[str, list[int]]] = {"sqlite_schema": (_SCHEMA, [0, 1])}
    names: list[Any] = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type IN ('table', 'shadow') ORDER BY name"
    ).fetchall()
    for (name,) in names:
        if name == "sqlite_sequence":
            tables[name] = (_SEQUENCES, [0])
        elif not name.lower().startswith((OWN_PREFIX, "sqlite_")):
            rows: list[Any] = connection.execute(
                "SELECT pk FROM pragma_table_xinfo(?) WHERE hidden <> 1 ORDER BY cid", (name,)
            ).fetchall()
            key = [number for number, (pk,) in enumerate(rows) if pk]
            columns = "*" if key else "rowid, *"
            tables[name] = (f"SELECT {columns} FROM {quote(name)}", key or [0])  # noqa: S608  # A quoted name.
    return tables


def read_rows(connection: apsw.Connection, sql: str, *, is_utf_8: bool = True, order: int = 0) -> Iterator[Row]:
    """Yield what a SELECT returns.

    Args:
        is_utf_8: Whether to take for granted that all text is; else bytes that are not become lone surrogates, at twice
            the time.
        order: By how many of the first columns to sort, if it is not taken for granted.

    Raises:
        UnicodeDecodeError: It was taken for granted, and is not so. SQLite stores whatever bytes are cast to text.
    """
    rows: Any = connection.execute(sql)
    if is_utf_8:
        yield from rows
        return
    encoding = connection.pragma("encoding").replace("UTF-16", "UTF-16-")
    names = [f"c{number}" for number in range(len(rows.get_description()))]
    rows.close(force=True)
    columns = ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END" for name in names
    )
    sorting = f" ORDER BY {', '.join(names[:order])}" if order else ""
    for row in connection.execute(f"WITH r({', '.join(names)}) AS ({sql}) SELECT {columns} FROM r{sorting}"):  # noqa: S608
        yield tuple(
            value.decode(encoding, "surrogateescape") if kind == "text" else value
            for kind, value in zip(row[::2], row[1::2], strict=True)
        )


def with_any_text(read: Callable[[bool], T]) -> T:
    """Return what a function returns that reads rows, and takes for granted that text is UTF-8, or else does not."""
    try:
        return read(True)
    except UnicodeDecodeError:
        return read(False)


def _encode_any(row: Row) -> bytes:
    try:
        return _encode(row)
    except UnicodeEncodeError:
        # A text must not have the sum of the blob with the same bytes.
        return _encode([_Text(one.encode(errors="surrogateescape")) if isinstance(one, str) else one for one in row])


def _sum_rows(
    connection: apsw.Connection, sql: str, key: list[int], is_utf_8: bool
) -> Iterator[tuple[int, Row, bytes]]:
    """Yield the bucket, the key and the checksum of each row."""
    encode = _encode if is_utf_8 else _encode_any
    for row in read_rows(connection, sql, is_utf_8=is_utf_8):
        values = tuple(row[number] for number in key)
        digest = blake2b(encode(values), digest_size=2).digest()
        yield int.from_bytes(digest) % BUCKET_COUNT, values, blake2b(encode(row), digest_size=_SUM_BYTES).digest()


def sum_content(connection: apsw.Connection, on_rows: Callable[[int], object] | None = None) -> Sums:
    """Return the sums of all buckets that are not empty, by table; within a transaction that reads.

    Args:
        on_rows: Called now and then with the number of rows read since the last time.
    """
    sums: Sums = {}
    row_count = 0

    def sum_table(sql: str, key: list[int], is_utf_8: bool) -> dict[int, int]:
        nonlocal row_count
        buckets: dict[int, int] = {}
        for bucket, _, checksum in _sum_rows(connection, sql, key, is_utf_8):
            buckets[bucket] = (buckets.get(bucket, 0) + int.from_bytes(checksum)) % _SUM_MODULUS
            row_count += 1
            if on_rows is not None and row_count >= _PROGRESS_ROWS:
                on_rows(row_count)
                row_count = 0
        return buckets

    for table, (sql, key) in _tables(connection).items():
        buckets = with_any_text(partial(sum_table, sql, key))
        sums[table] = {bucket: total.to_bytes(_SUM_BYTES) for bucket, total in buckets.items()}
    if on_rows is not None and row_count:
        on_rows(row_count)
    return sums


def read_bucket(connection: apsw.Connection, table: str, bucket: int) -> dict[str, bytes]:
    """Return the keys, as text, and checksums of the rows in one bucket."""
    known = _tables(connection).get(table)
    if known is None:
        return {}
    return with_any_text(
        lambda is_utf_8: {
            ", ".join(map(repr, values)): checksum
            for number, values, checksum in _sum_rows(connection, *known, is_utf_8)
            if number == bucket
        }
    )


def different_buckets(here: Sums, there: Sums) -> Iterator[tuple[str, int]]:
    """Yield the table and the number of each bucket that is not alike; the schema's first."""
    for table in sorted(here.keys() | there.keys(), key=lambda name: (name != "sqlite_schema", name)):
        own, other = here.get(table, {}), there.get(table, {})
        for bucket in sorted(own.keys() | other.keys()):
            if own.get(bucket) != other.get(bucket):
                yield table, bucket


def compare_buckets(table: str, here: dict[str, bytes], there: dict[str, bytes]) -> Iterator[Difference]:
    """Yield the rows of one bucket that are not alike."""
    for key in sorted(here.keys() | there.keys()):
        if key not in here:
            yield Difference(table, key, "missing here")
        elif key not in there:
            yield Difference(table, key, "missing there")
        elif here[key] != there[key]:
            yield Difference(table, key, "differs")
