"""A peer whose message has very many frames, or no last one. Its bytes are made here: no ZeroMQ library sends them."""

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

import pytest

from messenger import Limits, Message, Messenger
from messenger.limits import KIB, LOOK_S, MIB
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeers,
    contents_of,
    dropped,
    free_port,
    wait_dropped,
    wait_until,
)
from tests.processes.programs import running
from tests.processes.slow_receiver import resident_kib

MORE, LARGE = 1, 2
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY_BODY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
PONG = b"\x04\x05\x04PONG"
READY = bytes([4, len(READY_BODY)]) + READY_BODY
# Of ZMTP 2.0, without the type of the socket, which stands behind it, and the routing id, a frame (here an empty one).
OLD_GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x01"
OLD_DEALER, OLD_ROUTER = OLD_GREETING + b"\x05\0\0", OLD_GREETING + b"\x06\0\0"


@contextmanager
def raw_dealer(port: int) -> Iterator[socket.socket]:
    """Connects as a DEALER does, by ZMTP 3.0 (https://rfc.zeromq.org/spec/23/)."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as dealer:
        greet(dealer, READY, b"ROUTER")
        yield dealer


def greet(peer: socket.socket, ready: bytes, expected: bytes) -> None:
    """Greets, and waits until the other end has said what it is, before which nothing else may be sent."""
    peer.sendall(GREETING + ready)
    received = b""
    while expected not in received:
        received += peer.recv(4096)


def test_message_of_a_million_frames(messenger: MessengerFactory) -> None:
    """It is dropped and counted, a little in each turn, so that other listeners go on: all at once it took 2.4 s.

    Peers of the same socket do wait, as libzmq gives us the whole of a message before anything of another peer.
    """
    port, other = free_port(), f"tcp://127.0.0.1:{free_port()}"
    server, client = messenger("server"), messenger("client")
    link = server.listen_for_connection(f"tcp://127.0.0.1:{port}", None).links[0]
    server.listen_for_connection(other, lambda message: message.reply(message.contents))
    client.request(other, b"warm-up")
    with raw_dealer(port) as dealer:
        dealer.sendall(bytes([MORE, 1, 0x79]) * 1_000_000 + bytes([0, 1, 0x79]))
        # The next message of the same peer is whole: an echo, whose answer comes when all before it is dropped.
        dealer.sendall(bytes([MORE, 0, 0, 8]) + b"1024-1-x")
        meanwhile_count = 0
        received = b""
        deadline_at = time.monotonic() + 2 * TIMEOUT_S
        while b"0-1024-x" not in received:
            assert time.monotonic() < deadline_at
            for _ in range(20):
                was_dropping = link._is_dropping
                client.request(other, b"x")
                meanwhile_count += was_dropping and link._is_dropping
            if select.select([dealer], [], [], 0)[0]:
                data = dealer.recv(4096)
                received += data
                if b"PING" in data:
                    dealer.sendall(PONG)
    wait_dropped(server, "malformed_frames")
    assert meanwhile_count > 100


# Says `ready`, and then for each line of input what was dropped, and how much of the processor the loop took at most
# between two answers: a machine that pauses takes nothing.
SERVE_AND_COUNT = """
import sys, time
from messenger import Messenger
longest_s = before_s = 0.0
def answer(message):
    global longest_s, before_s
    now_s = time.thread_time()
    longest_s, before_s = max(longest_s, now_s - before_s), now_s
    message.reply(message.contents)
with Messenger("server") as server:
    server.listen_for_connection(sys.argv[1], answer)
    print("ready", flush=True)
    for line in sys.stdin:
        print(longest_s, dict(server.statistics().dropped), flush=True)
