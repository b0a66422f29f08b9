"""One file is one copy, whatever names it comes under."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from messenger.replication import NotConfirmed, Primary, Replica, ReplicaState
from messenger.replication.hub import Hub
from messenger.replication.records import Join, decode_from_replica, encode
from tests.conftest import free_port, wait_until
from tests.replication.pairs import BOOKS, INSERT, Cluster, assert_equal, state_of, wait_streaming
from tests.replication.programs import start


def names(primary: Primary) -> list[str]:
    return [replica.name for replica in primary.status().replicas]


def is_streaming(primary: Primary, name: str) -> bool:
    return state_of(primary, name) is ReplicaState.STREAMING


def is_known_alone(primary: Primary, name: str) -> bool:
    return names(primary) == [name]


def copy_of(cluster: Cluster, identity: str, **options: Any) -> Replica:
    """The one file `copy.db`, under this identity."""
    made = Replica(cluster.folder / "copy.db", cluster.messenger(identity), cluster.port, **options)
    cluster.keep(made)
    return made


def assert_confirmed_by(primary: Primary, count: int) -> None:
    """The last transaction is confirmed by so many, and not by one more."""
    for level in ("durable", "applied"):
        primary.wait_confirmed(primary.position, commit=level, acknowledgements=count, timeout=20)
        with pytest.raises(NotConfirmed):
            primary.wait_confirmed(primary.position, commit=level, acknowledgements=count + 1, timeout=0.3)


@pytest.mark.parametrize("change", ["", "resync", "primary restarts"])
def test_a_file_that_comes_back_under_another_name_confirms_once(cluster: Cluster, change: str) -> None:
    """What was remembered of the old name counted beside the new one, so that one file confirmed for two."""
    primary = cluster.primary()
    primary.execute(BOOKS)
    one = copy_of(cluster, "one")
    wait_streaming(primary, one)
    assert_confirmed_by(primary, 1)
    one.close()
    wait_until(lambda: state_of(primary, "one") is ReplicaState.DOWN)
    if change == "primary restarts":
        primary.close()
        primary.messenger.close()
        primary = cluster.primary()
    two = copy_of(cluster, "two", resync=change == "resync")
    wait_until(lambda: not change or two.status().snapshot_count == (change == "resync"))
    wait_streaming(primary, two)
    assert names(primary) == ["two"]
    assert_confirmed_by(primary, 1)
    primary.execute(INSERT, ("a",))
    assert_confirmed_by(primary, 1)
    cluster.replica("other").wait_for(primary.position, timeout=20)
    assert_confirmed_by(primary, 2)
    assert_equal(primary, two)


def test_a_killed_replica_that_is_started_under_another_name_confirms_once(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    for identity in ("one", "two"):
        program = start("replica", cluster.folder / "copy.db", cluster.port, "--name", identity)
        try:
            wait_until(partial(is_streaming, primary, identity), timeout=20)
            primary.execute(INSERT, (identity,))
            assert_confirmed_by(primary, 1)
            wait_until(partial(is_known_alone, primary, identity), timeout=20)
            assert_confirmed_by(primary, 1)
        finally:
            program.kill()


def test_a_file_confirms_once_also_while_its_former_name_seems_to_be_there(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a move to another machine, before the old connection is known to be gone."""
    primary = cluster.primary()
    primary.execute(BOOKS)
    wait_streaming(primary, one := copy_of(cluster, "one"))
    ends: list[Any] = []
    hub: Hub = primary._hub
    with monkeypatch.context() as patch:
        patch.setattr(hub, "handle_down", lambda *end: ends.append(end))
        one.close()
        wait_until(lambda: ends)
        two = copy_of(cluster, "two")
        wait_streaming(primary, two)
        assert names(primary) == ["one", "two"]
        assert_confirmed_by(primary, 1)
    for end in ends:
        hub.handle_down(*end)
    assert names(primary) == ["two"]
    assert_confirmed_by(primary, 1)


def test_copies_that_somebody_made_of_one_file_confirm_once(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    primary, one = cluster.pair()
    one.close()
    shutil.copy(one.path, cluster.folder / "two.db")
    primary.execute(INSERT, ("a",))
    one, two = cluster.replica(), cluster.replica("two")
    for replica in (one, two):
        wait_streaming(primary, replica)
    assert_confirmed_by(primary, 1)
    assert "is of the same file as" in caplog.text
    two.close()
    two.messenger.close()
    for suffix in ("", "-wal", "-shm"):
        Path(two.path + suffix).unlink(missing_ok=True)
    wait_streaming(primary, cluster.replica("two"))
    assert_confirmed_by(primary, 2)


def test_a_file_of_an_earlier_version_is_given_an_id(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    assert replica._applier.copy
    for each in (replica, primary):
        each.close()
        each.messenger.close()
        connection = apsw.Connection(each.path)
        connection.execute("DROP TABLE _messenger_copies")
        connection.close()
    primary, replica = cluster.primary(), cluster.replica()
    wait_streaming(primary, replica)
    kept = replica._applier.copy
    assert len(kept) == 32
    replica.close()
    replica.messenger.close()
    replica = cluster.replica()
    assert replica._applier.copy == kept
    wait_streaming(primary, replica)
    assert_confirmed_by(primary, 1)


def test_a_promotion_ends_the_id(cluster: Cluster) -> None:
    """Files that are copied from a primary's are copies of their own."""
    first, replica = cluster.pair()
    first.close()
    promoted = replica.promote(free_port())
    cluster.keep(promoted)
    assert promoted.execute("SELECT count(*) FROM _messenger_copies").fetchall() == [(0,)]


def test_a_replica_and_a_primary_of_an_earlier_version_are_understood() -> None:
    class EarlierJoin(msgspec.Struct, array_like=True, frozen=True, tag="join"):
        stream: int
        version: int
        name: str
        database: str
        term: int
        lsn: int
        checksum: bytes

    earlier = EarlierJoin(7, 1, "one", "db", 1, 2, b"sum")
    assert decode_from_replica(msgspec.msgpack.encode(earlier)) == Join(7, 1, "one", "db", 1, 2, b"sum", "")
    sent = encode(Join(7, 1, "one", "db", 1, 2, b"sum", "copy"))
    assert msgspec.msgpack.decode(sent, type=EarlierJoin) == earlier


def test_a_file_that_can_keep_no_id_is_served_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    primary, replica = cluster.pair()
    replica.close()
    replica.messenger.close()

    def be_full(connection: apsw.Connection) -> None:
        raise apsw.FullError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("messenger.replication.copies.add_own_tables", be_full)
        replica = cluster.replica()
    assert "keeps no id of its own" in caplog.text
    wait_streaming(primary, replica)
    assert os.path.exists(replica.path)
    assert_confirmed_by(primary, 1)
