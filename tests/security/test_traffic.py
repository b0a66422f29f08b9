"""What sessions promise holds with keys too: over links that are cut, in both directions, for large messages."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from messenger import AsyncMessenger, DestinationInvalid, Message, NotDelivered, Security
from messenger.limits import HANDSHAKE_FAILURES_MAX, HANDSHAKE_FAILURES_S
from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, contents_of, free_port, wait_until
from tests.security.conftest import SecuredServer, answer, ask
from tests.transports.test_sessions import CuttingProxy

KIB = 1024


@pytest.fixture
def proxy(server: SecuredServer) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(server.listener.port, 60 * KIB)
    yield proxy
    proxy.close()


def test_messages_both_ways_over_a_link_that_is_cut(
    server: SecuredServer, proxy: CuttingProxy, never: Inbox[object]
) -> None:
    """Exactly once and in order: a session moves to a link with another routing id, and the same key."""
    count = 3_000
    alice = server.client(server.alice)
    at_alice: Inbox[Message] = Inbox()
    connection = alice.make_connection(f"tcp://127.0.0.1:{proxy.port}", callback=at_alice)
    answers: Inbox[Message] = Inbox()
    for number in range(count):
        alice.send_message(connection, b"%8d" % number + bytes(100), answers, on_error=never, timeout=50)
        if number == 0:
            server.received.wait()
        server.messenger.send_message((server.listener, "alice"), b"%8d" % number, on_error=never, timeout=50)
    expected = [b"%8d" % number for number in range(count)]
    prefix = b"alice said "
    got = [contents.removeprefix(prefix)[:8] for contents in contents_of(answers.wait(count, timeout=50))]
    assert got == expected
    assert [contents[:8] for contents in contents_of(server.received.wait(count))] == expected
    # Answers run the connection's callback too.
    own = [contents for contents in contents_of(at_alice.wait(2 * count)) if not contents.startswith(prefix)]
    assert own == expected
    assert proxy.cut_count >= 5, "the link was hardly ever cut, so this proves nothing"
    assert not server.messenger.statistics().dropped.get("foreign_identity")


def test_large_messages(server: SecuredServer) -> None:
    """With frames of their own behind the batch."""
    alice = server.client(server.alice)
    for size in (64 * KIB - 1, 64 * KIB, 5_000_000):
        contents = os.urandom(size)
        assert ask(alice, server.destination, contents) == b"alice said " + contents


def test_a_server_in_trouble_is_no_server_with_another_key(server: SecuredServer) -> None:
    """Who hangs up in handshakes, and had the right key before, is waited for until the deadline."""
    alice = server.client(server.alice)
    proxy = CuttingProxy(server.listener.port, 10_000_000)
    try:
        connection = alice.make_connection(f"tcp://127.0.0.1:{proxy.port}")
        assert ask(alice, connection) == b"alice said hello"
        # From now on the proxy reaches nobody: it takes connections and closes them.
        proxy._target_port = free_port()
        for end in list(proxy._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        answers: Inbox[Message] = Inbox()
        errors: Inbox[object] = Inbox()
        alice.send_message(connection, b"wait for me", answers, on_error=errors, timeout=TIMEOUT_S)
        wait_until(lambda: connection.link._failure_count >= 2 * HANDSHAKE_FAILURES_MAX)
        time.sleep(HANDSHAKE_FAILURES_S)
        assert len(answers) == len(errors) == 0
        proxy._target_port = server.listener.port
        assert contents_of(answers.wait()) == [b"alice said wait for me"]
    finally:
        proxy.close()


def test_one_security_for_two_messengers(server: SecuredServer, messenger: MessengerFactory) -> None:
    """A reload cuts off in both; one that has closed is not told any more."""
    other = messenger("other", security=server.security)
    listener = other.listen_for_connection("tcp://127.0.0.1:0", answer)
    alice = server.client(server.alice)
    for destination in (server.listener.destination, listener.destination):
        assert ask(alice, destination) == b"alice said hello"
    told_count = len(server.security._on_reload)
    server.allow(server.bob)
    for each in (server.messenger, other):
        wait_until(lambda each=each: each.statistics().dropped.get("refused_key", 0) > 0)  # type: ignore[misc]
    other.close()
    assert len(server.security._on_reload) == told_count - 1
    server.allow(server.alice)


def test_many_threads_reload_while_messages_go(server: SecuredServer) -> None:
    """A list that keeps alice does not disturb her."""
    alice = server.client(server.alice)
    must_stop = threading.Event()

    def reload() -> None:
        while not must_stop.wait(0.001):
            server.allow(server.alice, server.bob)

    threads = [threading.Thread(target=reload) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            assert ask(alice, server.destination, b"%d" % number) == b"alice said %d" % number
    finally:
        must_stop.set()
        for thread in threads:
            thread.join()


def test_a_signal_handler_reloads(server: SecuredServer, tmp_path: Path) -> None:
    """It may interrupt whoever holds a messenger's lock, or reloads, in the same thread."""
    alice, allowed = server.client(server.alice), tmp_path / "allowed"
    assert ask(alice, server.destination) == b"alice said hello"
    allowed.write_text(f"{server.bob.public} bob\n")
    allowed.chmod(0o600)
    before = signal.signal(signal.SIGHUP, lambda *_: server.security.reload(allowed))
    try:
        # So does a send, and what a handler is called in.
        with server.messenger._loop.lock:
            signal.raise_signal(signal.SIGHUP)
            assert server.security.allowed == {server.bob.public: "bob"}
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: not server.messenger._exchange.handshake.sessions)
    with pytest.raises(NotDelivered, match="not on the allow-list"):
        ask(alice, server.destination)


