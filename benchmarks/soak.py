"""Many messages through one session: memory after all of them must be what it was after the first tenth, ±5 %.

`python -m benchmarks.soak [N]`, by default 10,000,000, each answered and with an MSC, in two processes. Writes
`benchmarks/results/soak.json`; the exit status is 1 if memory grew or shrank by more.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress

from messenger import Messenger

from .contender import free_port, resident_bytes
from .ours import pump_sessions, serve_echo
from .report import RESULTS, describe_machine
from .sample import ROOT

WINDOW = 1_000
CHANGE_MAX = 0.05


def main() -> None:
    """Send, and look at the memory of both processes after each tenth."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000_000, help="messages, at least 10,000")
    parser.add_argument("--serve", metavar="ENDPOINT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_echo(options.serve)
        return
    if options.count < 10 * WINDOW:
        parser.error(f"count is {options.count}, it must be at least {10 * WINDOW}")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.soak", "--serve", endpoint], cwd=ROOT)
    try:
        report = soak(endpoint, options.count, server.pid)
    finally:
        server.kill()
        server.wait()
    RESULTS.parent.mkdir(exist_ok=True)
    (RESULTS.parent / "soak.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    for process, change in report["change"].items():
        print(f"{process}: {change:+.1%} from {report['messages'] // 10:,} to {report['messages']:,} messages")
    sys.exit(any(abs(change) > CHANGE_MAX for change in report["change"].values()))


def soak(endpoint: str, count: int, server_pid: int) -> dict[str, Any]:
    """Make so many round trips on one session; return the memory of both processes after each tenth."""
    machine = describe_machine()
    memory: list[dict[str, int]] = []
    contents = b"x" * 64
    with Messenger("client") as messenger, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("round trips", total=count)
        connection = messenger.make_connection(endpoint)
        messenger.request(connection, b"")
        started_at = time.perf_counter()
        for tenth in range(1, 11):
            pump_sessions(messenger, [connection], contents, WINDOW, count // 10)
            memory.append({"client": resident_bytes(), "server": resident_bytes(server_pid)})
            progress.update(task, completed=count // 10 * tenth)
        total_s = time.perf_counter() - started_at
    change = {process: memory[-1][process] / memory[0][process] - 1 for process in ("client", "server")}
    return {
        "machine": machine,
        "messages": count // 10 * 10,
        "round_trips_per_s": count // 10 * 10 / total_s,
        "resident_bytes_after_each_tenth": memory,
        "change": change,
    }


if __name__ == "__main__":
    main()
