"""Which thread of a replica applies what: a few changes the one that receives, and what may take long another one."""

import threading
import time

import pytest

from messenger.replication import Replica
from messenger.replication.applier import Applier
from messenger.replication.limits import APPLY_HERE_BYTES
from messenger.replication.records import Entry
from tests.conftest import wait_until
from tests.replication.pairs import INSERT, Cluster, assert_equal

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
