"""`make bench`: every figure beside its peers, measured in the same run.

The machine is taken to be noisy: contenders take turns, round after round, fresh processes each; what counts is the
ratio to the baseline of the same round, and of those the median. A run of all works writes `benchmarks/results/` and
the figures in `docs/benchmarks.md`; a run of some only prints.
"""

import argparse
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .report import RESULTS, Figures, describe_machine, print_tables, write
from .sample import SampleFailed, missing_of, take_sample
from .works import WORKS


def main() -> None:
    """Measure, print tables, write files; the exit status is 1 if a contender failed."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender takes its turn (default 5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only works whose title contains this")
    parser.add_argument("--contender", default="", metavar="TEXT", help="only contenders whose name contains this")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, it must be at least 1")
    machine = describe_machine()
    figures = [Figures(work) for work in WORKS if options.only.lower() in work.title.lower()]
    for each in figures:
        for name in list(each.values):
            if options.contender not in name:
                each.give_up(name, "not asked for")
            elif missing := missing_of(name):
                each.give_up(name, f"not installed ({', '.join(missing)})")
    has_failed = measure(figures, options.rounds)
    print_tables(figures)
    if len(figures) == len(WORKS) and not options.contender:
        write(machine, options.rounds, figures)
        Console().print(f"written to {RESULTS.parent} and docs/benchmarks.md")
    sys.exit(has_failed)


def measure(figures: list[Figures], round_count: int) -> bool:
    """Let the contenders take turns; return whether one failed."""
    has_failed = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=round_count * sum(len(each.values) for each in figures))
        for number in range(1, round_count + 1):
            for each in figures:
                for name in list(each.values):
                    progress.update(task, description=f"round {number}: {each.work.title}: {name}")
                    try:
                        each.values[name].append(take_sample(each.work, name))
                    except SampleFailed as error:
                        has_failed = True
                        each.give_up(name, f"failed: {error}")
                        progress.console.print(f"{each.work.title}: {name} failed: {error}", style="red")
                    progress.advance(task)
    return has_failed


if __name__ == "__main__":
    main()
