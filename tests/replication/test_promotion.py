"""Promotion: a replica becomes the primary, the others follow, the old one is fenced and what only it had is saved."""

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import pytest

from messenger import DestinationInvalid, Message
from messenger.replication import (
    DatabaseRefused,
    Diverged,
    Fenced,
    NotConfirmed,
    Position,
    Primary,
    Replica,
    ReplicaState,
    query_status,
    request_promotion,
)
from messenger.replication.claims import Claims
from messenger.replication.feed import Feed
from messenger.replication.follower import Follower
from messenger.replication.limits import DESTINATIONS_MAX
from messenger.replication.places import Places
from messenger.replication.primary import _make_fenced
from messenger.replication.records import Entries, Entry
from tests.conftest import Inbox, free_port, wait_until
from tests.replication.pairs import BOOKS, INSERT, SELECT, Cluster, assert_equal, state_of, wait_streaming


def promote(cluster: Cluster, replica: Replica, *arguments: Any, **options: Any) -> Primary:
    primary = replica.promote(*arguments, **options)
    cluster.keep(primary)
    return primary


def test_a_replica_takes_over(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)
    primary.close()
    new = promote(cluster, replica)
    assert new.destination.port == cluster.port
    assert new.position == (2, 3)
    new.execute(INSERT, ("Emma",))
    assert new.execute(SELECT).fetchall() == [(1, "Dune"), (2, "Emma")]
    old = cluster.replica("primary")
    assert_equal(new, old)
    assert old.status().snapshot_count == 0  # It had nothing that the new one has not.
    assert old.status().lost_path == ""


def test_the_others_follow(cluster: Cluster) -> None:
    """Each lists all places; the old primary goes on running and is fenced."""
    places = [cluster.port, free_port(), free_port()]
    primary = cluster.primary(destination=places[0])
    primary.execute(BOOKS)
    first = cluster.replica("first", destination=places, listen=places[1])
    second = cluster.replica("second", destination=places, listen=places[2])
    for replica in (first, second):
        wait_streaming(primary, replica)
    new = promote(cluster, first, commit="applied", timeout=20)
    assert new.destination.port == places[1]
    with pytest.raises(Fenced, match=f"promoted under term 2 at {places[1]}") as fenced:
        wait_until(lambda: primary.execute(INSERT, ("too late",)) is None)
    assert fenced.value.term == 2
    assert fenced.value.destinations == (str(places[1]),)
    assert primary.status().role == "fenced"
    new.execute(INSERT, ("Dune",))
    assert_equal(new, second)
    assert second.status().primary == str(places[1])
    # What is lost is what the old primary committed between the promotion and the fence.
    primary.close()
    with pytest.raises(Fenced):
        cluster.primary(destination=places[0])
    old = cluster.replica("primary", destination=places)
    assert_equal(new, old)


