"""A crash, or a close, and a restart of either side at every step of some scenarios, one run for each step.

Random instants seldom fall between two frames of one turn. Here a step is each packet that a process is about to take,
each callback that it is about to run, each frame that it is about to send, and each event. The network is mild, so that
what a run breaks is the crash's doing.
"""

from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import msgspec
import pytest

from messenger.limits import Limits
from tests.sim.network import Mode, Weather
from tests.sim.simulator import Plan, Result, Simulator, Site
from tests.sim.test_planted_faults import sent_given_to_the_successor

SERVER, CLIENT = 0, 1
CHUNKS = 4


def scenario(*, worker_count: int = 0, window_msgs: int = 8192, cancel_share: float = 0.0) -> Callable[[Plan], Plan]:
    """Returns what makes any seed's plan this scenario: one client, few messages, no other faults."""

    def change(plan: Plan) -> Plan:
        return msgspec.structs.replace(
            plan,
            limits=Limits(window_msgs=window_msgs),
            weather=Weather(mode=Mode.FIFO, delay_s=(0.001, 0.02)),
            client_count=1,
            fault_count=0,
            msg_count=25,
            slow_share=0.3,
            longest_s=0.05,
            worker_count=worker_count,
            cancel_share=cancel_share,
        )

    return change


# By name: a seed, whose server has a callback and whose messages go both ways, and the scenario.
SCENARIOS = {
    "one thread": (1, scenario()),
    "workers": (2, scenario(worker_count=3)),
    "small window, cancelled": (5, scenario(window_msgs=2, cancel_share=0.2)),
}


class Sweep(Simulator):
    """A run in which one side ends at one step, and starts again a moment later."""

    def __init__(self, name: str, victim: int, how: str, step: int) -> None:
        seed, change = SCENARIOS[name]
        super().__init__(seed, change)
        self.steps_before_heal = 0
        self._victim = victim
        self._how = how
        self._step = step
        # Not the run's own, so that all is the same up to that step.
        self._restart_s = Random(step).choice((0.0, 0.02, 0.3))
        self.has_ended = False

    def note_step(self) -> None:
        """Count it; at the one that was chosen, the victim ends."""
        super().note_step()
        if self.step_count != self._step:
            return
        site = self.sites[self._victim]
        if self._how == "crash":
            self._end_now(site)
        else:
            # A close runs callbacks and sends, so it must not begin inside of a turn.
            self.schedule(self.now, self._end_now, site)

    def _end_now(self, site: Site) -> None:
        process = site.process
        if process is None or not process.is_alive:
            return
        self.has_ended = True
        getattr(process, self._how)()
        self.schedule(self.now + self._restart_s, self._start, site)

    def _draw_faults(self) -> None:
        self.oracles.may_end = True

    def _heal(self) -> None:
        self.steps_before_heal = self.step_count
        super()._heal()


@cache
def count_steps(name: str) -> int:
    """Returns how many steps a scenario has if nobody ends."""
    sweep = Sweep(name, SERVER, "crash", 0)
    result = sweep.run()
    assert not result.violations, result.report()
    assert result.counts["response"] > 5, result.report()
    return sweep.steps_before_heal


def runs(name: str, victim: int, how: str, chunk: int) -> Iterator[tuple[Sweep, Result]]:
    for step in range(1 + chunk, count_steps(name) + 1, CHUNKS):
        sweep = Sweep(name, victim, how, step)
        yield sweep, sweep.run()


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("how", ["crash", "close"])
@pytest.mark.parametrize("victim", [SERVER, CLIENT], ids=["server", "client"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_end_at_every_step(name: str, victim: int, how: str, chunk: int) -> None:
    failing = []
    ended_count = run_count = 0
    for sweep, result in runs(name, victim, how, chunk):
        run_count += 1
        ended_count += sweep.has_ended
        if result.violations:
            failing.append(f"step {sweep._step} of {name!r}, {how} of site {victim}\n{result.report(60)}")
    assert not failing, f"{len(failing)} of {run_count} runs\n" + "\n".join(failing[:2])
    # Before the site has started, and while it is gone, there is nobody to end.
    assert ended_count > 0.9 * run_count


@pytest.mark.replaces_core
def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep itself can fail: here what was sent to a process that ended is given to its successor."""
    sent_given_to_the_successor(monkeypatch)
    rules: set[str] = set()
    for _, result in runs("one thread", SERVER, "crash", 0):
        rules |= result.rules
    assert "given to a successor" in rules


def test_steps_fall_inside_turns() -> None:
    """A crash in the middle of a flush leaves frames unsent that were to leave at the same instant."""
    name = "one thread"
    ends: set[Any] = set()
    for _, result in runs(name, SERVER, "crash", 0):
        [at] = [entry[0] for entry in result.log if entry[1] == "crash"] or [None]
        ends.add(at)
    steps = len(range(1, count_steps(name) + 1, CHUNKS))
    assert len(ends) < 0.8 * steps, "each step is an instant of its own, so no crash falls inside of a turn"
