"""Runs SQL at a primary or a replica: what comes on standard input, and a file that is loaded.

What must never happen here: a statement that is told to have failed and was committed, or the other way round; an end
that looks like success when not everything was run.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import apsw

from messenger import MessengerError
from messenger.replication import DiskFailed, NotConfirmed, Primary, Replica, Transaction

from .sql import Failed, Statement, decode_lines, show_row, split_statements
from .terminal import FAILED, INTERRUPTED, UNKNOWN, complain, show_amount, write

# A load commits so much at a time, because one by one would wait as often for the disk, and a transaction has a limit.
LOAD_STATEMENTS = 1_000
LOAD_CHARS = 4 * 1024 * 1024


def is_terminal() -> bool:
    """Return whether somebody types the SQL."""
    return sys.stdin is not None and sys.stdin.isatty()


def _read_lines() -> Iterator[str]:
    """Yield what comes on standard input, with a prompt if that is a terminal."""
    if sys.stdin is None:
        return
    if not is_terminal():
        yield from decode_lines(sys.stdin.buffer)
        return
    with contextlib.suppress(EOFError):
        import readline  # noqa: F401  # Its import makes `input` edit lines.

        while True:
            try:
                line = input("sql> ")
                line.encode()
            except UnicodeError:
                complain("the line is no UTF-8 text, and was not taken")
            else:
                yield line + "\n"


class Load:
    """Runs the statements of a file, many in a transaction. BEGIN and COMMIT in it bound nothing."""

    def __init__(self, primary: Primary, path: str) -> None:
        self._primary = primary
        self._path = path
        self._open = contextlib.ExitStack()
        self._tx: Transaction | None = None
        self._chars = 0
        self._line = 0  # The statement that is run ends here.
        self._count = self._done_line = self._committed_count = self._committed_line = 0

    def run(self) -> int:
        """Run all, and return how many statements there were.

        Raises:
            Failed: One of them, or their commit, failed; the text says up to where all is committed.
        """
        try:
            with self._open, open(self._path, "rb") as file, show_amount() as show:
                size_bytes = os.path.getsize(self._path)
                for statement in split_statements(decode_lines(file)):
                    if show:
                        show("load", file.tell(), size_bytes)
                    self._line = statement.line
                    self._run_one(statement)
                self._commit()
        except KeyboardInterrupt:
            complain(f"{self._path}: interrupted; {self._committed(is_sure=self._tx is not None)}")
            raise
        except DiskFailed as error:
            raise Failed(f"{self._path}, line {self._line}: {error}; {self._committed(is_sure=False)}") from error
        except Failed as error:
            raise Failed(f"{self._path}, {error}; {self._committed()}") from error
        except (apsw.Error, ValueError, MessengerError) as error:
            raise Failed(f"{self._path}, line {self._line}: {error}; {self._committed()}") from error
        return self._count

    def _run_one(self, statement: Statement) -> None:
        if statement.kind in ("begin", "commit"):
            return
        if statement.kind == "rollback":
            raise Failed(f"line {self._line}: ROLLBACK cannot be done, as BEGIN bounds nothing in a load")
        if statement.word == "PRAGMA":
            self._commit()
            self._primary.execute(statement.text, commit="local")
            self._note_done(statement)
            self._commit()
        else:
            self._tx = self._tx or self._open.enter_context(self._primary.transaction(commit="local"))
            self._tx.execute(statement.text)
            self._note_done(statement)
            if self._count - self._committed_count >= LOAD_STATEMENTS or self._chars >= LOAD_CHARS:
                self._commit()

    def _note_done(self, statement: Statement) -> None:
        self._count += 1
        self._chars += len(statement.text)
        self._done_line = statement.line

    def _commit(self) -> None:
        self._tx = None
        self._open.close()
        self._chars = 0
        self._committed_count, self._committed_line = self._count, self._done_line

    def _committed(self, *, is_sure: bool = True) -> str:
        text = "nothing of it is committed"
        if self._committed_count:
            text = f"committed are {self._committed_count} of its statements, up to line {self._committed_line}"
        return text if is_sure else f"{text}, or more, up to line {self._line}"


class Shell:
    """Runs the statements of standard input at a primary or a replica, and prints rows."""

    def __init__(self, database: Callable[[], Primary | Replica], as_json: bool) -> None:
        self._database = database
        self._as_json = as_json
        self._open = contextlib.ExitStack()
        self._tx: Transaction | None = None
        self._waits = False  # For input, so all that has come was run.

    def run(self) -> int:
        """Run all; return the exit status. On a terminal an error is told and the next statement read, else it ends."""
        try:
            for statement in split_statements(self._read()):
                status = self._run_one(statement)
                if status and (status == INTERRUPTED or not is_terminal()):
                    return status
            return 0
        except KeyboardInterrupt:
            if self._waits:
                raise
            complain("interrupted between two statements")
            return INTERRUPTED
        finally:
            if self._tx is not None:
                # Nothing of a transaction that is still open counts.
                self._roll_back()
                complain("the transaction that was still open is rolled back")

    def _read(self) -> Iterator[str]:
        self._waits = True
        for line in _read_lines():
            self._waits = False
            yield line
            self._waits = True

    def _run_one(self, statement: Statement) -> int:
        where = "" if is_terminal() else f"line {statement.line}: "
        try:
            self._execute(statement)
        except NotConfirmed as error:
            complain(f"{where}{error}")
            return UNKNOWN
        except UnicodeDecodeError:
            complain(f"{where}a value is text that is no UTF-8; CAST(… AS BLOB) shows it")
            return FAILED
        except (apsw.Error, ValueError, MessengerError) as error:
            complain(f"{where}{error}")
            return FAILED
        except KeyboardInterrupt:
            what = "" if self._tx is not None else "; it may be committed here or not"
            complain(f"{where}interrupted{what}")
            return INTERRUPTED
        return 0

    def _execute(self, statement: Statement) -> None:
        database = self._database()
        kind = statement.kind
        if not kind or isinstance(database, Replica):
            for row in (self._tx or database).execute(statement.text):
                write(show_row(row, self._as_json))
        elif kind == "begin":
            if self._tx is not None:
                raise Failed("a transaction is open already; COMMIT or ROLLBACK ends it")
            self._tx = self._open.enter_context(database.transaction())
        elif self._tx is None:
            raise Failed(f"no transaction is open, so {statement.word} ends none")
        elif kind == "commit":
            self._tx = None
            self._open.close()
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        self._tx = None
        with contextlib.suppress(_RollBack), self._open:
            raise _RollBack


class _RollBack(Exception):
    """Leaves a transaction without committing it."""
