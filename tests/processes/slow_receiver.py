"""`python -m tests.processes.slow_receiver`: one slow receiver among ten, and what the others feel (FACTS F9).

A messenger talks to ten receivers, each in a process of its own. Nine answer at once; with each of them one message is
under way all the time. To the tenth, which takes 5 ms for a message, a thread sends without end: its queue is full
all the time, so the thread waits for room; who gives no time to wait gets `QueueFull`.

Rounds with and without that thread alternate, so that both see the same machine. What nobody reads must not pile up
either: the memory of the sender and of the slow receiver is read at the start and the end of the rounds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time

import msgspec

from messenger import Connection, Limits, Message, Messenger, QueueFull
from tests.processes.programs import Program, running

RECEIVER = """
import sys, time
from messenger import Limits, Messenger
delay_s = float(sys.argv[1])
def work(message):
    if delay_s:
        time.sleep(delay_s)
    message.reply(message.contents)
receiver = Messenger("receiver", limits=Limits(window_msgs=50))
print(receiver.listen_for_connection("tcp://127.0.0.1:0", work).port, flush=True)
sys.stdin.read()
"""

FAST_COUNT = 9
SLOW_S = 0.005
LIMITS = Limits(window_msgs=50, queue_msgs_max=100)
# The contents of a message to the slow one: what piles up would be seen in the memory.
BLOCK = bytes(2_000)


class Figures(msgspec.Struct):
    """What a run showed; latencies in microseconds, one for each round."""

    p50_alone_us: list[float] = msgspec.field(default_factory=list)
    p50_beside_us: list[float] = msgspec.field(default_factory=list)
    p99_alone_us: list[float] = msgspec.field(default_factory=list)
    p99_beside_us: list[float] = msgspec.field(default_factory=list)
    slow_sent: int = 0
    queue_full: int = 0
    queued_max: int = 0
    sender_grew_kib: int = 0
    receiver_grew_kib: int = 0
    errors: int = 0

    @property
    def ratio(self) -> float:
        """The median over all rounds of what the load on the slow receiver did to the 99th percentile of the others."""
        pairs = zip(self.p99_beside_us, self.p99_alone_us, strict=True)
        return statistics.median(beside / alone for beside, alone in pairs)


def resident_kib(pid: int | str) -> int:
    """Returns the memory that a process holds."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


class Pings:
    """One message under way with each of some connections, all the time."""

    def __init__(self, messenger: Messenger, connections: list[Connection]) -> None:
        self._messenger = messenger
        self._connections = connections
        self.errors = 0

    def measure(self, count: int) -> list[float]:
        """Returns the latencies of so many round trips, in microseconds."""
        latencies: list[float] = []
        done = threading.Event()
        left = len(self._connections)

        def send(connection: Connection) -> None:
            nonlocal left
            if len(latencies) >= count:
                left -= 1
                if not left:
                    done.set()
                return
            began_at = time.perf_counter()

            def on_response(response: Message) -> None:
                latencies.append((time.perf_counter() - began_at) * 1e6)
                send(connection)

            def on_error(error: object) -> None:
                self.errors += 1
                send(connection)

            self._messenger.send_message(connection, b"x" * 64, on_response, on_error=on_error)

        for connection in self._connections:
            send(connection)
        if not done.wait(60):
            raise AssertionError(f"{len(latencies)} of {count} round trips were made within 60 s")
        return latencies


class Flood:
    """A thread that sends to the slow receiver without end, while it may."""

    def __init__(self, messenger: Messenger, connection: Connection, figures: Figures) -> None:
        self._messenger = messenger
        self._connection = connection
        self._figures = figures
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._must_stop.is_set():
            self._messenger.send_message(self._connection, BLOCK, timeout=60)
            self._figures.slow_sent += 1

    def __enter__(self) -> "Flood":
        self._thread.start()
        while self._messenger.statistics().queued_msgs < LIMITS.queue_msgs_max:
            time.sleep(0.001)
        return self

    def press(self) -> None:
        """Sends with hardly any time to wait for room, until it is told that there is none."""
        for _ in range(1_000):
            try:
                self._messenger.send_message(self._connection, BLOCK, on_error=lambda error: None, timeout=0.001)
            except QueueFull:
                self._figures.queue_full += 1
                return

    def __exit__(self, *details: object) -> None:
        """Stops, and waits until the slow receiver has processed all."""
        self._must_stop.set()
        self._thread.join(60)
        self._messenger.request(self._connection, b"the last", timeout=60)


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which a share of the values lies."""
    return sorted(values)[int(len(values) * share)]


def run(rounds: int, count: int) -> Figures:
    """Measures so many rounds of so many round trips, with and without a sender to the slow receiver."""
    figures = Figures()
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(running(RECEIVER, SLOW_S))
        fast = [stack.enter_context(running(RECEIVER, 0)) for _ in range(FAST_COUNT)]
        sender = stack.enter_context(Messenger("sender", limits=LIMITS))

        def connect(program: Program) -> Connection:
            connection = sender.make_connection(f"tcp://127.0.0.1:{program.read_line()}")
            sender.request(connection, b"warm-up")
            return connection

        slow_connection = connect(slow)
        pings = Pings(sender, [connect(program) for program in fast])
        pings.measure(count)
        sender_kib = receiver_kib = 0
        for number in range(rounds):
            latencies = pings.measure(count)
            figures.p50_alone_us.append(percentile(latencies, 0.5))
            figures.p99_alone_us.append(percentile(latencies, 0.99))
            with Flood(sender, slow_connection, figures) as flood:
                latencies = pings.measure(count)
                figures.queued_max = max(figures.queued_max, sender.statistics().queued_msgs)
                flood.press()
                if number == 0:
                    sender_kib, receiver_kib = resident_kib("self"), resident_kib(slow.pid)
            figures.p50_beside_us.append(percentile(latencies, 0.5))
            figures.p99_beside_us.append(percentile(latencies, 0.99))
        figures.sender_grew_kib = resident_kib("self") - sender_kib
        figures.receiver_grew_kib = resident_kib(slow.pid) - receiver_kib
        figures.errors = pings.errors
    return figures


def main() -> None:
    """Measures as the command line says, and prints the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.processes.slow_receiver", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how many rounds of each kind (15)")
    parser.add_argument("--count", type=int, default=10_000, help="round trips in each (10,000)")
    options = parser.parse_args()
    figures = run(options.rounds, options.count)
    print(json.dumps(msgspec.to_builtins(figures)))
    for name in ("p50_alone_us", "p50_beside_us", "p99_alone_us", "p99_beside_us"):
        print(f"{name}: {statistics.median(getattr(figures, name)):.0f}", file=sys.stderr)
    print(f"the others' p99, median of the rounds' ratios: {figures.ratio:.2f} x", file=sys.stderr)


if __name__ == "__main__":
    main()
