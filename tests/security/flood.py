"""`python -m tests.security.flood`: idle connections and garbage against a listener with keys; what does a client feel?

Rounds of two phases: quiet, and the flood (2,000 TCP connections at once that say nothing or garbage, opened anew as
the listener cuts them, and a thread that sends garbage). In each a listed client asks one message after the other. It
must not wait three times as long at the 99th percentile, the server's memory must stay bounded, and afterwards every
connection is gone.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from messenger import KeyPair, Messenger, Security
from messenger.limits import HANDSHAKE_S
from tests.processes.slow_receiver import resident_kib

CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
GARBAGE = (
    b"",
    b"\xff",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    CURVE_GREETING,
    CURVE_GREETING + b"\x04\xc8\x05HELLO" + bytes(194),
    CURVE_GREETING.replace(b"CURVE", b"NULL\0"),
    os.urandom(200),
)
SERVE = """
import sys, time
from messenger import KeyPair, Messenger, Security
pair = KeyPair(sys.argv[1], "server")
with Messenger("server", security=Security(key=pair, allow={sys.argv[2]: "alice"})) as server:
    listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(message.contents))
    print(sys.stdin.readline() and listener.port, flush=True)
    for line in sys.stdin:
        time.sleep(0.2)  # It is noticed a moment later who has left.
        print(len(listener.links[0].inflows), dict(server.statistics().dropped), flush=True)
"""


def open_idle(port: int, count: int, says: Sequence[bytes]) -> list[socket.socket]:
    """Opens so many connections; each says one thing and then nothing."""
    connections = []
    for number in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.send(says[number % len(says)])
        connections.append(connection)
    return connections


class Flood:
    """Keeps so many connections open, and sends garbage, until standard input ends.

    It runs in a process of its own, and gives way to others: an attacker does not use the processor of its victim.
    """

    def __init__(self, port: int, count: int) -> None:
        os.nice(19)
        self._port, self._count = port, count
        self._must_stop = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._hold, self._babble)]
        self.opened_count = self.garbage_bytes = 0
        for thread in self._threads:
            thread.start()

    def _hold(self) -> None:
        connections: list[socket.socket] = []
        while not self._must_stop.wait(0.1):
            poll = select.poll()
            by_number = {connection.fileno(): connection for connection in connections}
            for number in by_number:
                poll.register(number, select.POLLRDHUP)
            for number, _ in poll.poll(0):
                by_number.pop(number).close()
            missing = open_idle(self._port, self._count - len(by_number), GARBAGE)
            self.opened_count += len(missing)
            connections = [*by_number.values(), *missing]
        for connection in connections:
            connection.close()

    def _babble(self) -> None:
        data = os.urandom(100_000)
        while not self._must_stop.wait(0.001):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as connection:
                self.garbage_bytes += connection.send(CURVE_GREETING + data)

    def run(self) -> None:
        sys.stdin.read()
        self._must_stop.set()
        for thread in self._threads:
            thread.join()
        print(json.dumps({"opened": self.opened_count, "garbage_bytes": self.garbage_bytes}))


def ask_for(client: Messenger, destination: str, seconds: float) -> list[float]:
    """Returns the times of one round trip after the other, sorted."""
    times_s = []
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        began_at = time.perf_counter()
        client.request(destination, b"x" * 64, timeout=30)
        times_s.append(time.perf_counter() - began_at)
        time.sleep(0.001)
    return sorted(times_s)


def p99_us(times_s: list[float]) -> float:
    return times_s[int(len(times_s) * 0.99)] * 1e6


@contextlib.contextmanager
def running(*words: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: "subprocess.Popen[str]", text: str) -> str:
    """Says something to a process, and returns the line that it answers."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    process.stdin.write(text)
    process.stdin.flush()
    if not text:
        process.stdin.close()
    return process.stdout.readline()


def measure(
    client: Messenger, server_pid: int, port: int, arguments: argparse.Namespace
) -> tuple[dict[str, object], float, int]:
    """Alternates quiet and flooded phases, since others use this machine too."""
    destination, seconds = f"tcp://127.0.0.1:{port}", arguments.seconds
    flood_words = ("-m", "tests.security.flood", "--connections", str(arguments.connections), "--flood", str(port))
    quiet: list[float] = []
    flooded: list[float] = []
    told = {"opened": 0, "garbage_bytes": 0}
    grown_kib = 0
    ask_for(client, destination, 1)
    before_kib = resident_kib(server_pid)
    for _ in range(arguments.rounds):
        quiet += ask_for(client, destination, seconds)
        with running(*flood_words) as flood:
            flooded += ask_for(client, destination, seconds)
            grown_kib = max(grown_kib, resident_kib(server_pid) - before_kib)
            for name, count in json.loads(say(flood, "")).items():
                told[name] += count
        time.sleep(HANDSHAKE_S + 1)
    result: dict[str, object] = {"grown_kib": grown_kib, **told}
    for name, times_s in {"quiet": quiet, "flooded": flooded}.items():
        times_s.sort()
        result[f"{name}_p99_us"] = round(p99_us(times_s))
        result[f"{name}_median_us"] = round(statistics.median(times_s) * 1e6)
    ratio = p99_us(flooded) / p99_us(quiet)
    return result | {"p99_ratio": round(ratio, 2)}, ratio, grown_kib


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.security.flood")
    parser.add_argument("--connections", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each phase of a round")
    parser.add_argument("--flood", type=int, metavar="PORT", help="only flood this port, until standard input ends")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.flood:
        Flood(arguments.flood, arguments.connections).run()
        return 0
    own, alice = KeyPair.generate("server"), KeyPair.generate("alice")
    with running("-c", SERVE, own.reveal().decode(), alice.public) as server:
        port = int(say(server, "\n"))
        with Messenger(security=Security(key=alice, servers=own.public)) as client:
            result, ratio, grown_kib = measure(client, server.pid, port, arguments)
        left, _, counts = say(server, "\n").strip().partition(" ")
    result |= {"connections_left": int(left), "dropped": counts}
    print(json.dumps(result, indent=2))
    return 0 if ratio <= 3 and int(left) == 0 and grown_kib < 256 * 1024 else 1


if __name__ == "__main__":
    sys.exit(main())
