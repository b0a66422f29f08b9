"""What makes libzmq abort the process: a connection that breaks while it does not read, at the next heartbeat.

Each server runs in a process of its own, and must still answer afterwards. Bytes are made here: no ZeroMQ library lets
a connection break at the wrong time.
"""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from messenger import Messenger
from tests.conftest import TIMEOUT_S, MessengerFactory, free_port
from tests.processes.programs import Program, running
from tests.transports.test_endless_frames import GREETING, PONG

# Two bytes, and for each libzmq holds a message.
EMPTY_MESSAGE = b"\0\0"
MESSAGE = b"\x01\0\0\x070-0-abc"
PING = PONG[:2] + b"\x04PING\0\0"
PING = bytes([4, len(PING) - 2]) + PING[2:]
SERVE_SLOWLY = """
import sys, time
from messenger import Messenger
def take(message):
    time.sleep(0.00005)
    message.reply(message.contents)
with Messenger("server") as server:
    server.listen_for_connection(sys.argv[1], take)
    print("ready", flush=True)
    sys.stdin.read()
"""


def connect(endpoint: str, routing_id: bytes = b"") -> socket.socket:
    """Connects as a DEALER does, by ZMTP 3.1, and returns when the other end has said what it is."""
    kind, _, at = endpoint.partition("://")
    peer = socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET)
    peer.settimeout(TIMEOUT_S)
    peer.connect(at if kind == "ipc" else ("127.0.0.1", int(at.rpartition(":")[2])))
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    body += b"\x08Identity" + struct.pack(">I", len(routing_id)) + routing_id
    length = bytes([4, len(body)]) if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body))
    peer.sendall(GREETING + length + body)
    received = b""
    while b"ROUTER" not in received:
        received += peer.recv(4096)
    return peer


def reset(peer: socket.socket) -> None:
    """Ends a connection at once, and what is under way with it."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@contextmanager
def victim(endpoint: str, client: Messenger) -> Iterator[Program]:
    """Runs a server, which must answer at the end too."""
    with running(SERVE_SLOWLY, endpoint) as server:
        assert server.read_line() == "ready"
        yield server
        # A heartbeat is sent each second.
        time.sleep(1.3)
        assert server.process.poll() is None
        assert client.request(endpoint, b"alive", timeout=3 * TIMEOUT_S).contents == b"alive"


@pytest.fixture(params=["tcp", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"tcp://127.0.0.1:{free_port()}" if request.param == "tcp" else f"ipc://{tmp_path}/socket"


def send_much(peer: socket.socket, data: bytes) -> None:
    """Sends as much as the other end takes in a while."""
    peer.settimeout(0.5)
    try:
        peer.sendall(data)
    except TimeoutError:
        pass
    except ConnectionError:
        pytest.fail("it was cut")


def flood(peer: socket.socket) -> None:
    """More than the callbacks are done with when the connection breaks, and than a mark of 100,000."""
    send_much(peer, MESSAGE * 150_000)
    time.sleep(1)


def flood_with_pings(peer: socket.socket) -> None:
    """The last bytes that were read ask for an answer."""
    send_much(peer, EMPTY_MESSAGE * 99_000 + (EMPTY_MESSAGE * 4 + PING) * 4_000)
    time.sleep(0.05)


# Who may connect by ipc could end the process anyway, so there only what honest peers do must not.
@pytest.mark.parametrize(
    ("endpoint", "attack"), [("tcp", flood), ("tcp", flood_with_pings), ("ipc", flood)], indirect=["endpoint"]
)
def test_a_peer_floods_and_hangs_up(
    messenger: MessengerFactory, endpoint: str, attack: Callable[[socket.socket], None]
) -> None:
    with victim(endpoint, messenger()):
        peer = connect(endpoint)
        attack(peer)
        reset(peer)


def test_a_peer_loses_its_routing_id_and_hangs_up(messenger: MessengerFactory, endpoint: str) -> None:
    with victim(endpoint, messenger()):
        first = connect(endpoint, b"name")
        first.sendall(MESSAGE)
        time.sleep(0.1)
        with connect(endpoint, b"name"):
            time.sleep(0.1)
            first.sendall(MESSAGE)
            time.sleep(0.1)
            reset(first)
            time.sleep(1.3)
