"""A short run of the kill loop, and that its checker finds each of the lies that it is there to find."""

from pathlib import Path

import pytest

from tests.processes.kill_loop import Checker, Figures, KillLoop
from tests.processes.kill_programs import CLIENT_RECORD, EFFECT_RECORD, OUTCOMES

SECONDS = 6.0
SENDER = 1001
# By their numbers: an ordinary message, one that is redelivered, one that nobody waits for.
ORDINARY, REDELIVERED, SILENT = 0, 3, 5


def test_every_message_has_one_true_outcome(tmp_path: Path) -> None:
    figures = KillLoop(tmp_path, seed=1).run(SECONDS, kills_min=3)
    assert not figures.violations, figures.report()
    # With nothing of this under way the kills would prove nothing.
    assert figures.outcomes["response"] > 100, figures.report()
    assert figures.outcomes["OutcomeUnknown"] > 0, figures.report()
    assert figures.open_at_kill > 0, figures.report()
    assert figures.sent == sum(figures.outcomes.values()) + figures.open_at_kill


def check(folder: Path, told: list[tuple[str, int]], effects: list[tuple[int, int, bool]]) -> list[str]:
    """Returns what the checker finds; told are (outcome, number), effects (the server's life, number, redelivered)."""
    effects_path, client_path = folder / "effects", folder / f"client-{SENDER}"
    effects_path.write_bytes(b"".join(EFFECT_RECORD.pack(life, SENDER, number, mark) for life, number, mark in effects))
    sent = [("sent", number) for number in range(6)]
    client_path.write_bytes(b"".join(CLIENT_RECORD.pack(OUTCOMES.index(what), number) for what, number in sent + told))
    figures = Figures()
    checker = Checker(figures, effects_path)
    checker.check(client_path, has_ended_in_peace=True)
    checker.check_strangers()
    checker.check_silent(SENDER, {})
    return figures.violations


# What really happened in a run without faults.
TOLD = [("response", number) for number in range(5)]
EFFECTS = [(1, number, False) for number in range(6)]


def test_checker_finds_nothing_in_a_true_run(tmp_path: Path) -> None:
    assert check(tmp_path, TOLD, EFFECTS) == []
    assert check(tmp_path, TOLD, [*EFFECTS, (2, REDELIVERED, True)]) == []
    unknown = [("OutcomeUnknown", ORDINARY), *TOLD[1:]]
    assert check(tmp_path, unknown, EFFECTS) == []
    assert check(tmp_path, unknown, EFFECTS[1:]) == []


@pytest.mark.parametrize(
    ("told", "effects", "found"),
    [
        (TOLD[1:], EFFECTS, "no outcome"),
        ([*TOLD, ("OutcomeUnknown", ORDINARY)], EFFECTS, "response, then OutcomeUnknown"),
        ([("NotDelivered", ORDINARY), *TOLD[1:]], EFFECTS, "NotDelivered, and it ran 1 times"),
        (TOLD, EFFECTS[1:], "response, and it ran 0 times"),
        (TOLD, [*EFFECTS, (2, ORDINARY, False)], "ran twice"),
        (TOLD, [*EFFECTS, (2, REDELIVERED, False)], "is not marked"),
        (TOLD, [*EFFECTS, (1, REDELIVERED, True)], "out of order, or twice"),
        (TOLD, [EFFECTS[1], EFFECTS[0], *EFFECTS[2:]], "out of order"),
        (TOLD, [*EFFECTS, (1, 99, False)], "never sent"),
        (TOLD, EFFECTS[:SILENT], "1 sent without a callback, 0 ran"),
    ],
)
def test_checker_finds(
    tmp_path: Path, told: list[tuple[str, int]], effects: list[tuple[int, int, bool]], found: str
) -> None:
    assert any(found in violation for violation in check(tmp_path, told, effects))
