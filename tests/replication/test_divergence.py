"""A replica that holds something else than its primary is noticed, named, and mended only when somebody says so."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import apsw
import pytest

from messenger.replication import Diverged, Replica, ReplicaState, WriterBusy, verify
from messenger.replication.check import PrimaryCheck
from messenger.replication.content import compare_buckets, different_buckets, read_bucket, sum_content
from messenger.replication.follower import Follower
from messenger.replication.records import (
    DivergedReport,
    Entries,
    MalformedRecord,
    Part,
    PartKind,
    decode_from_replica,
    encode,
    follow,
)
from tests.conftest import TIMEOUT_S, wait_until
from tests.replication.pairs import INSERT, Cluster, assert_equal, content_of, state_of, wait_streaming


def tamper(replica: Replica, sql: str) -> None:
    """Write into the replica's file, as nobody should."""
    connection = apsw.Connection(replica.path)
    connection.set_busy_timeout(5_000)
    connection.execute(sql)
    connection.close()


def filled(cluster: Cluster) -> tuple[Any, Any]:
    primary, replica = cluster.pair()
    for name in ("Dune", "Emma", "Ulysses"):
        primary.execute(INSERT, (name,))
    wait_streaming(primary, replica)
    return primary, replica


@pytest.mark.parametrize(
    ("tampering", "sql", "key", "reason"),
    [
        ("UPDATE books SET name = 'x' WHERE id = 2", "UPDATE books SET name = 'y' WHERE id = 2", "2", "is another one"),
        ("DELETE FROM books WHERE id = 2", "DELETE FROM books WHERE id = 2", "2", "is missing"),
        ("INSERT INTO books VALUES (4, 'x')", "INSERT INTO books VALUES (4, 'y')", "4", "is there already"),
        ("CREATE UNIQUE INDEX i ON books (name)", "INSERT INTO books VALUES (4, 'Emma')", "4", "a constraint forbids"),
    ],
)
def test_a_conflict_is_a_divergence(cluster: Cluster, tampering: str, sql: str, key: str, reason: str) -> None:
    primary, replica = filled(cluster)
    tamper(replica, tampering)
    primary.execute("INSERT INTO books VALUES (10, 'before')")
    primary.execute(sql)
    primary.execute("INSERT INTO books VALUES (11, 'after')")
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.DIVERGED)
    (status,) = primary.status().replicas
    assert f"in table books, key {key}: " in status.diverged
    assert reason in status.diverged
    assert replica.status().state is ReplicaState.DIVERGED
    assert replica.status().diverged == status.diverged
    # All before it is there, and nothing of it or behind it.
    assert replica.position.lsn == primary.position.lsn - 2
    assert replica.execute("SELECT id FROM books WHERE id >= 10").fetchall() == [(10,)]
    with pytest.raises(Diverged, match="table books"):
        replica.wait_for(primary.position)


def test_a_diverged_replica_stays_so_until_it_is_resynced(cluster: Cluster) -> None:
    primary, replica = filled(cluster)
    tamper(replica, "DELETE FROM books WHERE id = 2")
    primary.execute("DELETE FROM books WHERE id = 2")
    wait_until(lambda: replica.status().state is ReplicaState.DIVERGED)
    replica.close()
    primary.close()
    primary, replica = cluster.primary(), cluster.replica()
    assert replica.status().state is ReplicaState.DIVERGED
    assert state_of(primary, "replica") is ReplicaState.DIVERGED
    primary.execute(INSERT, ("after",))
    replica.resync()
    wait_streaming(primary, replica)
    assert_equal(primary, replica)
    assert replica.status().diverged == ""
    assert primary.status().replicas[0].diverged == ""
    tamper(replica, "DELETE FROM books WHERE id = 1")
    primary.execute("DELETE FROM books WHERE id = 1")
    wait_until(lambda: replica.status().state is ReplicaState.DIVERGED)
    replica.close()
    assert_equal(primary, cluster.replica(resync=True))


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("SELECT 1", ""),
        ("UPDATE books SET name = 'x' WHERE id = 2", "table books, key 2: differs"),
        ("DELETE FROM books WHERE id = 2", "table books, key 2: missing here"),
        ("INSERT INTO books VALUES (77, NULL)", "table books, key 77: missing there"),
        ("CREATE TABLE extra (x)", "table sqlite_schema, key 'table', 'extra': missing there"),
        ("UPDATE nokey SET b = 3.0", "table nokey, key 1: differs"),
        ("UPDATE counted SET id = 2; DELETE FROM counted", "table counted, key 1: missing here"),
        ("UPDATE sqlite_sequence SET seq = 9", "table sqlite_sequence, key 'counted': differs"),
    ],
)
def test_a_check_finds_what_no_conflict_shows(cluster: Cluster, tampering: str, found: str) -> None:
    primary, replica = filled(cluster)
    with primary.transaction() as tx:
        tx.execute("CREATE TABLE nokey (a, b); INSERT INTO nokey VALUES (1, 3)")
        tx.execute("CREATE TABLE counted (id INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO counted VALUES (1)")
    wait_streaming(primary, replica)
    tamper(replica, tampering)
    assert primary.check(timeout=20) == {"replica": found}
    if found:
        wait_until(lambda: state_of(primary, "replica") is ReplicaState.DIVERGED)
        assert replica.status().state is ReplicaState.DIVERGED
    else:
        primary.execute(INSERT, ("x",), commit="applied", timeout=20)
        assert primary.check(timeout=20) == {"replica": ""}


