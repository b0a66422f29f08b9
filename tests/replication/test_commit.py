"""Commit levels: what a commit waits for, what it says if that does not come, and how many threads share the work."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import apsw
import pytest

from messenger import Limits, Message, Messenger
from messenger.replication import (
    NotConfirmed,
    Position,
    Primary,
    ReplicaState,
    ReplicationClosed,
    ReplicationLimits,
    StatementRefused,
    WriterBusy,
)
from messenger.replication.applier import Applier
from messenger.replication.confirm import Confirmations, Level, Waiter
from messenger.replication.follower import Follower
from messenger.replication.records import Entries, Entry
from messenger.replication.writer import Operation
from tests.conftest import free_port, wait_until
from tests.replication.pairs import BOOKS, INSERT, SELECT, Cluster, assert_equal, content_of, wait_streaming

LEVELS = ["local", "received", "durable", "applied"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_commit_waits_for_its_level(cluster: Cluster, level: str) -> None:
    primary, replica = cluster.pair(commit=level)
    primary.execute(INSERT, ("Dune",))
    with primary.transaction() as tx:
        tx.execute(INSERT, ("Emma",))
    status = primary.status()
    assert tx.position == (1, status.lsn)
    assert status.durable_lsn == status.lsn
    (other,) = status.replicas
    if level == "received":
        assert other.received_lsn == status.lsn
    if level in ("durable", "applied"):
        assert other.durable_lsn == status.lsn
        assert replica.execute(SELECT).fetchall() == [(1, "Dune"), (2, "Emma")]
    assert_equal(primary, replica)


def test_a_stuck_replica_holds_up_nobody_who_does_not_wait_for_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20)
    stuck = cluster.replica("stuck")
    wait_streaming(primary, stuck)
    go_on = threading.Event()
    apply = Applier.apply

    def apply_later(self: Applier, entries: list[Entry]) -> None:
        if self.path == stuck.path:
            go_on.wait(20)
        apply(self, entries)

    monkeypatch.setattr(Applier, "apply", apply_later)
    try:
        for name in ("Dune", "Emma"):
            primary.execute(INSERT, (name,))
        with pytest.raises(NotConfirmed):
            primary.execute(INSERT, ("Ulysses",), acknowledgements=2, timeout=0.2)
        assert replica.execute("SELECT count(*) FROM books").fetchall() == [(3,)]
    finally:
        go_on.set()
    primary.wait_confirmed(primary.position, acknowledgements=2)


def test_a_replica_that_never_answers_and_joins_anew_confirms_in_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20)
    with monkeypatch.context() as patch:

        def leave(self: Follower, record: Entries, message: Message) -> None:
            with self._lock:
                self._leave(ReplicaState.CONNECTING)
            patch.undo()

        patch.setattr(Follower, "_take_entries", leave)
        began_at = time.monotonic()
        primary.execute(INSERT, ("Dune",))
    assert time.monotonic() - began_at < 10
    assert_equal(primary, replica)


def test_closing_wakes_who_waits_for_a_replica_that_is_stuck(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, _ = cluster.pair(commit="applied", timeout=50)
    monkeypatch.setattr(Follower, "_take_entries", lambda self, record, message: None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(primary.execute, INSERT, ("Dune",))
        wait_until(lambda: primary.status().replicas[0].sent_lsn == 2)
        primary.close()
        with pytest.raises(NotConfirmed, match="closed"):
            waiting.result(10)


def test_a_commit_in_a_callback_is_not_confirmed_there(cluster: Cluster) -> None:
    """The answer would come to the thread that waits for it; the transaction is committed all the same."""
    primary, replica = cluster.pair(commit="applied", timeout=0.2)
    told: list[Exception] = []

    def on_message(message: Message) -> None:
        try:
            primary.execute(INSERT, ("Dune",))
        except NotConfirmed as error:
            told.append(error)
        message.reply(b"")

    port = free_port()
    primary.messenger.listen_for_connection(port, on_message)
    asking = cluster.messenger("asking")
    asking.request(asking.make_connection(port), b"")
    assert len(told) == 1
    assert_equal(primary, replica)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_without_a_replica_a_commit_is_not_confirmed(cluster: Cluster, level: str) -> None:
    primary = cluster.primary(commit=level, timeout=0.1)
    with pytest.raises(NotConfirmed, match=rf"\(1, 1\) is committed here, but fewer than 1 replicas .* {level}") as one:
        primary.execute(BOOKS)
    assert one.value.position == Position(1, 1) == primary.position
    with pytest.raises(NotConfirmed) as two, primary.transaction() as tx:
        tx.execute(INSERT, ("Dune",))
    assert two.value.position == tx.position == (1, 2)
    assert primary.execute(SELECT).fetchall() == [(1, "Dune")]
    assert primary.status().not_confirmed_count == 2
    replica = cluster.replica()
    primary.wait_confirmed(two.value.position, timeout=20)
    assert_equal(primary, replica)


def test_a_transaction_may_ask_for_more_or_less(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=0.1)
    primary.execute(BOOKS, commit="local")
    with primary.transaction(commit="local") as tx:
        tx.execute(INSERT, ("Dune",))
    replica = cluster.replica()
    wait_streaming(primary, replica)
    primary.execute(INSERT, ("Emma",), timeout=20)
    with pytest.raises(NotConfirmed, match="fewer than 2 replicas"):
        primary.execute(INSERT, ("Ulysses",), acknowledgements=2)
    second = cluster.replica("second")
    wait_streaming(primary, second)
    primary.execute(INSERT, ("Persuasion",), acknowledgements=2, timeout=20)
    assert len(second.execute(SELECT).fetchall()) == len(replica.execute(SELECT).fetchall()) == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"commit": "remote"}, "commit level is 'remote', it must be local, received, durable, applied"),
        ({"acknowledgements": 0}, "acknowledgements is 0"),
        ({"acknowledgements": True}, "acknowledgements is True"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
    ],
)
def test_wrong_options_are_told(cluster: Cluster, options: dict[str, Any], text: str) -> None:
    primary = cluster.primary()
    with pytest.raises(ValueError, match=text):
        primary.execute("DELETE FROM x", **options)
    with pytest.raises(ValueError, match=text):
        cluster.primary("other", destination=0, **options)


def test_threads_share_commits(cluster: Cluster) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20)
    before = primary.status()

    def insert(number: int) -> None:
        for count in range(50):
            primary.execute(INSERT, (f"{number}-{count}",))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(insert, range(8)))
    after = primary.status()
    assert after.transaction_count - before.transaction_count == 400
    assert after.group_count - before.group_count < 400
    # Each group is one entry.
    assert after.lsn - before.lsn == after.group_count - before.group_count
    names = [name for _, name in replica.execute(SELECT)]
    assert sorted(names) == sorted(f"{number}-{count}" for number in range(8) for count in range(50))
    for number in range(8):  # Each thread's order is kept.
        own = [name for name in names if name.startswith(f"{number}-")]
        assert own == [f"{number}-{count}" for count in range(50)]
    assert_equal(primary, replica)


def test_an_error_in_a_group_concerns_its_own_statement_only(cluster: Cluster) -> None:
    primary, replica = cluster.pair(timeout=20)
    primary.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    outcomes: list[str] = []

    def insert(number: int) -> None:
        try:
            primary.execute("INSERT INTO numbers VALUES (?)", (number % 10,))
        except apsw.ConstraintError:
            outcomes.append("refused")
        else:
            outcomes.append("committed")

    with ThreadPoolExecutor(20) as pool:
        with primary.transaction():  # So that all of them wait at the same time.
            results = [pool.submit(insert, number) for number in range(20)]
            wait_until(lambda: len(primary._writer._queue) == 20)
        for result in results:
            result.result(20)
    assert sorted(outcomes) == ["committed"] * 10 + ["refused"] * 10
    assert primary.execute("SELECT n FROM numbers ORDER BY n").fetchall() == [(n,) for n in range(10)]
    assert_equal(primary, replica)


def is_queued(primary: Primary, count: int) -> bool:
    return len(primary._writer._queue) == count


def run_group(primary: Primary, *statements: str) -> list[BaseException | None]:
    """Let statements wait at the same time, so that they are one group; return how each ended."""
    with ThreadPoolExecutor(len(statements)) as pool:
        with primary.transaction():
            futures = []
            for count, statement in enumerate(statements, 1):
                futures.append(pool.submit(primary.execute, statement))
                wait_until(partial(is_queued, primary, count))
        return [future.exception(20) for future in futures]


def test_statements_of_a_group_that_change_nothing_wait_for_nobody(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=1)
    primary.execute(BOOKS, commit="local")
    first, *others, schema = run_group(
        primary,
        "INSERT INTO books VALUES (1, 'Dune')",
        "DELETE FROM books WHERE id = 2",
        "UPDATE books SET name = 'x' WHERE id = 2",
        "DELETE FROM books WHERE id = 2; CREATE INDEX names ON books (name)",
    )
    assert [type(first), *others, type(schema)] == [NotConfirmed, None, None, NotConfirmed]


def test_an_entry_of_a_counter_only_waits_for_its_level(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=0.2)
    primary.execute("CREATE TABLE numbers (id INTEGER PRIMARY KEY AUTOINCREMENT, n UNIQUE)", commit="local")
    primary.execute("INSERT INTO numbers (n) VALUES (1)", commit="local")
    before = primary.position.lsn
    with pytest.raises(NotConfirmed):
        primary.execute("INSERT OR IGNORE INTO numbers (n) VALUES (1)")
    assert primary.position.lsn == before + 1


def test_a_counter_in_the_entry_of_a_group_waits_for_its_level(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=0.5)
    primary.execute("CREATE TABLE numbers (id INTEGER PRIMARY KEY AUTOINCREMENT, n UNIQUE)", commit="local")
    primary.execute("INSERT INTO numbers (n) VALUES (1)", commit="local")
    told = run_group(primary, "INSERT OR IGNORE INTO numbers (n) VALUES (1)", "INSERT INTO numbers (n) VALUES (2)")
    assert list(map(type, told)) == [NotConfirmed, NotConfirmed]


def test_a_counter_that_was_undone_in_a_group_is_compared_anew(cluster: Cluster) -> None:
    primary, replica = cluster.pair(timeout=20)
    primary.execute("CREATE TABLE numbers (id INTEGER PRIMARY KEY AUTOINCREMENT, n UNIQUE)")
    primary.execute("INSERT INTO numbers (n) VALUES (1)")
    first, undone, ignored = run_group(
        primary,
        "INSERT INTO books VALUES (1, 'a')",
        "INSERT INTO numbers (n) VALUES (2); INSERT INTO numbers (n) VALUES (1)",
        "INSERT OR IGNORE INTO numbers (n) VALUES (1)",
    )
    assert (first, type(undone), ignored) == (None, apsw.ConstraintError, None)
    assert_equal(primary, replica)


def test_a_group_whose_statements_undo_each_other_is_no_entry(cluster: Cluster) -> None:
    primary, _ = cluster.pair(commit="applied", timeout=1)
    before = primary.position
    assert run_group(primary, "INSERT INTO books VALUES (7, 'a')", "DELETE FROM books WHERE id = 7") == [None, None]
    assert primary.position == before


def test_a_group_may_change_the_schema(cluster: Cluster) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20)
    before = primary.position.lsn
    statements = (
        "INSERT INTO books VALUES (1, 'a')",
        "ALTER TABLE books ADD COLUMN year INTEGER",
        "UPDATE books SET year = 1965",
        "INSERT INTO books VALUES (2, 'b', 1815)",
    )
    assert run_group(primary, *statements) == [None] * 4
    assert primary.position.lsn == before + 1
    assert replica.execute("SELECT * FROM books").fetchall() == [(1, "a", 1965), (2, "b", 1815)]
    assert_equal(primary, replica)


def test_a_deferred_foreign_key_that_fails_concerns_its_own_statement_only(cluster: Cluster) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20)
    primary.execute("PRAGMA foreign_keys = ON")
    primary.execute("CREATE TABLE pages (book INTEGER REFERENCES books (id) DEFERRABLE INITIALLY DEFERRED)")
    primary.execute("INSERT INTO books VALUES (1, 'Dune')")
    before = primary.position.lsn
    good = "INSERT INTO pages VALUES (1)"
    first, orphan, last = run_group(primary, good, "INSERT INTO pages VALUES (99)", good)
    assert (first, type(orphan), last) == (None, apsw.ConstraintError, None)
    assert primary.position.lsn == before + 2
    assert replica.execute("SELECT * FROM pages").fetchall() == [(1,), (1,)]
    assert_equal(primary, replica)


def test_a_group_that_is_too_large_together_is_several_entries(cluster: Cluster) -> None:
    primary, replica = cluster.pair(commit="applied", timeout=20, limits=ReplicationLimits(transaction_bytes_max=2_000))
    before = primary.position.lsn
    fits = "INSERT INTO books (name) VALUES (hex(zeroblob(700)))"
    *fitting, large = run_group(primary, fits, fits, "INSERT INTO books (name) VALUES (hex(zeroblob(1500)))")
    assert (fitting, type(large)) == ([None, None], StatementRefused)
    assert primary.position.lsn == before + 2
    assert_equal(primary, replica)


def test_a_transaction_is_no_larger_than_a_message(cluster: Cluster) -> None:
    messenger = Messenger("small", limits=Limits(message_bytes_max=300_000))
    cluster.keep(messenger)
    primary = Primary(cluster.folder / "small.db", messenger, cluster.port, commit="applied", timeout=20)
    cluster.keep(primary)
    primary.execute(BOOKS, commit="local")
    wait_streaming(primary, cluster.replica())
    insert = "INSERT INTO books (name) VALUES (zeroblob(?))"
    with pytest.raises(StatementRefused, match="transaction_bytes_max is 298976"):
        primary.execute(insert, (299_000,))
    primary.execute(insert, (298_900,))


def test_who_waits_too_long_for_others_has_changed_nothing(cluster: Cluster) -> None:
    primary, _ = cluster.pair()
    with primary.transaction(), ThreadPoolExecutor(2) as pool:
        first = pool.submit(primary.execute, INSERT, ("a",), timeout=0.1)
        second = pool.submit(primary.execute, INSERT, ("b",), timeout=0.1)
        for late in (first, second):
            with pytest.raises(WriterBusy):
                late.result(20)
    primary.execute(INSERT, ("c",))
    assert primary.execute(SELECT).fetchall() == [(1, "c")]


def test_a_file_that_somebody_else_holds_for_long_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, _ = cluster.pair()
    writer = primary._writer
    writer.connection.set_busy_timeout(10)
    other = apsw.Connection(primary.path)
    cluster.keep(other)
    other.execute("BEGIN IMMEDIATE")
    begin = writer.begin

    def begin_and_free() -> None:
        try:
            begin()
        finally:  # Whoever tried again at once would find the file free.
            if other.in_transaction:
                other.execute("ROLLBACK")

    monkeypatch.setattr(writer, "begin", begin_and_free)
    with pytest.raises(apsw.BusyError):
        primary.execute(INSERT, ("a",))
    primary.execute(INSERT, ("b",), timeout=5)
    assert primary.execute(SELECT).fetchall() == [(1, "b")]


@pytest.mark.parametrize(
    ("is_the_moment", "is_written"),
    [
        (lambda operation: True, False),  # It waits in the queue.
        (lambda operation: operation.leads, False),  # It is to lead.
        (lambda operation: operation.position is not None, True),  # Another thread has written it.
    ],
)
def test_after_ctrl_c_in_a_thread_that_waits_others_write(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    is_the_moment: Callable[[Operation], bool],
    is_written: bool,
) -> None:
    primary, _ = cluster.pair(timeout=20)
    sync = primary._sync
    is_syncing, go_on = threading.Event(), threading.Event()

    def sync_slowly(lsn: int) -> None:
        is_syncing.set()
        go_on.wait(20)
        sync(lsn)

    def wait_until_interrupted(operation: Operation, timeout: float) -> bool:
        if operation.sql != "DELETE FROM books":
            return Waiter.wait(operation, timeout)
        if not is_the_moment(operation):
            go_on.set()
            wait_until(lambda: is_the_moment(operation))
        raise KeyboardInterrupt

    monkeypatch.setattr(primary, "_sync", sync_slowly)
    monkeypatch.setattr(Operation, "wait", wait_until_interrupted)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(primary.execute, INSERT, ("first",))]
        is_syncing.wait(20)
        if is_written:  # Another one is before it in the queue, and will lead.
            others.append(pool.submit(primary.execute, INSERT, ("second",)))
            wait_until(lambda: is_queued(primary, 1))
        with pytest.raises(KeyboardInterrupt):
            primary.execute("DELETE FROM books")
        go_on.set()
        for other in others:
            other.result(20)
    primary.execute(INSERT, ("last",), timeout=5)
    assert [name for _, name in primary.execute(SELECT)] == (["last"] if is_written else ["first", "last"])


def test_a_transaction_inside_another_is_refused(cluster: Cluster) -> None:
    primary, _ = cluster.pair()
    with primary.transaction() as tx:
        with pytest.raises(StatementRefused, match="use its `tx`"):
            primary.execute(INSERT, ("a",))
        with pytest.raises(StatementRefused, match="use its `tx`"), primary.transaction():
            pass
        with pytest.raises(StatementRefused, match="a transaction is open"):
            primary.close()
        assert primary.execute("SELECT count(*) FROM books").fetchall() == [(0,)]
        tx.execute(INSERT, ("b",))
    with pytest.raises(StatementRefused, match="has ended"):
        tx.execute(INSERT, ("c",))
    assert primary.execute(SELECT).fetchall() == [(1, "b")]


def test_a_check_inside_a_transaction_waits_for_no_check_of_another_thread(cluster: Cluster) -> None:
    """That one waits for the transaction."""
    primary, _ = cluster.pair()
    with ThreadPoolExecutor(1) as pool:
        with primary.transaction():
            other = pool.submit(primary.check, 20)
            wait_until(primary._check_lock.locked)
            with pytest.raises(StatementRefused, match="use its `tx`"):
                primary.check()
            assert not other.done()
        assert other.result(20) == {"replica": ""}


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_transaction_that_sqlite_rolled_back_commits_nothing_more(cluster: Cluster, goes_on: bool) -> None:
    primary, replica = cluster.pair()
    primary.execute("INSERT INTO books VALUES (1, 'Dune')")
    position = primary.position

    def run() -> None:
        with primary.transaction() as tx:
            tx.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
            with pytest.raises(apsw.ConstraintError):
                tx.execute("INSERT OR ROLLBACK INTO books VALUES (1, 'Emma')")
            if goes_on:
                tx.execute("INSERT INTO books VALUES (2, 'Emma')")

    with pytest.raises(StatementRefused, match="SQLite has rolled it back"):
        run()
    assert primary.position == position
    primary.execute("INSERT INTO books VALUES (3, 'Walden')")
    assert primary.execute(SELECT).fetchall() == [(1, "Dune"), (3, "Walden")]
    assert_equal(primary, replica)


def test_a_transaction_that_was_rolled_back_runs_nothing_more(cluster: Cluster) -> None:
    primary, _ = cluster.pair()
    with contextlib.suppress(LookupError), primary.transaction() as tx:
        raise LookupError
    with pytest.raises(StatementRefused, match="has ended"):
        tx.execute(INSERT, ("late",))
    assert primary.execute(SELECT).fetchall() == []


def test_returning_rows(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    assert primary.execute(f"{INSERT} RETURNING id", ("Dune",)).fetchall() == [(1,)]
    with primary.transaction() as tx:
        assert tx.execute(f"{INSERT} RETURNING id", ("Emma",)).fetchone() == (2,)
        tx.executemany(INSERT, [("a",), ("b",)])
        assert tx.last_insert_rowid() == 4
        assert next(tx.execute(SELECT)) == (1, "Dune")  # Rows that are not taken do not matter.
    assert_equal(primary, replica)


def test_closing_wakes_who_waits(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=30)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(primary.execute, BOOKS)
        wait_until(lambda: primary.position.lsn == 1)
        started_at = time.monotonic()
        primary.close()
        with pytest.raises(NotConfirmed, match="it was closed"):
            waiting.result(20)
    assert time.monotonic() - started_at < 10


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_closing_ends_a_read_that_is_under_way(cluster: Cluster, role: str) -> None:
    primary, replica = cluster.pair()
    reader = primary if role == "primary" else replica
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()

        def read() -> None:
            reader.execute("SELECT 1").fetchall()
            started.set()
            reader.execute(
                "SELECT (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n)"
            ).fetchall()

        reading = pool.submit(read)
        assert started.wait(10)
        time.sleep(0.1)
        reader.close()
        with pytest.raises(apsw.InterruptError):
            reading.result(10)
    with pytest.raises(ReplicationClosed):
        reader.execute("SELECT 1")
    # The file is free.
    if role == "primary":
        with pytest.raises(ReplicationClosed):
            primary.wait_confirmed(primary.position)
        cluster.primary(destination=free_port())
    else:
        cluster.replica()


def test_a_write_of_somebody_else_is_noticed(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    other = apsw.Connection(primary.path)
    other.execute("INSERT INTO books VALUES (99, 'foreign')")
    other.close()
    primary.execute(INSERT, ("Dune",))
    assert primary.status().foreign_write_count == 1
    replica.wait_for(primary.position)
    assert content_of(primary.path) != content_of(replica.path)


class Known:
    def __init__(self, received: int, durable: int, applied: int) -> None:
        self.received, self.durable, self.applied = received, durable, applied


@pytest.mark.parametrize(
    ("level", "count", "confirmed"),
    [
        (Level.LOCAL, 1, 9),
        (Level.RECEIVED, 1, 8),
        (Level.RECEIVED, 2, 7),
        (Level.DURABLE, 1, 6),
        (Level.DURABLE, 2, 5),
        (Level.APPLIED, 1, 4),
        (Level.APPLIED, 2, 3),
        (Level.APPLIED, 3, 0),
    ],
)
def test_what_confirms(level: Level, count: int, confirmed: int) -> None:
    confirmations = Confirmations()
    confirmations.durable_lsn = 9
    waiters = [Waiter(Position(1, lsn)) for lsn in range(1, 12)]
    for waiter in waiters:
        confirmations.add(waiter, level, count)
    confirmations.settle([Known(8, 6, 4), Known(7, 5, 3)])
    assert [waiter.is_confirmed for waiter in waiters] == [lsn <= confirmed for lsn in range(1, 12)]


def test_the_own_disk_counts_for_every_level() -> None:
    confirmations = Confirmations()
    waiter = Waiter(Position(1, 5))
    confirmations.add(waiter, Level.APPLIED, 1)
    confirmations.settle([Known(9, 9, 9)])
    assert not waiter.is_confirmed
    confirmations.durable_lsn = 5
    confirmations.settle([Known(9, 9, 9)])
    assert waiter.is_confirmed


def test_reads_run_beside_a_transaction(cluster: Cluster) -> None:
    primary, _ = cluster.pair()
    with primary.transaction() as tx:
        tx.execute(INSERT, ("Dune",))
        seen: list[object] = []
        reader = threading.Thread(target=lambda: seen.append(primary.execute(SELECT).fetchall()))
        reader.start()
        reader.join(20)
        assert seen == [[]]
    assert primary.execute(SELECT).fetchall() == [(1, "Dune")]


def test_what_changes_nothing_waits_for_nobody(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=0.2)
    primary.execute(BOOKS, commit="local")
    primary.execute("DELETE FROM books")
    with primary.transaction() as tx:
        assert tx.execute("UPDATE books SET name = 'x'").fetchall() == []
    assert primary.status().not_confirmed_count == 0


def test_who_leads_with_an_error_makes_the_others_durable(cluster: Cluster) -> None:
    primary, _ = cluster.pair(timeout=20)
    primary.execute("INSERT INTO books VALUES (1, 'there')")
    with ThreadPoolExecutor(4) as pool:
        with primary.transaction():
            first = pool.submit(primary.execute, "INSERT INTO books VALUES (1, 'refused')")
            wait_until(lambda: len(primary._writer._queue) == 1)
            others = [pool.submit(primary.execute, INSERT, (str(number),)) for number in range(3)]
            wait_until(lambda: len(primary._writer._queue) == 4)
        started_at = time.monotonic()
        for other in others:
            other.result(20)
        with pytest.raises(apsw.ConstraintError):
            first.result(20)
    assert time.monotonic() - started_at < 10
    assert primary.status().durable_lsn == primary.position.lsn


def test_a_group_that_is_not_confirmed_is_told_in_time(cluster: Cluster) -> None:
    primary = cluster.primary(commit="applied", timeout=0.5)
    primary.execute(BOOKS, commit="local")
    with ThreadPoolExecutor(4) as pool:
        with primary.transaction(commit="local"):
            waiting = [pool.submit(primary.execute, INSERT, (str(number),)) for number in range(4)]
            wait_until(lambda: len(primary._writer._queue) == 4)
        started_at = time.monotonic()
        for one in waiting:
            with pytest.raises(NotConfirmed):
                one.result(20)
    assert 0.3 < time.monotonic() - started_at < 5
