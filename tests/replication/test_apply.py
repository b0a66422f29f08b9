"""Which thread of a replica applies what: a few changes the one that receives, and what may take long another one."""

import threading
import time

import apsw
import pytest

from messenger.replication import Replica
from messenger.replication.applier import Applier
from messenger.replication.limits import APPLY_HERE_BYTES
from messenger.replication.records import Entry
from tests.conftest import wait_until
from tests.replication.pairs import INSERT, Cluster, assert_equal, content_of, wait_streaming

LIMIT = "messenger.replication.follower.APPLY_HERE_S"
MESSENGERS, OWN = "messenger-replica", "replication-apply-replica"


@pytest.fixture
def applied_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that applied, in turn; here no batch takes too long."""
    names: list[str] = []
    apply = Applier.apply

    def note(self: Applier, entries: list[Entry]) -> None:
        names.append(threading.current_thread().name)
        apply(self, entries)

    monkeypatch.setattr(Applier, "apply", note)
    monkeypatch.setattr(LIMIT, 60.0)
    return names


def wait_idle(replica: Replica) -> None:
    """Until the apply thread has nothing to do."""
    wait_until(lambda: replica._follower._inbox.is_idle)


def test_a_few_changes_are_applied_where_they_arrive(cluster: Cluster, applied_by: list[str]) -> None:
    primary, replica = cluster.pair(commit="applied")
    wait_idle(replica)
    applied_by.clear()
    primary.execute(INSERT, ("Dune",))
    primary.execute(INSERT, ("Emma",))
    assert applied_by == [MESSENGERS, MESSENGERS]
    assert_equal(primary, replica)


@pytest.mark.parametrize(
    ("sql", "bindings"),
    [("CREATE INDEX names ON books (name)", None), (INSERT, ("x" * APPLY_HERE_BYTES,))],
)
def test_what_may_take_long_has_a_thread_of_its_own(
    cluster: Cluster, applied_by: list[str], sql: str, bindings: tuple[str] | None
) -> None:
    primary, replica = cluster.pair(commit="applied")
    wait_idle(replica)
    applied_by.clear()
    primary.execute(sql, bindings)
    assert applied_by == [OWN]
    wait_idle(replica)
    primary.execute(INSERT, ("Dune",))
    assert applied_by == [OWN, MESSENGERS]
    assert_equal(primary, replica)


def test_a_slow_disk_holds_up_other_callbacks_only_once(
    cluster: Cluster, applied_by: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, replica = cluster.pair(commit="applied")
    wait_idle(replica)
    applied_by.clear()
    monkeypatch.setattr(LIMIT, 0.0)
    primary.execute(INSERT, ("Dune",))
    assert applied_by == [OWN]


def test_another_process_that_writes_to_the_file_holds_up_no_callbacks(cluster: Cluster, applied_by: list[str]) -> None:
    primary, replica = cluster.pair(commit="applied")
    wait_idle(replica)
    applied_by.clear()
    other = apsw.Connection(str(replica.path))
    other.execute("BEGIN IMMEDIATE")
    committing = threading.Thread(target=primary.execute, args=(INSERT, ("Dune",)))
    committing.start()
    wait_until(lambda: applied_by == [MESSENGERS, OWN])
    time.sleep(0.05)
    assert committing.is_alive()
    other.execute("ROLLBACK")
    committing.join(20)
    assert_equal(primary, replica)
    assert applied_by == [MESSENGERS, OWN]
    assert not replica.status().trouble
    other.close()


def test_a_received_transaction_is_answered_before_it_is_applied(cluster: Cluster, applied_by: list[str]) -> None:
    primary, replica = cluster.pair(commit="received")
    wait_idle(replica)
    applied_by.clear()
    primary.execute(INSERT, ("Dune",))
    assert_equal(primary, replica)
    assert applied_by == [OWN]


def test_closing_waits_for_what_is_being_applied(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, replica = cluster.pair()
    wait_idle(replica)
    began, go_on = threading.Event(), threading.Event()
    apply = Applier.apply

    def apply_slowly(self: Applier, entries: list[Entry]) -> None:
        began.set()
        assert go_on.wait(20)
        apply(self, entries)

    monkeypatch.setattr(Applier, "apply", apply_slowly)
    monkeypatch.setattr(LIMIT, 60.0)
    primary.execute(INSERT, ("Dune",))
    assert began.wait(20)
    closing = threading.Thread(target=replica.close)
    closing.start()
    wait_until(lambda: not any(thread.name == OWN for thread in threading.enumerate()))
    time.sleep(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(20)
    assert not closing.is_alive()
    assert replica.status().lsn == primary.position.lsn


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        (
            "t (a INTEGER PRIMARY KEY, b)",
            ["1, 2.5", "2, x'00ff'", "3, NULL", "4, 'a' || char(0)"],
        ),
        ("t (a, b)", ["1, 2", "1, 2", "NULL, NULL"]),
        ("t (a TEXT PRIMARY KEY, b) WITHOUT ROWID", ["'x', 1", "'', 2"]),
        ("t (b, a INTEGER, PRIMARY KEY (a, b))", ["1, 2", "2, 1"]),
        ("t (a INTEGER PRIMARY KEY, b UNIQUE ON CONFLICT REPLACE)", ["1, 2", "3, 2"]),
        ("t (a INTEGER PRIMARY KEY, b UNIQUE ON CONFLICT ROLLBACK)", ["1, 2", "3, 3"]),
        ("t (a INTEGER PRIMARY KEY, b, c AS (b + 1) STORED, d AS (b + 2))", ["1, 2", "3, 2"]),
        ("t (a, b, c AS (b + 1))", ["1, 2", "3, 2"]),
        ("t (a INTEGER PRIMARY KEY AUTOINCREMENT, b)", ["1, 2", "7, 2"]),
        ('"t" (a INTEGER PRIMARY KEY, "b""\'" UNIQUE)', ["1, 2", "3, 3"]),
    ],
)
def test_single_rows_are_inserted_as_they_are(cluster: Cluster, table: str, rows: list[str]) -> None:
    primary, replica = cluster.pair(commit="applied")
    primary.execute(f"CREATE TABLE {table}")
    for row in rows:
        primary.execute(f"INSERT INTO t VALUES ({row})")  # noqa: S608
    assert_equal(primary, replica)
    primary.execute("DELETE FROM t")
    primary.execute("ALTER TABLE t ADD COLUMN more DEFAULT 5")
    primary.execute(f"INSERT INTO t VALUES ({rows[0]}, 6)")  # noqa: S608
    assert_equal(primary, replica)
    assert replica.status().trouble == ""


def test_text_that_is_no_utf_8_is_replicated(cluster: Cluster) -> None:
    primary, replica = cluster.pair(commit="applied")
    primary.execute("INSERT INTO books (name) VALUES (cast(x'ff' AS TEXT))")
    assert replica.execute("SELECT typeof(name), hex(name) FROM books").fetchall() == [("text", "FF")]


@pytest.mark.parametrize("clause", ["", "ON CONFLICT ROLLBACK"])
def test_a_row_that_is_there_already_is_a_divergence(cluster: Cluster, clause: str) -> None:
    primary, replica = cluster.pair()
    primary.execute(f"CREATE TABLE t (a INTEGER PRIMARY KEY {clause}, b)")
    wait_streaming(primary, replica)
    other = apsw.Connection(replica.path)
    other.execute("INSERT INTO t VALUES (1, 'by somebody else')")
    other.close()
    primary.execute("INSERT INTO t VALUES (1, 'by the primary')")
    wait_until(lambda: replica.status().diverged)
    assert "table t, key 1" in replica.status().diverged
    assert content_of(replica.path)["t"] == [(1, "by somebody else")]
