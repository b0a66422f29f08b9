"""What a worker process of `make sim` runs; a process that is spawned cannot find functions of `__main__`."""

from collections import Counter

from .simulator import Result, simulate

REPORTS_MAX = 3


def run_chunk(seeds: range) -> tuple[int, Counter[str], list[Result]]:
    """Return how many seeds were run, what became of their messages, and the first that broke a rule."""
    counts: Counter[str] = Counter()
    failing = []
    for seed in seeds:
        result = simulate(seed)
        counts.update(result.counts)
        if result.violations:
            failing.append(result)
    return len(seeds), counts, failing[:REPORTS_MAX]
