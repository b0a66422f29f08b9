"""`Transaction`: what the user does within one transaction of a primary."""

from collections.abc import Iterator, Sequence

import apsw

from .capture import Capture
from .errors import StatementRefused
from .records import Position
from .rows import Rows
from .writer import Bindings


class Transaction:
    """A transaction that is open, given by `with primary.transaction() as tx:`. Used on the thread that opened it.

    Attributes:
        position: Its (term, LSN), once it is committed.
    """

    def __init__(self, cursor_of: apsw.Connection, capture: Capture) -> None:
        self.position: Position | None = None
        self._connection = cursor_of
        self._capture = capture
        self._cursors: list[apsw.Cursor] = []
        self._has_ended = False

    def execute(self, sql: str, bindings: Bindings = None) -> Rows:
        """Run statements within the transaction; take the rows before it ends.

        Args:
            sql: One or more statements. Those that change the schema are replicated as they stand.
            bindings: A sequence or mapping, as apsw takes them.

        Raises:
            StatementRefused: It cannot be replicated. apsw.Error: SQLite refused it.
        """
        cursor = self._cursor()
        try:
            return Rows(iter(cursor.execute(sql, bindings)))
        except BaseException:
            self._capture.forget_pending()
            raise

    def executemany(self, sql: str, bindings: Sequence[Bindings] | Iterator[Bindings]) -> Rows:
        """Run a statement once for each of many bindings, as `execute` does."""
        cursor = self._cursor()
        try:
            return Rows(iter(cursor.executemany(sql, bindings)))
        except BaseException:
            self._capture.forget_pending()
            raise

    def last_insert_rowid(self) -> int:
        """Return the rowid of the row inserted last."""
        return self._connection.last_insert_rowid()

    def _cursor(self) -> apsw.Cursor:
        if self._has_ended:
            raise StatementRefused("the transaction has ended")
        self._cursors = [cursor for cursor in self._cursors if _is_under_way(cursor)]
        cursor = self._connection.cursor()
        cursor.exec_trace = self._capture.on_statement
        self._cursors.append(cursor)
        return cursor

    def finish(self) -> None:
        """Run what was not taken yet of statements that are under way. For `Primary`."""
        for cursor in self._cursors:
            for _ in cursor:
                pass

    def end(self) -> None:
        """Let go of all statements, and run no more. For `Primary`."""
        self._has_ended = True
        for cursor in self._cursors:
            cursor.close(force=True)


def _is_under_way(cursor: apsw.Cursor) -> bool:
    try:
        return bool(cursor.has_vdbe)
    except apsw.ExecutionCompleteError:
        return False
