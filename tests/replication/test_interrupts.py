"""Ctrl-C at any instant of a commit: it is raised, nothing is lost or left half done, and others write on."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from messenger import interrupts
from messenger.replication import Primary
from messenger.replication.confirm import Level
from messenger.replication.writer import Operation
from tests.replication.pairs import BOOKS, INSERT, Cluster

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="Ctrl-C concerns the main thread only"
)


class CtrlC:
    """Interrupts what runs in replication's code at its n-th instruction, as a signal would."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0

    def run(self, work: Callable[[], object]) -> bool:
        """Return whether it was raised, at once or where it was deferred to."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return interrupts.take()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("messenger.replication"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.count += 1
            if self.count == self.number:
                interrupts.handle(signal.SIGINT, frame)
        return self._trace


def execute(primary: Primary) -> None:
    primary.execute(INSERT, ("interrupted",))


def transact(primary: Primary) -> None:
    with primary.transaction() as tx:
        tx.execute(INSERT, ("interrupted",))


def change_schema(primary: Primary) -> None:
    with primary.transaction() as tx:
        tx.execute("CREATE TABLE IF NOT EXISTS more (id INTEGER PRIMARY KEY AUTOINCREMENT)")
        tx.execute("DROP TABLE more")


@pytest.fixture
def primary(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Primary]:
    # What is deferred is looked for by the test.
    monkeypatch.setattr(interrupts, "_send_again", lambda: None)
    made = cluster.primary()
    made.execute(BOOKS)
    yield made
    interrupts.take()


def finish(primary: Primary, other: Operation) -> None:
    """Do what the thread of another operation does: if it has become the leader, it writes; it must not wait."""
    writer = primary._writer
    if other in writer._queue:
        assert other.leads or not writer._has_leader
        with writer._queue_lock:
            writer._queue.remove(other)
        if other.leads:
            writer._pass_lead()
    else:
        assert other.position is not None or other.error is not None, "it is lost"


@pytest.mark.parametrize(("work", "step"), [(execute, 31), (transact, 41), (change_schema, 211)])
def test_ctrl_c_at_any_instant(primary: Primary, work: Callable[[Primary], None], step: int) -> None:
    number, was_raised = 1, True
    while was_raised:
        other = Operation(INSERT, ("other",), Level.LOCAL, 0)
        primary._writer._queue.append(other)
        was_raised = CtrlC(number).run(lambda: work(primary))
        finish(primary, other)
        before = primary.position.lsn
        primary.execute(INSERT, ("after",), timeout=1)
        assert primary.position.lsn == before + 1
        number += step
    assert number > 20 * step
    names = [name for (name,) in primary.execute("SELECT name FROM books")]
    entry_count = primary.execute("SELECT count(*) FROM _messenger_log").fetchone()[0]
    assert names.count("after") == number // step
    assert entry_count == primary.position.lsn


def test_ctrl_c_does_not_wait_for_other_transactions(primary: Primary) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with primary.transaction():
            began.set()
            go_on.wait(20)

    def interrupt() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(hold)
        began.wait(20)
        for work in (execute, transact):
            started_at = time.monotonic()
            interrupting = pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                work(primary)
            assert time.monotonic() - started_at < 2
            interrupting.result(20)
        go_on.set()
        holding.result(20)
    primary.execute(INSERT, ("after",), timeout=1)
    assert primary.execute("SELECT name FROM books").fetchall() == [("after",)]
