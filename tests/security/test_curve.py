"""A1 and A2: who has no key, another key, or another server's key; and an authenticator that does not work."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from messenger import KeyPair, Messenger, NotDelivered, Security, SecurityError
from messenger.limits import HANDSHAKE_FAILURES_MAX
from messenger.transports import zap
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeers,
    dropped,
    free_port,
    wait_event,
    wait_until,
)
from tests.security.conftest import SecuredServer, answer, ask

Warnings = Callable[[], list[str]]
# An unlisted client is told within this time, also when it asks again, and not at its deadline of 30 s. It takes
# milliseconds; that it takes less than two seconds, with the start of a program, is shown in test_command_line.py.
TOLD_S = 10.0


def is_served(client: Messenger, destination: object) -> bool:
    try:
        return ask(client, destination).endswith(b" said hello")
    except NotDelivered:
        return False


def refusal(client: Messenger, destination: object) -> str:
    """Returns what a client is told; it must be told soon."""
    began_at = time.monotonic()
    with pytest.raises(NotDelivered) as caught:
        ask(client, destination)
    assert time.monotonic() - began_at < TOLD_S
    return str(caught.value)


def test_a_listed_key_is_served(server: SecuredServer) -> None:
    alice = server.client(server.alice)
    assert ask(alice, server.destination) == b"alice said hello"
    assert not server.messenger.statistics().dropped


def test_an_unlisted_key_is_refused_and_told_on_both_sides(server: SecuredServer, warnings: Warnings) -> None:
    mallory = server.client(server.mallory)
    for _ in range(2):
        text = refusal(mallory, server.destination)
        assert f"our key {server.mallory.public} is not on the allow-list there" in text
    lines = [line for line in warnings() if server.mallory.public in line]
    on_server = f"! server refused the key {server.mallory.public} from 127.0.0.1, which is not on the allow-list"
    assert on_server in lines
    assert len(lines) == 2, "each side says it once"
    assert dropped(server.messenger, "refused_key") == 2
    assert len(server.received) == 0
    assert ask(server.client(server.alice), server.destination) == b"alice said hello"


def test_no_key_is_refused(server: SecuredServer, messenger: MessengerFactory, warnings: Warnings) -> None:
    text = refusal(messenger("mallory"), server.destination)
    assert "it lets in only who has a key: Security(key=…, servers=…)" in text
    wait_until(lambda: dropped(server.messenger, "failed_handshakes") > 0)
    assert "! server refused somebody who has no key, or knows another key of ours" in warnings()
    assert len(server.received) == 0


def test_a_plain_dealer_without_a_key_is_refused(server: SecuredServer, plain: PlainPeers) -> None:
    dealer = plain.dealer(server.destination, b"alice")
    dealer.send(b"", b"1-0-x")
    wait_until(lambda: dropped(server.messenger, "failed_handshakes") > 0)
    assert len(server.received) == 0
    assert dealer.is_silent()


def test_another_key_of_the_server_is_refused(server: SecuredServer) -> None:
    """The client does not talk to a server that has not the key that was pinned: nothing of its message leaves."""
    alice = server.client(server.alice, server=server.bob.public)
    text = refusal(alice, server.destination)
    match = re.search(r"it hung up (\d+) times in the handshake, so it probably has not the key (.*)$", text)
    assert match
    assert int(match[1]) >= HANDSHAKE_FAILURES_MAX
    assert match[2] == server.bob.public
    assert len(server.received) == 0


def test_a_server_without_a_key_gets_nothing(messenger: MessengerFactory, plain: PlainPeers) -> None:
    port = free_port()
    router = plain.router(f"tcp://127.0.0.1:{port}")
    client = messenger(security=Security(key=KeyPair.generate("alice"), servers=KeyPair.generate().public))
    # Which end hangs up first is a race.
    assert re.search(
        "(does not speak CURVE|hung up .* times).* not the key", refusal(client, f"tcp://127.0.0.1:{port}")
    )
    assert router.is_silent()


def test_who_has_a_key_goes_nowhere_by_tcp_without_the_servers(server: SecuredServer) -> None:
    other = str(free_port())
    client = server._make(security=Security(key=server.alice, servers={f"tcp://127.0.0.1:{other}": server.pair.public}))
    with pytest.raises(SecurityError, match=r"the key of the server there is not known"):
        client.make_connection(server.destination)
    # A bare port may be reached on this machine, and only there.
    assert client.make_connection(int(other) + 1).endpoint.startswith("ipc:")


def test_each_server_may_have_a_key_of_its_own(server: SecuredServer, messenger: MessengerFactory) -> None:
    other = messenger(security=Security(key=server.bob, allow={server.alice.public: "alice"}))
    listener = other.listen_for_connection("tcp://127.0.0.1:0", answer)
    keys = {str(listener.destination): server.bob.public, "*": server.pair.public}
    alice = messenger(security=Security(key=server.alice, servers=keys))
    assert ask(alice, server.destination) == b"alice said hello"
    assert ask(alice, listener.destination) == b"alice said hello"


def test_a_refused_client_is_served_once_it_is_listed(server: SecuredServer) -> None:
    bob = server.client(server.bob)
    refusal(bob, server.destination)
    server.allow(server.alice, server.bob)
    wait_until(lambda: is_served(bob, server.destination))


def test_a_connection_whose_key_is_taken_off_the_list_is_served_once_it_is_back(server: SecuredServer) -> None:
    bob = server.client(server.bob)
    server.allow(server.alice, server.bob)
    connection = bob.make_connection(server.destination)
    assert ask(bob, connection) == b"bob said hello"
    server.allow(server.alice)
    wait_until(lambda: not is_served(bob, connection))
    refusal(bob, connection)
    server.allow(server.alice, server.bob)
    wait_until(lambda: is_served(bob, connection))


def test_a_basic_connection_is_refused_and_served_alike(server: SecuredServer) -> None:
    mallory, alice = server.client(server.mallory), server.client(server.alice)
    errors: Inbox[Exception] = Inbox()
    connection = mallory.make_connection(server.destination, dialect="basic")
    mallory.send_message(connection, b"x", lambda _: None, on_error=errors)
    [error] = errors.wait(timeout=TOLD_S)
    assert isinstance(error, NotDelivered)
    assert "not on the allow-list" in str(error)
    connection = alice.make_connection(server.destination, dialect="basic")
    assert alice.request(connection, b"hello", timeout=TIMEOUT_S).contents == b"alice said hello"


def test_plain_programs_with_a_key_are_served(server: SecuredServer, plain: PlainPeers) -> None:
    """With any routing id or none: they are known by their key, and those after the first by a number behind it."""
    names = {b"": b"alice", b"alice": b"alice#2", b"any": b"alice#3"}
    dealers = {routing_id: server.dealer(plain, server.alice, routing_id or None) for routing_id in names}
    for routing_id, name in names.items():
        dealers[routing_id].send(b"", b"7-0-x")
        assert dealers[routing_id].receive() == [b"server", b"", b"0-7-" + name + b" said x"]
    for routing_id, name in names.items():
        server.messenger.send_message((server.listener, name.decode()), b"to you")
        assert dealers[routing_id].receive() == [b"server", b"", b"0-0-to you"]


# A2: the authenticator.


def test_a_listener_that_lets_a_random_key_in_does_not_start(
    messenger: MessengerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zap.Gate, "admit", lambda gate, key, _: key)
    port = free_port()
    with pytest.raises(SecurityError, match="in its self-test a random key was let in"):
        SecuredServer(messenger).listener.close()
    pair = KeyPair.generate()
    other = messenger(security=Security(key=pair, allow={KeyPair.generate().public: "alice"}))
    with pytest.raises(SecurityError, match="was let in"):
        other.listen_for_connection(f"tcp://127.0.0.1:{port}", answer)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_question_that_fails_is_a_no(
    server: SecuredServer, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    alice = server.client(server.alice)

    def fail(*_: object) -> bool:
        raise RuntimeError("planted")

    monkeypatch.setattr(zap.Gate, "admit", fail)
    refusal(alice, server.destination)
    assert len(server.received) == 0
    assert "! the question whether to let somebody in failed, so the answer is no" in warnings()
    monkeypatch.undo()
    wait_until(lambda: is_served(alice, server.destination))


DEAD_AUTHENTICATOR = """
import sys, threading
from messenger import KeyPair, Messenger, NotDelivered, OutcomeUnknown, Security, SecurityError
from messenger import limits
from messenger.transports import zap

