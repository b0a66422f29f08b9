"""`make bench`: echo between two processes, every figure beside its peers, measured in the same run.

The machine is taken to be noisy: contenders take turns, round after round, a fresh pair of processes each; what
counts is the ratio to the baseline of the same round, and of those the median. Results go to
`benchmarks/results/echo.json` with machine and versions.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import messenger

from .contenders import CONTENDERS, Measured

RESULTS = Path(__file__).parent / "results" / "echo.json"


class Work(NamedTuple):
    """One thing to measure, and who takes part; the first of `baselines` is what the ratios are against."""

    title: str
    size_bytes: int
    window: int
    message_count: int
    contenders: tuple[str, ...]
    baselines: tuple[str, ...]
    pinned: bool = False


ALL = ("messenger", "messenger request")
BASELINES = ("pyzmq idiomatic", "pyzmq best")
WORKS = (
    Work("64 bytes, 1,000 in flight", 64, 1_000, 100_000, ("messenger",), BASELINES),
    Work("64 bytes, one in flight", 64, 1, 3_000, ALL, BASELINES),
    Work("64 bytes, one in flight, both processes on one CPU", 64, 1, 3_000, ALL, BASELINES, pinned=True),
    Work("1 KiB, 1,000 in flight", 1_024, 1_000, 50_000, ("messenger",), BASELINES),
)


def main() -> None:
    """Measure everything, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender takes its turn")
    parser.add_argument("--only", default="", help="only works whose title contains this")
    parser.add_argument("--role", choices=("serve", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "serve":
        contender, endpoint = options.arguments
        CONTENDERS[contender].serve(endpoint)
    elif options.role == "measure":
        contender, endpoint, *numbers = options.arguments
        json.dump(CONTENDERS[contender].measure(endpoint, *map(int, numbers)), sys.stdout)
    else:
        run([work for work in WORKS if options.only in work.title], options.rounds)


def run(works: list[Work], round_count: int) -> None:
    """Let the contenders take turns, then report."""
    figures: dict[str, dict[str, list[float]]] = {
        work.title: {name: [] for name in (*work.contenders, *work.baselines)} for work in works
    }
    total = round_count * sum(len(work.contenders) + len(work.baselines) for work in works)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=total)
        for _ in range(round_count):
            for work in works:
                for name, values in figures[work.title].items():
                    values.append(sample(work, name))
                    progress.advance(task)
    results = [summarise(work, figures[work.title]) for work in works]
    report = {"machine": describe_machine(), "rounds": round_count, "works": results}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    for result in results:
        print_table(result)
    Console().print(f"written to {RESULTS}")


def sample(work: Work, name: str) -> float:
    """Run one contender once; return round trips/s, or with one in flight the median round trip in microseconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.echo", "--role"]
    if work.pinned:
        command = ["taskset", "-c", "0", *command]
    numbers = [str(work.size_bytes), str(work.window), str(work.message_count)]
    server = subprocess.Popen([*command, "serve", name, endpoint])
    try:
        client = subprocess.run(
            [*command, "measure", name, endpoint, *numbers], check=True, capture_output=True, timeout=300
        )
    finally:
        server.kill()
        server.wait()
    total_s, each_s = msgspec.json.decode(client.stdout, type=Measured)
    return statistics.median(each_s) * 1e6 if each_s else work.message_count / total_s


def summarise(work: Work, figures: dict[str, list[float]]) -> dict[str, Any]:
    """Return the medians, and the median of the ratios to each baseline, round by round."""
    contenders: dict[str, Any] = {}
    for name, values in figures.items():
        contenders[name] = {"median": statistics.median(values), "values": values}
        for baseline in work.baselines:
            ratios = [value / base for value, base in zip(values, figures[baseline], strict=True)]
            contenders[name][f"ratio to {baseline}"] = statistics.median(ratios)
    unit = "µs a round trip, median" if work.window == 1 else "round trips/s"
    return {**work._asdict(), "unit": unit, "measured": contenders}


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "msgspec": msgspec.__version__,
        "messenger": messenger.__version__,
    }


def print_table(result: dict[str, Any]) -> None:
    """Print one work's figures; a ratio of latencies is better below 1, of rates above 1."""
    table = Table(title=f"{result['title']} ({result['unit']})", title_justify="left")
    table.add_column("contender")
    table.add_column("median", justify="right")
    for baseline in result["baselines"]:
        table.add_column(f"× {baseline}", justify="right")
    for name, measured in result["measured"].items():
        ratios = [f"{measured[f'ratio to {baseline}']:.2f}" for baseline in result["baselines"]]
        table.add_row(name, f"{measured['median']:,.0f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