def test_what_an_old_primary_still_sends_is_not_confirmed_to_the_new_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot hear of the new one, nor of the replica, which has left it, and has nothing of the new one yet."""
    monkeypatch.setattr(Claims, "_run", lambda self: None)
    monkeypatch.setattr(Claims, "wait_first", lambda self: None)
    places = [cluster.port, free_port()]
    old = cluster.primary("old", places[0])
    old.execute(BOOKS)
    first, second = cluster.replica("first", places, listen=places[1]), cluster.replica("second", places)
    for replica in (first, second):
        wait_streaming(old, replica)
    send_some, take_entries = Feed._send_some, Follower._take_entries
    is_held, came = threading.Event(), Inbox[int]()

    def hold(self: Feed, reader: apsw.Connection) -> bool:
        return is_held.is_set() and send_some(self, reader)

    def note(self: Follower, record: Entries, message: Message) -> None:
        take_entries(self, record, message)
        came(record.entries[-1].lsn)

    monkeypatch.setattr(Feed, "_send_some", hold)
    monkeypatch.setattr(Follower, "_take_entries", note)
    monkeypatch.setattr(old._hub, "handle_message", lambda message: None)
    new = promote(cluster, first, commit="applied", timeout=20)
    second._follower.hear_claim(new._make_claim())
    wait_until(lambda: state_of(new, "second") is ReplicaState.CATCHING_UP)
    for name in ("old one", "old other"):
        old.execute(INSERT, (name,))
        came.wait(old.position.lsn - 1)
    is_held.set()
    new.execute(INSERT, ("new",))
    assert second.execute(SELECT).fetchall() == [(1, "new")]
    assert_equal(new, second)


def test_what_only_the_old_primary_has_is_saved(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    replica.close()
    primary.execute(INSERT, ("only here",))
    primary.execute("CREATE TABLE other (k TEXT PRIMARY KEY, v BLOB)")
    with primary.transaction() as tx:
        tx.execute("INSERT INTO other VALUES ('a', x'00ff')")
        tx.execute("UPDATE books SET name = 'changed'")
    primary.close()
    new = promote(cluster, cluster.replica())
    new.execute(INSERT, ("on the other side",))
    old = cluster.replica("primary")
    assert_equal(new, old)
    assert old.execute(SELECT).fetchall() == [(1, "on the other side")]
    path = old.status().lost_path
    assert Path(path).name == "primary.db-lost-1-4.jsonl"
    lost = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [(entry["term"], entry["lsn"]) for entry in lost] == [(1, 2), (1, 3), (1, 4)]
    assert lost[0]["changes"] == [{"table": "books", "operation": "INSERT", "after": {"0": 1, "1": "only here"}}]
    assert lost[1]["changes"] == [{"sql": "CREATE TABLE other (k TEXT PRIMARY KEY, v BLOB)"}]
    changes = {change["table"]: change for change in lost[2]["changes"]}
    assert changes["other"]["after"] == {"0": "a", "1": {"hex": "00ff"}}
    assert changes["books"]["before"] == {"0": 1, "1": "only here"}
    assert changes["books"]["after"] == {"1": "changed"}
    with pytest.raises(Diverged, match=r"position \(1, 3\) is not in this history: term 1 ended at LSN 1"):
        old.wait_for((1, 3))
    old.wait_for((1, 1))
    with pytest.raises(Diverged):
        new.wait_confirmed((1, 3))


def test_what_json_does_not_know_is_saved_all_the_same(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.execute("CREATE TABLE reals (id INTEGER PRIMARY KEY, value REAL)")
    replica.wait_for(primary.position)
    replica.close()
    primary.execute("INSERT INTO reals VALUES (1, 9e999), (2, -9e999), (3, -0.0)")
    primary.execute("INSERT INTO books VALUES (4, CAST(x'feff' AS TEXT))")
    primary.close()
    new = promote(cluster, cluster.replica())
    old = cluster.replica("primary")
    assert_equal(new, old)
    lost = [json.loads(line) for line in Path(old.status().lost_path).read_text().splitlines()]
    values = {change["after"]["0"]: change["after"]["1"] for change in lost[0]["changes"]}
    assert values == {1: {"real": "inf"}, 2: {"real": "-inf"}, 3: 0.0}
    new.close()
    # A changeset that can be applied to what is there.
    (change,) = lost[1]["changes"]
    with contextlib.closing(apsw.Connection(new.path)) as connection:
        apsw.Changeset.apply(bytes.fromhex(change["changeset"]), connection)
        assert connection.execute("SELECT id, hex(name) FROM books").fetchall() == [(4, "FEFF")]


def test_a_returning_primary_that_knows_others_commits_nothing(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    primary.close()
    place = free_port()
    new = promote(cluster, replica, place)
    with pytest.raises(Fenced, match=f"under term 2 at {place}"):
        cluster.primary(others=[place])
    new.close()
    # It remembers that, also when nobody is there to tell it.
    with pytest.raises(Fenced, match=f"under term 2 at {place}"):
        cluster.primary()
    assert cluster.primary(promote=True).position.term == 3


def test_a_returning_primary_is_told(cluster: Cluster) -> None:
    """It knows of nobody; the new primary looks for it where it was."""
    primary, replica = cluster.pair()
    primary.close()
    promote(cluster, replica, free_port())
    primary = cluster.primary(commit="applied", timeout=20)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(primary.execute, INSERT, ("x",))
        with pytest.raises((Fenced, NotConfirmed)):
            waiting.result(20)
    wait_until(lambda: primary.status().role == "fenced")


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE orders (id INTEGER PRIMARY KEY)", "INSERT INTO books VALUES (1, 'x')"]
)
def test_a_transaction_that_is_open_when_another_is_promoted_is_fenced(cluster: Cluster, statement: str) -> None:
    primary, replica = cluster.pair()
    position = primary.position

    def run() -> None:
        with primary.transaction() as tx:
            tx.execute(statement)
            promote(cluster, replica, free_port())
            wait_until(lambda: primary.status().role == "fenced")

    with pytest.raises(Fenced, match="under term 2"):
        run()
    assert primary.position == position
    assert primary.execute("SELECT name FROM sqlite_schema WHERE name = 'orders'").fetchall() == []


def test_a_position_that_was_lost_is_told_at_once(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    replica.close()
    for _ in range(10):
        primary.execute(INSERT, ("only here",))
    lost = primary.position
    primary.close()
    new = cluster.primary("replica", promote=True)
    second = cluster.replica("second")
    wait_streaming(new, second)
    assert second.position < lost._replace(term=2)
    with pytest.raises(Diverged, match="term 1 ended at LSN 1"):
        second.wait_for(lost)
    second.wait_for((1, 1))


def test_a_replica_of_a_higher_term_fences_and_is_not_led_back(cluster: Cluster) -> None:
    primary, replica = cluster.pair()
    second = cluster.replica("second")
    wait_streaming(primary, second)
    primary.close()
    place = free_port()
    new = promote(cluster, replica, place)
    second.close()
    second = cluster.replica("second", destination=place)
    wait_streaming(new, second)
    second.close()
    new.close()
    primary = cluster.primary()
    second = cluster.replica("second")  # Its list names the old primary only.
    wait_until(lambda: primary.status().role == "fenced")
    assert second.position == (2, 2)
    assert second.execute("SELECT term FROM _messenger_terms").fetchall() == [(1,), (2,)]


def test_what_cannot_be_promoted(cluster: Cluster) -> None:
    empty = cluster.replica("empty")
    with pytest.raises(DatabaseRefused, match="there is no copy yet"):
        empty.promote()
    primary, replica = cluster.pair()
    with pytest.raises(Exception, match=str(cluster.port)):  # The old primary is there.
        replica.promote()
    replica = cluster.replica()
    wait_streaming(primary, replica)
    assert primary.position == (1, 1)


@pytest.mark.parametrize("options", [{"commit": "twice"}, {"timeout": 0}, {"destination": "udp://x"}])
def test_a_mistake_in_a_promotion_leaves_the_replica_as_it_is(cluster: Cluster, options: dict[str, Any]) -> None:
    primary, replica = cluster.pair()
    with pytest.raises((ValueError, DestinationInvalid)):
        replica.promote(**options)
    primary.execute(INSERT, ("Dune",), commit="applied", timeout=20)


def test_a_fence_that_cannot_be_kept_holds_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise apsw.FullError("database or disk is full")

    primary, replica = cluster.pair()
    with monkeypatch.context() as patch:
        patch.setattr("messenger.replication.writer.Writer.keep_fence", refuse)
        promote(cluster, replica, free_port())
        wait_until(lambda: "will not know that it is fenced: database or disk is full" in caplog.text)
    with pytest.raises(Fenced):
        primary.execute(INSERT, ("lost",))


def test_promotion_from_outside(cluster: Cluster) -> None:
    primary = cluster.primary()
    primary.execute(BOOKS)
    place = free_port()
    promoted: list[Primary] = []
    replica: Replica

    def on_promote() -> None:
        promoted.append(promote(cluster, replica))

    replica = cluster.replica(listen=place, on_promote=on_promote)
    wait_streaming(primary, replica)
    other = cluster.messenger("operator")
    status = query_status(other, place)
    assert (status.role, status.lsn) == ("replica", 1)
    assert query_status(other, cluster.port).role == "primary"
    status = request_promotion(other, place, timeout=20)
    assert (status.role, status.term) == ("primary", 2)
    wait_until(lambda: promoted)
    assert promoted[0].position == (2, 2)


def test_a_replica_does_not_let_itself_be_promoted_unasked(cluster: Cluster) -> None:
    primary = cluster.primary()
    replica = cluster.replica(listen=free_port())
    wait_streaming(primary, replica)
    other = cluster.messenger("operator")
    listener = replica._listener
    assert listener is not None
    with pytest.raises(Exception, match="does not let itself be promoted"):
        request_promotion(other, listener.destination)
    with pytest.raises(Exception, match="this is the primary already"):
        request_promotion(other, cluster.port)


def test_two_promoted_at_once_do_not_both_stay(cluster: Cluster) -> None:
    """Nobody should do this; the one whose term began with the lower checksum is fenced."""
    primary, first = cluster.pair()
    second = cluster.replica("second")
    wait_streaming(primary, second)
    primary.close()
    places = [free_port(), free_port()]
    first.close()
    second.close()
    one = cluster.primary("replica", destination=places[0], promote=True)
    two = cluster.primary("second", destination=places[1], promote=True)
    assert one.position.term == two.position.term == 2
    two.close()
    one.close()
    try:
        one = cluster.primary("replica", destination=places[0], others=places)
        two = cluster.primary("second", destination=places[1], others=places)
    except Fenced:
        return
    wait_until(lambda: {one.status().role, two.status().role} == {"primary", "fenced"})


def test_what_only_the_other_of_two_promoted_at_once_has_is_saved(cluster: Cluster) -> None:
    primary, first = cluster.pair()
    second = cluster.replica("second")
    wait_streaming(primary, second)
    for closable in (primary, first, second):
        closable.close()
    one = cluster.primary("replica", promote=True)
    two = cluster.primary("second", destination=free_port(), promote=True)
    one.execute(INSERT, ("one",))
    two.execute(INSERT, ("two",))
    assert one.position == two.position
    two.close()
    other = cluster.replica("second")
    wait_until(lambda: "history up to LSN 3 is another one" in other.status().diverged)
    other.resync()
    wait_until(lambda: other.status().snapshot_count == 1)
    assert_equal(one, other)
    lost = [json.loads(line) for line in Path(other.status().lost_path).read_text().splitlines()]
    assert [(entry["term"], entry["lsn"]) for entry in lost] == [(2, 2), (2, 3)]
    assert lost[1]["changes"] == [{"table": "books", "operation": "INSERT", "after": {"0": 1, "1": "two"}}]


def test_replicas_find_a_primary_again_although_they_ask_each_other(cluster: Cluster) -> None:
    """All list all places, as the example says, so each asks itself and the other one, too."""
    places = [cluster.port, free_port(), free_port()]
    primary = cluster.primary(others=places)
    primary.execute(BOOKS)
    replicas = [cluster.replica(f"replica{n}", destination=places, listen=places[n]) for n in (1, 2)]
    for replica in replicas:
        wait_streaming(primary, replica)
    primary.close()
    asked: set[tuple[str, ...]] = set()

    def have_asked_each_other() -> bool:
        asked.update((replica.status().primary,) for replica in replicas)
        return len(asked) == 3

    wait_until(have_asked_each_other)
    primary = cluster.primary(others=places)
    primary.execute(INSERT, ("Dune",))
    for replica in replicas:
        replica.wait_for(primary.position, timeout=10)


def test_no_place_is_left_out_whoever_names_whom() -> None:
    places = Places([1, 2, 3])
    asked: list[str] = []
    for _ in range(8):
        asked.append(str(places.current))
        is_first = not places.is_out_of_turn
        named = {"1": ["9"], "9": ["1"], "2": ["1"]}.get(asked[-1], [])  # Who names another that is no primary either.
        places.go_on()
        assert places.add(named, is_first=is_first) == 0
    assert asked == ["1", "9", "2", "1", "3", "9", "1", "1"]
    assert places.add(["udp://x"]) == 1
    places.add([str(number) for number in range(100, 200)])
    assert len(places.all) == DESTINATIONS_MAX


def test_a_replica_asks_all_its_places(cluster: Cluster) -> None:
    places = [free_port(), free_port(), cluster.port]
    primary = cluster.primary()
    replica = cluster.replica(destination=places)
    assert replica.status().state is ReplicaState.CONNECTING
    replica.wait_for(Position(1, 0), timeout=20)
    wait_streaming(primary, replica)
    primary.execute(BOOKS, commit="applied", timeout=20)


def test_who_waits_for_replicas_at_a_fenced_primary_is_told_at_once(cluster: Cluster) -> None:
    """They have left it, so that the wait could only end by its timeout."""
    old, _ = cluster.pair()
    position = old.position
    old.wait_confirmed(position, commit="applied", timeout=20)
    old._hub.leave(2, ("inproc://other",))
    old._writer.fence = _make_fenced(old.path, 2, ("inproc://other",))
    began_at = time.monotonic()
    with pytest.raises(NotConfirmed, match="another primary was promoted"):
        old.wait_confirmed(position, commit="applied", acknowledgements=2, timeout=20)
    assert time.monotonic() - began_at < 10
    old.wait_confirmed(position, commit="applied", timeout=20)  # That one has it is known all the same.


def test_what_is_still_applied_of_an_old_primary_is_not_confirmed_to_the_new_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the same LSN, and came to the file after the replica had said to the new primary where it stands."""
    other = free_port()
    first = cluster.primary("first")
    first.execute(BOOKS)
    second = cluster.replica("second")
    replica = cluster.replica("replica", [cluster.port, other])
    for each in (second, replica):
        wait_streaming(first, each)
    second.close()
    second.messenger.close()
    apply, comes, goes_on = replica._applier.apply, threading.Event(), threading.Event()

    def apply_slowly(entries: list[Entry]) -> None:
        if not comes.is_set():
            comes.set()
            assert goes_on.wait(20)
        apply(entries)

    monkeypatch.setattr(replica._applier, "apply", apply_slowly)
    replica._follower._apply_s = 1.0  # So slow that it has a thread of its own.
    first.execute(INSERT, ("old",))
    assert comes.wait(20)
    first.close()
    promoted = cluster.primary("second", other, promote=True)
    wait_until(lambda: any(each.sent_lsn >= 2 for each in promoted.status().replicas), timeout=20)
    goes_on.set()
    # Whenever that is: what is confirmed must be there.
    promoted.wait_confirmed(promoted.position, commit="applied", timeout=20)
    assert replica.execute(SELECT).fetchall() == []
    promoted.execute(INSERT, ("new",), commit="applied", timeout=20)
    assert_equal(promoted, replica)


def test_what_is_not_on_the_disk_yet_is_not_durable_for_a_new_join(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A join says up to where a replica has all on its disk; what it had only applied counted as durable."""
    first = cluster.primary()
    first.execute(BOOKS)
    replica = cluster.replica("replica")
    wait_streaming(first, replica)
    sync, comes, goes_on = replica._applier.sync, threading.Event(), threading.Event()

    def sync_slowly() -> int:
        if not comes.is_set():
            comes.set()
            assert goes_on.wait(20)
        return sync()

    monkeypatch.setattr(replica._applier, "sync", sync_slowly)
    replica._follower._apply_s = 1.0  # So slow that it has a thread of its own.
    first.execute(INSERT, ("new",))
    assert comes.wait(20)
    first.close()
    again = cluster.primary()
    wait_until(lambda: any(each.sent_lsn >= 2 for each in again.status().replicas), timeout=20)
    with pytest.raises(NotConfirmed):
        again.wait_confirmed(again.position, commit="durable", timeout=1.5)
    goes_on.set()
    again.wait_confirmed(again.position, commit="durable", timeout=20)
    assert_equal(again, replica)
