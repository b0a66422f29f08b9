"""Thousands of runs with failures of all kinds, and that the simulator itself does what the planted faults rely on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.network import Mode
from tests.sim.simulator import Simulator, simulate

# In every run of the tests; `make sim SEEDS=100000` runs more.
SEEDS = 2_000
CHUNK = 100
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_no_rule_is_broken(start: int) -> None:
    failing = [result for result in map(simulate, range(start, start + CHUNK)) if result.violations]
    assert not failing, "\n".join(result.report() for result in failing[:3])


def test_same_seed_gives_the_same_log() -> None:
    seeds = range(20)
    # Another process has other addresses and another salt of its hashes.
    script = f"from tests.sim.simulator import simulate; print(*[simulate(seed).digest for seed in {seeds!r}])"
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert output.split() == [simulate(seed).digest for seed in seeds]


def test_runs_differ_and_fail_in_all_ways() -> None:
    """What no run does proves nothing, so this makes sure that all of it happens."""
    outcomes: set[str] = set()
    events: set[str] = set()
    ends: set[str] = set()
    modes: set[Mode] = set()
    for seed in range(150):
        simulator = Simulator(seed)
        result = simulator.run()
        outcomes |= set(result.counts)
        events |= {entry[1] for entry in result.log}
        ends |= {entry[3] for entry in result.log if entry[1] == "ended"}
        modes.add(simulator.plan.weather.mode)
    assert outcomes == {
        *("response", "OutcomeUnknown", "NotDelivered", "NoHandler", "HandlerError", "IdentityInUse", "Cancelled"),
        "expired",
        "stream",
    }
    assert events >= {
        "connect",
        "cut",
        "partition",
        "crash",
        "close",
        "start",
        "ended",
        "run",
        "unheard",
        "heal",
        "deserted",
    }
    assert any("that is sessions_max" in why for why in ends)
    assert any("nothing was heard of it" in why for why in ends)
    assert modes == set(Mode)
