"""How processes fork, end, sleep, and run out of descriptors (FACTS F18 and F20)."""

import os
import resource
import signal
import statistics
import time

import pytest

from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, free_port, quickest
from tests.processes.programs import SERVE, running

# Fork.

FORK = """
import os, sys, warnings
from messenger import ForkedError, Messenger
port = int(sys.argv[1])
parent = Messenger("parent")
listener = parent.listen_for_connection(port, lambda message: message.reply(b"answer to " + message.contents))
connection = parent.make_connection(port)
assert parent.request(connection, b"before").contents == b"answer to before"
# From 3.12 on Python warns of what this test is about.
warnings.simplefilter("ignore", DeprecationWarning)
pid = os.fork()
if pid == 0:
    status = 0
    for call in (
        lambda: parent.send_message(connection, b""),
        lambda: parent.request(connection, b"", timeout=1),
        lambda: parent.wait(1024),
        lambda: parent.make_connection(port),
        lambda: parent.listen_for_connection(0, None),
        parent.__enter__,
    ):
        try:
            call()
            status = 1
        except ForkedError:
            pass
    parent.close()
    connection.close()
    # A messenger of its own reaches the parent's listener.
    with Messenger("child") as child:
        if child.request(port, b"from the child", timeout=10).contents != b"answer to from the child":
            status = 2
    sys.stdout.flush()
    # By the ordinary way out, with all its exit handlers.
    sys.exit(status)
_, status = os.waitpid(pid, 0)
print("child", os.waitstatus_to_exitcode(status), flush=True)
print(parent.request(connection, b"after").contents.decode(), flush=True)
"""


def test_fork() -> None:
    with running(FORK, free_port()) as program:
        assert program.read_line() == "child 0"
        assert program.read_line() == "answer to after"
        status, _, err = program.wait()
        assert (status, err) == (0, "")


# The end.

# Ends, in a way that is its second argument, with a message under way and one that nobody takes.
END = """
import os, sys, threading
from messenger import Messenger
server, client = Messenger("server"), Messenger("client")
arrived = threading.Event()
server.listen_for_connection(int(sys.argv[1]), lambda message: arrived.set())
def tell(name):
    return lambda error: print(name, type(error).__name__, flush=True)
client.send_message(int(sys.argv[1]), b"", print, on_error=tell("sent"))
client.send_message(f"inproc://nobody", b"", print, on_error=tell("queued"))
assert arrived.wait(10)
print("ready", flush=True)
way = sys.argv[2]
if way == "exception":
    raise ValueError("planted")
elif way == "sys.exit":
    sys.exit(3)
elif way == "wait":
    sys.stdin.read()
elif way == "request":
    client.request(int(sys.argv[1]), b"", timeout=60)
elif way == "handler":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    print("handles", flush=True)
    sys.stdin.read()
"""


def end_lines(out: str) -> list[str]:
    return sorted(out.split("\n"))


TOLD = ["", "queued NotDelivered", "sent OutcomeUnknown"]


@pytest.mark.parametrize(("way", "expected_status"), [("return", 0), ("exception", 1), ("sys.exit", 3)])
def test_exit_without_close(way: str, expected_status: int) -> None:
    """In less than two seconds, and everybody who waits is told."""

    def end() -> float:
        with running(END, free_port(), way) as program:
            assert program.read_line() == "ready"
            started_at = time.monotonic()
            status, out, err = program.wait()
            took_s = time.monotonic() - started_at
        assert status == expected_status, err
        assert end_lines(out) == TOLD
        assert ("planted" in err) == (way == "exception")
        return took_s

    assert quickest(end, 2) < 2


@pytest.mark.parametrize("way", ["wait", "request"])
def test_ctrl_c(way: str) -> None:
    """Also in a `request`: it ends with KeyboardInterrupt and the messengers are closed as at any exit."""

    def interrupt() -> float:
        with running(END, free_port(), way) as program:
            assert program.read_line() == "ready"
            started_at = time.monotonic()
            # Until the signal finds the program where it waits, it may still be on its way there; either is fine.
            program.signal(signal.SIGINT)
            status, out, err = program.wait()
            took_s = time.monotonic() - started_at
        assert status in (1, -signal.SIGINT), err
        assert "KeyboardInterrupt" in err
        assert end_lines(out) == TOLD
        return took_s

    assert quickest(interrupt, 2) < 2


def test_sigterm_without_a_handler() -> None:
    """Nobody is told, as Python does not run, but nothing holds the process up."""

    def terminate() -> float:
        with running(END, free_port(), "wait") as program:
            assert program.read_line() == "ready"
            started_at = time.monotonic()
            program.signal(signal.SIGTERM)
            status, _, _ = program.wait()
            took_s = time.monotonic() - started_at
        assert status == -signal.SIGTERM
        return took_s

    assert quickest(terminate, 1) < 1


def test_sigterm_with_a_handler_that_exits() -> None:
    def terminate() -> float:
        with running(END, free_port(), "handler") as program:
            assert [program.read_line(), program.read_line()] == ["ready", "handles"]
            started_at = time.monotonic()
            program.signal(signal.SIGTERM)
            status, out, err = program.wait()
            took_s = time.monotonic() - started_at
        assert status == 5, err
        assert end_lines(out) == TOLD
        return took_s

    assert quickest(terminate, 2) < 2