def test_what_a_signal_handler_has_read_is_not_replaced_by_what_is_older(
    server: SecuredServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [{server.alice.public: "alice"}, {server.bob.public: "bob"}, {server.bob.public: "bob"}]

    def load(_: object) -> dict[str, str]:
        found = lists.pop(0)
        if len(lists) == 2:
            signal.raise_signal(signal.SIGHUP)
        return found

    monkeypatch.setattr("messenger.security._load_allowed", load)
    before = signal.signal(signal.SIGHUP, lambda *_: server.security.reload())
    try:
        server.security.reload()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert server.security.allowed == {server.bob.public: "bob"}


FORK = """
import os, sys
from messenger import KeyPair, Messenger, NotDelivered, Security

server, alice, bob = (KeyPair.generate(name) for name in ("server", "alice", "bob"))

def serve_and_ask():
    with Messenger(security=Security(key=server, allow={alice.public: "alice"})) as messenger:
        listener = messenger.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b"served"))
        for pair in (alice, bob):
            with Messenger(security=Security(key=pair, servers=server.public)) as client:
                try:
                    came = client.request(listener.destination, b"", timeout=5).contents
                except NotDelivered:
                    came = "refused"
                print(os.getpid() == parent, pair.name, came)
        sys.stdout.flush()

parent = os.getpid()
serve_and_ask()
child = os.fork()
if child:
    os.waitpid(child, 0)
serve_and_ask()
"""


def test_the_child_of_a_fork_has_an_authenticator_of_its_own() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    served = [f"{is_parent} {text}" for is_parent in (True, False, True) for text in ("alice b'served'", "bob refused")]
    assert result.stdout.splitlines() == served, result.stderr
    assert result.returncode == 0


def test_a_listener_on_ipv6(server: SecuredServer) -> None:
    try:
        listener = server.messenger.listen_for_connection(f"tcp://[::1]:{free_port()}", answer)
    except DestinationInvalid as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    assert ask(server.client(server.alice), listener.destination) == b"alice said hello"


def test_an_async_messenger_has_keys_too(server: SecuredServer) -> None:
    """On one event loop: a listed client is served, an unlisted one told, a revoked one cut off."""
    alice, bob = server.alice, server.bob

    async def run() -> list[str]:
        security = Security(key=server.pair, allow={alice.public: "alice", bob.public: "bob"})
        told: list[str] = []

        async def tell(client: AsyncMessenger, destination: object) -> None:
            try:
                response = await client.request(str(destination), b"hello", timeout=TIMEOUT_S)
                told.append(response.contents.decode())
            except NotDelivered as error:
                told.append("refused" if "not on the allow-list" in str(error) else str(error))

        async with (
            AsyncMessenger("server", security=security) as listening,
            AsyncMessenger(security=Security(key=alice, servers=server.pair.public)) as one,
            AsyncMessenger(security=Security(key=server.mallory, servers=server.pair.public)) as other,
        ):
            listener = listening.listen_for_connection("tcp://127.0.0.1:0", answer)
            for client in (one, other):
                await tell(client, listener.destination)
            await asyncio.to_thread(security.reload, {bob.public: "bob"})
            await tell(one, listener.destination)
        return told

    assert asyncio.run(run()) == ["alice said hello", "refused", "refused"]
