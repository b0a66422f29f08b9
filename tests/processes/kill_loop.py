"""`python -m tests.processes.kill_loop --seconds 60`: SIGKILL of either side under load, and what all messages became.

A server, a client that lives on, and a client that is killed as the server is, each started again under the same
identity. All write down what happens to them (`kill_programs.py`); at the end every message is looked at:

* Whoever waits has exactly one outcome; in a process that was killed, at most one.
* A message runs at most once, in all lives of the server together; sent with `redeliver`, once in each, and marked.
* A response or a `HandlerError` means that it ran, `NotDelivered` that it did not.
* Messages without a callback ran, or are counted as `not_delivered` or `outcome_unknown`.
* Each life of the server runs what each life of a client sent in the order sent.

What must never happen: a kill that finds nothing under way. So each waits until its process has done some work.
"""

import argparse
import json
import sys
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from tests.conftest import free_port
from tests.processes.kill_programs import CLIENT_RECORD, EFFECT_RECORD, OUTCOMES, is_redelivered, is_silent
from tests.processes.programs import Program

RUN = "from tests.processes.kill_programs import main; main()"
# Records that a process writes before it is killed, at most.
WORK_MAX = 6_000
# A process that does nothing for so long is mute.
MUTE_S = 20.0
LIVES_MAX = 1_000
STEADY, MORTAL = 1, 2


