"""The supervisor alone, with programs that are no servers."""

import os
import resource
import signal

from messenger.models.supervisor import Slot, Supervisor
from tests.conftest import TIMEOUT_S, wait_until


def test_a_shortage_of_descriptors_gives_no_server_up() -> None:
    """For as long as no process can be made it is tried again and again, and not five times only."""
    ended: list[Slot] = []
    supervisor = Supervisor(1, 3, ended.append, lambda: None)
    supervisor.start(["sleep", "600"], is_own=False)
    (slot,) = supervisor.slots
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        wait_until(lambda: slot.pid)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # Those that are open stay so.
        os.kill(slot.pid, signal.SIGKILL)
        wait_until(lambda: slot.start_count > 5)
        wait_until(lambda: "Too many open files" in slot.reason)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: slot.pid, timeout=TIMEOUT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        supervisor.stop(0)
    assert slot.state.value == "stopped"
    assert len(ended) == 2
