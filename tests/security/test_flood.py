"""A5: connections that say nothing, garbage, and a listed peer that wants all there is.

`python -m tests.security.flood` does the first with 2,000 connections, and measures what a listed client feels.
"""

import ctypes
import select
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import msgspec
import pytest

from messenger import DeliveryError, HandlerError, KeyPair, Limits, Listener, Message, NotDelivered, Security
from messenger.blocks import OptionKind
from messenger.limits import CHALLENGES_PER_IDENTITY_MAX, HANDSHAKE_S, KIB, MIB, REFUSAL_LOG_KEYS_MAX, REFUSAL_LOG_S
from messenger.transports import inflow as inflow_module
from messenger.transports import listener as listener_module
from messenger.transports import zap
from messenger.transports.sockets import Kernel
from messenger.wire import encode_identity
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeers,
    StandingClock,
    dropped,
    wait_dropped,
    wait_until,
)
from tests.security.conftest import SecuredServer, answer, ask
from tests.security.flood import GARBAGE, open_idle
from tests.security.test_aborts import EMPTY_MESSAGE, connect
from tests.transports.test_bad_input import RawSession


def connected_count(listener: Listener) -> int:
    return len(listener.links[0].inflows)


def closed_count(connections: list[socket.socket]) -> int:
    """Returns how many were closed by the other end."""
    readable, _, _ = select.select(connections, [], [], 0)
    return sum(not _has_more(connection) for connection in readable)


def _has_more(connection: socket.socket) -> bool:
    try:
        while data := connection.recv(65_536):
            if not data:
                return False
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_idle_connections_and_garbage_end_by_themselves(server: SecuredServer, standing_clock: StandingClock) -> None:
    """Each says something else, or nothing; none outlives the time that a handshake may take."""
    alice = server.client(server.alice)
    ask(alice, server.destination)
    wait_until(lambda: connected_count(server.listener) == 1)
    began_at = time.monotonic()
    connections = open_idle(server.listener.port, 200, GARBAGE)
    try:
        slowest_s = 0.0
        while closed_count(connections) < len(connections):
            asked_at = standing_clock.now()
            assert ask(alice, server.destination) == b"alice said hello"
            slowest_s = max(slowest_s, standing_clock.now() - asked_at)
            assert time.monotonic() < began_at + HANDSHAKE_S + TIMEOUT_S
            time.sleep(0.01)
    finally:
        for connection in connections:
            connection.close()
    assert slowest_s < 1
    wait_until(lambda: connected_count(server.listener) == 1)
    # libzmq tells of those that sent at least a greeting.
    assert dropped(server.messenger, "failed_handshakes") >= len(connections) / 2
    assert server.messenger.statistics().dropped.keys() == {"failed_handshakes"}


@pytest.mark.parametrize("passed_bytes", [0, 64, 64 + 202, 64 + 202 + 150])
def test_a_listed_peer_that_stops_in_its_handshake(
    messenger: MessengerFactory, plain: PlainPeers, monkeypatch: pytest.MonkeyPatch, passed_bytes: int
) -> None:
    """It is cut, wherever it stops: before its greeting, HELLO, INITIATE, and within that. Who is let in is not."""
    monkeypatch.setattr(inflow_module, "HANDSHAKE_S", 0.3)
    server = SecuredServer(messenger)
    server.dealer(plain, server.alice)
    wait_until(lambda: connected_count(server.listener) == 1)
    inflows = server.listener.links[0].inflows
    let_in = list(inflows.values())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        is_over = threading.Event()
        relay = threading.Thread(target=withhold, args=(listening, server.listener.port, passed_bytes, is_over))
        relay.start()
        plain.dealer(f"tcp://127.0.0.1:{listening.getsockname()[1]}", **server.dealer_keys(server.alice))
        wait_until(lambda: connected_count(server.listener) == 2)
        relay.join(TIMEOUT_S)
        is_over.set()
        assert not relay.is_alive(), "the relay ends only when it is cut"
    wait_until(lambda: connected_count(server.listener) == 1)
    time.sleep(0.6)
    assert list(inflows.values()) == let_in


