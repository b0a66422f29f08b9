"""Keys for the tests, and a server that lets in whom a test lists."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from messenger import KeyPair, Limits, Listener, Message, Messenger, Security
from tests.canary import canary
from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, PlainPeer, PlainPeers


def answer(message: Message) -> None:
    message.reply(f"{message.sender} said ".encode() + message.contents)


class SecuredServer:
    """A messenger that listens on tcp with a key, and lets alice in, at first nobody else."""

    def __init__(self, messenger: MessengerFactory, limits: Limits | None = None) -> None:
        self._make = messenger
        self.pair = canary("server")
        self.alice, self.bob, self.mallory = (KeyPair.generate(name) for name in ("alice", "bob", "mallory"))
        self.security = Security(key=self.pair, allow={self.alice.public: "alice"})
        self.received: Inbox[Message] = Inbox()
        self.messenger = messenger("server", security=self.security, limits=limits)
        self.listener: Listener = self.messenger.listen_for_connection("tcp://127.0.0.1:0", self.take)

    def take(self, message: Message) -> None:
        self.received(message)
        answer(message)

    @property
    def destination(self) -> str:
        return str(self.listener.destination)

    def client(self, pair: KeyPair, identity: str | None = None, server: str | None = None) -> Messenger:
        """Makes a messenger with a key that knows the server's, unless it is told another one."""
        return self._make(identity, security=Security(key=pair, servers=server or self.pair.public))

    def dealer(self, plain: PlainPeers, pair: KeyPair, routing_id: bytes | None = None) -> PlainPeer:
        """Connects a bare DEALER with a key."""
        return plain.dealer(self.destination, routing_id, **self.dealer_keys(pair))

    def dealer_keys(self, pair: KeyPair) -> dict[str, bytes]:
        """Returns the options of a bare DEALER with a key."""
        keys = {"CURVE_PUBLICKEY": pair.public.encode(), "CURVE_SECRETKEY": pair.reveal()}
        return keys | {"CURVE_SERVERKEY": self.pair.public.encode()}

    def allow(self, *pairs: KeyPair) -> None:
        self.security.reload({pair.public: pair.name for pair in pairs})


def ask(client: Messenger, destination: object, contents: bytes = b"hello") -> bytes:
    to: Any = destination
    return client.request(to, contents, timeout=TIMEOUT_S).contents


@pytest.fixture
def driver() -> str:
    """Attacks run on threads; `test_identity.py` has both drivers."""
    return "thread"


@pytest.fixture
def server(messenger: MessengerFactory) -> SecuredServer:
    return SecuredServer(messenger)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Returns what was warned of so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return KeyPair.generate("alice").save(tmp_path)[0]
