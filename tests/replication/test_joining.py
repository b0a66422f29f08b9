"""A replica that joins while writes go on: `python -m tests.replication.joining`, with a small database."""

from pathlib import Path

from tests.conftest import StandingClock
from tests.replication.joining import measure


def test_writes_go_on_while_a_replica_joins(tmp_path: Path, standing_clock: StandingClock) -> None:
    """A second is what other tests on this machine may cost; the limit of 100 ms is for a machine of its own."""
    joined = measure(tmp_path, 16 * 2**20, clock=standing_clock.now)
    assert joined.is_equal, joined.describe()
    assert len(joined.waits_s) > 10, joined.describe()
    assert max(joined.waits_s) < 1, joined.describe()
