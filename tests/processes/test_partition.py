"""Networks that are cut: two network namespaces, a pair of virtual interfaces, and nftables (FACTS F5 and F6).

No fault that a process can make looks like this: no packet says that the link is gone, and both ends live on.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import quickest
from tests.processes.programs import Program, running

PARTITION_S = 5.0
PORT = 15_445
SERVER_ADDRESS, CLIENT_ADDRESS = "10.231.77.1", "10.231.77.2"


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=check, timeout=20)


def why_not() -> str:
    """Returns why there can be no network namespaces here; nothing if there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for command in ("ip", "nft"):
        if shutil.which(command) is None:
            return f"needs the command {command}"
    name = f"m-probe-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "exec", name, "nft", "add table inet probe")
    except subprocess.CalledProcessError as error:
        return f"this kernel or container allows no network namespaces: {error.stderr.strip()}"
    finally:
        run("ip", "netns", "delete", name, check=False)
    return ""


class Network:
    """Two hosts with a cable between them, which can be cut in either direction without either noticing."""

    def __init__(self, name: str) -> None:
        self.server, self.client = f"{name}s", f"{name}c"

    def build(self) -> None:
        for namespace in (self.server, self.client):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "link", "add", self.server, "netns", self.server, "type", "veth",
            "peer", "name", self.client, "netns", self.client)  # fmt: skip
        for namespace, address in ((self.server, SERVER_ADDRESS), (self.client, CLIENT_ADDRESS)):
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", namespace)
            run("ip", "-n", namespace, "link", "set", namespace, "up")

    def cut(self, namespace: str) -> None:
        """Drop all that comes in there."""
        rules = "table inet cut { chain input { type filter hook input priority 0; iifname != lo drop; }; }"
        run("ip", "netns", "exec", namespace, "nft", rules.replace("table", "add table", 1))

    def heal(self) -> None:
        for namespace in (self.server, self.client):
            run("ip", "netns", "exec", namespace, "nft", "flush ruleset")

    def remove(self) -> None:
        for namespace in (self.server, self.client):
            run("ip", "netns", "delete", namespace, check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    network = Network(f"m{os.getpid() % 100_000}")
    try:
        network.build()
        yield network
    finally:
        network.remove()


# Writes each message that it processes to a file, and answers it.
SERVER = """
import sys
from messenger import Messenger, Security
log = open(sys.argv[2], "w", buffering=1)
def answer(message):
    print(message.contents.decode(), file=log)
    message.reply(message.contents)
server = Messenger("server", security=Security(insecure=True))
server.listen_for_connection(sys.argv[1], answer)
print("ready", flush=True)
sys.stdin.read()
"""

# Sends a number each 2 ms until a line comes on standard input, then waits for all outcomes and prints them counted.
CLIENT = """
import collections, sys, threading, time
from messenger import Messenger
client = Messenger("client")
outcomes = collections.Counter()
answers = []
stop = threading.Event()
def send():
    number = 0
    while not stop.wait(0.002):
        client.send_message(sys.argv[1], b"%d" % number, lambda response: answers.append(int(response.contents)),
                            on_error=lambda error: outcomes.update([type(error).__name__]), timeout=30)
        number += 1
    return number
def talk():
    for line in sys.stdin:
        if line.strip() == "stop":
            stop.set()
            return
        print(len(answers), client.statistics().queued_msgs, flush=True)
threading.Thread(target=talk, daemon=True).start()
print("ready", flush=True)
count = send()
# A message that has its response is not outstanding, but its callback may still have to run.
while client.statistics().outstanding_msgs or len(answers) + outcomes.total() < count:
    time.sleep(0.005)
print(count, len(answers), answers == list(range(count)), dict(outcomes), flush=True)
"""


def answered_count(client: Program) -> int:
    client.write_line()
    return int(client.read_line().split()[0])


def wait_more_answers(client: Program, timeout: float) -> float:
    """Returns after how many seconds an answer came."""
    before_count, started_at = answered_count(client), time.monotonic()
    while answered_count(client) == before_count:
        assert time.monotonic() - started_at < timeout, f"no answer came within {timeout} s"
        time.sleep(0.005)
    return time.monotonic() - started_at


@pytest.mark.parametrize("cut", ["both ways", "to the server", "to the client"])
def test_partition_heals(network: Network, tmp_path: Path, cut: str) -> None:
    """Nothing is lost, nothing comes twice, everything is in order, and it goes on soon after the cable is mended."""
    log = tmp_path / "processed"
    destination = f"tcp://{SERVER_ADDRESS}:{PORT}"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(SERVER, destination, log, prefix=("ip", "netns", "exec", network.server)))
        assert server.read_line() == "ready"
        client = stack.enter_context(running(CLIENT, destination, prefix=("ip", "netns", "exec", network.client)))
        assert client.read_line() == "ready"
        wait_more_answers(client, 10)
        if cut != "to the client":
            network.cut(network.server)
        if cut != "to the server":
            network.cut(network.client)
        time.sleep(0.05)
        cut_count = answered_count(client)
        # The fault itself lasts; there is no event in it to wait for.
        time.sleep(PARTITION_S)
        assert answered_count(client) == cut_count, "the network was not cut, so this proves nothing"
        network.heal()
        wait_more_answers(client, 10)
        client.write_line("stop")
        status, out, err = client.wait(timeout=15)
    assert status == 0, err
    count = int(out.split()[0])
    assert out.strip() == f"{count} {count} True {{}}"
    assert log.read_text().split() == [str(number) for number in range(count)]


# Says when a message was refused for want of anybody there.
NOTICE = """
import sys, time
from messenger import Messenger, NotDelivered, OutcomeUnknown
client = Messenger("client")
client.request(sys.argv[1], b"x", timeout=10)
print("ready", flush=True)
sys.stdin.readline()
started_at = time.monotonic()
while True:
    try:
        client.request(sys.argv[1], b"x", timeout=0.1)
        started_at = time.monotonic()
    except OutcomeUnknown:
        pass
    except NotDelivered:
        break
print(time.monotonic() - started_at, flush=True)
"""


def test_half_open_link_is_noticed(network: Network, tmp_path: Path) -> None:
    """Within 3.5 s and the 0.1 s of a request, though TCP alone would take minutes."""
    assert quickest(lambda: notice_s(network, tmp_path), 3.7) < 3.7


def notice_s(network: Network, folder: Path) -> float:
    """Returns how long a client takes until it knows that its server cannot be reached."""
    destination = f"tcp://{SERVER_ADDRESS}:{PORT}"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            running(SERVER, destination, folder / "processed", prefix=("ip", "netns", "exec", network.server))
        )
        assert server.read_line() == "ready"
        client = stack.enter_context(running(NOTICE, destination, prefix=("ip", "netns", "exec", network.client)))
        assert client.read_line() == "ready"
        network.cut(network.server)
        client.write_line()
        took_s = float(client.read_line())
        network.heal()
        return took_s
