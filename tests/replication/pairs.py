"""Primaries and replicas in one process, for the tests: made by a factory that closes them all."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

from messenger import Messenger
from messenger.replication import Primary, Replica, ReplicaState, ReplicationLimits
from messenger.replication.database import quote
from tests.conftest import free_port, wait_until

BOOKS = "CREATE TABLE books (id INTEGER PRIMARY KEY, name TEXT)"
INSERT = "INSERT INTO books (name) VALUES (?)"
SELECT = "SELECT id, name FROM books ORDER BY id"


class Cluster:
    """One database, its primary and its replicas, each with a messenger of its own."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.port = free_port()
        self._stack = stack

    def messenger(self, identity: str) -> Messenger:
        made = Messenger(identity)
        self._stack.callback(made.close, timeout=0)
        return made

    def primary(self, name: str = "primary", destination: int | None = None, **options: Any) -> Primary:
        """Open `<name>.db` as the primary."""
        made = Primary(self.folder / f"{name}.db", self.messenger(name), destination or self.port, **options)
        self._stack.callback(made.close)
        return made

    def replica(self, name: str = "replica", destination: Any = None, **options: Any) -> Replica:
        """Open `<name>.db` as a replica."""
        made = Replica(self.folder / f"{name}.db", self.messenger(name), destination or self.port, **options)
        self._stack.callback(made.close)
        return made

    def pair(self, **options: Any) -> tuple[Primary, Replica]:
        """A primary that has a table, and a replica that has it too."""
        primary, replica = self.primary(**options), self.replica()
        primary.execute(BOOKS, commit="local")
        wait_streaming(primary, replica)
        return primary, replica

    def keep(self, closable: Any) -> None:
        """Close it after the test, too."""
        self._stack.callback(closable.close)


NewCluster = Callable[[], Cluster]


@contextlib.contextmanager
def new_cluster(folder: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(folder, stack)


def wait_streaming(primary: Primary, replica: Replica) -> None:
    """Returns once the replica has all, and whoever commits sends to it directly."""
    replica.wait_for(primary.position, timeout=20)
    wait_until(lambda: state_of(primary, replica.name) is ReplicaState.STREAMING)


def state_of(primary: Primary, name: str) -> ReplicaState | None:
    return next((replica.state for replica in primary.status().replicas if replica.name == name), None)


def content_of(path: str | Path) -> dict[str, list[Any]]:
    """All tables of a file and their rows, with rowids where there is no key, read by a connection of its own."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        tables: list[Any] = connection.execute(
            "SELECT name, EXISTS (SELECT 1 FROM pragma_table_info(list.name) WHERE pk) FROM pragma_table_list AS list "
            "WHERE schema = 'main' AND type IN ('table', 'shadow') "
            "AND name NOT LIKE '\\_messenger\\_%' ESCAPE '\\' AND name <> 'sqlite_schema' ORDER BY name"
        ).fetchall()
        content: dict[str, list[Any]] = {}
        for name, has_key in tables:
            rows = connection.execute(f"SELECT {'' if has_key else 'rowid, '}* FROM {quote(name)}")  # noqa: S608
            content[name] = sorted(rows, key=repr)
        schema = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE '%\\_messenger\\_%' ESCAPE '\\'"
        return content | {"sqlite_schema": connection.execute(schema).fetchall()}
    finally:
        connection.close()


def assert_equal(primary: Primary, replica: Replica) -> None:
    """Once the replica has all that the primary has, the two files hold the same."""
    replica.wait_for(primary.position, timeout=20)
    assert content_of(replica.path) == content_of(primary.path)


SMALL = ReplicationLimits(log_transactions_max=10)