def test_those_who_come_and_go_do_not_wake_us_each(server: SecuredServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the loop for every two events of a monitor took a fifth of a core in a flood."""
    # So long that most of them come within one, also on a slow machine.
    monkeypatch.setattr("messenger.loop.NEWS_PAUSE_S", 0.2)
    link = server.listener.links[0]
    read_news, read_count = link.read_news, 0

    def count_and_read() -> None:
        nonlocal read_count
        read_count += 1
        read_news()

    monkeypatch.setattr(link, "read_news", count_and_read)
    began_at = time.monotonic()
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", server.listener.port)) as connection:
            connection.send(GARBAGE[5])
            select.select([connection], [], [], TIMEOUT_S)
        time.sleep(0.005)
    wait_until(lambda: dropped(server.messenger, "failed_handshakes") == 200)
    assert read_count < 10 + 2 * (time.monotonic() - began_at) / 0.2


def test_connections_beyond_the_limit_are_cut(messenger: MessengerFactory, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(peer_connections_max=20)
    server = messenger("server", limits=limits)
    listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b"served"))
    client = messenger("client")
    assert ask(client, listener.destination) == b"served"
    connections = open_idle(listener.port, 60, (b"",))
    try:
        wait_until(lambda: dropped(server, "too_many_connections") >= 41)
        wait_until(lambda: closed_count(connections) >= 41)
        wait_until(lambda: connected_count(listener) <= limits.peer_connections_max)
        assert ask(client, listener.destination) == b"served"
    finally:
        for connection in connections:
            connection.close()
    said = [
        record.getMessage()
        for record in caplog.records
        if "limits.peer_connections_max allows 20" in record.getMessage()
    ]
    assert len(said) == 1, "once, not for each of them"
    wait_until(lambda: connected_count(listener) == 1)
    assert ask(messenger("another"), listener.destination) == b"served"


def withhold(listening: socket.socket, port: int, bytes_max: int, is_over: threading.Event) -> None:
    """Passes on what a client sends, but no more than so much, and all that it is answered, until one of both ends."""
    with listening.accept()[0] as client, socket.create_connection(("127.0.0.1", port)) as server:
        passed_bytes = 0
        while not is_over.is_set():
            for one, other in ((client, server), (server, client)):
                if one is client and passed_bytes >= bytes_max:
                    continue
                if not select.select([one], [], [], 0.01)[0]:
                    continue
                try:
                    # In small portions, so that it takes longer than it takes until somebody looks.
                    data = one.recv(min(bytes_max - passed_bytes, 200_000) if one is client else 1_000_000)
                    other.sendall(data)
                except ConnectionError:
                    return
                if not data:
                    return
                passed_bytes += len(data) if one is client else 0


@pytest.mark.parametrize("passed_bytes", [4 * MIB, 16 * MIB])
def test_a_listed_peer_whose_message_does_not_end(
    messenger: MessengerFactory, plain: PlainPeers, passed_bytes: int
) -> None:
    """It is cut when more has come than a message may have, and not before; a relay withholds the end."""
    server = SecuredServer(messenger, Limits(message_bytes_max=64 * KIB))
    alice = server.client(server.alice)
    ask(alice, server.destination)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        is_over = threading.Event()
        relay = threading.Thread(target=withhold, args=(listening, server.listener.port, passed_bytes, is_over))
        relay.start()
        keys = server.dealer_keys(server.alice)
        dealer = plain.dealer(f"tcp://127.0.0.1:{listening.getsockname()[1]}", **keys)
        dealer.send(*[bytes(MIB)] * 20)
        if passed_bytes > 4 * MIB:
            wait_dropped(server.messenger, "endless_message")
        else:
            time.sleep(1)
            assert dropped(server.messenger, "endless_message") == 0
        assert ask(alice, server.destination) == b"alice said hello"
        is_over.set()
        relay.join()
        # To close a socket of libzmq while half of a message is out, or just lost, can end the process.
        time.sleep(0.5)
        dealer.close()


def test_a_listed_peer_that_sends_much_is_heard(messenger: MessengerFactory, plain: PlainPeers) -> None:
    server = SecuredServer(messenger, Limits(message_bytes_max=64 * KIB))
    dealer = server.dealer(plain, server.alice)
    contents = b"1-0-" + bytes(60_000)
    for count in range(1, 41):
        for _ in range(20):
            dealer.send(b"", contents)
        server.received.wait(20 * count)
        time.sleep(0.05)
    assert server.messenger.statistics().dropped == {}


def test_a_peer_that_is_too_far_ahead(messenger: MessengerFactory, plain: PlainPeers) -> None:
    """It sends whole messages faster than they are taken, so libzmq holds more and more; others do not feel its end."""
    limits = Limits(message_bytes_max=64 * KIB, queue_bytes_max=MIB, window_bytes=MIB)
    server = messenger("server", limits=limits)

    def take(message: Message) -> None:
        time.sleep(0.001)
        message.reply(b"served")

    listener = server.listen_for_connection("tcp://127.0.0.1:0", take)
    client = messenger("client")
    dealer = plain.dealer(listener.destination, b"hasty", SNDHWM=0)

    def is_cut() -> bool:
        for _ in range(100):
            dealer.send(b"", b"0-0-" + bytes(10_000))
        return dropped(server, "too_far_ahead") > 0

    wait_until(is_cut)
    dealer.close()
    assert ask(client, listener.destination) == b"served"
    # Its answers find nobody.
    assert server.statistics().dropped.keys() <= {"too_far_ahead", "peer_gone"}


@pytest.mark.parametrize("has_keys", [True, False])
@pytest.mark.parametrize("dialect", ["basic", "session"])
def test_each_byte_is_counted(
    messenger: MessengerFactory,
    monkeypatch: pytest.MonkeyPatch,
    has_keys: bool,
    dialect: Literal["basic", "session"],
) -> None:
    """Else a peer that is honest and busy for long would be cut in the end, or one that is neither would not."""
    server = SecuredServer(messenger)
    client = server.client(server.alice)
    listener = server.listener
    if not has_keys:
        client = messenger("client")
        listener = messenger("server").listen_for_connection("tcp://127.0.0.1:0", answer)
    connection = client.make_connection(listener.destination, dialect=dialect)
    ask(client, connection)
    link = listener.links[0]
    monkeypatch.setattr(link, "_note_empty", lambda: None)
    kernel = Kernel()
    wait_until(lambda: len(link.inflows) == 1)
    [inflow] = link.inflows.values()
    inflow.begin_watch(kernel.received_bytes(inflow.descriptor), kernel.cookie_of(inflow.descriptor))
    for size in [*range(180, 260), 70_000]:
        ask(client, connection, bytes(size))
    came_bytes = kernel.received_bytes(inflow.descriptor) - inflow.held_base
    # Heartbeats are not counted, and a frame may have been under way at the start or the end.
    assert abs(came_bytes - inflow.taken_bytes) < 400


def test_a_routing_id_that_is_too_long(messenger: MessengerFactory, standing_clock: StandingClock) -> None:
    """libzmq copies it for each message, which are two bytes here: others waited for half a minute."""
    server, client = messenger("server"), messenger("client")
    listener = server.listen_for_connection("tcp://127.0.0.1:0", answer)
    ask(client, listener.destination)
    with connect(str(listener.destination), bytes(16 * MIB)) as peer:
        peer.sendall(EMPTY_MESSAGE * 500)
        wait_until(lambda: dropped(server, "malformed_frames"))
        for _ in range(3):
            began_at = standing_clock.now()
            ask(client, listener.destination)
            assert standing_clock.now() < began_at + 1
        while peer.recv(4_096):
            pass


def test_a_routing_id_is_cut_once(messenger: MessengerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left when it ended must not cut whoever has its descriptor when that is taken."""
    cut_descriptors: list[int] = []

    def note(descriptor: int, port: int) -> bool:
        cut_descriptors.append(descriptor)
        return True

    monkeypatch.setattr(listener_module, "cut", note)
    server = messenger("server")
    listener = server.listen_for_connection("tcp://127.0.0.1:0", answer)
    for count in (1, 2):
        with connect(str(listener.destination), bytes(300) + bytes([count])) as peer:
            peer.sendall(EMPTY_MESSAGE * 50)
            wait_until(lambda: dropped(server, "malformed_frames") == 50 * count)  # noqa: B023
        assert len(cut_descriptors) == count


def test_an_identity_of_a_megabyte(server: SecuredServer, plain: PlainPeers, warnings: Callable[[], list[str]]) -> None:
    """It is refused before it is looked at, told or logged."""
    RawSession(server.dealer(plain, server.alice), identity=b"x" * MIB).send_hello()
    wait_dropped(server.messenger, "malformed_frames")
    assert warnings() == []
    assert ask(server.client(server.alice), server.destination) == b"alice said hello"


def test_an_error_response_of_a_megabyte(server: SecuredServer, plain: PlainPeers) -> None:
    """It reaches an exception and the log, so it is cut, and a terminal that shows it obeys nothing in it."""
    raw = RawSession(server.dealer(plain, server.alice), identity=b"alice")
    raw.join()
    raw.send_data([b"1024-0-warm-up"])
    raw.receive_until(lambda: bool(raw.messages))
    raw.messages.clear()
    errors: Inbox[DeliveryError] = Inbox()
    server.messenger.send_message((server.listener, "alice"), b"x", print, on_error=errors)
    raw.receive_until(lambda: bool(raw.messages))
    message_id = raw.messages[0].partition(b"-")[0]
    options = msgspec.msgpack.encode(
        [[0, OptionKind.HANDLER_ERROR, "Error\x1b[2J" * 100_000, "text\x1b[2J\n" * 100_000]]
    )
    raw.send_data([b"0-%b-" % message_id], options=len(options).to_bytes(4, "little") + options)
    [error] = errors.wait()
    assert type(error) is HandlerError
    assert "raised Error\\x1b[2JError" in str(error)
    assert ": text\\x1b[2J\ntext" in str(error)
    assert len(str(error)) < 5_000


def test_one_identity_has_so_many_sessions(messenger: MessengerFactory) -> None:
    """So no peer takes what others need."""
    limits = Limits(sessions_max=100, sessions_per_identity_max=3)
    server = messenger("server", limits=limits)
    listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b"served"))
    greedy = messenger("greedy")
    for _ in range(3):
        assert ask(greedy, greedy.make_connection(listener.destination)) == b"served"
    with pytest.raises(NotDelivered, match="3 sessions of 'greedy' are open, that is sessions_per_identity_max"):
        ask(greedy, greedy.make_connection(listener.destination))
    assert dropped(server, "too_many_sessions") >= 1
    assert ask(messenger("modest"), listener.destination) == b"served"


