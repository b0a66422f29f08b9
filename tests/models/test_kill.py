"""Processes that are killed and stopped: servers while they infer and train, and the manager itself."""

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from messenger import OutcomeUnknown
from messenger.models import Job, ModelServerManager, Progress, ServerLost
from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, free_port, quickest, wait_until
from tests.models.conftest import Data, NewManager, make_linear
from tests.processes.programs import running

KILLS = int(os.environ.get("MODEL_KILLS", "25"))
CALLERS = 8
# Starts a manager and prints the process ids of its server and, once it trains, goes on.
MANAGE = """
import sys
from messenger import Messenger
from messenger.models import ModelServerManager
messenger = Messenger()
manager = ModelServerManager(messenger, int(sys.argv[1]), folder=sys.argv[2])
reported = []
def on_progress(progress):
    if not reported:
        reported.append(progress)
        print(manager.status().servers[0].pid, flush=True)
manager.train("m", data=sys.argv[3], target="class", params={"steps": 100_000}, on_progress=on_progress)
sys.stdin.read()
"""


def pid_of(manager: ModelServerManager) -> int:
    return manager.status().servers[0].pid


def kill_server(manager: ModelServerManager, number: signal.Signals = signal.SIGKILL) -> int:
    pid = pid_of(manager)
    os.kill(pid, number)
    return pid


