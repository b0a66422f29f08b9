"""How a replica joins, falls behind, comes back: by the log or by a snapshot, with no gap and nothing twice."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest

from messenger import DestinationInvalid, Limits, Messenger
from messenger.replication import (
    DatabaseRefused,
    Position,
    Primary,
    Replica,
    ReplicaSelfStatus,
    ReplicaState,
    ReplicationClosed,
    ReplicationLimits,
    Stale,
)
from messenger.replication.database import open_reader
from messenger.replication.feed import Feed, Peer
from messenger.replication.log import read_entries
from messenger.replication.records import CHECKSUM_BYTES, Ack, Entries, Entry, SnapshotPart, encode
from messenger.replication.snapshot import SnapshotFailed
from tests.conftest import free_port, wait_until
from tests.replication.direct import Direct
from tests.replication.pairs import BOOKS, INSERT, SELECT, Cluster, assert_equal, content_of, state_of, wait_streaming


def test_the_example_of_the_issue(cluster: Cluster) -> None:
    with cluster.primary(commit="applied", acknowledgements=1, timeout=5.0) as primary:
        primary.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, book TEXT)", commit="local")
        with primary.transaction(commit="local") as tx:
            tx.execute("INSERT INTO orders (book) VALUES (?)", ("Dune",))
        position = primary.position
        assert position == (1, 2)
        with cluster.replica() as replica:
            replica.wait_for(position, timeout=20)
            assert replica.execute("SELECT * FROM orders").fetchall() == [(1, "Dune")]


def test_an_existing_database_is_adopted(cluster: Cluster) -> None:
    connection = apsw.Connection(str(cluster.folder / "primary.db"))
    connection.execute("PRAGMA page_size = 8192; CREATE TABLE old (a, b); INSERT INTO old VALUES (1, x'02')")
    connection.close()
    primary, replica = cluster.pair()
    assert replica.execute("SELECT * FROM old").fetchall() == [(1, b"\x02")]
    assert_equal(primary, replica)


def test_a_replica_that_comes_back_takes_the_log(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    for _ in range(3):
        replica.close()
        wait_until(lambda: state_of(primary, "replica") is ReplicaState.DOWN)
        with primary.transaction() as tx:
            tx.execute(INSERT, ("while it was gone",))
        primary.execute(INSERT, ("too",))
        replica = cluster.replica()
        assert_equal(primary, replica)
        assert replica.status().snapshot_count == 0
    assert primary.status().snapshot_count == 1


def test_a_replica_that_fell_behind_the_log_takes_a_snapshot(cluster: Cluster) -> None:
    limits = ReplicationLimits(log_transactions_max=10)
    primary, replica = cluster.pair(limits=limits)
    replica.close()
    for number in range(400):
        primary.execute(INSERT, (str(number),))
    status = primary.status()
    assert status.lsn - status.log_first_lsn + 1 <= 10 + 256
    replica = cluster.replica()
    assert_equal(primary, replica)
    assert replica.status().snapshot_count == 1
    wait_streaming(primary, replica)
    primary.execute(INSERT, ("after",), commit="applied")
    assert_equal(primary, replica)


def test_the_log_is_bounded_in_bytes(cluster: Cluster) -> None:
    primary, replica = cluster.pair(limits=ReplicationLimits(log_bytes_max=100_000))
    for _ in range(30):
        primary.execute(INSERT, ("x" * 10_000,))
    assert primary.status().log_bytes <= 110_000
    assert primary.status().log_first_lsn > 15
    assert_equal(primary, replica)


def test_a_restarted_primary_goes_on(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    for number in range(3):
        primary.close()
        assert replica.execute("SELECT count(*) FROM books").fetchall() == [(number,)]  # It is read meanwhile.
        primary = cluster.primary()
        assert primary.position == (1, 1 + number)
        primary.execute(INSERT, (str(number),), commit="applied", timeout=20)
        assert_equal(primary, replica)
    assert replica.status().snapshot_count == 1


def test_writes_go_on_during_a_snapshot(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    with primary.transaction() as tx:
        tx.executemany(INSERT, (("x" * 1_000,) for _ in range(20_000)))
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            primary.execute(INSERT, ("meanwhile",))
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[ReplicaSelfStatus] = []
    replica = cluster.replica(on_progress=seen.append)
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.STREAMING, 30)
    stop.set()
    writer.join()
    assert written > 10
    assert_equal(primary, replica)
    snapshots = [status for status in seen if status.state is ReplicaState.SNAPSHOT and status.snapshot_bytes_total]
    assert snapshots[-1].snapshot_bytes_total > 20_000_000
    assert [status.snapshot_bytes for status in snapshots] == sorted(status.snapshot_bytes for status in snapshots)
    assert not list(cluster.folder.glob("*-snapshot-*"))


def test_several_replicas(cluster: Cluster) -> None:
    primary = cluster.primary(acknowledgements=3, commit="applied", timeout=20)
    replicas = [cluster.replica(f"replica{number}") for number in range(3)]
    primary.execute(BOOKS)
    primary.execute(INSERT, ("Dune",))
    for replica in replicas:
        assert replica.execute(SELECT).fetchall() == [(1, "Dune")]
    assert [status.name for status in primary.status().replicas] == ["replica0", "replica1", "replica2"]


def test_a_replica_that_catches_up_is_sent_no_more_than_the_limit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, replica = cluster.pair(limits=ReplicationLimits(in_flight_transactions_max=5))
    replica.close()
    for number in range(100):
        primary.execute(INSERT, (str(number),))
    most: list[int] = []
    note_sent = Peer.note_sent

    def note(peer: Peer, entry: Entry) -> None:
        note_sent(peer, entry)
        most.append(len(peer.under_way))

    monkeypatch.setattr(Peer, "note_sent", note)
    wait_streaming(primary, cluster.replica())
    assert len(most) == 100
    assert max(most) == 5


def test_a_slow_replica_is_bounded_and_catches_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, replica = cluster.pair(limits=ReplicationLimits(in_flight_transactions_max=5))
    gate = threading.Event()
    sync = replica._applier.sync

    def slow_sync() -> int:
        gate.wait(20)
        return sync()

    monkeypatch.setattr(replica._applier, "sync", slow_sync)
    for number in range(100):
        primary.execute(INSERT, (str(number),))
    (status,) = primary.status().replicas
    assert status.sent_lsn - status.applied_lsn <= 6
    assert status.state is ReplicaState.CATCHING_UP
    assert status.lag_transactions >= 90
    assert status.lag_s > 0
    gate.set()
    wait_streaming(primary, replica)
    assert_equal(primary, replica)


def test_two_cannot_have_one_file(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with pytest.raises(DatabaseRefused, match="open as a primary or replica already"):
        Primary(primary.path, cluster.messenger("other"), free_port())
    with pytest.raises(DatabaseRefused, match="open as a primary or replica already"):
        Replica(primary.path, cluster.messenger("another"), cluster.port)
    replica.close()
    with pytest.raises(DatabaseRefused, match="is a replica's; promote it"):
        Primary(replica.path, cluster.messenger("third"), free_port())


def test_a_database_that_is_no_replica_is_not_overwritten(cluster: Cluster) -> None:
    path = cluster.folder / "mine.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = content_of(path)
    with pytest.raises(DatabaseRefused, match="is no replica, and would be overwritten"):
        cluster.replica("mine")
    assert content_of(path) == before


def test_a_replica_of_another_database_is_refused(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    replica.close()
    other = cluster.primary("other", destination=free_port())
    replica = cluster.replica(destination=other.destination)
    wait_until(lambda: "this primary has database" in replica.status().trouble)
    assert replica.execute("SELECT count(*) FROM books").fetchall() == [(0,)]
    assert primary.status().database != other.status().database


def test_a_replica_refuses_writes(cluster: Cluster) -> None:
    _, replica = cluster.pair()
    with pytest.raises(apsw.ReadOnlyError):
        replica.execute("INSERT INTO books (name) VALUES ('x')")
    with pytest.raises(apsw.ReadOnlyError):
        replica.execute("CREATE TABLE x (y)")


def test_waiting_for_a_position(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with pytest.raises(Stale, match=r"position \(1, 99\) did not come within 0.05 s, this is \(1, 1\)"):
        replica.wait_for((1, 99), timeout=0.05)
    with primary.transaction() as tx:
        tx.execute(INSERT, ("Dune",))
    assert tx.position is not None
    replica.wait_for(tx.position)
    replica.wait_for([*tx.position])  # type: ignore[arg-type]  # As JSON gives it.
    assert replica.position == Position(1, 2)
    replica.close()
    with pytest.raises(ReplicationClosed):
        replica.wait_for((1, 1))
    with pytest.raises(ReplicationClosed):
        replica.execute(SELECT)


def test_staleness_is_bounded(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    replica = cluster.replica(max_lag=1.5)
    with pytest.raises(Stale, match="no copy of the database yet"):
        replica.execute(SELECT)
    wait_streaming(primary, replica)
    wait_until(lambda: (replica.status().lag_s or 99) < 1)
    assert replica.execute(SELECT).fetchall() == []
    primary.close()
    wait_until(lambda: (replica.status().lag_s or 0) > 1.5)
    with pytest.raises(Stale, match=r"max_lag is 1\.5 s"):
        replica.execute(SELECT)


def test_staleness_does_not_trust_the_clock_of_an_earlier_life(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica whose machine was started anew, or that is on another one, has another monotonic clock."""
    primary = cluster.primary()
    primary.execute(BOOKS)
    with monkeypatch.context() as patch:
        patch.setattr("messenger.replication.follower.time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6))
        replica = cluster.replica()
        wait_streaming(primary, replica)
        wait_until(lambda: primary._hub.peers["replica"].echo_s > 1e6)
        replica.close()
    replica = cluster.replica(max_lag=1.5)
    wait_streaming(primary, replica)
    wait_until(lambda: replica.status().lag_s is not None)
    assert 0 <= (replica.status().lag_s or 0) < 60


def test_the_status_tells_of_a_replica_that_is_gone(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    replica.close()
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.DOWN)
    primary.execute(INSERT, ("Emma",))
    (gone,) = primary.status().replicas
    assert (gone.applied_lsn, gone.durable_lsn, gone.lag_transactions) == (2, 2, 1)
    assert gone.contact_s is not None
    primary.close()
    primary = cluster.primary()
    (gone,) = primary.status().replicas
    assert (gone.name, gone.state, gone.applied_lsn, gone.lag_transactions) == ("replica", ReplicaState.DOWN, 2, 1)


def test_the_lag_of_a_replica_that_is_gone_outlasts_a_restart(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    replica.close()
    primary.execute(INSERT, ("Dune",))
    time.sleep(1)
    primary.close()
    primary = cluster.primary()
    primary.execute(INSERT, ("Emma",))
    (status,) = primary.status().replicas
    assert (status.state, status.lag_transactions) == (ReplicaState.DOWN, 2)
    assert 1 <= status.lag_s < 60
    replica = cluster.replica()
    wait_streaming(primary, replica)
    wait_until(lambda: primary.status().replicas[0].lag_s == 0)


def test_a_replica_is_told_why_it_gets_no_snapshot(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
        replica = cluster.replica()
        wait_until(lambda: "1 are free" in replica.status().trouble)
        assert replica.status().state is ReplicaState.CONNECTING
        with pytest.raises(Stale, match="a snapshot needs"):
            replica.execute(SELECT)
    assert_equal(primary, replica)
    assert replica.status().trouble == ""


def test_two_replicas_of_one_name_do_not_take_turns(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    first = Replica(cluster.folder / "first.db", cluster.messenger("first"), cluster.port, name="copy")
    cluster.keep(first)
    wait_streaming(primary, first)
    second = Replica(cluster.folder / "second.db", cluster.messenger("second"), cluster.port, name="copy")
    cluster.keep(second)
    wait_until(lambda: "first has a replica named copy here; give each a name" in second.status().trouble)
    first.close()
    wait_streaming(primary, second)


def test_messages_may_be_small(cluster: Cluster) -> None:
    limits = Limits(message_bytes_max=50_000)
    with (
        Messenger("one", limits=limits) as one,
        Messenger("two", limits=limits) as two,
        Primary(cluster.folder / "primary.db", one, cluster.port) as primary,
    ):
        primary.execute("CREATE TABLE pages (page BLOB)")
        for _ in range(20):
            primary.execute("INSERT INTO pages VALUES (randomblob(20000))")
        with Replica(cluster.folder / "replica.db", two, cluster.port) as replica:
            assert_equal(primary, replica)
        for size_bytes in [20_000] * 20 + [10] * 2_000 + [45_000]:
            primary.execute("INSERT INTO pages VALUES (randomblob(?))", (size_bytes,))
        with Replica(cluster.folder / "replica.db", two, cluster.port) as replica:
            assert_equal(primary, replica)
            assert replica.status().snapshot_count == 0
            wait_streaming(primary, replica)
            with ThreadPoolExecutor(8) as pool:
                for _ in range(100):
                    pool.submit(primary.execute, "INSERT INTO pages VALUES (randomblob(9000))")
            assert_equal(primary, replica)
            assert replica.status().trouble == ""


def test_garbage_is_counted_and_harms_nobody(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    stranger = cluster.messenger("stranger")
    for contents in (b"", b"\x00", b"\xff" * 100, encode(Entries(0, [])), b"\x92\xa3ack", encode(Ack(7, 9, 9, 9, 0.0))):
        stranger.send_message(cluster.port, contents)
    wait_until(lambda: primary.status().malformed_count == 5)
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    assert_equal(primary, replica)


def test_entries_that_do_not_follow_are_not_applied(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    (peer,) = primary._hub.peers.values()
    assert peer.feed is not None
    for lsn in (1, 2):
        peer.feed.send(Entries(peer.feed.stream, [Entry(lsn, 1, 0, b"x" * 16, b"\x90")]))
    wait_until(lambda: replica.status().malformed_count >= 2)
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    assert_equal(primary, replica)


def test_a_gap_is_asked_for(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    (peer,) = primary._hub.peers.values()
    assert peer.feed is not None
    with primary._hub.lock:
        peer.sent += 1  # As if one had been sent.
    primary._hub.head = primary._hub.head._replace(lsn=1)
    primary.execute(INSERT, ("lost on the way",))
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    assert_equal(primary, replica)


def test_readers_in_other_processes_see_a_resync_as_one_step(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    with primary.transaction() as tx:
        tx.executemany(INSERT, (("x" * 100,) for _ in range(10_000)))
    wait_streaming(primary, replica)
    reader = apsw.Connection(replica.path, flags=apsw.SQLITE_OPEN_READONLY)
    seen: set[int] = set()
    replica.resync()

    def look() -> bool:
        rows: list[tuple[int]] = reader.execute("SELECT count(*) FROM books").fetchall()  # type: ignore[assignment]
        seen.add(rows[0][0])
        return replica.status().snapshot_count == 2

    wait_until(look, 20)
    assert seen == {10_000}
    assert reader.pragma("integrity_check") == "ok"
    reader.close()
    assert_equal(primary, replica)


def test_nothing_is_confirmed_by_what_a_snapshot_replaces(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    primary, replica = cluster.pair()
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    gate = threading.Event()
    install = replica._applier.install_snapshot

    def slow_install(checksum: bytes) -> None:
        gate.wait(20)
        install(checksum)

    monkeypatch.setattr(replica._applier, "install_snapshot", slow_install)
    replica.resync()
    wait_until(lambda: primary.status().replicas[0].sent_lsn == 2 and primary.status().snapshot_count == 2)
    contact_at = primary._hub.peers["replica"].contact_at
    wait_until(lambda: (primary._hub.peers["replica"].contact_at or 0) > (contact_at or 0) + 0.5)  # It answers beats.
    (status,) = primary.status().replicas
    assert (status.received_lsn, status.durable_lsn, status.applied_lsn) == (0, 0, 0)
    gate.set()
    wait_streaming(primary, replica)
    wait_until(lambda: primary.status().replicas[0].applied_lsn == 2)


def test_a_wal_that_is_left_is_not_played_into_a_new_copy(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    wal = Path(f"{replica.path}-wal").read_bytes()
    assert len(wal) > 4_096
    replica.close()
    Path(replica.path).unlink()
    Path(f"{replica.path}-wal").write_bytes(wal)
    primary.execute("UPDATE books SET name = 'Emma'")
    replica = cluster.replica()
    assert_equal(primary, replica)
    assert replica.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_leftovers_of_killed_processes_are_removed(cluster: Cluster) -> None:
    number = "0123456789abcdef" * 2
    leftovers = [cluster.folder / f"primary.db-snapshot-{number}", cluster.folder / f"replica.db-snapshot-{number}-wal"]
    users = [cluster.folder / f"primary.db.bak-snapshot-{number}", cluster.folder / "primary.db-snapshot-20261130"]
    for path in (*leftovers, *users):
        path.write_bytes(b"half")
    cluster.pair()
    assert [path.exists() for path in leftovers] == [False, False]
    assert [path.exists() for path in users] == [True, True]


def test_a_file_may_be_a_link(cluster: Cluster) -> None:
    (cluster.folder / "other").mkdir()
    for name in ("primary", "replica"):
        (cluster.folder / f"{name}.db").symlink_to(cluster.folder / "other" / f"{name}.db")
    primary, replica = cluster.pair()
    primary.execute(INSERT, ("Dune",))
    assert_equal(primary, replica)
    with pytest.raises(DatabaseRefused, match="open as a primary or replica already"):
        Replica(cluster.folder / "other" / "primary.db", cluster.messenger("x"), cluster.port)
    replica.close()
    cluster.replica().wait_for(primary.position)
    assert (cluster.folder / "replica.db").is_symlink()


def test_a_progress_callback_that_raises_holds_up_nothing(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    calls: list[object] = []

    def on_progress(status: object) -> None:
        calls.append(status)
        raise ValueError("the user's own")

    replica = cluster.replica(on_progress=on_progress)
    wait_streaming(primary, replica)
    wait_until(lambda: calls)
    assert len(calls) == 1


@pytest.mark.parametrize("path", ["", ":memory:", "file:x.db"])
def test_a_path_must_be_a_file(cluster: Cluster, path: str) -> None:
    with pytest.raises(DatabaseRefused, match="is no path of a file"):
        Primary(path, cluster.messenger("x"), free_port())


def test_a_failed_start_gives_everything_back(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.primary()
    messenger = cluster.messenger("second")
    with contextlib.suppress(Exception):
        Primary(tmp_path / "second.db", messenger, first.destination)
    Primary(tmp_path / "second.db", messenger, free_port()).close()
    with pytest.raises(DestinationInvalid):
        Replica(tmp_path / "third.db", messenger, "udp://x:1")
    Replica(tmp_path / "third.db", messenger, first.destination).close()


def test_replicas_that_are_gone_make_room(cluster: Cluster) -> None:
    primary = cluster.primary(limits=ReplicationLimits(replicas_max=2))
    primary.execute(BOOKS)
    for number in range(3):
        replica = cluster.replica(f"r{number}")
        replica.wait_for(primary.position, timeout=20)
        replica.close()
        wait_until(lambda: primary.status().replicas[-1].state is ReplicaState.DOWN)
    assert [status.name for status in primary.status().replicas] == ["r1", "r2"]
    present = [cluster.replica(name) for name in ("r1", "r2")]
    for replica in present:
        wait_streaming(primary, replica)
    refused = cluster.replica("r3")
    wait_until(lambda: "2 replicas are there, that is replicas_max" in refused.status().trouble)


def test_a_reader_that_cannot_be_closed_hides_no_end(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once ended the thread that feeds a replica before that had told that the replica is down."""
    closed: list[str] = []

    class Reader:
        def __init__(self, path: str) -> None:
            self._inner = open_reader(path)

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def close(self, force: bool) -> None:
            self._inner.close(force)
            closed.append("closed")
            raise apsw.IOError("planted")

    monkeypatch.setattr("messenger.replication.feed.open_reader", Reader)
    primary, replica = cluster.pair()
    replica.close()
    wait_until(lambda: closed)
    wait_until(lambda: state_of(primary, "replica") is ReplicaState.DOWN)
    primary.close()


def test_a_snapshot_with_pages_of_another_size_says_what_to_do(direct: Direct, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    with contextlib.closing(apsw.Connection(str(path))) as copy:
        with copy.backup("main", direct.writer.connection, "main") as backup:
            backup.step(-1)
        copy.execute("PRAGMA journal_mode = delete; PRAGMA page_size = 8192; VACUUM").fetchall()
    direct.applier.begin_snapshot(path.stat().st_size)
    assert direct.applier.sink is not None
    direct.applier.sink.write(SnapshotPart(1, 0, path.read_bytes()))
    checksum = blake2b(path.read_bytes(), digest_size=CHECKSUM_BYTES).digest()
    with pytest.raises(SnapshotFailed, match="has pages of 4096 bytes, the primary's file of 8192"):
        direct.applier.install_snapshot(checksum)


def test_a_feed_that_was_given_up_changes_nothing_that_the_next_one_counts_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the log slowly, so its replica joined anew; what it then noted as sent was never sent for that join."""
    primary, replica = cluster.pair()
    replica.close()
    replica.messenger.close()
    for _ in range(3):
        primary.execute(INSERT, ("a",))
    reads, comes, goes_on, feeds = read_entries, threading.Event(), threading.Event(), list[Feed]()
    step = Feed._step

    def read_slowly(*arguments: Any) -> list[Entry]:
        entries = reads(*arguments)
        if not comes.is_set():
            comes.set()
            assert goes_on.wait(20)
        return entries

    def note_step(self: Feed, reader: apsw.Connection) -> None:
        feeds.append(self)
        step(self, reader)

    monkeypatch.setattr("messenger.replication.feed.read_entries", read_slowly)
    monkeypatch.setattr(Feed, "_step", note_step)
    replica = cluster.replica()
    assert comes.wait(20)
    slow = feeds[-1]
    with replica._follower._lock:
        replica._follower._leave(ReplicaState.CONNECTING)
    wait_until(lambda: (current := primary._hub.peers["replica"].feed) not in (None, slow) and current in feeds)
    wait_until(lambda: primary._hub.peers["replica"].state is ReplicaState.STREAMING)
    with primary._hub.lock:
        before = primary._hub.peers["replica"].sent_bytes
    goes_on.set()
    slow.thread.join(20)
    with primary._hub.lock:
        assert primary._hub.peers["replica"].sent_bytes == before
        assert primary._hub.peers["replica"].state is ReplicaState.STREAMING
    primary.execute(INSERT, ("b",), commit="applied", timeout=20)
    assert_equal(primary, replica)
