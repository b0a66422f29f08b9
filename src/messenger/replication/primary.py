"""`Primary`: an SQLite file whose transactions are replicated.

A commit goes through four hands: the `Writer` makes it an entry of the log in the transaction that makes its changes,
the `Hub` sends it to the replicas, the caller's thread makes it durable (one fsync for all that wait), and the
`Confirmations` wake the caller when enough replicas have said that they have it. Sending comes before the fsync, so
that the disks here and there work at the same time.

What must never happen here: a commit that returns without what its level promises.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import apsw
import msgspec

from messenger import Destination, Messenger, interrupts

from . import database
from .capture import Kind, classify
from .check import PeriodicCheck, PrimaryCheck
from .claims import Claims
from .confirm import Level, Waiter
from .errors import DiskFailed, Fenced, NotConfirmed, WriterBusy
from .hub import Hub
from .limits import ENTRY_ROOM_BYTES, MESSAGE_ROOM_BYTES, ReplicationLimits
from .log import check_in_history, read_age_s
from .records import Claim, Part, PartKind, Position
from .rows import Rows
from .snapshot import remove_leftovers
from .status import PrimaryStatus, ReplicaStatus
from .transaction import Transaction
from .writer import Bindings, Operation, Writer, Written, wait_until

logger = logging.getLogger("messenger.replication")

ACKNOWLEDGEMENTS_MAX = 64


class Promise(NamedTuple):
    """What a commit waits for."""

    level: Level
    replicas: int
    timeout: float


def make_promise(commit: str, acknowledgements: int, timeout: float) -> Promise:
    """Return what a commit is to wait for. ValueError: That cannot be."""
    if type(acknowledgements) is not int or not 1 <= acknowledgements <= ACKNOWLEDGEMENTS_MAX:
        raise ValueError(f"acknowledgements is {acknowledgements!r}, it must be 1 to {ACKNOWLEDGEMENTS_MAX}")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout is {timeout!r}, it must be a finite number of seconds above 0")
    return Promise(Level.parse(commit), acknowledgements, timeout)


class Primary:
    """The primary of a replicated SQLite database. A context manager; open from the start.

    Args:
        path: The file. It is made if there is none; one that was never replicated is adopted as it is.
        messenger: Carries the messages; stays yours, close it after the primary.
        destination: Where replicas join, as `listen_for_connection` takes it.
        commit: The level that a commit waits for: `local` (on this disk), `received` (in a replica's memory),
            `durable` (on its disk too), `applied` (readable there too). Each includes those before it.
        acknowledgements: How many replicas must confirm it, 1 to 64.
        timeout: Seconds, > 0, that a commit waits for other transactions, and then for the replicas.
        check_every: Seconds, > 0, between two checks of the content of all replicas (`check`); by default none are made
            but those that you ask for.
        others: Other places where a primary of this database may be. They are asked first, for up to a second, and
            told again and again; whoever has the lower term is fenced.
        promote: Make the file of a replica, or of a fenced primary, the primary under the next term.
        limits: What the log may hold, and what may be under way.

    Raises:
        DatabaseRefused: The file is in use, or belongs to a replica. Fenced: Another primary was promoted over it.
        DestinationInUse, DestinationInvalid, apsw.Error.

    Source: docs/replication.md.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        messenger: Messenger,
        destination: Destination | str | int = 15445,
        *,
        commit: str = "local",
        acknowledgements: int = 1,
        timeout: float = 5.0,
        check_every: float | None = None,
        others: Sequence[Destination | str | int] = (),
        promote: bool = False,
        limits: ReplicationLimits | None = None,
    ) -> None:
        self.path = database.resolve(path)
        self.messenger = messenger
        if check_every is not None and not 0 < check_every < float("inf"):
            raise ValueError(f"check_every is {check_every!r}, it must be a finite number of seconds above 0")
        self._checks: PeriodicCheck | None = None
        self._claims: Claims | None = None
        self._keeper: threading.Thread | None = None
        self._promise = make_promise(commit, acknowledgements, timeout)
        self._not_confirmed_count = 0
        self._check_lock = threading.Lock()
        self._is_closed = False
        limits = _fit(limits or ReplicationLimits(), messenger)
        self._writer = writer = Writer(self.path, limits, self._publish, promote=promote)
        try:
            if writer.state.fenced_term and not promote:
                by = msgspec.json.decode(writer.state.fenced_by, type=tuple[str, ...])
                raise _make_fenced(self.path, writer.state.fenced_term, by)
            remove_leftovers(self.path)
            self._readers = database.Readers(self.path)
            self._hub = Hub(
                messenger,
                destination,
                self.path,
                writer.state.database,
                writer.log.head,
                [] if promote else writer.known_replicas(),
                partial(read_age_s, writer.connection),
                limits,
                self._on_claim,
                self.status,
            )
            try:
                self._begin(promote, others)
                if check_every is not None:
                    self._checks = PeriodicCheck(check_every, self.check)
            except BaseException:
                self._hub.close()
                raise
        except BaseException:
            writer.close()
            raise

    def _begin(self, promote: bool, others: Sequence[Destination | str | int]) -> None:
        """Lead, unless another primary is known to."""
        if promote:
            self._writer.promote()
        own = Destination.parse(self.destination)
        places = [place for place in map(Destination.parse, others) if place != own]
        if places:
            self._claims = Claims(self.messenger, places, self._make_claim, self._on_claim)
            self._claims.wait_first()
        if self._writer.fence is not None:
            self._stop_claims()
            raise self._writer.fence
        self._hub.open(self._writer.log.head)
        self._sync(self._writer.log.head.lsn)

    # Transactions.

    @contextlib.contextmanager
    @interrupts.shields  # All but the user's block.
    def transaction(
        self, *, commit: str | None = None, acknowledgements: int | None = None, timeout: float | None = None
    ) -> Iterator[Transaction]:
        """Run a block as one transaction; an exception out of it rolls it back. One at a time, others wait.

        Args:
            commit, acknowledgements, timeout: Of this transaction, if not the primary's own. The timeout bounds the
                wait for other transactions, and that for the replicas.

        Raises:
            NotConfirmed: Committed here, but not confirmed by enough replicas in time.
            WriterBusy, StatementRefused, Fenced, ReplicationClosed, apsw.Error: Nothing was committed.

        Thread: any.
        """
        promise = self._override(commit, acknowledgements, timeout)
        writer = self._writer
        waiter = Waiter()
        writer.acquire(time.monotonic() + promise.timeout)
        try:
            writer.begin()
            capture = writer.capture()
            tx = Transaction(writer.connection, capture)
            try:
                yield tx
                tx.finish()
                parts = capture.finish()
                tx.end()
                writer.commit(parts, waiter, promise.level, promise.replicas)
            except BaseException:
                tx.end()
                capture.close()
                writer.roll_back()
                capture.undo()
                raise
            tx.position = waiter.position
            self._tidy()
        finally:
            writer.release()
        self._sync_for(waiter)
        self._await(waiter, promise)

    def execute(
        self,
        sql: str,
        bindings: Bindings = None,
        *,
        commit: str | None = None,
        acknowledgements: int | None = None,
        timeout: float | None = None,
    ) -> Rows:
        """Run a statement as a transaction of its own; one that only reads runs beside transactions.

        Transactions of this kind that wait at the same time share a position, a commit, a message and an fsync.

        Args:
            sql: One or more statements; a SELECT first makes all of them only read.
            bindings: A sequence or mapping, as apsw takes them.
            commit, acknowledgements, timeout: As `transaction` takes them.

        Raises:
            As `transaction`.

        Thread: any.
        """
        kind = classify(sql)
        if kind is Kind.READ:
            return Rows(iter(self._readers.get().execute(sql, bindings)))
        promise = self._override(commit, acknowledgements, timeout)
        deadline_at = time.monotonic() + promise.timeout
        if kind is Kind.SETTING:
            return self._set(sql, deadline_at)
        operation = Operation(sql, bindings, promise.level, promise.replicas)
        self._writer.write(operation, deadline_at, self._tidy, self._sync)
        if operation.error is not None:
            raise operation.error
        self._await(operation, promise)
        return Rows(iter(operation.rows))

    def _tidy(self) -> None:
        """Do what a commit left to do, before the next one; the writer's lock is held."""
        self._writer.trim()
        if self._hub.must_keep:
            self._keep_replicas()

    def _keep_replicas(self) -> None:
        try:
            self._writer.keep_replicas(self._hub.kept_replicas())
        except apsw.Error as error:
            logger.error("! the replicas of %s cannot be remembered: %s", self.path, error)

    @interrupts.shields
    def _set(self, sql: str, deadline_at: float) -> Rows:
        self._writer.acquire(deadline_at)
        try:
            return Rows(iter(self._writer.set(sql)))
        finally:
            self._writer.release()

    def _publish(self, written: Written) -> None:
        self._hub.publish(written)

    def _sync_for(self, waiter: Waiter) -> None:
        if waiter.position is not None:
            self._sync(waiter.position.lsn)

    def _sync(self, lsn: int) -> None:
        hub = self._hub
        try:
            hub.note_durable(self._writer.wal.sync(lsn, lambda: hub.head.lsn))
        except DiskFailed:
            hub.give_up()
            raise

    def _await(self, waiter: Waiter, promise: Promise) -> None:
        """Return once a transaction is confirmed."""
        if waiter.is_confirmed:
            return
        deadline_at = waiter.written_at + promise.timeout
        if not waiter.is_settled:
            self._hub.take_answers(waiter, promise.replicas, deadline_at)
        if not waiter.is_settled and not wait_until(deadline_at, waiter.wait):
            self._hub.forget(waiter)
        if not waiter.is_confirmed:
            if self._writer.wal.failure is not None and not self._is_closed:
                raise DiskFailed(f"the disk did not confirm {waiter.position}: {self._writer.wal.failure}")
            self._not_confirmed_count += 1
            position = waiter.position or Position(0, 0)
            why = f"within {promise.timeout} s"
            if self._is_closed:
                why = "it was closed"
            elif self._writer.fence is not None:
                why = str(self._writer.fence)
            raise NotConfirmed(
                f"transaction {position} is committed here, but fewer than {promise.replicas} replicas confirmed it as "
                f"{promise.level.name.lower()} ({why}); it may be there, or come there",
                position,
            )

    def wait_confirmed(
        self,
        position: tuple[int, int],
        *,
        commit: str | None = None,
        acknowledgements: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Wait until a transaction that was committed earlier is confirmed, as after `NotConfirmed`.

        Raises:
            NotConfirmed: Not in time. Diverged: It is not in this database's history.
        """
        promise = self._override(commit, acknowledgements, timeout)
        wanted = Position(*position)
        if wanted > self.position:
            raise ValueError(f"position {wanted} is ahead of {self.position}")
        check_in_history(self._readers.get(), wanted)
        waiter = Waiter(wanted)
        self._hub.wait_for(waiter, promise.level, promise.replicas)
        self._await(waiter, promise)

    def check(self, timeout: float = 60.0) -> dict[str, str]:
        """Compare the content of all replicas that are there with this one, while all go on.

        All tables, the schema and the AUTOINCREMENT counters are read, here and there: about a second for a million
        rows. A replica that differs is `DIVERGED` from then on.

        Args:
            timeout: Seconds, > 0, to wait for other checks and transactions, and for the replicas.

        Returns:
            For each replica that answered in time, the first row that differs, or an empty text.

        Raises:
            WriterBusy, StatementRefused, Fenced, ReplicationClosed, apsw.Error.

        Thread: any, not within a transaction.
        """
        deadline_at = time.monotonic() + timeout
        self._writer.check_not_mine()  # First, for who has the lock below may wait for this thread's transaction.
        if not wait_until(deadline_at, lambda left_s: self._check_lock.acquire(timeout=left_s)):
            raise WriterBusy(f"{self.path}: another check took all the time; this one was not begun")
        try:
            waiter = Waiter()
            check = self._begin_check(waiter, deadline_at)
            try:
                self._sync_for(waiter)
                check.sum()
                return self._hub.compare(check, deadline_at)
            finally:
                self._hub.check = None
                check.close()
        finally:
            self._check_lock.release()

    @interrupts.shields
    def _begin_check(self, waiter: Waiter, deadline_at: float) -> PrimaryCheck:
        """Write the entry of a check, and return the check, which sees the database behind it."""
        writer = self._writer
        writer.acquire(deadline_at)
        try:
            writer.begin()
            # It is there before the entry leaves, because a replica can be quick.
            check = self._hub.check = PrimaryCheck(self.position.lsn + 1, self.path)
            try:
                writer.commit([Part(PartKind.CHECK, b"")], waiter, Level.LOCAL, 0)
            except BaseException:
                self._hub.check = None
                writer.roll_back()
                raise
            check.pin()
        finally:
            writer.release()
        return check

    def _override(self, commit: str | None, acknowledgements: int | None, timeout: float | None) -> Promise:
        own = self._promise
        if commit is None and acknowledgements is None and timeout is None:
            return own
        return make_promise(
            own.level.name if commit is None else commit,
            own.replicas if acknowledgements is None else acknowledgements,
            own.timeout if timeout is None else timeout,
        )

    # What is known.

    @property
    def position(self) -> Position:
        """The (term, LSN) of the newest transaction committed here. Thread: any."""
        return self._hub.head.position

    @property
    def destination(self) -> Destination:
        """Where replicas join; a port of 0 has become the one that was free."""
        return self._hub.listener.destination

    def status(self) -> PrimaryStatus:
        """Return how the primary and each replica that it knows stand. Thread: any."""
        writer, hub = self._writer, self._hub
        return PrimaryStatus(
            path=self.path,
            database=hub.database,
            role="fenced" if writer.fence is not None else "primary",
            term=hub.head.term,
            lsn=hub.head.lsn,
            durable_lsn=hub.confirmations.durable_lsn,
            log_first_lsn=writer.log.first_lsn,
            log_bytes=writer.log.bytes,
            transaction_count=writer.transaction_count,
            group_count=writer.group_count,
            not_confirmed_count=self._not_confirmed_count,
            foreign_write_count=writer.foreign_write_count,
            snapshot_count=hub.snapshot_count,
            malformed_count=hub.malformed_count,
            replicas=self._replicas(),
        )

    def _replicas(self) -> tuple[ReplicaStatus, ...]:
        return self._hub.replicas()

    # Other primaries.

    def _make_claim(self) -> Claim:
        writer = self._writer
        return Claim(self._hub.database, writer.term, writer.term_checksum, (str(self.destination),))

    def _on_claim(self, claim: Claim) -> Claim | None:
        """Another primary says that it leads; on the messenger's thread. Return what it is to be told."""
        writer = self._writer
        if claim.database != self._hub.database:
            return None
        own, other = (writer.term, writer.term_checksum), (claim.term, claim.checksum)
        if other < own:
            return self._make_claim()
        if other > own and writer.fence is None:
            fence = writer.fence = _make_fenced(self.path, claim.term, claim.destinations)
            logger.error("! %s", fence)
            self._hub.leave(claim.term, claim.destinations)
            encoded = msgspec.json.encode(claim.destinations).decode()
            # The file may be busy, and the messenger's thread must not wait for it.
            keeper = threading.Thread(target=self._keep_fence, args=(fence, encoded), daemon=True)
            keeper.start()
            self._keeper = keeper
        return None

    def _keep_fence(self, fence: Fenced, encoded_destinations: str) -> None:
        try:
            self._writer.keep_fence(fence, encoded_destinations)
        except apsw.Error as error:
            logger.error("! the next start of %s will not know that it is fenced: %s", self.path, error)

    def _stop_claims(self) -> None:
        if self._claims is not None:
            self._claims.stop()
        if self._keeper is not None:
            self._keeper.join()

    # Life.

    def close(self) -> None:
        """Serve replicas no more, and close the file. Transactions that still wait end as `NotConfirmed`.

        Raises:
            StatementRefused: The calling thread is in a transaction.

        Thread: any, not within a transaction. Twice is fine.
        """
        if self._is_closed:
            return
        self._writer.check_not_mine()
        self._is_closed = True
        if (check := self._hub.check) is not None:
            check.cancel()
        if self._checks is not None:
            self._checks.stop()
        self._stop_claims()
        self._hub.close()
        self._readers.close()
        with self._writer.lock:
            self._keep_replicas()
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Primary of {self.path} at {self.position}>"


def _fit(limits: ReplicationLimits, messenger: Messenger) -> ReplicationLimits:
    """Return limits by which each transaction fits into a message, and all that may be under way together does."""
    most_bytes = max(2, messenger.limits.message_bytes_max - MESSAGE_ROOM_BYTES)
    return msgspec.structs.replace(
        limits,
        transaction_bytes_max=min(limits.transaction_bytes_max, most_bytes),
        in_flight_bytes_max=min(limits.in_flight_bytes_max, most_bytes // 2),
        in_flight_transactions_max=min(limits.in_flight_transactions_max, max(1, most_bytes // 2 // ENTRY_ROOM_BYTES)),
    )


def _make_fenced(path: str, term: int, destinations: tuple[str, ...]) -> Fenced:
    where = f" at {', '.join(destinations)}" if destinations else ""
    return Fenced(
        f"{path}: another primary was promoted under term {term}{where}; nothing is committed here any more, open the "
        "file as a Replica of that primary",
        term,
        destinations,
    )
