"""A primary's writer and a replica's file, without a messenger between them, to test what is recorded and applied."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from messenger.replication import ReplicationLimits
from messenger.replication.applier import Applier
from messenger.replication.confirm import Level
from messenger.replication.content import sum_content
from messenger.replication.database import REPLICA, open_reader, write_state
from messenger.replication.records import Entry
from messenger.replication.writer import Operation, Writer, Written


class Direct:
    """Both files; `run` writes at one, `apply` brings the other up to date."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.entries: list[Entry] = []
        self.writer = Writer(str(folder / "primary.db"), ReplicationLimits(), self._publish)
        stack.callback(self.writer.close)
        path = str(folder / "replica.db")
        copy = apsw.Connection(path)
        with copy.backup("main", self.writer.connection, "main") as backup:
            backup.step(-1)
        write_state(copy, role=REPLICA)
        copy.close()
        self.applier = Applier(path, ReplicationLimits())
        stack.callback(self.applier.close)

    def _publish(self, written: Written) -> None:
        self.entries += written.entries

    def run(self, *statements: str) -> None:
        """Write each as a transaction of its own."""
        for sql in statements:
            operation = Operation(sql, None, Level.LOCAL, 0)
            self.write(operation)
            if operation.error is not None:
                raise operation.error

    def write(self, operation: Operation) -> None:
        """Write one, and what waits with it."""
        self.writer.write(operation, time.monotonic() + 5, lambda: None, lambda lsn: None)

    def apply(self) -> None:
        """Apply what was written and is not applied yet."""
        self.applier.apply(self.entries)
        self.entries.clear()

    def tamper(self, sql: str) -> None:
        """Write into the replica's file, as nobody should."""
        connection = apsw.Connection(self.applier.path)
        connection.execute(sql)
        connection.close()

    def rows(self, sql: str) -> list[Any]:
        """Read at the replica."""
        with contextlib.closing(open_reader(self.applier.path)) as reader:
            return list(reader.execute(sql))

    def assert_equal(self) -> None:
        """The replica holds what the primary does once it has applied what was written."""
        self.apply()
        paths = (self.writer.path, self.applier.path)
        with contextlib.closing(open_reader(paths[0])) as one, contextlib.closing(open_reader(paths[1])) as two:
            assert sum_content(one) == sum_content(two)


@contextlib.contextmanager
def new_direct(folder: Path) -> Iterator[Direct]:
    with contextlib.ExitStack() as stack:
        yield Direct(folder, stack)
