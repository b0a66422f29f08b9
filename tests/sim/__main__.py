"""`make sim SEEDS=n SEED=s`: run n seeds from s on, on all cores; end with 1 if a rule was broken."""

import argparse
import hashlib
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable

from .chunk import REPORTS_MAX, run_chunk
from .simulator import Result

CHUNK = 50


def _run(chunks: Iterable[range], total_count: int) -> tuple[Counter[str], list[Result], str]:
    counts: Counter[str] = Counter()
    failing: list[Result] = []
    logs = hashlib.sha256()
    done_count = 0
    began_at = time.monotonic()
    with multiprocessing.get_context("spawn").Pool() as pool:
        for count, some_counts, some_failing, digest in pool.imap(run_chunk, chunks):
            done_count += count
            counts.update(some_counts)
            failing += some_failing
            logs.update(digest)
            spent_s = time.monotonic() - began_at
            line = f"{done_count} of {total_count} seeds, {len(failing)} violations, {done_count / spent_s:.0f} seeds/s"
            if sys.stderr.isatty():
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
            if len(failing) >= REPORTS_MAX:
                break
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return counts, failing, logs.hexdigest()[:16]


def main() -> int:
    """Run the seeds that the command line names."""
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many seeds to run")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    options = parser.parse_args()
    first, end = options.seed, options.seed + options.seeds
    chunks = [range(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK)]
    counts, failing, digest = _run(chunks, options.seeds)
    for result in failing[:REPORTS_MAX]:
        print(result.report())
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    print(f"seeds {first} to {end - 1}: {'VIOLATIONS' if failing else 'no violation'}; outcomes: {outcomes}")
    print(f"event logs: {digest}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