def test_one_key_has_so_many_open_challenges(server: SecuredServer, plain: PlainPeers) -> None:
    dealer = server.dealer(plain, server.alice)
    for _ in range(CHALLENGES_PER_IDENTITY_MAX + 3):
        RawSession(dealer, identity=b"alice").send_hello()
    wait_until(lambda: dropped(server.messenger, "too_many_challenges") == 3)
    server.allow(server.alice, server.bob)
    assert ask(server.client(server.bob), server.destination) == b"bob said hello"


def test_routing_ids_cannot_be_guessed(messenger: MessengerFactory, plain: PlainPeers) -> None:
    """libzmq aborts the process when a peer shows the routing id that it gives out next; it must not be known.

    Its own numbers start at what rand() gives, which it never seeds, so they are the same in each process.
    """
    libc = ctypes.CDLL(None)
    ids: set[str] = set()
    for _ in range(3):
        libc.srand(1)
        server = messenger()
        received: Inbox[Message] = Inbox()
        listener = server.listen_for_connection("tcp://127.0.0.1:0", received)
        plain.dealer(listener.destination).send(b"", b"0-0-x")
        ids.update(message.sender for message in received.wait())
    assert len(ids) == 3
    first_known = 0x6B8B4567
    numbers = [int.from_bytes(encode_identity(sender)[1:], "big") & 0x7FFFFFFF for sender in ids]
    assert not [number for number in numbers if first_known <= number < first_known + 1_000]


