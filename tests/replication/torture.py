"""Kill a primary under load and its replica again and again, at random; everything must hold each time.

`python -m tests.replication.torture --kills 1000` prints the seed, a line for each hundred kills, and what was seen.
The exit status is 1 if anything that was confirmed is missing, or anything is there twice, or in part.
"""

import argparse
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.conftest import free_port
from tests.processes.programs import Program
from tests.replication import checks
from tests.replication.programs import start

# Most lives end some time after a transaction was confirmed, the others at any time, also while they begin.
LONG_PART = 0.7
LIFE_S_MAX = 0.4
BOTH_PART = 0.2  # How often both are killed at once.
FULL_CHECK_KILLS = 50
PROGRESS_S_MAX = 30.0
NO_OPTIONS: Mapping[str, Sequence[object]] = MappingProxyType({})


class Pair:
    """A primary and a replica on two files, either of which is started again when it was killed."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.primary, self.replica = folder / "primary.db", folder / "replica.db"
        self._paths = {"primary": self.primary, "replica": self.replica}
        self._confirmed = folder / "confirmed"
        self._destination = free_port()
        self._commit = commit
        self._programs: dict[str, Program] = {}
        self._checked_count = 0
        self.kill_counts = dict.fromkeys(self._paths, 0)

    def start(self, options: Mapping[str, Sequence[object]] = NO_OPTIONS, must_live: bool = True) -> None:
        """Start what does not run, with further options for each role, and wait until it is ready, or dead."""
        started = []
        for role in self._paths.keys() - self._programs.keys():
            own = ("--confirmed", self._confirmed, "--commit", self._commit) if role == "primary" else ()
            program = start(role, self._paths[role], self._destination, *own, *options.get(role, ()))
            self._programs[role] = program
            started.append(program)
        for program in started if must_live else ():
            assert program.read_line() == "ready"

    def wait_death(self, role: str) -> None:
        """Wait until a process was killed by its own hand."""
        program = self._programs.pop(role)
        try:
            # Not communicate, which closes the standard input, at whose end the program ends as well.
            program.process.wait(PROGRESS_S_MAX)
        finally:
            program.process.kill()
            status, _, errors = program.wait()
        assert status == -signal.SIGKILL, f"the {role} ended with status {status}: {errors}"
        self.kill_counts[role] += 1

    def kill(self, role: str) -> None:
        """kill -9."""
        self._programs.pop(role).kill()
        self.kill_counts[role] += 1

    def stop(self) -> None:
        """Kill what runs, which is no part of the test."""
        for program in self._programs.values():
            program.kill()
        self._programs.clear()

    def check(self, is_full: bool) -> tuple[int, int]:
        """Check both files and what was confirmed; return how many transactions each has."""
        after = 0 if is_full else self._checked_count
        counts = checks.check_pair(self.primary, self.replica, self._confirmed, after)
        self._checked_count = min(counts)
        return counts

    def confirmed_count(self) -> int:
        """Return how many transactions were confirmed so far."""
        return len(checks.read_confirmed(self._confirmed))

    def wait_confirmed(self) -> None:
        """Wait until one more transaction is confirmed: safety without progress would be easy."""
        before_count = self._confirmed.stat().st_size if self._confirmed.exists() else 0
        deadline_at = time.monotonic() + PROGRESS_S_MAX
        while not self._confirmed.exists() or self._confirmed.stat().st_size == before_count:
            assert time.monotonic() < deadline_at, f"nothing was confirmed within {PROGRESS_S_MAX} s"
            time.sleep(0.005)

    def wait_caught_up(self) -> None:
        """Wait until the replica has all that the primary has now."""
        count, _ = self.check(False)
        deadline_at = time.monotonic() + PROGRESS_S_MAX
        while self.check(False)[1] < count:
            assert time.monotonic() < deadline_at, f"the replica has not all {count} after {PROGRESS_S_MAX} s"
            time.sleep(0.05)


def torture(folder: Path, kill_count: int, seed: int, commit: str = "applied") -> str:
    """Kill so many times and return what was seen.

    Raises:
        AssertionError: Something does not hold.
    """
    rng = random.Random(seed)
    pair = Pair(folder, commit)
    started_at = time.monotonic()
    try:
        for number in range(1, kill_count + 1):
            pair.start()
            if rng.random() < LONG_PART:
                pair.wait_confirmed()
            time.sleep(rng.uniform(0, LIFE_S_MAX))
            roles = ["primary", "replica"]
            rng.shuffle(roles)
            for role in roles if rng.random() < BOTH_PART else roles[:1]:
                pair.kill(role)
            counts = pair.check(is_full=number % FULL_CHECK_KILLS == 0)
            if number % 100 == 0:
                print(f"{number} kills, {counts[0]} transactions, {time.monotonic() - started_at:.0f} s", flush=True)
        # Whoever died last is to catch up too, and nothing may be left over that is never mended.
        pair.start()
        pair.wait_caught_up()
        pair.stop()
        primary_count, replica_count = pair.check(is_full=True)
    finally:
        pair.stop()
    confirmed_count = pair.confirmed_count()
    assert confirmed_count > kill_count, f"only {confirmed_count} transactions were confirmed, which proves little"
    return (
        f"{sum(pair.kill_counts.values())} kills ({pair.kill_counts}), {primary_count} transactions, {confirmed_count} "
        f"of them confirmed as {commit}, {replica_count} at the replica, {time.monotonic() - started_at:.0f} s"
    )


def main() -> None:
    """Torture as the words say."""
    parser = argparse.ArgumentParser(prog="tests.replication.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--commit", choices=["durable", "applied"], default="applied")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    folder = tempfile.mkdtemp(prefix="torture-")
    try:
        print(torture(Path(folder), options.kills, options.seed, options.commit))
    except AssertionError as error:
        print(f"FAILED: {error}\nthe files are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
