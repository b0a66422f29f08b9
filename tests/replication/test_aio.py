"""A primary and its replicas in a program with asyncio."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import apsw
import pytest
import uvloop

from messenger import AsyncMessenger
from messenger.replication import Primary, Replica, ReplicationClosed, StatementRefused, WriterBusy
from messenger.replication.aio import AsyncPrimary, AsyncReplica
from messenger.replication.limits import ASYNC_TRANSACTIONS_MAX
from tests.conftest import StandingClock, free_port
from tests.replication.pairs import BOOKS, INSERT, SELECT, content_of

Call = Callable[[AsyncPrimary], Coroutine[Any, Any, None]]


def run(coroutine: Coroutine[Any, Any, None], uses_uvloop: bool = False) -> None:
    async def check() -> None:
        async with asyncio.timeout(50):
            await coroutine
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uses_uvloop else asyncio.new_event_loop) as runner:
        runner.run(check())


@contextlib.asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[AsyncPrimary, AsyncReplica]]:
    port = free_port()
    async with (
        AsyncMessenger("primary") as one,
        AsyncMessenger("replica") as other,
        AsyncPrimary(folder / "primary.db", one, port) as primary,
        AsyncReplica(folder / "replica.db", other, port) as replica,
    ):
        await primary.execute(BOOKS)
        await replica.wait_for(primary.position, timeout=20)
        yield primary, replica


@pytest.mark.parametrize("uses_uvloop", [False, True])
def test_transactions_and_reads(tmp_path: Path, uses_uvloop: bool) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (primary, replica):
            async with primary.transaction(commit="applied") as tx:
                await tx.executemany(INSERT, [("a",), ("b",)])
                assert await tx.execute("SELECT count(*) FROM books") == [(2,)]
                assert await tx.last_insert_rowid() == 2
            assert tx.position == primary.position
            assert await replica.execute(SELECT) == [(1, "a"), (2, "b")]
            await asyncio.gather(*[primary.execute(INSERT, (str(number),)) for number in range(50)])
            await primary.wait_confirmed(primary.position, commit="applied")
            assert len(await replica.execute(SELECT)) == 52
            assert [each.name for each in (await primary.status()).replicas] == ["replica"]
            assert (await replica.status()).lsn == primary.position.lsn
            assert await primary.check() == {"replica": ""}
        assert content_of(tmp_path / "replica.db") == content_of(tmp_path / "primary.db")

    run(main(), uses_uvloop)


def test_transaction_that_raises_or_is_cancelled_is_rolled_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (primary, _):
            with pytest.raises(ValueError, match="planted"):  # noqa: PT012  # It leaves by the context manager.
                async with primary.transaction() as tx:
                    await tx.execute(INSERT, ("lost",))
                    raise ValueError("planted")
            with pytest.raises(apsw.SQLError):
                async with primary.transaction() as tx:
                    await tx.execute("nonsense")
            entered = asyncio.Event()

            async def hold() -> None:
                async with primary.transaction() as tx:
                    await tx.execute(INSERT, ("lost too",))
                    entered.set()
                    await asyncio.Event().wait()

            holder = asyncio.create_task(hold())
            await entered.wait()
            with pytest.raises(WriterBusy):
                async with primary.transaction(timeout=0.05):
                    pass
            # One that waits for its turn is cancelled before it begins.
            waiting = asyncio.create_task(hold())
            await asyncio.sleep(0.05)
            waiting.cancel()
            holder.cancel()
            for task in (holder, waiting):
                with pytest.raises(asyncio.CancelledError):
                    await task
            async with primary.transaction() as tx:
                await tx.execute(INSERT, ("kept",))
            assert await primary.execute(SELECT) == [(1, "kept")]
            with pytest.raises(StatementRefused, match="the transaction has ended"):
                await tx.execute(INSERT, ("late",))

    run(main())


def test_event_loop_is_never_blocked(tmp_path: Path, standing_clock: StandingClock) -> None:
    """A tick of 5 ms goes on beside openings, commits and a wait for a replica that is not there."""
    gaps: list[float] = []

    async def tick() -> None:
        last_at = standing_clock.now()
        while True:
            await asyncio.sleep(0.005)
            gaps.append(standing_clock.now() - last_at)
            last_at = standing_clock.now()

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        async with pair(tmp_path) as (primary, replica):
            for _ in range(20):
                await primary.execute(INSERT, ("x",))
            with contextlib.suppress(Exception):
                await replica.wait_for((9, 9), timeout=0.5)
        ticking.cancel()
        await asyncio.wait([ticking])
        assert sorted(gaps)[-3] < 0.25, sorted(gaps)[-5:]

    run(main())


def test_promotion(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        async with AsyncMessenger("replica") as messenger, AsyncReplica(tmp_path / "r.db", messenger, port) as replica:
            async with AsyncMessenger("primary") as other, AsyncPrimary(tmp_path / "p.db", other, port) as primary:
                await primary.execute(BOOKS)
                await primary.execute(INSERT, ("a",))
                await replica.wait_for(primary.position, timeout=20)
            promoted = await replica.promote()
        # The replica is closed, and what it has become goes on.
        await promoted.execute(INSERT, ("b",))
        assert await promoted.execute(SELECT) == [(1, "a"), (2, "b")]
        assert promoted.position.term == 2
        await promoted.close()
        await promoted.close()

    run(main())


async def close(primary: AsyncPrimary) -> None:
    await primary.close()


async def write(primary: AsyncPrimary) -> None:
    await primary.execute(INSERT, ("inner",), timeout=0.2)


async def set_a_pragma(primary: AsyncPrimary) -> None:
    await primary.execute("PRAGMA foreign_keys = ON", timeout=0.2)


async def begin_another(primary: AsyncPrimary) -> None:
    async with primary.transaction(timeout=0.2):
        pass


async def check(primary: AsyncPrimary) -> None:
    await primary.check(timeout=0.2)


@pytest.mark.parametrize("call", [close, write, set_a_pragma, begin_another, check])
def test_a_task_does_not_wait_for_its_own_transaction(tmp_path: Path, call: Call) -> None:
    """It is refused at once, as by `Primary` in a thread, and what is refused leaves the transaction as it is."""

    async def main() -> None:
        async with pair(tmp_path) as (primary, _):
            async with primary.transaction() as tx:
                await tx.execute(INSERT, ("a",))
                async with asyncio.timeout(10):
                    with pytest.raises(StatementRefused, match="a transaction is open in this task; use its `tx`"):
                        await call(primary)
                assert await primary.execute(SELECT) == []
            assert await primary.execute(SELECT) == [(1, "a")]
            async with asyncio.timeout(10):
                await call(primary)  # Now that it has ended.

    run(main())


@pytest.mark.parametrize("call", [write, set_a_pragma, begin_another, check])
def test_another_task_waits_for_a_transaction_until_its_timeout(tmp_path: Path, call: Call) -> None:
    """Also one that the task of the transaction has started, whether or not that waits for it."""

    async def main() -> None:
        async with pair(tmp_path) as (primary, _), primary.transaction() as tx:
            with pytest.raises(WriterBusy):
                await asyncio.create_task(call(primary))
            await tx.execute(INSERT, ("a",))

    run(main())


def test_a_close_of_another_task_waits_for_a_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (primary, _):
            async with primary.transaction() as tx:
                with pytest.raises(TimeoutError):  # Who does not wait until it is closed can wait again.
                    await asyncio.wait_for(asyncio.create_task(primary.close()), 0.05)
                closing = [asyncio.create_task(primary.close()) for _ in range(2)]
                await asyncio.sleep(0.1)
                await tx.execute(INSERT, ("a",))
                assert not any(each.done() for each in closing)
            await asyncio.gather(*closing)
            async with (
                AsyncMessenger("again") as messenger,
                AsyncPrimary(tmp_path / "primary.db", messenger, free_port()) as again,
            ):
                assert await again.execute(SELECT) == [(1, "a")]

    run(main())


def test_a_transaction_can_read_however_many_tasks_wait_for_it(tmp_path: Path) -> None:
    """They would take all threads, and what the transaction waits for would wait for them."""

    async def main() -> None:
        async with pair(tmp_path) as (primary, _):
            async with primary.transaction(timeout=30) as tx:
                waiting = [
                    asyncio.create_task(primary.execute(INSERT, ("b",), timeout=30))
                    for _ in range(2 * ASYNC_TRANSACTIONS_MAX)
                ]
                await asyncio.sleep(0.1)
                async with asyncio.timeout(5):
                    assert await primary.execute(SELECT) == []
                    assert (await primary.status()).role == "primary"
                    await primary.wait_confirmed(primary.position, commit="applied")
                await tx.execute(INSERT, ("a",))
            await asyncio.gather(*waiting)
            assert (await primary.execute(SELECT))[0] == (1, "a")

    run(main())


def test_what_is_opened_for_a_task_that_is_cancelled_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begins, goes_on = threading.Event(), threading.Event()
    make = Primary.__init__

    def make_slowly(*arguments: Any, **options: Any) -> None:
        begins.set()
        assert goes_on.wait(20)
        make(*arguments, **options)

    async def use(messenger: AsyncMessenger, port: int) -> None:
        async with AsyncPrimary(tmp_path / "primary.db", messenger, port) as primary:
            await primary.execute("SELECT 1")

    async def main() -> None:
        port = free_port()
        async with AsyncMessenger("primary") as messenger:
            monkeypatch.setattr(Primary, "__init__", make_slowly)
            opening = asyncio.create_task(use(messenger, port))
            await asyncio.to_thread(begins.wait, 20)
            opening.cancel()
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await use(messenger, port)

    run(main())


def test_a_primary_that_is_promoted_for_a_task_that_is_cancelled_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins, goes_on = threading.Event(), threading.Event()
    promote = Replica.promote

    def promote_slowly(*arguments: Any, **options: Any) -> Primary:
        begins.set()
        assert goes_on.wait(20)
        return promote(*arguments, **options)

    async def main() -> None:
        async with pair(tmp_path) as (_, replica):
            monkeypatch.setattr(Replica, "promote", promote_slowly)
            promoting = asyncio.create_task(replica.promote(free_port()))
            await asyncio.to_thread(begins.wait, 20)
            promoting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await promoting
            goes_on.set()
            await replica.close()
            async with (
                AsyncMessenger("again") as messenger,
                AsyncPrimary(tmp_path / "replica.db", messenger, free_port()) as again,
            ):
                assert again.position.term == 2

    run(main())


def test_calls_before_it_is_open_and_a_refused_opening(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncMessenger() as messenger:
            with pytest.raises(ReplicationClosed, match="async with"):
                await AsyncPrimary(tmp_path / "x.db", messenger, free_port()).execute("SELECT 1")
            with pytest.raises(ValueError, match="check_every"):
                async with AsyncPrimary(tmp_path / "x.db", messenger, free_port(), check_every=0):
                    pass

    run(main())