STUCK = """
import sys, threading
from messenger import Messenger
server = Messenger("server")
arrived = threading.Event()
def block(message):
    arrived.set()
    threading.Event().wait()
server.listen_for_connection(int(sys.argv[1]), block, workers=int(sys.argv[2]))
server.send_message(int(sys.argv[1]), b"")
assert arrived.wait(10)
print("ready", flush=True)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_exit_with_a_stuck_callback(workers: int) -> None:
    def end() -> float:
        with running(STUCK, free_port(), workers) as program:
            assert program.read_line() == "ready"
            started_at = time.monotonic()
            status, _, err = program.wait()
            took_s = time.monotonic() - started_at
        assert status == 0, err
        return took_s

    assert quickest(end, 3) < 3


# Idle.

IDLE = """
import sys, time
from messenger import Messenger
server, client = Messenger("server"), Messenger("client")
server.listen_for_connection(int(sys.argv[1]), lambda message: message.reply(message.contents))
for _ in range(10):
    client.request(int(sys.argv[1]), b"")
print("ready", flush=True)
for line in sys.stdin:
    started_at = time.perf_counter()
    client.request(int(sys.argv[1]), line.strip(), timeout=10)
    print(time.perf_counter() - started_at, time.process_time(), flush=True)
"""


def test_idle_messengers_use_no_cpu_and_wake_at_once() -> None:
    with running(IDLE, free_port()) as program:
        assert program.read_line() == "ready"

        def ask() -> tuple[float, float]:
            program.write_line("x")
            latency_s, cpu_s = program.read_line().split()
            return float(latency_s), float(cpu_s)

        latencies_s = [ask()[0] for _ in range(5)]
        assert statistics.median(latencies_s) < 0.05

        def idle() -> float:
            """Returns what was the more: of its limit, the time on the processor, or the latency."""
            _, before_s = ask()
            # Two seconds pass in which nothing happens: that is what is measured here.
            time.sleep(2)
            latency_s, after_s = ask()
            return max((after_s - before_s) / 0.02, latency_s / 0.1)

        assert quickest(idle, 1) < 1, "it used the processor, or what was sent while it slept did not leave at once"


# Descriptors.

# Has a limit of its first argument's descriptors, takes all that are left, and gives them back when told.
SCARCE = """
import os, resource, sys
from messenger import Messenger
server = Messenger("server")
server.listen_for_connection(sys.argv[1], lambda message: message.reply(b"answer to " + message.contents))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
print("ready", flush=True)
sys.stdin.readline()
taken = []
while True:
    try:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
print("taken", flush=True)
sys.stdin.readline()
for descriptor in taken:
    os.close(descriptor)
print("given back", flush=True)
sys.stdin.read()
"""


def test_out_of_descriptors(messenger: MessengerFactory) -> None:
    """Those who are connected are served as before; a newcomer waits, and gets in when there is room again."""
    destination = f"tcp://127.0.0.1:{free_port()}"
    present = messenger("present")
    with running(SCARCE, destination) as server:
        assert server.read_line() == "ready"
        assert present.request(destination, b"x").contents == b"answer to x"
        server.write_line()
        assert server.read_line() == "taken"
        answers: Inbox[bytes] = Inbox()
        newcomer = messenger("newcomer")
        newcomer.send_message(destination, b"new", lambda response: answers(response.contents), timeout=2 * TIMEOUT_S)
        for number in range(200):
            assert present.request(destination, b"%d" % number).contents == b"answer to %d" % number
        assert len(answers) == 0, "the server had a descriptor left, so this proves nothing"
        server.write_line()
        assert server.read_line() == "given back"
        assert answers.wait() == [b"answer to new"]
        assert present.request(destination, b"y").contents == b"answer to y"
        assert server.process.poll() is None


# The client's side: it is the one that has none left.
SCARCE_CLIENT = """
import os, resource, sys
from messenger import Messenger, MessengerError
client = Messenger("client")
assert client.request(sys.argv[1], b"x").contents
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
taken = []
while True:
    try:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
for _ in range(3):
    try:
        client.make_connection(sys.argv[1])
        print("connected")
    except MessengerError as error:
        print(type(error).__name__)
    try:
        client.listen_for_connection("inproc://a", None)
        print("listens")
    except MessengerError as error:
        print(type(error).__name__)
    assert client.request(sys.argv[1], b"y", timeout=10).contents
count = client.statistics().connection_count, client.statistics().listener_count
for descriptor in taken:
    os.close(descriptor)
assert client.request(client.make_connection(sys.argv[1]), b"z", timeout=10).contents
print(*count, flush=True)
"""


def test_no_descriptors_for_a_new_connection() -> None:
    """The call says so, leaves nothing behind, and the present connection is not harmed."""
    port = free_port()
    destination = f"tcp://127.0.0.1:{port}"
    with running(SERVE, destination) as server:
        server.read_line()
        with running(SCARCE_CLIENT, destination) as client:
            status, out, err = client.wait()
    assert status == 0, err
    *told, count = out.splitlines()
    assert "connected" not in told
    assert "listens" not in told
    assert count == "1 0"


def test_limit_of_descriptors_here_is_high_enough() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    assert len(os.listdir("/proc/self/fd")) < 256
