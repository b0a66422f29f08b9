"""`python -m tests.fuzz TARGET --seconds N`: coverage-guided fuzzing of one target, with atheris.

What is found stays in the working folder as `crash-…`; new inputs go to --corpus, by default a folder of their own.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"

# Before anything of it is imported elsewhere, so that its branches are counted.
with atheris.instrument_imports(include=["messenger"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the fuzzer; printed, to run it again")
    parser.add_argument("--new", help="the folder for new inputs (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        new = arguments.new or temporary
        print(f"target {arguments.target}, seed {arguments.seed}, {arguments.seconds} s", flush=True)
        options = [f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}", "-max_len=4000", "-timeout=10"]
        options += ["-print_final_stats=1", "-rss_limit_mb=2000"]
        atheris.Setup([sys.argv[0], *options, new, str(CORPUS / arguments.target)], TARGETS[arguments.target])
        atheris.Fuzz()


main()
