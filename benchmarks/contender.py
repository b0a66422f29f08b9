"""What is measured: a server and a client that belong together, run in a process each unless they say otherwise.

`serve(endpoint)` serves until it is killed. `measure(endpoint, size_bytes, window, count)` makes `count` round trips,
or whatever the work counts, with `window` in flight. It must see every answer, or it raises.
"""

import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

ANSWER_TIMEOUT_S = 120.0
CLIENT_PROCESS_COUNT = 5
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Measured(NamedTuple):
    """What one run gave.

    Attributes:
        total_s: From the first message to the last answer.
        each_s: With one message in flight, the time of each round trip.
        grown_bytes: Where memory is measured, by how much the process grew.
        figure: Where the work has a unit of its own, the value in it.
    """

    total_s: float
    each_s: list[float]
    grown_bytes: int = 0
    figure: float | None = None


class Contender(NamedTuple):
    """A server and a client.

    Attributes:
        transport: `tcp`: two processes. `inproc`: the server is a thread of the client's process. `none`: no server, or
            one that the client starts.
        needs: Distributions that must be installed, beside what the package itself needs; `PostgreSQL` is its programs.
        share: Of a work's message count that it gets, so that a slow one takes about as long as the others.
    """

    serve: Callable[[str], None]
    measure: Callable[[str, int, int, int], Measured]
    transport: str = "tcp"
    needs: tuple[str, ...] = ()
    share: float = 1.0


def serve_nothing(endpoint: str) -> None:
    """Stand in where no server is needed."""


def pump(send: Callable[[], object], receive: Callable[[], object], window: int, count: int) -> Measured:
    """Send the next message whenever an answer came; one round trip before that is not timed."""
    send()
    receive()
    each_s: list[float] = []
    started_at = time.perf_counter()
    if window == 1:
        for _ in range(count):
            sent_at = time.perf_counter()
            send()
            receive()
            each_s.append(time.perf_counter() - sent_at)
    else:
        for _ in range(window):
            send()
        for _ in range(count - window):
            receive()
            send()
        for _ in range(window):
            receive()
    return Measured(time.perf_counter() - started_at, each_s)


async def pump_async(
    send: Callable[[], Awaitable[object]], receive: Callable[[], Awaitable[object]], window: int, count: int
) -> Measured:
    """Do the same with coroutines."""
    await send()
    await receive()
    each_s: list[float] = []
    started_at = time.perf_counter()
    if window == 1:
        for _ in range(count):
            sent_at = time.perf_counter()
            await send()
            await receive()
            each_s.append(time.perf_counter() - sent_at)
    else:
        for _ in range(window):
            await send()
        for _ in range(count - window):
            await receive()
            await send()
        for _ in range(window):
            await receive()
    return Measured(time.perf_counter() - started_at, each_s)


def measure_clients(
    run: Callable[..., None], endpoint: str, size_bytes: int, window: int, count: int, connection_count: int
) -> Measured:
    """Spread so many connections, and the messages in flight, over a few client processes.

    Args:
        run: Called in each with (barrier, endpoint, size_bytes, connection count, window of each connection, count);
            waits at the barrier when it is connected, and when it has all answers.
    """
    spawn = multiprocessing.get_context("spawn")
    barrier: Any = spawn.Barrier(CLIENT_PROCESS_COUNT + 1)
    share = (connection_count // CLIENT_PROCESS_COUNT, window // connection_count, count // CLIENT_PROCESS_COUNT)
    for _ in range(CLIENT_PROCESS_COUNT):
        spawn.Process(target=run, args=(barrier, endpoint, size_bytes, *share), daemon=True).start()
    barrier.wait(ANSWER_TIMEOUT_S)
    started_at = time.perf_counter()
    barrier.wait(ANSWER_TIMEOUT_S)
    return Measured(time.perf_counter() - started_at, [])


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_of(endpoint: str) -> int:
    """Return the port of a tcp endpoint."""
    return int(endpoint.rpartition(":")[2])


def wait_until_open(port: int) -> None:
    """Wait until somebody listens, for clients that do not try again by themselves."""
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.025)
        else:
            return
    raise RuntimeError(f"nobody listens on port {port}")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the memory of a process (RSS)."""
    if pid == "self":
        gc.collect()
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
