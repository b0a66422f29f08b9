"""Streams between processes: one side ends in the middle, and a slow reader does not fill the memory of either."""

import signal
import time

import pytest

from messenger import Message, OutcomeUnknown
from tests.conftest import TIMEOUT_S, MessengerFactory, free_port
from tests.processes.programs import running

pytestmark = pytest.mark.threads_only

# The most memory that the process ever had, in MiB. Not `ru_maxrss`, which a process inherits from whoever starts it.
MOST_MIB = "next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) // 1024"

# Writes a gigabyte in parts of 1 MiB; prints how many parts it could send when it is told that nobody reads any more,
# and the most memory it ever had, in MiB.
WRITE = f"""
import sys
from messenger import Cancelled, Messenger
def write(message):
    part, count = bytes(1 << 20), 0
    try:
        for count in range(1, 1025):
            message.reply(part, more=True, timeout=120)
        message.reply(b"end")
    except Cancelled:
        pass
    print(count, {MOST_MIB}, flush=True)
with Messenger("server") as server:
    server.listen_for_connection(sys.argv[1], write, workers=1)
    print("ready", flush=True)
    sys.stdin.read()
"""

# Reads some parts of a stream, prints how many, and waits to be killed.
READ = """
import sys
from messenger import Messenger
client = Messenger("client")
stream = client.stream(sys.argv[1], b"", timeout=20)
print(sum(len(next(stream).contents) >> 20 for _ in range(5)), flush=True)
sys.stdin.read()
"""

# A quarter of the window of 64 MiB, a part more, what ZeroMQ holds, and the interpreter.
MEMORY_MIB_MAX = 150


def test_a_writer_that_is_killed(messenger: MessengerFactory) -> None:
    port = free_port()
    with running(WRITE, port) as program:
        assert program.read_line() == "ready"
        client = messenger()
        stream = client.stream(f"tcp://127.0.0.1:{port}", b"", timeout=1.0)
        assert len(next(stream).contents) == 1 << 20
        program.process.send_signal(signal.SIGKILL)
        # What has come is read, and then that nothing more does.
        parts: list[Message] = []
        with pytest.raises(OutcomeUnknown):
            parts.extend(iter(stream.__next__, None))
        assert {len(part.contents) for part in parts} <= {1 << 20}


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_reader_that_ends_stops_the_writer_and_neither_held_much(is_killed: bool) -> None:
    destination = f"tcp://127.0.0.1:{free_port()}"
    with running(WRITE, destination) as writer, running(READ, destination) as reader:
        assert writer.read_line() == "ready"
        assert reader.read_line() == "5"
        # Now the reader takes nothing; the writer waits for it.
        time.sleep(0.3)
        reader.process.send_signal(signal.SIGKILL if is_killed else signal.SIGINT)
        if is_killed:
            # The next process of the same identity shows that the first is gone.
            with running(READ, destination):
                count, memory_mib = map(int, writer.read_line().split())
        else:
            count, memory_mib = map(int, writer.read_line().split())
        assert 5 <= count < 40
        assert memory_mib < MEMORY_MIB_MAX


def test_a_gigabyte_to_a_slow_reader_stays_within_the_window() -> None:
    script = (
        "import sys, time\n"
        "from messenger import Messenger\n"
        "size_bytes = 0\n"
        "with Messenger() as client:\n"
        "    for number, part in enumerate(client.stream(sys.argv[1], b'')):\n"
        "        size_bytes += len(part.contents)\n"
        "        time.sleep(0.3 if number == 100 else 0)\n"
        f"print(size_bytes, {MOST_MIB}, flush=True)\n"
        "sys.stdin.read()\n"
    )
    destination = f"tcp://127.0.0.1:{free_port()}"
    with running(WRITE, destination) as writer:
        assert writer.read_line() == "ready"
        with running(script, destination) as reader:
            size_bytes, memory_mib = map(int, reader.read_line(timeout=3 * TIMEOUT_S).split())
            assert size_bytes == (1 << 30) + 3
            assert memory_mib < MEMORY_MIB_MAX
            count, memory_mib = map(int, writer.read_line().split())
            assert count == 1024
            assert memory_mib < MEMORY_MIB_MAX