class Life(msgspec.Struct, eq=False):
    """A process of the loop."""

    program: Program
    path: Path
    # The size of its log at which it is killed.
    kill_bytes: int
    log_bytes: int
    started_at: float
    moved_at: float
    # From its start to its first work.
    back_s: float = 0.0

    def is_due(self, now: float) -> bool:
        """Returns whether it has done enough; a process that ended by itself or does nothing is a failure."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > self.log_bytes:
            self.back_s = self.back_s or now - self.started_at
            self.log_bytes, self.moved_at = size, now
        if self.program.process.poll() is not None:
            raise AssertionError(f"a program ended by itself: {self.program.wait()}")
        assert now - self.moved_at < MUTE_S, f"nothing was written to {self.path.name} for {MUTE_S} s"
        return size >= self.kill_bytes


class Figures(msgspec.Struct):
    """What a run was, counted over all messages."""

    kills: Counter[str] = msgspec.field(default_factory=Counter)
    outcomes: Counter[str] = msgspec.field(default_factory=Counter)
    sent: int = 0
    silent: int = 0
    effects: int = 0
    repeated: int = 0
    open_at_kill: int = 0
    open_at_kill_ran: int = 0
    unknown_ran: int = 0
    silent_ran: int = 0
    silent_not_delivered: int = 0
    silent_unknown: int = 0
    back_s_max: float = 0.0
    violations: list[str] = msgspec.field(default_factory=list)

    def report(self) -> str:
        """Returns the figures for a person."""
        told = sum(self.outcomes.values())
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        lines = [
            f"kills: {self.kills['server']} of the server, {self.kills['client']} of a client; "
            f"a message ran within {self.back_s_max:.2f} s of each start of the server",
            f"sent: {self.sent} with a callback, {self.silent} without; effects: {self.effects}, "
            f"of which {self.repeated} are repeats that redeliver=True asked for",
            f"with a callback: {self.sent} sent = {told} told ({outcomes}) + {self.open_at_kill} of senders that were "
            f"killed ({self.open_at_kill_ran} of them ran)",
            f"OutcomeUnknown: {self.unknown_ran} of {self.outcomes['OutcomeUnknown']} ran",
            f"without a callback, of the client that lived: {self.silent_ran} ran, {self.silent_not_delivered} counted "
            f"as not_delivered, {self.silent_unknown} as outcome_unknown",
            f"violations: {len(self.violations)}",
        ]
        return "\n".join(lines + self.violations[:20])


class KillLoop:
    """The processes of one run, in a folder of their own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.figures = Figures()
        self._folder = folder
        self._rng = Random(seed)
        self._port = free_port()
        self._effects = folder / "effects"
        self._effects.touch()
        self._server_life = 0
        self._client_life = 0

    def _start(self, path: Path, *arguments: object) -> Life:
        size = path.stat().st_size if path.exists() else 0
        record = EFFECT_RECORD if path == self._effects else CLIENT_RECORD
        work = self._rng.choice((self._rng.randint(1, 50), self._rng.randint(1, WORK_MAX)))
        now = time.monotonic()
        return Life(Program(RUN, *arguments), path, size + record.size * work, size, now, now)

    def start_server(self) -> Life:
        """Starts the server's next life."""
        self._server_life += 1
        return self._start(self._effects, "serve", self._port, self._effects, self._server_life)

    def start_client(self, number: int) -> Life:
        """Starts a client's next life: the steady one goes by tcp, the mortal one by ipc, if it can."""
        self._client_life += 1
        assert self._client_life < LIVES_MAX
        destination = f"tcp://127.0.0.1:{self._port}" if number == STEADY else self._port
        sender = number * LIVES_MAX + self._client_life
        return self._start(self._folder / f"client-{sender}", "send", destination, self._folder / f"client-{sender}",
                           f"client{number}", sender)  # fmt: skip

    def _kill(self, life: Life, name: str) -> None:
        self.figures.kills[name] += 1
        life.program.kill()

    def run(self, seconds: float, kills_min: int = 0) -> Figures:
        """Kills for so many seconds, and so often each kind; lets the last ones end in peace, and checks everything."""
        server, steady, mortal = self.start_server(), self.start_client(STEADY), self.start_client(MORTAL)
        ends_at = time.monotonic() + seconds
        try:
            kills = self.figures.kills
            while (now := time.monotonic()) < ends_at or min(kills["server"], kills["client"]) < kills_min:
                steady.is_due(now)
                server_is_due, mortal_is_due = server.is_due(now), mortal.is_due(now)
                # Now and then both at once.
                both = server_is_due and self._rng.random() < 0.2
                if server_is_due:
                    self.figures.back_s_max = max(self.figures.back_s_max, server.back_s)
                    self._kill(server, "server")
                    server = self.start_server()
                if mortal_is_due or both:
                    self._kill(mortal, "client")
                    mortal = self.start_client(MORTAL)
                self._show(ends_at - now)
                time.sleep(0.001)
            self._end([steady, mortal])
        finally:
            for life in (server, steady, mortal):
                if life.program.process.returncode is None:
                    life.program.kill()
        return self.figures

    def _show(self, left_s: float) -> None:
        if sys.stderr.isatty():
            kills = self.figures.kills
            print(f"\r{left_s:5.1f} s left, {kills['server']} + {kills['client']} kills ", end="", file=sys.stderr)

    def _end(self, clients: list[Life]) -> None:
        """The senders stop and wait for what is open; then all records are checked."""
        counts = []
        for life in clients:
            life.program.write_line("stop")
        for life in clients:
            status, out, err = life.program.wait(timeout=60)
            assert status == 0, err
            counts.append(json.loads(out))
        checker = Checker(self.figures, self._effects)
        for path in sorted(self._folder.glob("client-*")):
            checker.check(path, has_ended_in_peace=any(life.path == path for life in clients))
        checker.check_strangers()
        for life, count in zip(clients, counts, strict=True):
            checker.check_silent(int(life.path.name.removeprefix("client-")), count["dropped"])
            if count["callback_error_count"]:
                self.figures.violations.append(f"{life.path.name}: callbacks raised, so responses were wrong")