def state_of(pid: int) -> str:
    """Returns the kernel's letter for a process: T if it is stopped, Z and nothing if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def is_alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def stop_server(manager: ModelServerManager) -> int:
    """Stops it, and waits until it has: its threads run on until the kernel has reached each."""
    pid = kill_server(manager, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")
    return pid


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.name))
    return found


def test_every_call_has_one_outcome_through_random_kills(new_manager: NewManager, folder: Path) -> None:
    """Servers are killed at random times under load. No inference fails, and none is answered wrongly or twice."""
    make_linear(folder)
    manager = new_manager(crashes_max=10 * KILLS)
    rng = random.Random(15446)
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    stop = threading.Event()
    sent_count = 0

    def call(caller: int) -> None:
        nonlocal sent_count
        number = 0
        while not stop.is_set():
            number += 1
            ends: list[Any] = []
            job = manager.infer("sum", [[caller, number]], timeout=TIMEOUT_S)
            job.add_done_callback(ends.append)
            with lock:
                sent_count += 1
            try:
                is_right = job.result(timeout=2 * TIMEOUT_S).predictions == [float(caller + number)]
                outcome = "right" if is_right else "wrong"
            except Exception as error:
                outcome = type(error).__name__
            with lock:
                outcomes[outcome if len(ends) == 1 else f"{len(ends)} outcomes"] += 1

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    recovery_s = []
    try:
        for _ in range(KILLS):
            manager.infer("sum", [[0, 0]]).result(timeout=TIMEOUT_S)
            time.sleep(rng.uniform(0, 0.05))
            kill_server(manager)
            killed_at = time.monotonic()
            pid = pid_of(manager)
            wait_until(lambda pid=pid: pid_of(manager) not in (0, pid) and manager.is_ready)  # type: ignore[misc]
            recovery_s.append(time.monotonic() - killed_at)
    finally:
        stop.set()
        for thread in threads:
            thread.join(3 * TIMEOUT_S)
    assert outcomes["right"] == sum(outcomes.values()) == sent_count, outcomes
    status = manager.status()
    assert status.waiting_calls == 0
    assert status.servers[0].restarts == KILLS
    print(
        f"{KILLS} kills, {sent_count} calls, {status.counts['retried']} retried, back in {sorted(recovery_s)[-1]:.2f} s"
    )


def test_readiness_tells_the_truth_within_a_second(new_manager: NewManager) -> None:
    manager = new_manager(command=["sleep", "60"], servers=1)
    assert not manager.is_ready
    ours = new_manager()

    def notice() -> float:
        ours.wait_ready()
        restarts = ours.status().servers[0].restarts
        kill_server(ours)
        killed_at = time.monotonic()
        wait_until(lambda: not ours.is_ready or ours.status().servers[0].restarts > restarts)
        return time.monotonic() - killed_at

    assert quickest(notice, 1.0) < 1.0
    ours.wait_ready()


def test_a_training_that_is_killed_is_told_and_leaves_nothing(
    new_manager: NewManager, folder: Path, wine: Data
) -> None:
    manager = new_manager()
    progress: Inbox[Progress] = Inbox()
    job = manager.train("m", data=wine.path, target="class", params={"steps": 100_000}, on_progress=progress)
    progress.wait(1, timeout=50)
    (trainer,) = children_of(pid_of(manager))
    pid = kill_server(manager)
    with pytest.raises(ServerLost, match="SIGKILL"):
        job.result(timeout=TIMEOUT_S)
    wait_until(lambda: not is_alive(trainer))
    # The next process of the server tidies up what the one before has left.
    wait_until(lambda: pid_of(manager) not in (0, pid) and manager.is_ready)
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    assert manager.list_models().result(timeout=TIMEOUT_S) == []
    again = manager.train("m", method="linear", data=wine.path, target="class")
    assert again.result(timeout=50).version == 1


def test_a_trainer_that_is_killed_costs_only_its_training(new_manager: NewManager, folder: Path, wine: Data) -> None:
    manager = new_manager()
    progress: Inbox[Progress] = Inbox()
    job = manager.train("m", data=wine.path, target="class", params={"steps": 100_000}, on_progress=progress)
    progress.wait(1, timeout=50)
    pid = pid_of(manager)
    (trainer,) = children_of(pid)
    os.kill(trainer, signal.SIGKILL)
    with pytest.raises(Exception, match="the training's process ended with status -9"):
        job.result(timeout=TIMEOUT_S)
    assert pid_of(manager) == pid
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_what_is_not_inference_is_not_given_to_another_server(new_manager: NewManager) -> None:
    manager = new_manager()
    manager.wait_ready()
    stop_server(manager)
    job: Job[str] = manager.print_message("once")
    wait_until(lambda: manager.status().servers[0].open_calls >= 1)
    kill_server(manager)
    with pytest.raises(OutcomeUnknown):
        job.result(timeout=TIMEOUT_S)


def test_a_server_that_is_stopped_gets_nothing_more_and_its_calls_go_on(
    new_manager: NewManager, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers no pings: after 2 s it is silent, after HUNG_S it is killed, and its inferences go to another."""
    monkeypatch.setattr("messenger.models.peers.SILENT_S", 0.5)
    monkeypatch.setattr("messenger.models.peers.HUNG_S", 2.0)
    make_linear(folder)
    manager = new_manager()
    assert manager.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S).predictions == [3.0]
    pid = stop_server(manager)
    job = manager.infer("sum", [[3, 4]])
    wait_until(lambda: manager.status().servers[0].state == "silent")
    assert not manager.is_ready
    assert job.result(timeout=TIMEOUT_S).predictions == [7.0]
    assert not is_alive(pid)
    assert manager.status().servers[0].restarts == 1


def test_servers_and_trainings_die_with_their_manager(tmp_path: Path, wine: Data) -> None:
    with running(MANAGE, free_port(), tmp_path / "models", wine.path) as program:
        server = int(program.read_line(timeout=50))
        trainings = children_of(server)
        assert is_alive(server)
        assert trainings
        program.kill()
    wait_until(lambda: not is_alive(server))
    wait_until(lambda: not any(map(is_alive, trainings)))


def test_a_server_started_by_hand_serves_the_next_manager(
    new_manager: NewManager, messenger: MessengerFactory, folder: Path
) -> None:
    """It outlives its manager, and says hello to the next one."""
    make_linear(folder)
    port = free_port()
    serve = "import sys; from messenger.models.server import main; main(sys.argv[1:])"
    with running(serve, port, "--folder", folder):
        for _ in range(3):
            manager = new_manager(port, servers=0)
            assert manager.infer("sum", [[1, 2]]).result(timeout=TIMEOUT_S).predictions == [3.0]
            (server,) = manager.status().servers
            assert (server.slot, server.state) == (-1, "ready")
            manager.stop()
