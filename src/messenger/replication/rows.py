"""What a statement returned."""

from collections.abc import Iterator
from typing import Any


class Rows:
    """The rows of one statement, each a tuple; an iterator, taken once.

    Of a statement that only reads, the rows are read as they are taken; take them on the thread that asked.
    """

    def __init__(self, rows: Iterator[Any]) -> None:
        self._rows = rows

    def fetchall(self) -> list[Any]:
        """Return all rows that are left."""
        return list(self._rows)

    def fetchone(self) -> Any:
        """Return the next row, or None after the last."""
        return next(self._rows, None)

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def __next__(self) -> Any:
        return next(self._rows)