def read_records(path: Path, width: int) -> tuple[Sequence[int], ...]:
    """Returns the columns of a file of records; the last may be cut short by a kill."""
    data = path.read_bytes()
    numbers = array("Q", data[: len(data) // (8 * width) * 8 * width])
    return tuple(numbers[column::width] for column in range(width))


class Checker:
    """Compares what the senders were told with what happened at the server."""

    def __init__(self, figures: Figures, effects: Path) -> None:
        self.figures = figures
        # By sender and number: how often it ran.
        self.ran: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._sent_counts: dict[int, int] = {}
        last: dict[tuple[int, int], int] = {}
        for life, sender, number, redelivered in zip(*read_records(effects, 4), strict=True):
            figures.effects += 1
            text = f"message {number} of client {sender} in life {life} of the server"
            count = self.ran[sender][number]
            self.ran[sender][number] += 1
            if count:
                figures.repeated += 1
                if not is_redelivered(number):
                    self._fail(f"{text}: ran twice")
                elif not redelivered:
                    self._fail(f"{text}: ran before, and is not marked")
            if number <= last.get((life, sender), -1):
                self._fail(f"{text}: out of order, or twice, after {last[life, sender]}")
            last[life, sender] = number
        self._unseen = set(self.ran)

    def _fail(self, text: str) -> None:
        self.figures.violations.append(text)

    def check(self, path: Path, *, has_ended_in_peace: bool) -> None:
        """Looks at every message of one life of a client."""
        figures, sender = self.figures, int(path.name.removeprefix("client-"))
        self._unseen.discard(sender)
        ran = self.ran[sender]
        sent: set[int] = set()
        told: dict[int, int] = {}
        for kind, number in zip(*read_records(path, 2), strict=True):
            if kind == 0:
                sent.add(number)
            elif number in told:
                self._fail(f"message {number} of client {sender}: {OUTCOMES[told[number]]}, then {OUTCOMES[kind]}")
            else:
                told[number] = kind
                figures.outcomes[OUTCOMES[kind]] += 1
        self._sent_counts[sender] = len(sent)
        if sent != set(range(len(sent))) or not sent >= ran.keys():
            self._fail(f"client {sender}: ran or numbered what was never sent")
        for number in sent:
            if is_silent(number):
                figures.silent += 1
                continue
            figures.sent += 1
            self._check_outcome(sender, number, OUTCOMES[told[number]] if number in told else "")
            if number not in told and has_ended_in_peace:
                self._fail(f"message {number} of client {sender}: no outcome")
            elif number not in told:
                figures.open_at_kill += 1
                figures.open_at_kill_ran += bool(ran[number])

    def _check_outcome(self, sender: int, number: int, outcome: str) -> None:
        count = self.ran[sender][number]
        text = f"message {number} of client {sender}: {outcome}, and it ran {count} times"
        if outcome in ("response", "HandlerError"):
            # What is redelivered may have run in several lives, of which one answered.
            if count < 1:
                self._fail(text)
        elif outcome in ("NotDelivered", "IdentityInUse", "NoHandler"):
            if count:
                self._fail(text)
        elif outcome == "OutcomeUnknown":
            self.figures.unknown_ran += bool(count)

    def check_silent(self, sender: int, dropped: dict[str, int]) -> None:
        """What nobody waited for has run, or is counted."""
        figures = self.figures
        ran = sum(1 for number in self.ran[sender] if is_silent(number) and self.ran[sender][number])
        lost, unknown = dropped.get("not_delivered", 0), dropped.get("outcome_unknown", 0)
        figures.silent_ran += ran
        figures.silent_not_delivered += lost
        figures.silent_unknown += unknown
        sent = sum(1 for number in range(self._sent_counts[sender]) if is_silent(number))
        if not sent - lost - unknown <= ran <= sent - lost:
            self._fail(f"client {sender}: {sent} sent without a callback, {ran} ran, {lost} lost, {unknown} unknown")

    def check_strangers(self) -> None:
        """The server ran nothing of anybody else."""
        for sender in self._unseen:
            self._fail(f"the server ran messages of client {sender}, whom nobody started")


def main() -> int:
    """Runs the loop as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.processes.kill_loop", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to kill (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills (0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m-kill-") as folder:
        figures = KillLoop(Path(folder), options.seed).run(options.seconds)
    print(figures.report())
    return 1 if figures.violations else 0


if __name__ == "__main__":
    sys.exit(main())
