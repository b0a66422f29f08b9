"""Every line of a real text goes to a server loop over inproc, ipc and tcp, and every answer is checked.

The server loop on port 15445 runs in a process of its own; over inproc, which never leaves a process, the same server
loop runs in a second messenger of the sending process. Each line is a message with its own callback (MSC), which
verifies the answer: the line's SHA-256 and its number of words. The exit status is 0 only if every answer came and
matched.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from messenger import DeliveryError, Destination, Message, Messenger, MessengerError

PORT = 15445
ROOT = Path(__file__).resolve().parent.parent
IN_FLIGHT_MAX = 1_000
TIMEOUT_S = 10.0


def describe(line: bytes) -> bytes:
    """Return what the server loop answers to a line."""
    return json.dumps({"sha256": hashlib.sha256(line).hexdigest(), "words": len(line.split())}).encode()


def server_loop(message: Message) -> None:
    """Answer a line with its SHA-256 and word count."""
    message.reply(describe(message.contents))


class Run:
    """One transport's run: sends the lines, verifies each answer, and keeps the times."""

    def __init__(self, transport: str, lines: list[bytes]) -> None:
        self.transport = transport
        self.lines = lines
        self.round_trips_s: list[float] = []
        self.mismatch_count = 0
        self.lost_count = 0
        self.total_s = 0.0
        self._room = threading.Semaphore(IN_FLIGHT_MAX)

    def send_all(self, messenger: Messenger, endpoint: str, progress: Progress) -> None:
        """Send every line and wait until each has its outcome."""
        task = progress.add_task(self.transport, total=len(self.lines))
        started_at = time.perf_counter()
        for line in self.lines:
            self._room.acquire()
            self._send(messenger, endpoint, line, progress, task)
        for _ in range(IN_FLIGHT_MAX):
            self._room.acquire()
        self.total_s = time.perf_counter() - started_at
        progress.refresh()

    def _send(self, messenger: Messenger, endpoint: str, line: bytes, progress: Progress, task: object) -> None:
        sent_at = time.perf_counter()

        def verify(response: Message) -> None:
            self.round_trips_s.append(time.perf_counter() - sent_at)
            self.mismatch_count += response.contents != describe(line)
            finish()

        def count_lost(error: DeliveryError) -> None:
            self.lost_count += 1
            finish()

        def finish() -> None:
            progress.advance(task)  # type: ignore[arg-type]
            self._room.release()

        messenger.send_message(endpoint, line, verify, on_error=count_lost, timeout=TIMEOUT_S)

    @property
    def succeeded(self) -> bool:
        """Whether every line was answered, and rightly."""
        return len(self.round_trips_s) == len(self.lines) and not self.mismatch_count and not self.lost_count

    def row(self) -> list[str]:
        """Return the run's row of the table."""
        cuts = (
            statistics.quantiles(self.round_trips_s, n=100) if len(self.round_trips_s) > 1 else self.round_trips_s * 99
        )
        p50, p99 = (f"{cuts[n] * 1000:.2f} ms" if cuts else "-" for n in (49, 98))
        counts = (len(self.lines), len(self.round_trips_s), self.mismatch_count, self.lost_count)
        return [self.transport, *(f"{count:,}" for count in counts), f"{len(self.lines) / self.total_s:,.0f}", p50, p99]


@contextmanager
def server_process() -> Iterator[None]:
    """Run the server loop on its port in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise SystemExit(f"the server process ended with status {process.wait()}; is port {PORT} in use?")
        yield
    finally:
        process.communicate()  # Closes its standard input, which ends it.


def serve() -> None:
    """Serve until standard input is closed."""
    with Messenger("server") as messenger:
        messenger.listen_for_connection(PORT, server_loop)
        print("ready", flush=True)
        sys.stdin.read()


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a text."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SystemExit(f"cannot read the text: {error}") from error
    if not lines:
        raise SystemExit(f"{path} has no lines")
    return lines


def largest_document() -> Path:
    """Return the largest document of the repository."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if not documents:
        raise SystemExit(f"{ROOT} is no clone of the repository, so name a text: every_line.py FILE")
    return max(documents, key=lambda path: path.stat().st_size)


def main() -> int:
    """Send the text over every transport and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="the text (default: the largest document of the repository)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    path = options.file or largest_document()
    lines = read_lines(path)
    console = Console()
    title = f"{path}: {len(lines):,} lines, each a message with its own callback"
    console.print(title, highlight=False, soft_wrap=True)
    _, ipc, tcp = Destination.parse(PORT).endpoints()
    runs = {f"inproc://{PORT}": Run("inproc", lines), ipc: Run("ipc", lines), tcp: Run("tcp", lines)}
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        server_process(),
        Messenger("here") as here,
        Messenger("sender") as sender,
        Progress(*columns, console=console) as progress,
    ):
        here.listen_for_connection(f"inproc://{PORT}", server_loop)
        for endpoint, run in runs.items():
            run.send_all(sender, endpoint, progress)
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("transport", "lines", "responses", "mismatches", "lost", "round trips/s", "p50", "p99"):
        table.add_column(title, justify="left" if title == "transport" else "right", no_wrap=True)
    for run in runs.values():
        table.add_row(*run.row())
    console.print(table)
    return 0 if all(run.succeeded for run in runs.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MessengerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