def test_a_check_compares_one_moment_while_writes_go_on(cluster: Cluster) -> None:
    primary, replica = filled(cluster)
    second = cluster.replica("second")
    wait_streaming(primary, second)
    for number in range(20):
        primary.execute(INSERT, (str(number),))
        if number % 5 == 0:
            assert primary.check(timeout=20) == {"replica": "", "second": ""}
    assert_equal(primary, replica)
    replica.close()
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.DOWN)
    assert primary.check(timeout=20) == {"second": ""}


def test_a_check_waits_for_another_no_longer_than_it_was_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, _ = filled(cluster)
    begun, end = threading.Event(), threading.Event()

    def compare(*_: object) -> dict[str, str]:
        begun.set()
        end.wait(TIMEOUT_S)
        return {}

    monkeypatch.setattr(primary._hub, "compare", compare)
    other = threading.Thread(target=primary.check)
    other.start()
    assert begun.wait(TIMEOUT_S)
    with pytest.raises(WriterBusy, match="another check took all the time; this one was not begun"):
        primary.check(timeout=0.1)
    end.set()
    other.join()
    assert primary.check(timeout=TIMEOUT_S) == {}


def test_a_check_does_not_wait_for_a_replica_that_began_behind_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is filled from a snapshot that has the check's entry in it, so it never comes to it."""
    primary, _ = cluster.pair()
    replicas: list[Replica] = []
    compare = primary._hub.compare

    def join_first(check: Any, deadline_at: float) -> dict[str, str]:
        replicas.append(cluster.replica("late"))
        wait_until(lambda: state_of(primary, "late") is ReplicaState.STREAMING)
        return compare(check, deadline_at)

    monkeypatch.setattr(primary._hub, "compare", join_first)
    started_at = time.monotonic()
    assert primary.check(timeout=20) == {"replica": ""}
    assert time.monotonic() - started_at < 10


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("SELECT 1", ""),
        ("UPDATE books SET name = 'other' WHERE id = 4", "table books, key 4: differs"),
        ("UPDATE books SET name = x'feff' WHERE id = 4", "table books, key 4: differs"),
        ("UPDATE books SET name = 'other' WHERE id = 1", "table books, key 1: differs"),
        ("DELETE FROM names WHERE value = 2", "table names, key 'a': missing here"),
        ("DELETE FROM names WHERE value = 1", r"table names, key '\udcfe\udcff': missing here"),
    ],
)
def test_text_that_is_no_utf_8_is_compared(cluster: Cluster, tampering: str, found: str) -> None:
    primary, replica = filled(cluster)
    primary.execute("INSERT INTO books VALUES (4, CAST(x'feff' AS TEXT))")
    primary.execute("CREATE TABLE names (name TEXT PRIMARY KEY, value) WITHOUT ROWID")
    primary.execute("INSERT INTO names VALUES (CAST(x'feff' AS TEXT), 1), ('a', 2)")
    wait_streaming(primary, replica)
    tamper(replica, tampering)
    assert verify(primary.path, replica.path).is_equal == (not found)
    assert primary.check(10) == {"replica": found}


def test_a_conflict_over_text_that_is_no_utf_8_is_a_divergence(cluster: Cluster) -> None:
    primary, replica = filled(cluster)
    primary.execute("CREATE TABLE names (name TEXT PRIMARY KEY, value)")
    primary.execute("INSERT INTO names VALUES (CAST(x'feff' AS TEXT), 1)")
    wait_streaming(primary, replica)
    tamper(replica, "DELETE FROM names")
    primary.execute("UPDATE names SET value = 2")
    wait_until(lambda: replica.status().state is ReplicaState.DIVERGED)
    assert "in table names, key ?: UPDATE: the row is missing" in replica.status().diverged


