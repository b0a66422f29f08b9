"""A primary and a replica on two hosts whose cable is cut under load (FACTS F5)."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT_S, wait_until
from tests.processes.test_partition import PORT, SERVER_ADDRESS, Network, why_not
from tests.replication import checks
from tests.replication.programs import start

PARTITION_S = 5.0


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    network = Network(f"r{os.getpid() % 100_000}")
    try:
        network.build()
        yield network
    finally:
        network.remove()


@pytest.mark.parametrize("cut", ["both ways", "to the primary", "to the replica"])
def test_partition_heals(network: Network, tmp_path: Path, cut: str) -> None:
    """Nothing is confirmed while it lasts, it goes on soon afterwards, and nothing confirmed is lost or there twice."""
    primary, replica, confirmed = tmp_path / "primary.db", tmp_path / "replica.db", tmp_path / "confirmed"
    destination = f"tcp://{SERVER_ADDRESS}:{PORT}"

    def confirmed_count() -> int:
        return len(checks.read_confirmed(confirmed))

    with contextlib.ExitStack() as stack:
        first = start(
            *("primary", primary, destination, "--confirmed", confirmed, "--timeout", 0.5),
            prefix=("ip", "netns", "exec", network.server),
        )
        stack.callback(first.kill)
        assert first.read_line() == "ready"
        second = start("replica", replica, destination, prefix=("ip", "netns", "exec", network.client))
        stack.callback(second.kill)
        assert second.read_line() == "ready"
        wait_until(lambda: confirmed_count() > 100)
        if cut != "to the replica":
            network.cut(network.server)
        if cut != "to the primary":
            network.cut(network.client)
        # What was under way may still be confirmed; the fault itself lasts, there is no event in it to wait for.
        time.sleep(0.5)
        cut_count = confirmed_count()
        time.sleep(PARTITION_S)
        assert confirmed_count() == cut_count, "it was confirmed by nobody"
        counts = checks.check_pair(primary, replica, confirmed)
        assert counts[0] > counts[1], "the primary did not go on, so this proves little"
        network.heal()
        wait_until(lambda: confirmed_count() > cut_count + 100, timeout=2 * TIMEOUT_S)
        checks.check_pair(primary, replica, confirmed)
