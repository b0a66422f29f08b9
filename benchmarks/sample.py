"""Run one contender once, in processes of its own."""

import importlib.metadata
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import msgspec

from . import postgresql
from .contender import Measured, free_port
from .works import CONTENDERS, Work

ROOT = Path(__file__).parents[1]
SAMPLE_TIMEOUT_S = 180.0


class SampleFailed(Exception):
    """A contender did not finish; the text is the last that it said."""


def missing_of(name: str) -> list[str]:
    """Return what a contender needs and this environment lacks."""
    return [needed for needed in CONTENDERS[name].needs if not version_of(needed)]


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, or nothing."""
    if distribution == postgresql.NAME:
        return postgresql.version()
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def take_sample(work: Work, name: str) -> float:
    """Return one figure in the unit of the work.

    Raises:
        SampleFailed: The client raised, or took too long.
    """
    contender = CONTENDERS[name]
    message_count = max(int(work.message_count * contender.share), 2 * work.window, 200)
    with tempfile.TemporaryFile() as errors:
        measured = _run_pair(work, name, message_count, errors.fileno())
        if measured is None:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise SampleFailed(said[-1] if said else "it was too slow, or ended without a word")
    if measured.figure is not None:
        return measured.figure
    if work.unit == "bytes":
        return measured.grown_bytes / message_count
    if work.unit == "µs":
        return statistics.median(measured.each_s) * 1e6
    rate = message_count / measured.total_s
    return rate * work.size_bytes / 1e9 if work.unit == "GB/s" else rate


def _run_pair(work: Work, name: str, message_count: int, errors: int) -> Measured | None:
    transport = CONTENDERS[name].transport
    endpoint = "inproc://bench" if transport == "inproc" else f"tcp://127.0.0.1:{free_port()}"
    cpu = "0" if work.pinned else ""
    command = [sys.executable, "-m", "benchmarks.sample"]
    client_command = [
        *command,
        "measure",
        cpu,
        name,
        endpoint,
        *map(str, (work.size_bytes, work.window, message_count)),
    ]
    server = None
    if transport == "tcp":
        # Its group ends with it, so that what it started does too.
        server_command = [*command, "serve", cpu, name, endpoint]
        server = subprocess.Popen(server_command, cwd=ROOT, stderr=errors, start_new_session=True)
    try:
        client = subprocess.run(
            client_command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, timeout=SAMPLE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    return msgspec.json.decode(client.stdout, type=Measured) if client.returncode == 0 else None


def play_role(role: str, cpu: str, name: str, endpoint: str, *numbers: str) -> None:
    """Be the server or the client of a sample."""
    if cpu:
        os.sched_setaffinity(0, {int(cpu)})
    # A listener with 1,000 sessions has as many descriptors.
    _, descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors_max, descriptors_max))
    contender = CONTENDERS[name]
    if role == "serve":
        contender.serve(endpoint)
        return
    if contender.transport == "inproc":
        threading.Thread(target=contender.serve, args=(endpoint,), daemon=True).start()
    size_bytes, window, count = map(int, numbers)
    print(json.dumps(contender.measure(endpoint, size_bytes, window, count)), flush=True)
    # Nothing is to be closed, and a server in a thread never ends.
    os._exit(0)


if __name__ == "__main__":
    play_role(*sys.argv[1:])
