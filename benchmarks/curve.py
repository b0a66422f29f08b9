"""What CURVE costs: the CPU time that it adds to a round trip, at both ends together.

CPU time, because a rate hides what runs beside the rest, on a CPU that would else wait.
"""

import multiprocessing
import time
from functools import partial
from pathlib import Path

from . import ours, plain
from .contender import Contender, Measured, free_port, serve_nothing, wait_until_open

TURN_COUNT = 5


def measure_added(
    without: Contender, with_curve: Contender, _: str, size_bytes: int, window: int, count: int
) -> Measured:
    """Make `count` round trips with CURVE and as many without it, by turns; the least of each counts.

    What else runs on the machine only ever adds, by what it takes from the caches.
    """
    each_count = max(count // TURN_COUNT, 2 * window)
    started_at = time.perf_counter()
    turns = [
        (
            _measure_cpu(without, size_bytes, window, each_count),
            _measure_cpu(with_curve, size_bytes, window, each_count),
        )
        for _turn in range(TURN_COUNT)
    ]
    least_s, least_with_curve_s = map(min, zip(*turns, strict=True))
    added_us = (least_with_curve_s - least_s) / each_count * 1e6
    return Measured(time.perf_counter() - started_at, [], figure=added_us)


def _measure_cpu(contender: Contender, size_bytes: int, window: int, count: int) -> float:
    """Return the CPU seconds that client (this process) and server take for `count` round trips, once both are warm."""
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    server = multiprocessing.get_context("spawn").Process(target=contender.serve, args=(endpoint,), daemon=True)
    server.start()
    try:
        wait_until_open(port)
        contender.measure(endpoint, size_bytes, window, max(count // 10, 2 * window))
        before_s = time.process_time() + _cpu_seconds(server.pid)
        contender.measure(endpoint, size_bytes, window, count)
        return time.process_time() + _cpu_seconds(server.pid) - before_s
    finally:
        server.kill()
        server.join()


def _cpu_seconds(pid: int | None) -> float:
    """Return the CPU time of all threads of a process so far."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


_CONTENDERS = {**ours.CONTENDERS, **plain.CONTENDERS}
CONTENDERS = {
    f"{name}, added by CURVE": Contender(
        serve_nothing, partial(measure_added, _CONTENDERS[name], _CONTENDERS[f"{name}, CURVE"]), "none"
    )
    for name in ("messenger", "pyzmq best")
}
