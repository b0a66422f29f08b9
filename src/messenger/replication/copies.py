"""Which copy a file is, and what a primary remembers of the copies that it knows.

A replica's file keeps a random id, which says that it is the same copy when it comes back, under whatever name: one
file must not confirm a transaction twice. The id is of the file, so a snapshot that takes the place of what is in it
changes nothing, and a promotion, from which on the file is no copy, ends it. A file of before there were ids gets one
when it is opened.

What must never happen here: a file that comes by the id of another one through what it takes over from it.
"""

import logging
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

import apsw

from .database import add_own_tables, transaction

logger = logging.getLogger("messenger.replication")


class Known(NamedTuple):
    """What a primary remembers of a replica.

    Attributes:
        name: The replica's.
        applied: Up to which LSN it has all, on its disk.
        contact_at: When it last said anything: seconds since 1970, 0 if it never did.
        diverged: Why it takes nothing more, or empty.
        copy: The id of its file; empty if it is older than these.
    """

    name: str
    applied: int
    contact_at: float
    diverged: str
    copy: str


def keep_copy(connection: apsw.Connection, copy: str) -> str:
    """Return the id that a replica's file keeps; if it has none, it keeps this one from now on."""
    try:
        add_own_tables(connection)
        rows: list[Any] = connection.execute("SELECT copy FROM _messenger_copies WHERE replica IS NULL").fetchall()
        if rows:
            return str(rows[0][0])
        with transaction(connection):
            connection.execute("INSERT INTO _messenger_copies VALUES (NULL, ?)", (copy,))
    except apsw.Error as error:
        # Such as a full disk; and one that goes on with nothing but this id may have another one the next time.
        logger.warning("! %s keeps no id of its own, so its name alone tells who it is: %s", connection.filename, error)
        return ""
    return copy


def begin_copy(connection: apsw.Connection, copy: str) -> None:
    """Give what was another's file this id, or a new one, and forget what that remembered; within a transaction."""
    forget_replicas(connection)
    connection.execute("INSERT INTO _messenger_copies VALUES (NULL, ?)", (copy or secrets.token_hex(16),))


def forget_replicas(connection: apsw.Connection) -> None:
    """Forget all replicas, and the id of the file itself; within a transaction."""
    add_own_tables(connection)
    connection.execute("DELETE FROM _messenger_replicas")
    connection.execute("DELETE FROM _messenger_copies")


def remember_replicas(connection: apsw.Connection, replicas: Iterable[Known]) -> None:
    """Remember these replicas, and no others; within a transaction."""
    known = list(replicas)
    connection.execute("DELETE FROM _messenger_replicas")
    connection.executemany("INSERT INTO _messenger_replicas VALUES (?, ?, ?, ?)", [each[:4] for each in known])
    connection.execute("DELETE FROM _messenger_copies WHERE replica IS NOT NULL")
    connection.executemany("INSERT INTO _messenger_copies VALUES (?, ?)", [(each.name, each.copy) for each in known])


def known_replicas(connection: apsw.Connection) -> list[Known]:
    """Return what was remembered."""
    rows: list[Any] = connection.execute(
        "SELECT name, applied, contact_at, diverged, coalesce(copy, '') "
        "FROM _messenger_replicas LEFT JOIN _messenger_copies ON replica = name"
    ).fetchall()
    return [Known(*row) for row in rows]
