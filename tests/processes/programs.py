"""Programs that the tests of this folder run in processes of their own, and the means to start, stop and kill them.

Each prints a line when it is ready and then does what its standard input, a line at a time, tells it.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# As that of tests.conftest, which the programs that import this would pay for: it takes a third longer to start one.
TIMEOUT_S = 10.0

# Answers every message with its own process id and the contents.
SERVE = """
import os, sys
from messenger import Messenger
def answer(message):
    message.reply(b"%d " % os.getpid() + message.contents)
with Messenger("server") as server:
    server.listen_for_connection(sys.argv[1], answer)
    print("ready", flush=True)
    sys.stdin.read()
"""

# Prints what comes and answers nothing, until it is killed.
HOLD = """
import sys
from messenger import Messenger
with Messenger("server") as server:
    server.listen_for_connection(sys.argv[1], lambda message: print(message.contents.decode(), flush=True))
    print("ready", flush=True)
    sys.stdin.read()
"""

# Asks once under a fixed identity, prints the answer, and waits to be killed.
ASK = """
import sys
from messenger import Messenger
client = Messenger(sys.argv[2])
print(client.request(sys.argv[1], b"x", timeout=20).contents.decode(), flush=True)
sys.stdin.read()
"""


class Program:
    """A running Python program."""

    def __init__(self, source: str, *arguments: object, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_line(self, timeout: float = 2 * TIMEOUT_S) -> str:
        """Returns the next line of standard output, without its end."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], timeout)
            assert ready, f"no line came within {timeout} s"
            data = os.read(descriptor, 65_536)
            if not data:
                assert self.process.stderr is not None
                raise AssertionError("the program ended: " + self.process.stderr.read().decode())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def write_line(self, text: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as a crash; returns when the process is gone."""
        self.process.kill()
        self.process.communicate()

    def wait(self, timeout: float = 2 * TIMEOUT_S) -> tuple[int, str, str]:
        """Returns the exit status and the rest of what it printed."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, (self._buffer + out).decode(), err.decode()

    def cpu_s(self) -> float:
        """Returns the processor time that the process has used."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(source: str, *arguments: object, prefix: Sequence[str] = ()) -> Iterator[Program]:
    """Starts a program, and kills it at the end if it still runs."""
    program = Program(source, *arguments, prefix=prefix)
    try:
        yield program
    finally:
        if program.process.returncode is None:
            program.process.kill()
        program.process.communicate()
