"""Processes that are killed: at named points of a commit and of a snapshot, at the n-th write, and at random."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.replication.faults import POINTS
from tests.replication.torture import Pair, torture

SIGKILLED = -9
KILLS = 12


def check_after_death(pair: Pair, role: str) -> None:
    """Wait until a process has killed itself; check what it left, and that both go on and catch up."""
    pair.wait_death(role)
    pair.check(is_full=True)
    pair.start()
    pair.wait_confirmed()
    pair.wait_caught_up()
    pair.stop()
    primary_count, replica_count = pair.check(is_full=True)
    assert primary_count >= replica_count > 0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, "applied")
    yield pair
    pair.stop()


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_named_point(pair: Pair, point: str) -> None:
    role = POINTS[point].role
    needs_file = POINTS[point].method == "Applier._replace_content"
    if needs_file:
        pair.start()
        pair.wait_confirmed()
        pair.kill("replica")
    pair.start({role: ("--point", point, *(("--resync",) if needs_file else ()))}, must_live=False)
    check_after_death(pair, role)


@pytest.mark.parametrize("number", [1, 3, 8, 21, 55, 89])
@pytest.mark.parametrize("role", ["primary", "replica"])
def test_kill_at_nth_write(pair: Pair, role: str, number: int) -> None:
    pair.start({role: ("--fault", "kill", "write,truncate", number)}, must_live=False)
    check_after_death(pair, role)


def test_kill_at_random(tmp_path: Path) -> None:
    """A short run of `python -m tests.replication.torture`, which says what it saw."""
    print(torture(tmp_path, KILLS, seed=1))
