"""Transactions that no other replica has, saved for people to read before they leave the database.

One JSON object a line: the position, the time, and the changes. For each row these are its table, what was done, and
the values before and after by the number of their column, those that did not change left out; for the schema the SQL.
Blobs are `{"hex": …}`, and infinity is `{"real": "inf"}`. Of tables without a primary key, column 0 is the rowid. Where
text is not UTF-8, the changes of the transaction are a changeset of SQLite's session extension, `{"changeset": …}`.
"""

import math
import os
from collections.abc import Iterable
from typing import Any

import apsw
import msgspec

from .records import Entry, PartKind, decode_parts, decode_sequences


def save_lost(path: str, entries: Iterable[Entry]) -> None:
    """Write entries into a file, durable when this returns; one that is there is replaced.

    Raises:
        OSError: It cannot be written. MalformedRecord.
    """
    unfinished = f"{path}.unfinished"
    with open(unfinished, "wb") as file:
        for entry in entries:
            file.write(msgspec.json.encode(_describe(entry)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _describe(entry: Entry) -> dict[str, Any]:
    changes: list[dict[str, Any]] = []
    for part in decode_parts(entry.body):
        if part.kind is PartKind.CHANGES:
            try:
                changes += [_describe_change(change) for change in apsw.Changeset.iter(part.data)]
            except UnicodeDecodeError:
                changes.append({"changeset": part.data.hex()})
        elif part.kind in (PartKind.SQL, PartKind.SQL_FOREIGN_KEYS):
            changes.append({"sql": part.data.decode()})
        elif part.kind is PartKind.SEQUENCES:
            rows = decode_sequences(part.data)
            changes.append({"sequences": {str(name): _describe_value(value) for name, value in rows}})
    return {"term": entry.term, "lsn": entry.lsn, "at_us": entry.at_us, "changes": changes}


def _describe_change(change: apsw.TableChange) -> dict[str, Any]:
    described: dict[str, Any] = {"table": change.name, "operation": change.op}
    if change.old is not None:
        described["before"] = _describe_values(change.old)
    if change.new is not None:
        described["after"] = _describe_values(change.new)
    return described


def _describe_values(values: Iterable[Any]) -> dict[str, Any]:
    """Return values by the number of their column: those of an update are not all there."""
    return {str(number): _describe_value(value) for number, value in enumerate(values) if value is not apsw.no_change}


def _describe_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    # JSON has no infinity; what writes it writes null.
    return {"real": str(value)} if isinstance(value, float) and not math.isfinite(value) else value
