"""`AsyncPrimary` and `AsyncReplica`: a primary and a replica for programs with asyncio.

SQLite blocks, an fsync blocks, and a transaction belongs to the thread that opened it. So the blocking classes run on
threads, with a `Messenger` of threads that has the identity, the keys and the limits of the program's `AsyncMessenger`,
and the event loop only awaits them. A transaction has a thread to itself as long as it is open.

A call that needs the writer's turn may wait for a transaction of another task. Such calls have threads of their own, so
however many of them wait, the task whose transaction they wait for can still read.

What must never happen here: a call that blocks the event loop; a transaction, or a file, that stays open because the
task that opened it was cancelled; a task that waits for its own transaction.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from messenger import AsyncMessenger, Destination, Messenger

from .capture import Kind, classify
from .errors import ReplicationClosed, StatementRefused
from .limits import ASYNC_TRANSACTIONS_MAX
from .primary import Primary
from .records import Position
from .replica import Replica
from .status import PrimaryStatus, ReplicaSelfStatus
from .transaction import Transaction
from .writer import Bindings

T = TypeVar("T")
B = TypeVar("B", Primary, Replica)
Row = tuple[Any, ...]


class _Bridge(Generic[B]):
    """What runs a primary or replica on threads; an async context manager."""

    def __init__(self, messenger: AsyncMessenger, make: Callable[[Messenger], B]) -> None:
        self._make: Callable[[Messenger], B] = make
        self._messenger = Messenger(messenger.identity, security=messenger.security, limits=messenger.limits)
        self._threads = ThreadPoolExecutor(ASYNC_TRANSACTIONS_MAX, thread_name_prefix="messenger-replication")
        self._made: B | None = None
        # What makes it, and what closes it: each goes on when the task that waits for it is cancelled.
        self._opening: Future[B] | None = None
        self._closing: Future[None] | None = None
        self._is_closed = False

    @property
    def _blocking(self) -> B:
        if self._made is None or self._is_closed:
            how = "is closed" if self._is_closed else "is not open; say `async with`, or await `open()`"
            raise ReplicationClosed(f"{type(self).__name__} {how}")
        return self._made

    async def _call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **options))

    async def open(self) -> Self:
        """Open it. Twice is fine. Raises what the blocking class raises when it is made."""
        if self._made is None:
            if self._is_closed:
                raise ReplicationClosed(f"{type(self).__name__} is closed")
            opening = self._opening
            if opening is None:
                opening = self._opening = self._threads.submit(self._make, self._messenger)
            try:
                self._made = await asyncio.shield(asyncio.wrap_future(opening))
            except Exception:
                if self._opening is opening:
                    self._opening = None  # It may succeed another time.
                raise
        return self

    async def close(self) -> None:
        """Close it, and what carried its messages. Twice is fine; each returns when it is closed."""
        self._is_closed = True
        if self._closing is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="messenger-close")
            self._closing = thread.submit(self._close)
            thread.shutdown(wait=False)
        await asyncio.shield(asyncio.wrap_future(self._closing))

    def _close(self) -> None:
        made = self._made or _result_of(self._opening)
        try:
            if made is not None:
                made.close()
        finally:
            self._messenger.close()
            self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        try:
            return await self.open()
        except BaseException:
            await asyncio.shield(self.close())
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncTransaction:
    """A transaction that is open, given by `async with primary.transaction() as tx:`.

    Attributes:
        position: Its (term, LSN), once it is committed.
    """

    def __init__(self, transaction: Transaction, thread: ThreadPoolExecutor) -> None:
        self._transaction = transaction
        self._thread = thread

    @property
    def position(self) -> Position | None:
        """Its (term, LSN), once it is committed."""
        return self._transaction.position

    async def execute(self, sql: str, bindings: Bindings = None) -> list[Row]:
        """Run statements within the transaction and return their rows; see `Transaction.execute`."""
        return await self._call(lambda: list(self._transaction.execute(sql, bindings)))

    async def executemany(self, sql: str, bindings: Sequence[Bindings]) -> list[Row]:
        """Run a statement once for each of many bindings, as `execute` does."""
        return await self._call(lambda: list(self._transaction.executemany(sql, bindings)))

    async def last_insert_rowid(self) -> int:
        """Return the rowid of the row inserted last."""
        return await self._call(self._transaction.last_insert_rowid)

    async def _call(self, function: Callable[[], T]) -> T:
        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, function)
        except RuntimeError:  # Its thread has ended with it.
            raise StatementRefused("the transaction has ended") from None
        return await running


class AsyncPrimary(_Bridge[Primary]):
    """`Primary` for programs with asyncio. An async context manager, opened on entry.

    A call that is cancelled goes on in its thread: what it was about to commit may be committed. Within a transaction
    the task that opened it uses `tx`, and may read; what would wait for the end of that transaction (a write, another
    transaction, `check`, `close`) raises `StatementRefused`. Other tasks wait for it, also those that it has started:
    it must not wait for them before its end.

    Args:
        path, destination, options: As `Primary` takes them.
        messenger: Whose identity, keys and limits it uses.

    Source: docs/replication.md.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        messenger: AsyncMessenger,
        destination: Destination | str | int = 15445,
        **options: Any,
    ) -> None:
        super().__init__(messenger, lambda carrier: Primary(path, carrier, destination, **options))
        self._slots = asyncio.Semaphore(ASYNC_TRANSACTIONS_MAX)
        # For what needs the writer's turn.
        self._writers = ThreadPoolExecutor(ASYNC_TRANSACTIONS_MAX, thread_name_prefix="messenger-writer")
        # Of the transaction that is open.
        self._owner: asyncio.Task[Any] | None = None

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        *,
        commit: str | None = None,
        acknowledgements: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> AsyncIterator[AsyncTransaction]:
        """Run a block as one transaction; an exception out of it, a cancellation too, rolls it back.

        At most 32 are open or wait at a time; the others wait for them.

        Args:
            commit, acknowledgements, timeout: As `Primary.transaction` takes them, which also says what it raises.
        """
        self._check_not_mine()
        context = self._blocking.transaction(commit=commit, acknowledgements=acknowledgements, timeout=timeout)
        async with self._slots:
            thread = ThreadPoolExecutor(1, thread_name_prefix="messenger-transaction")
            entering = thread.submit(context.__enter__)
            try:
                transaction = await asyncio.wrap_future(entering)
                self._owner = asyncio.current_task()
                try:
                    yield AsyncTransaction(transaction, thread)
                except BaseException as error:
                    await self._leave(thread, context, error)
                    raise
                await self._leave(thread, context, None)
            except asyncio.CancelledError as error:
                # It may have been about to begin.
                thread.submit(_leave_if_entered, entering, context, error)
                raise
            finally:
                thread.shutdown(wait=False)

    async def _leave(self, thread: ThreadPoolExecutor, context: Any, error: BaseException | None) -> None:
        """Commit, or roll back for an error, whether or not the task that waits for it is cancelled meanwhile."""
        self._owner = None
        leaving = thread.submit(_leave, context, error)
        await asyncio.shield(asyncio.wrap_future(leaving))

    def _check_not_mine(self) -> None:
        """Refuse, by `StatementRefused`, what would wait for a transaction that the calling task has open."""
        if self._owner is not None and self._owner is asyncio.current_task():
            raise StatementRefused("a transaction is open in this task; use its `tx`")

    async def close(self) -> None:
        """Close it, once the transactions of other tasks have ended. Twice is fine; each returns when it is closed.

        Raises:
            StatementRefused: The calling task is in a transaction.
        """
        self._check_not_mine()
        await super().close()

    def _close(self) -> None:
        self._writers.shutdown(wait=False)
        super()._close()

    async def execute(
        self,
        sql: str,
        bindings: Bindings = None,
        *,
        commit: str | None = None,
        acknowledgements: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> list[Row]:
        """Run a statement as a transaction of its own, or read, and return its rows; see `Primary.execute`."""
        execute, promise = self._blocking.execute, (commit, acknowledgements, timeout)

        def run() -> list[Row]:
            return list(execute(sql, bindings, commit=promise[0], acknowledgements=promise[1], timeout=promise[2]))

        if classify(sql) is Kind.READ:
            return await self._call(run)
        self._check_not_mine()
        return await asyncio.get_running_loop().run_in_executor(self._writers, run)

    async def wait_confirmed(self, position: tuple[int, int], **promise: Any) -> None:
        """Wait until a transaction is confirmed; see `Primary.wait_confirmed`."""
        await self._call(self._blocking.wait_confirmed, position, **promise)

    async def check(self, timeout: float = 60.0) -> dict[str, str]:  # noqa: ASYNC109  # As in `Primary`.
        """Compare the content of all replicas; see `Primary.check`."""
        check = self._blocking.check
        self._check_not_mine()
        return await asyncio.get_running_loop().run_in_executor(self._writers, check, timeout)

    async def status(self) -> PrimaryStatus:
        """Return what `Primary.status` returns."""
        return await self._call(self._blocking.status)

    @property
    def position(self) -> Position:
        """The (term, LSN) of the last transaction."""
        return self._blocking.position

    @property
    def destination(self) -> Destination:
        """Where replicas join."""
        return self._blocking.destination


class AsyncReplica(_Bridge[Replica]):
    """`Replica` for programs with asyncio. An async context manager, opened on entry.

    Args:
        path, destination, options: As `Replica` takes them. Its `on_progress` and `on_promote` are called on threads.
        messenger: Whose identity, keys and limits it uses.

    Source: docs/replication.md.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        messenger: AsyncMessenger,
        destination: Destination | str | int | Sequence[Destination | str | int] = 15445,
        **options: Any,
    ) -> None:
        super().__init__(messenger, lambda carrier: Replica(path, carrier, destination, **options))
        self._async_messenger = messenger
        self._promoting: Future[Primary] | None = None

    async def execute(self, sql: str, bindings: Any = None) -> list[Row]:
        """Read, and return the rows; see `Replica.execute`."""
        execute = self._blocking.execute
        return await self._call(lambda: list(execute(sql, bindings)))

    async def wait_for(self, position: tuple[int, int], timeout: float = 5.0) -> None:  # noqa: ASYNC109
        """Wait until a transaction, and all before it, can be read here; see `Replica.wait_for`."""
        await self._call(self._blocking.wait_for, position, timeout)

    async def status(self) -> ReplicaSelfStatus:
        """Return what `Replica.status` returns."""
        return await self._call(self._blocking.status)

    async def resync(self) -> None:
        """Throw away what is here for a snapshot of the primary; see `Replica.resync`."""
        await self._call(self._blocking.resync)

    @property
    def position(self) -> Position:
        """The (term, LSN) up to which it has applied everything."""
        return self._blocking.position

    async def promote(self, destination: Destination | str | int | None = None, **options: Any) -> AsyncPrimary:
        """Become the primary, and return it, open; see `Replica.promote`. This replica is closed then.

        A task that is cancelled here gets no primary; one that is made all the same is closed with this replica.
        """
        self._promoting = self._threads.submit(self._blocking.promote, destination, **options)
        made = await asyncio.shield(asyncio.wrap_future(self._promoting))
        self._promoting = None
        primary = AsyncPrimary(made.path, self._async_messenger, made.destination)
        # What carries its messages goes on with it.
        primary._made = made
        primary._messenger, self._messenger = self._messenger, primary._messenger
        return primary

    def _close(self) -> None:
        promoted = _result_of(self._promoting)
        if promoted is not None:
            promoted.close()
        super()._close()


def _result_of(making: "Future[B] | None") -> B | None:
    """Return what was made for a task that was cancelled meanwhile; None if there is nothing, or it failed."""
    if making is None or making.exception() is not None:
        return None
    return making.result()


def _leave(context: Any, error: BaseException | None) -> None:
    if error is None:
        context.__exit__(None, None, None)
    else:
        context.__exit__(type(error), error, error.__traceback__)


def _leave_if_entered(entering: "Future[Any]", context: Any, error: BaseException) -> None:
    if not entering.cancelled() and entering.exception() is None and context.gen.gi_frame is not None:
        _leave(context, error)
