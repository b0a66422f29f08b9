"""A peer whose message has very many frames, or no last one. Its bytes are made here: no ZeroMQ library sends them."""

import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from messenger import Messenger
from tests.conftest import TIMEOUT_S, MessengerFactory, free_port, wait_dropped
from tests.processes.programs import SERVE, running
from tests.processes.slow_receiver import resident_kib

MORE, LARGE = 1, 2
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY_BODY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
PONG = b"\x04\x05\x04PONG"
READY = bytes([4, len(READY_BODY)]) + READY_BODY


@contextmanager
def raw_dealer(port: int) -> Iterator[socket.socket]:
    """Connects as a DEALER does, by ZMTP 3.0 (https://rfc.zeromq.org/spec/23/)."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as dealer:
        dealer.sendall(GREETING + READY)
        received = b""
        while b"ROUTER" not in received:
            received += dealer.recv(4096)
        yield dealer


def slowest_s(client: Messenger, destination: str, count: int) -> float:
    """Returns the longest of so many round trips."""
    slowest = 0.0
    for _ in range(count):
        began_at = time.monotonic()
        client.request(destination, b"x")
        slowest = max(slowest, time.monotonic() - began_at)
    return slowest


def test_message_of_a_million_frames(messenger: MessengerFactory) -> None:
    """It is dropped and counted, a little in each turn, so that other listeners go on: all at once it took 2.4 s.

    Peers of the same socket do wait, as libzmq gives us the whole of a message before anything of another peer.
    """
    port, other = free_port(), f"tcp://127.0.0.1:{free_port()}"
    server, client = messenger("server"), messenger("client")
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", None)
    server.listen_for_connection(other, lambda message: message.reply(message.contents))
    client.request(other, b"warm-up")
    with raw_dealer(port) as dealer:
        dealer.sendall(bytes([MORE, 1, 0x79]) * 1_000_000 + bytes([0, 1, 0x79]))
        # The next message of the same peer is whole: an echo, whose answer comes when all before it is dropped.
        dealer.sendall(bytes([MORE, 0, 0, 8]) + b"1024-1-x")
        slowest = 0.0
        received = b""
        deadline_at = time.monotonic() + 2 * TIMEOUT_S
        while b"0-1024-x" not in received:
            assert time.monotonic() < deadline_at
            slowest = max(slowest, slowest_s(client, other, 20))
            if select.select([dealer], [], [], 0)[0]:
                data = dealer.recv(4096)
                received += data
                if b"PING" in data:
                    dealer.sendall(PONG)
    wait_dropped(server, "malformed_frames")
    assert slowest < 0.5


@pytest.mark.xfail(
    reason="libzmq keeps the frames of a message until its last one, bounds only each, and shows us none before",
    raises=MemoryError,
)
def test_message_without_end() -> None:
    """Memory is bounded, whatever a peer sends."""
    port = free_port()
    with running(SERVE, f"tcp://127.0.0.1:{port}") as server:
        assert server.read_line() == "ready"
        before_kib = resident_kib(server.pid)
        frame = bytes([MORE | LARGE]) + struct.pack(">Q", 1_000_000) + bytes(1_000_000)
        with raw_dealer(port) as dealer:
            for _ in range(300):
                dealer.sendall(frame)
        grown_kib = resident_kib(server.pid) - before_kib
        if grown_kib > 200 * 1024:
            raise MemoryError(f"the server grew by {grown_kib} KiB")