"""
SMALL = Limits(message_bytes_max=64 * KIB)


def frame_of(size: int) -> bytes:
    """Returns the bytes of a frame behind which more follow."""
    if size < 256:
        return bytes([MORE, size]) + bytes(size)
    return bytes([MORE | LARGE]) + struct.pack(">Q", size) + bytes(size)


def send_on(peer: socket.socket, frame: bytes) -> None:
    """Sends without end, until the other end hangs up, as it must."""
    peer.setblocking(False)
    ends_at = time.monotonic() + TIMEOUT_S
    rest = memoryview(frame)
    while time.monotonic() < ends_at:
        readable, writable, _ = select.select([peer], [peer], [], 0.1)
        try:
            if readable and not peer.recv(4096):
                return
            if writable:
                rest = rest[peer.send(rest) :] or memoryview(frame)
        except ConnectionError:
            return
    pytest.fail(f"nobody hung up within {TIMEOUT_S} s")


@pytest.mark.threads_only
def test_message_without_end(messenger: MessengerFactory) -> None:
    """Who sends one is cut, memory is bounded and given back, and others are served meanwhile."""
    port = free_port()
    client = messenger("client")
    with running(SERVE_AND_COUNT, f"tcp://127.0.0.1:{port}") as server:
        assert server.read_line() == "ready"
        client.request(f"tcp://127.0.0.1:{port}", b"warm-up")
        before_kib = resident_kib(server.pid)
        grown_kib = 0
        with raw_dealer(port) as dealer:
            sender = threading.Thread(target=send_on, args=(dealer, frame_of(MIB)))
            sender.start()
            while sender.is_alive():
                client.request(f"tcp://127.0.0.1:{port}", b"x")
                grown_kib = max(grown_kib, resident_kib(server.pid) - before_kib)
        server.write_line("counts")
        longest_s, _, counts = server.read_line().partition(" ")
        assert counts == "{'endless_message': 1}"
        assert float(longest_s) < 1
        assert grown_kib < 2 * MIB
        wait_until(lambda: resident_kib(server.pid) - before_kib < 100 * KIB)


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_small_frames_without_end(messenger: MessengerFactory, size: int) -> None:
    port = free_port()
    server = messenger(limits=SMALL)
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", lambda message: message.reply(message.contents))
    with raw_dealer(port) as dealer:
        send_on(dealer, frame_of(size) * (MIB // size))
    wait_dropped(server, "endless_message")
    assert messenger().request(port, b"x").contents == b"x"


@pytest.mark.threads_only
def test_many_that_each_begin_a_message(messenger: MessengerFactory) -> None:
    """Each has sent less than a message may have, all together more than may wait; others are served meanwhile."""
    port = free_port()
    limits = Limits(message_bytes_max=2 * MIB, unread_bytes_max=16 * MIB)
    server = messenger("server", limits=limits)
    listener = server.listen_for_connection(f"tcp://127.0.0.1:{port}", lambda message: message.reply(message.contents))
    client = messenger()
    client.request(port, b"warm-up")
    with ExitStack() as stack:
        dealers = [stack.enter_context(raw_dealer(port)) for _ in range(10)]
        for _ in range(5):
            for dealer in dealers:
                with suppress(ConnectionError):
                    dealer.sendall(frame_of(MIB))
            time.sleep(2 * LOOK_S)
            assert client.request(port, b"x").contents == b"x"
        wait_until(lambda: dropped(server, "too_far_ahead") > 0)
        wait_until(lambda: sum(inflow.held_bytes for inflow in listener.links[-1].inflows.values()) <= 16 * MIB)
        assert len(listener.links[-1].inflows) > 1
    assert set(server.statistics().dropped) == {"too_far_ahead"}


def test_busy_peers_hide_nobody(messenger: MessengerFactory) -> None:
    """The socket of the listener is never empty, and none of those who are honest is cut."""
    port = free_port()
    server = messenger(limits=SMALL)
    answered: Inbox[Message] = Inbox()
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", lambda message: message.reply(message.contents))
    clients = [messenger(limits=SMALL) for _ in range(2)]
    is_over = threading.Event()

    def work(client: Messenger) -> None:
        connection = client.make_connection(port)
        while not is_over.is_set():
            for _ in range(100):
                client.send_message(connection, bytes(10_000), answered)
            client.request(connection, b"")

    workers = [threading.Thread(target=work, args=(client,)) for client in clients]
    for worker in workers:
        worker.start()
    try:
        with raw_dealer(port) as dealer:
            send_on(dealer, frame_of(10_000) * 10)
        wait_dropped(server, "endless_message")
        count = len(answered)
        answered.wait(count + 500)
    finally:
        is_over.set()
        for worker in workers:
            worker.join()
    assert server.statistics().dropped == {"endless_message": 1}


def test_a_callback_that_blocks_costs_nobody_its_link(messenger: MessengerFactory, plain: PlainPeers) -> None:
    """What waits meanwhile is much more than one message may have, but all of it is whole messages."""
    port = free_port()
    server = messenger(limits=SMALL)
    received: Inbox[Message] = Inbox()

    def take(message: Message) -> None:
        if message.contents == b"block":
            time.sleep(3 * LOOK_S)
        received(message)

    server.listen_for_connection(f"tcp://127.0.0.1:{port}", take)
    dealer = plain.dealer(port, b"honest", SNDHWM=0)
    for _ in range(3):
        dealer.send(b"", b"0-0-block")
        for _ in range(500):
            dealer.send(b"", b"0-0-" + bytes(60_000))
    received.wait(3 * 501, 3 * TIMEOUT_S)
    assert server.statistics().dropped == {}


def test_who_sends_large_messages_slowly_is_heard(messenger: MessengerFactory) -> None:
    """Each takes half a second, and the next begins where it ends; so much of them comes as no one message may have."""
    port = free_port()
    size = 8 * MIB
    server = messenger(limits=Limits(message_bytes_max=size))
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", received)
    message = bytes([MORE, 0, LARGE]) + struct.pack(">Q", size + 4) + b"0-0-" + bytes(size)
    with raw_dealer(port) as dealer:
        part_size = len(message) // 20
        for _ in range(6):
            for start in range(0, len(message), part_size):
                dealer.sendall(message[start : start + part_size])
                time.sleep(0.025)
        assert [len(message.contents) for message in received.wait(6)] == [size] * 6
    assert server.statistics().dropped == {}


@pytest.mark.parametrize("dialect", ["session", "basic"])
def test_a_server_that_sends_without_end(messenger: MessengerFactory, dialect: Literal["session", "basic"]) -> None:
    """Its client cuts it off, and goes on with others and with whoever is there later."""
    client = messenger(limits=SMALL)
    with socket.create_server(("127.0.0.1", free_port())) as listening:
        listening.settimeout(TIMEOUT_S)
        port = listening.getsockname()[1]
        connection = client.make_connection(f"tcp://127.0.0.1:{port}", dialect=dialect)
        client.send_message(connection, b"x")
        accepted, _ = listening.accept()
        with accepted:
            accepted.settimeout(TIMEOUT_S)
            greet(accepted, READY.replace(b"DEALER", b"ROUTER"), b"DEALER")
            send_on(accepted, frame_of(100_000))
    wait_dropped(client, "endless_message")
    server = messenger(limits=SMALL)
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", received)
    # In the basic dialect what is sent before the cut is noticed is lost.
    wait_until(lambda: client.send_message(connection, b"y") and received.wait(0))
    assert contents_of(received.wait())[-1] == b"y"


def old_message(*frames: bytes) -> bytes:
    """Returns the bytes of a message, the same in ZMTP 2 and 3."""
    more = b"".join(bytes([MORE, len(frame)]) + frame for frame in frames[:-1])
    return more + bytes([LARGE]) + struct.pack(">Q", len(frames[-1])) + frames[-1]


def test_an_old_peer_is_heard(messenger: MessengerFactory) -> None:
    """By which connection a message came, libzmq does not tell for peers older than ZMTP 3; an endless one is cut."""
    port = free_port()
    server = messenger(limits=SMALL)
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(f"tcp://127.0.0.1:{port}", received)
    message = old_message(b"", b"0-0-" + bytes(60_000))
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as old:
        old.sendall(OLD_DEALER)
        # So many that it is watched, and then more than one message may have.
        for step in range(4):
            old.sendall(message * 100)
            received.wait((step + 1) * 100)
            time.sleep(2 * LOOK_S)
        with raw_dealer(port) as dealer:
            dealer.sendall(frame_of(MIB // 10) * 50)
            time.sleep(2 * LOOK_S)
            old.sendall(message)
            received.wait(401)
            # It watches again, with nobody else there.
            send_on(dealer, frame_of(MIB // 10))
        wait_dropped(server, "endless_message")
        old.sendall(message)
        received.wait(402)
        # Its end counts as a failed handshake: libzmq takes an old peer whose link breaks for one that never greeted.
        assert server.statistics().dropped == {"endless_message": 1}


def test_an_old_server_is_heard(messenger: MessengerFactory) -> None:
    client = messenger(limits=SMALL)
    received: Inbox[Message] = Inbox()
    with socket.create_server(("127.0.0.1", free_port())) as listening:
        listening.settimeout(TIMEOUT_S)
        endpoint = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        client.make_connection(endpoint, callback=received, dialect="basic")
        accepted, _ = listening.accept()
        with accepted:
            accepted.settimeout(TIMEOUT_S)
            accepted.sendall(OLD_ROUTER)
            for step in range(4):
                accepted.sendall(old_message(b"old", b"", b"0-0-" + bytes(60_000)) * 100)
                received.wait((step + 1) * 100)
                time.sleep(2 * LOOK_S)
    assert client.statistics().dropped == {}
