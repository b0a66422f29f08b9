"""`Replica`: a live copy of a primary's SQLite database, for reading.

The copy is a file of its own that any thread and any process may read. `Follower` keeps it up to date; this class
opens it, reads it, waits for positions, and says how it stands.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from messenger import Destination, Listener, Message, Messenger

from . import database
from .applier import Applier
from .errors import DatabaseRefused, Diverged, ReplicationClosed, Stale
from .follower import Follower
from .limits import ReplicationLimits
from .log import check_in_history
from .primary import Primary, make_promise
from .records import (
    Claim,
    Join,
    Knock,
    MalformedRecord,
    NotPrimary,
    Position,
    PromoteQuery,
    StatusQuery,
    decode_from_replica,
    encode,
)
from .rows import Rows
from .status import ReplicaSelfStatus, ReplicaState

logger = logging.getLogger("messenger.replication")


class Replica:
    """A replica of an SQLite database. A context manager; follows from the start.

    Args:
        path: The file of the copy. If there is none, it is made from a snapshot; one that is a replica, or was the
            primary of this database, goes on from where it stands.
        messenger: Carries the messages; stays yours, close it after the replica.
        destination: Where the primary is, or several places where it may be.
        name: What the primary calls this replica, and keeps its place by; by default the messenger's identity.
        listen: Where this replica answers who asks for its status or for the primary, and where it becomes the primary
            if it is promoted; list it among the destinations of the other replicas.
        max_lag: Seconds, > 0; `execute` raises `Stale` if the copy may be older.
        resync: Throw away what is here for a snapshot of the primary, as after `Diverged`.
        on_progress: Called with the status, on threads of the replica, while a snapshot or catching up goes on; it
            must not block. One that raises is not called again.
        on_promote: Called on a thread of its own when somebody asks over `listen` that this replica be promoted; it
            should call `promote`. Without it that is refused.

    Raises:
        DatabaseRefused: The file is in use, or holds a database that is no replica.
        DestinationInUse, DestinationInvalid, apsw.Error.

    Source: docs/replication.md.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        messenger: Messenger,
        destination: Destination | str | int | Sequence[Destination | str | int] = 15445,
        *,
        name: str | None = None,
        listen: Destination | str | int | None = None,
        max_lag: float | None = None,
        resync: bool = False,
        on_progress: Callable[[ReplicaSelfStatus], object] | None = None,
        on_promote: Callable[[], object] | None = None,
        limits: ReplicationLimits | None = None,
    ) -> None:
        if max_lag is not None and not max_lag > 0:
            raise ValueError(f"max_lag is {max_lag!r}, it must be a number of seconds above 0")
        self.path = database.resolve(path)
        self.messenger = messenger
        self.name = messenger.identity if name is None else name
        self._max_lag = max_lag
        self._on_progress = on_progress
        # For one call at a time, so that one that raises is really not called again; others do not wait for it.
        self._progress_lock = threading.Lock()
        self._changed = threading.Condition()
        self._is_closed = False
        self._limits = limits = limits or ReplicationLimits()
        is_one = isinstance(destination, Destination | str | int)
        destinations: Any = [destination] if is_one else list(destination)  # type: ignore[arg-type]  # A sequence.
        if not destinations:
            raise ValueError("destination is an empty sequence; name at least one place where the primary may be")
        self._applier = Applier(self.path, limits)
        self._readers = database.Readers(self.path)
        try:
            self._follower = Follower(self._applier, messenger, destinations, self.name, limits, self._on_change)
        except BaseException:
            self._applier.close()
            raise
        if resync:
            self.resync()
        self._on_promote = on_promote
        self._listener: Listener | None = None
        if listen is not None:
            try:
                self._listener = messenger.listen_for_connection(listen, self._on_question)
            except BaseException:
                self.close()
                raise

    # Reading.

    def execute(self, sql: str, bindings: Any = None) -> Rows:
        """Read; what would write is refused by SQLite.

        Raises:
            Stale: There is no copy yet, or it may be older than `max_lag`. apsw.Error.

        Thread: any; take the rows on the thread that asked.
        """
        self._check_open()
        if not self._applier.database:
            raise Stale(f"{self.path} has no copy of the database yet ({self._follower.trouble or 'it is on its way'})")
        if self._max_lag is not None:
            lag_s = self._lag_s(time.monotonic())
            if lag_s is None or lag_s > self._max_lag:
                shown = "unknown" if lag_s is None else f"{lag_s:.3f} s"
                raise Stale(f"the lag is {shown}, max_lag is {self._max_lag} s")
        return Rows(iter(self._readers.get().execute(sql, bindings)))

    def wait_for(self, position: tuple[int, int], timeout: float = 5.0) -> None:
        """Return once a transaction, and all before it, can be read here.

        Args:
            position: The (term, LSN) that the primary gave.
            timeout: Seconds, >= 0.

        Raises:
            Stale: Not in time. Diverged: This replica takes nothing more, or the transaction is not in its history.
        """
        wanted = Position(*position)
        deadline_at = time.monotonic() + timeout
        with self._changed:
            while True:
                self._check_open()
                head = self._applier.head
                if head.position >= wanted:  # Of a later term: then it is known whether it will ever come.
                    break
                if self._follower.state is ReplicaState.DIVERGED:
                    raise Diverged(f"{self.path} has diverged {self._applier.diverged}")
                left_s = deadline_at - time.monotonic()
                if left_s <= 0:
                    follower = self._follower
                    why = f"{follower.state}, {follower.trouble}" if follower.trouble else str(follower.state)
                    raise Stale(f"position {wanted} did not come within {timeout} s, this is {head.position} ({why})")
                self._changed.wait(left_s)
        if head.term > wanted.term:
            check_in_history(self._readers.get(), wanted)

    # What is known.

    @property
    def position(self) -> Position:
        """The (term, LSN) of the newest transaction that can be read here. Thread: any."""
        return self._applier.head.position

    def status(self) -> ReplicaSelfStatus:
        """Return how the replica stands. Thread: any."""
        follower, applier, now = self._follower, self._applier, time.monotonic()
        head, sink = applier.head, applier.sink
        return ReplicaSelfStatus(
            path=self.path,
            database=applier.database,
            role="replica",
            state=follower.state,
            primary=follower.destination,
            term=head.term,
            lsn=head.lsn,
            durable_lsn=applier.durable_lsn,
            primary_lsn=follower.primary_lsn,
            lag_transactions=max(0, follower.primary_lsn - head.lsn),
            lag_s=self._lag_s(now),
            contact_s=None if follower.contact_at is None else now - follower.contact_at,
            snapshot_bytes=sink.bytes_done if sink is not None else 0,
            snapshot_bytes_total=sink.bytes_total if sink is not None else 0,
            transaction_count=applier.transaction_count,
            group_count=applier.group_count,
            snapshot_count=follower.snapshot_count,
            malformed_count=follower.malformed_count,
            trouble=follower.trouble,
            diverged=str(applier.diverged) if applier.diverged is not None else "",
            lost_path=applier.lost_path,
        )

    def _lag_s(self, now: float) -> float | None:
        fresh_at = self._follower.fresh_at
        return None if fresh_at is None else now - fresh_at

    def _on_change(self) -> None:
        with self._changed:
            self._changed.notify_all()
        is_going_on = self._follower.state in (ReplicaState.SNAPSHOT, ReplicaState.CATCHING_UP)
        if is_going_on and self._progress_lock.acquire(blocking=False):
            try:
                self._tell_progress()
            finally:
                self._progress_lock.release()

    def _tell_progress(self) -> None:
        if self._on_progress is None:
            return
        try:
            self._on_progress(self.status())
        except Exception:
            # What is replicated must not hang on whether somebody can show it.
            logger.exception("! on_progress of %s raised, it is not called any more", self.name)
            self._on_progress = None

    # Changing.

    def resync(self) -> None:
        """Throw away what is here for a snapshot of the primary; returns at once, and it can be read meanwhile."""
        self._check_open()
        self._follower.ask_snapshot()

    def promote(
        self,
        destination: Destination | str | int | None = None,
        *,
        commit: str = "local",
        acknowledgements: int = 1,
        timeout: float = 5.0,
    ) -> Primary:
        """Make this replica the primary, under the next term; the replica is closed then.

        What was not replicated to here is lost, as far as nobody else has it: promote the one that is furthest. Only
        one may be promoted. The places that this replica followed are told, so that an old primary there is fenced.

        Args:
            destination: Where to listen; by default `listen`, or else the place that was followed.
            commit, acknowledgements, timeout: Of the primary.

        Returns:
            The primary; close it in the end.

        Raises:
            DatabaseRefused, ValueError, DestinationInvalid: There is no copy yet, or it has diverged, or an argument is
            wrong; the replica stays as it is. DestinationInUse: The old primary is still there, say; the file can be
            opened again as a replica.
        """
        self._check_open()
        if not self._applier.database or self._applier.diverged is not None:
            what = self._applier.diverged or "there is no copy yet"
            raise DatabaseRefused(f"{self.path} cannot be promoted: {what}")
        places = self._follower.destinations
        if destination is None:
            destination = places[0] if self._listener is None else self._listener.destination
        # What can be seen to be wrong must leave the replica as it is.
        Destination.parse(destination)
        make_promise(commit, acknowledgements, timeout)
        self.close()
        return Primary(
            self.path,
            self.messenger,
            destination,
            commit=commit,
            acknowledgements=acknowledgements,
            timeout=timeout,
            others=places,
            promote=True,
            limits=self._limits,
        )

    def _on_question(self, message: Message) -> None:
        """Answer who asks this replica, on the messenger's thread."""
        try:
            record = decode_from_replica(message.contents)
        except MalformedRecord:
            self._follower.malformed_count += 1
            return
        if isinstance(record, Knock | Join):
            follower = self._follower
            # While it looks for a primary itself, what it asks now is no news to anybody.
            primary: tuple[str, ...] = () if follower.state is ReplicaState.CONNECTING else (follower.destination,)
            message.reply(encode(NotPrimary(record.stream, self._applier.head.term, primary)))
        elif isinstance(record, Claim):
            self._follower.hear_claim(record)
        elif isinstance(record, StatusQuery):
            message.reply(msgspec.json.encode(self.status()))
        elif isinstance(record, PromoteQuery) and self._on_promote is None:
            message.reply(msgspec.json.encode({"error": "this replica does not let itself be promoted from outside"}))
        elif isinstance(record, PromoteQuery) and self._on_promote is not None:
            message.reply(msgspec.json.encode({"promoting": self.path}))
            threading.Thread(target=self._on_promote, name="replication-promote", daemon=True).start()
        else:
            self._follower.malformed_count += 1

    def _check_open(self) -> None:
        if self._is_closed:
            raise ReplicationClosed(f"{self.path} is closed")

    # Life.

    def close(self) -> None:
        """Follow no more, and close the file. Twice is fine. Thread: any but the messenger's."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._listener is not None:
            self._listener.close()
        self._follower.stop()
        self._readers.close()
        self._applier.close()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Replica {self.name!r} in {self.path} at {self.position}>"