def test_a_check_goes_on_without_a_replica_that_is_forgotten_meanwhile(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is gone is, when there are too many, or when its file comes under another name."""
    primary, _ = cluster.pair()
    wait_sums = PrimaryCheck.wait_sums

    def forget(*arguments: Any) -> Iterator[str]:
        for name in wait_sums(*arguments):
            with primary._hub.lock:
                del primary._hub.peers[name]
            yield name

    monkeypatch.setattr(PrimaryCheck, "wait_sums", forget)
    assert primary.check(10) == {}


def test_checks_come_by_themselves(cluster: Cluster) -> None:
    primary, replica = cluster.pair(check_every=0.1)
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    before = primary.position.lsn
    wait_until(lambda: primary.position.lsn > before + 2)
    tamper(replica, "UPDATE books SET name = 'x'")
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.DIVERGED)
    assert replica.status().diverged.endswith("in table books, key 1: differs")


def test_changes_of_our_own_tables_are_refused(cluster: Cluster) -> None:
    primary, replica = filled(cluster)
    source = apsw.Connection(":memory:")
    source.execute("CREATE TABLE _messenger_terms (term INTEGER PRIMARY KEY, first_lsn, checksum)")
    session = apsw.Session(source, "main")
    session.attach()
    source.execute("INSERT INTO _messenger_terms VALUES (9, 9, x'00')")
    body = encode([Part(PartKind.CHANGES, session.changeset())])
    (peer,) = primary._hub.peers.values()
    peer.feed.send(Entries(peer.feed.stream, [follow(primary._hub.head, 1, 0, body)]))
    wait_until(lambda: replica.status().state is ReplicaState.DIVERGED)
    assert "changes of replication's own tables are refused" in replica.status().diverged
    assert replica.execute("SELECT term FROM _messenger_terms").fetchall() == [(1,)]


@pytest.mark.parametrize("data", [b"", b"\x00", b"T\xff\xff\xff", b"T" * 50, bytes(range(256))])
def test_a_garbled_changeset_changes_nothing(cluster: Cluster, data: bytes) -> None:
    primary, replica = filled(cluster)
    before = content_of(replica.path)
    body = encode([Part(PartKind.CHANGES, data)])
    (peer,) = primary._hub.peers.values()
    peer.feed.send(Entries(peer.feed.stream, [follow(primary._hub.head, 1, 0, body)]))
    wait_until(lambda: replica.status().diverged or replica.status().lsn > primary.position.lsn)
    assert content_of(replica.path) == before


def test_a_replica_that_is_ahead_has_diverged(cluster: Cluster) -> None:
    """As when the primary's machine lost power, and what its disk had not confirmed."""
    primary, replica = filled(cluster)
    (peer,) = primary._hub.peers.values()
    peer.feed.send(Entries(peer.feed.stream, [follow(primary._hub.head, 1, 0, encode([]))]))
    wait_until(lambda: replica.position.lsn == primary.position.lsn + 1)
    replica.close()
    replica = cluster.replica()
    wait_until(lambda: replica.status().state is ReplicaState.DIVERGED)
    assert "it is at LSN 5, the primary only at 4" in replica.status().diverged
    assert state_of(primary, "replica") is ReplicaState.DIVERGED


def test_two_files_are_compared(cluster: Cluster) -> None:
    primary, replica = filled(cluster)
    assert verify(primary.path, replica.path).is_equal
    tamper(replica, "DELETE FROM books WHERE id = 2")
    assert not verify(primary.path, replica.path).is_equal


def test_sums_tell_rows_apart() -> None:
    one, two = apsw.Connection(":memory:"), apsw.Connection(":memory:")
    for connection, numbers in ((one, range(1, 5001)), (two, range(5000, 0, -1))):
        connection.execute("CREATE TABLE t (k PRIMARY KEY, v)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", ((number, 2 * number) for number in numbers))
    assert sum_content(one) == sum_content(two)
    two.execute("UPDATE t SET v = CAST(v AS REAL) WHERE k = 77; UPDATE t SET k = 99999 WHERE k = 5")
    buckets = list(different_buckets(sum_content(one), sum_content(two)))
    assert len(buckets) == 3
    found = [
        str(difference)
        for table, bucket in buckets
        for difference in compare_buckets(table, read_bucket(one, table, bucket), read_bucket(two, table, bucket))
    ]
    assert sorted(found) == [
        "table t, key 5: missing there",
        "table t, key 77: differs",
        "table t, key 99999: missing here",
    ]


def test_a_resync_is_not_lost_that_comes_as_soon_as_the_divergence_is_seen(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, replica = filled(cluster)
    send = Follower._send

    def resync_and_send(follower: Follower, stream: int, data: bytes) -> None:
        with contextlib.suppress(MalformedRecord):
            if isinstance(decode_from_replica(data), DivergedReport):
                with pytest.raises(Diverged):
                    replica.wait_for((1, 100))
                replica.resync()
        send(follower, stream, data)

    monkeypatch.setattr(Follower, "_send", resync_and_send)
    tamper(replica, "DELETE FROM books WHERE id = 2")
    primary.execute("UPDATE books SET name = 'Walden'")
    wait_until(lambda: replica.status().snapshot_count == 2)
    assert_equal(primary, replica)


def test_a_divergence_that_cannot_be_kept_is_told_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise apsw.FullError("database or disk is full")

    primary, replica = filled(cluster)
    tamper(replica, "DELETE FROM books WHERE id = 2")
    with monkeypatch.context() as patch:
        patch.setattr("messenger.replication.database.write_state", refuse)
        assert primary.check(10) == {"replica": "table books, key 2: missing here"}
        wait_until(lambda: state_of(primary, "replica") is ReplicaState.DIVERGED)
        assert replica.status().state is ReplicaState.DIVERGED
        assert "will not know that it has diverged: database or disk is full" in caplog.text
    replica.resync()
    wait_until(lambda: replica.status().snapshot_count == 2)
    assert_equal(primary, replica)
