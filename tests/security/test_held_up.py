"""While a callback blocks a listener, its peers cannot make it hold more than its limits say."""

import threading
from collections.abc import Iterator

import pytest

from messenger import Limits, Message, Messenger
from messenger.limits import MIB
from messenger.transports import inflow
from tests.conftest import TIMEOUT_S, MessengerFactory, PlainPeers, dropped, wait_until
from tests.security.conftest import SecuredServer
from tests.security.flood import open_idle
from tests.security.test_flood import closed_count


class Blocked:
    """A callback that does not return before it is told."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_return = threading.Event()

    def __call__(self, message: Message) -> None:
        self.has_begun.set()
        self.may_return.wait(10 * TIMEOUT_S)


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    callback = Blocked()
    yield callback
    callback.may_return.set()


def block(server: Messenger, blocked: Blocked) -> None:
    listener = server.listen_for_connection("inproc://block", blocked)
    server.send_message(listener.destination, b"")
    assert blocked.has_begun.wait(TIMEOUT_S)


def test_connections_beyond_the_limit_are_cut(messenger: MessengerFactory, blocked: Blocked) -> None:
    server = messenger("server", limits=Limits(peer_connections_max=20))
    listener = server.listen_for_connection("tcp://127.0.0.1:0", print)
    block(server, blocked)
    connections = open_idle(listener.port, 60, (b"",))
    wait_until(lambda: closed_count(connections) >= 40)
    assert dropped(server, "too_many_connections") >= 40
    for connection in connections:
        connection.close()


def test_what_waits_of_all_is_bounded(messenger: MessengerFactory, plain: PlainPeers, blocked: Blocked) -> None:
    limits = Limits(message_bytes_max=MIB, queue_bytes_max=MIB, window_bytes=MIB, unread_bytes_max=16 * MIB)
    server = messenger("server", limits=limits)
    listener = server.listen_for_connection("tcp://127.0.0.1:0", print)
    block(server, blocked)
    dealer = plain.dealer(listener.destination, SNDHWM=0)

    def is_cut() -> bool:
        for _ in range(100):
            dealer.send(b"", b"0-0-" + bytes(100_000))
        return dropped(server, "too_far_ahead") > 0

    wait_until(is_cut)


def test_strangers_are_cut(messenger: MessengerFactory, blocked: Blocked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflow, "HANDSHAKE_S", 0.5)
    server = SecuredServer(messenger)
    block(server.messenger, blocked)
    connections = open_idle(server.listener.port, 20, (b"",))
    wait_until(lambda: closed_count(connections) == 20)
    for connection in connections:
        connection.close()
