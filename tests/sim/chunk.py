"""What a worker process of `make sim` runs; a process that is spawned cannot find functions of `__main__`."""

import hashlib
from collections import Counter

from .simulator import Result, simulate

REPORTS_MAX = 3


def run_chunk(seeds: range) -> tuple[int, Counter[str], list[Result], bytes]:
    """Return how many seeds were run, what became of their messages, the first that broke a rule, and a digest of all.

    The digest is of the event logs, so it is the same wherever the core does the same, interpreted or compiled.
    """
    counts: Counter[str] = Counter()
    failing = []
    logs = hashlib.sha256()
    for seed in seeds:
        result = simulate(seed)
        counts.update(result.counts)
        logs.update(result.digest.encode())
        if result.violations:
            failing.append(result)
    return len(seeds), counts, failing[:REPORTS_MAX], logs.digest()