zap.SELF_TEST_S = 0.5
server, alice, mallory = KeyPair.generate("server"), KeyPair.generate("alice"), KeyPair.generate("mallory")
security = Security(key=server, allow={alice.public: "alice"})
with Messenger("server", security=security) as messenger:
    listener = messenger.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b"served"))
    if sys.argv[1] == "closed":
        zap._gates.clear()                      # Nobody answers for the domain.
    else:
        zap._answer = lambda frames: threading.Event().wait()    # The thread hangs for ever.
    for pair in (alice, mallory):
        with Messenger(security=Security(key=pair, servers=server.public)) as client:
            try:
                print(pair.name, client.request(listener.destination, b"x", timeout=1).contents)
            except NotDelivered as error:
                print(pair.name, "not delivered")
            client.close(0)
    try:
        messenger.listen_for_connection("tcp://127.0.0.1:0", None)
        print("started")
    except SecurityError:
        print("does not start")
"""


@pytest.mark.parametrize(
    ("how", "last"), [("closed", "started"), ("hangs", "does not start")], ids=["no gate", "a thread that hangs"]
)
def test_a_dead_authenticator_lets_nobody_in(how: str, last: str) -> None:
    """A new listener opens the gate anew, and starts if somebody answers then."""
    command = [sys.executable, "-c", DEAD_AUTHENTICATOR, how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert result.stdout.splitlines() == ["alice not delivered", "mallory not delivered", last], result.stderr


def test_a_callback_that_blocks_keeps_nobody_out(server: SecuredServer) -> None:
    """The answer to who may come in does not wait for the messenger's own thread."""
    blocked, may_go_on = threading.Event(), threading.Event()

    def block(_: object) -> None:
        blocked.set()
        may_go_on.wait(TIMEOUT_S)

    server.messenger.register_callback(64, block)
    alice = server.client(server.alice)
    alice.send_message(server.destination, b"", remote_callback=64)
    wait_event(blocked)
    mallory = server.client(server.mallory)
    assert "not on the allow-list" in refusal(mallory, server.destination)
    may_go_on.set()


def test_a_messenger_that_has_closed_answers_for_nobody(server: SecuredServer) -> None:
    gates = len(zap._gates)
    server.messenger.close()
    assert len(zap._gates) == gates - 1


def test_two_messengers_of_one_process_have_two_lists(server: SecuredServer, messenger: MessengerFactory) -> None:
    other = messenger("other", security=Security(key=server.bob, allow={server.mallory.public: "mallory"}))
    listener = other.listen_for_connection("tcp://127.0.0.1:0", answer)
    mallory = messenger(security=Security(key=server.mallory, servers={"*": server.bob.public}))
    assert ask(mallory, listener.destination) == b"mallory said hello"
    refusal(server.client(server.mallory), server.destination)


def test_a_bare_port_needs_keys_on_tcp_only(server: SecuredServer, messenger: MessengerFactory) -> None:
    port = free_port()
    server.messenger.listen_for_connection(port, answer)
    assert ask(messenger("local"), port) == b"local said hello"
    refusal(messenger("by tcp"), f"tcp://127.0.0.1:{port}")
    assert ask(server.client(server.alice), f"tcp://127.0.0.1:{port}") == b"alice said hello"