def test_so_many_refused_keys_are_logged_at_a_time(
    server: SecuredServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes a new key for each try fills neither the disk nor the memory."""
    now = 1_000.0
    monkeypatch.setattr(zap, "time", SimpleNamespace(monotonic=lambda: now))
    gate = zap.Gate(server.security, server.pair, "server")

    def knock(count: int) -> int:
        """Returns how many of so many new keys were logged."""
        caplog.clear()
        for _ in range(count):
            assert not gate.admit(KeyPair.generate().public, "192.0.2.1")
        return len(caplog.records)

    assert knock(REFUSAL_LOG_KEYS_MAX + 20) == REFUSAL_LOG_KEYS_MAX
    assert len(gate._logged_at) == REFUSAL_LOG_KEYS_MAX
    now += REFUSAL_LOG_S / 2
    assert knock(20) == 0
    now += REFUSAL_LOG_S / 2
    assert knock(20) == 20
    assert gate.refused_count == REFUSAL_LOG_KEYS_MAX + 60


def test_refusals_are_counted_each_and_logged_once(server: SecuredServer, caplog: pytest.LogCaptureFixture) -> None:
    """Who is refused again and again fills no disk."""
    mallory = Security(key=server.mallory, servers=server.pair.public)
    for _ in range(5):
        client = server._make(security=mallory)
        try:
            ask(client, server.destination)
        except NotDelivered:
            client.close()
    assert dropped(server.messenger, "refused_key") == 5
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("! server refused") for line in lines) == 1
