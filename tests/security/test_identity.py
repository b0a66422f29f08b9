"""A3: another's identity, claimed in a HELLO, by a routing id, or by a frame of another's session; and revocation."""

import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from messenger import KeyPair, Messenger, NotDelivered, OutcomeUnknown, Security
from messenger.limits import MIB
from messenger.transports import curve, zap
from tests.conftest import (
    Inbox,
    MessengerFactory,
    PlainPeers,
    dropped,
    wait_dropped,
    wait_until,
)
from tests.security.conftest import SecuredServer, ask
from tests.security.test_curve import is_served
from tests.transports.test_bad_input import DATA, GOODBYE, RESPONSE, RawSession

Warnings = Callable[[], list[str]]


@pytest.fixture(params=["thread", "asyncio"])
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def victim(server: SecuredServer) -> Messenger:
    """Alice, whom bob wants to be; both are on the list."""
    server.allow(server.alice, server.bob)
    victim = server.client(server.alice)
    assert ask(victim, server.destination) == b"alice said hello"
    return victim


def test_another_identity_in_hello(server: SecuredServer, victim: Messenger, warnings: Warnings) -> None:
    liar = server.client(server.bob, "alice")
    with pytest.raises(NotDelivered, match=r"refused: its key here is not that of 'alice'; take the identity that"):
        ask(liar, server.destination)
    assert dropped(server.messenger, "foreign_identity") >= 1
    claim = f"! server refused a message that claims to be of 'alice', by the key {server.bob.public} of 'bob'"
    assert claim in warnings()
    assert ask(victim, server.destination) == b"alice said hello"
    assert {message.sender for message in server.received.wait(2)} == {"alice"}


def test_another_identity_while_its_owner_is_away(server: SecuredServer, victim: Messenger) -> None:
    victim.close()
    with pytest.raises(NotDelivered, match="not that of 'alice'"):
        ask(server.client(server.bob, "alice"), server.destination)
    again = server.client(server.alice)
    assert ask(again, server.destination) == b"alice said hello"


@pytest.mark.parametrize("claimed", [b"alice", b"alice#2", b"mallory", b"\x01", b"\0abcd"])
def test_another_identity_by_routing_id(
    server: SecuredServer, victim: Messenger, plain: PlainPeers, claimed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no effect: a peer is given its routing id, and is known by its key, as the log says, once."""
    caplog.set_level(logging.INFO)
    for _ in range(2):
        liar = server.dealer(plain, server.bob, claimed)
        liar.send(b"", b"1-0-x")
        assert liar.receive() == [b"server", b"", b"0-1-bob said x"]
        liar.close()
        wait_until(lambda: b"bob" not in server.listener.links[0]._routing_ids)
    said = f"takes a program without a session, by its key {server.bob.public}, for 'bob', whatever its routing id"
    assert caplog.text.count(said) == 1
    assert ask(victim, server.destination) == b"alice said hello"
    assert [message.sender for message in server.received.wait(4)] == ["alice", "bob", "bob", "alice"]


def test_a_plain_victim_keeps_its_routing_id(server: SecuredServer, victim: Messenger, plain: PlainPeers) -> None:
    """A thief does not take it over while its owner is connected, and gets nothing of what is sent to it."""
    owner = server.dealer(plain, server.alice, b"alice")
    owner.send(b"", b"1-0-x")
    assert owner.receive() == [b"server", b"", b"0-1-alice said x"]
    thief = server.dealer(plain, server.bob, b"alice")
    thief.send(b"", b"2-0-y")
    for number in range(20):
        owner.send(b"", b"%d-0-x" % (number + 1))
        assert owner.receive() == [b"server", b"", b"0-%d-alice said x" % (number + 1)]
    assert thief.receive() == [b"server", b"", b"0-2-bob said y"]
    assert thief.is_silent()


def test_a_thief_that_was_there_first_gets_nothing(server: SecuredServer, plain: PlainPeers) -> None:
    """Nothing goes to a routing id by its name alone, and its owner is served all the same."""
    server.allow(server.alice, server.bob)
    thief = server.dealer(plain, server.bob, b"alice")
    assert_gone(server, "alice")
    owner = server.dealer(plain, server.alice, b"alice")
    owner.send(b"", b"1-0-x")
    assert owner.receive() == [b"server", b"", b"0-1-alice said x"]
    server.messenger.send_message((server.listener, "alice"), b"secret")
    assert owner.receive() == [b"server", b"", b"0-0-secret"]
    assert thief.is_silent()


def test_a_thief_that_comes_when_its_victim_has_gone_gets_nothing(server: SecuredServer, plain: PlainPeers) -> None:
    """libzmq sends by a routing id to whoever has it now."""
    server.allow(server.alice, server.bob)
    owner = server.dealer(plain, server.alice, b"alice")
    owner.send(b"", b"1-0-x")
    assert owner.receive() == [b"server", b"", b"0-1-alice said x"]
    owner.close()
    link = server.listener.links[0]
    wait_until(lambda: not link.inflows)
    thief = server.dealer(plain, server.bob, b"alice")
    wait_until(lambda: len(link.inflows) == 1)
    assert_gone(server, "alice")
    thief.send(b"", b"1-0-x")
    assert thief.receive() == [b"server", b"", b"0-1-bob said x"]
    assert_gone(server, "alice")
    assert thief.is_silent()


def assert_gone(server: SecuredServer, identity: str) -> None:
    """Asserts that what is sent to a plain peer is given back."""
    errors: Inbox[Exception] = Inbox()
    server.messenger.send_message((server.listener, identity), b"secret", lambda _: None, on_error=errors)
    [error] = errors.wait()
    assert isinstance(error, NotDelivered)


def test_nothing_is_kept_of_connections_that_choose_the_same(server: SecuredServer, plain: PlainPeers) -> None:
    """libzmq kept what each sent but the first, until the listener closed, and nobody could take it."""
    server.messenger.register_callback(64, server.received)
    first = server.dealer(plain, server.alice, b"same")
    first.send(b"", b"1-0-x")
    first.receive()
    for count in range(1, 4):
        other = server.dealer(plain, server.alice, b"same")
        other.send(b"", b"0-64-" + bytes(MIB))
        assert len(server.received.wait(count + 1)[count].contents) == MIB
        other.close()


def test_who_was_not_given_its_routing_id_is_cut(
    server: SecuredServer, plain: PlainPeers, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq took what it chose, which it does if our answer comes sooner than it can."""
    plain_answer = zap._answer
    monkeypatch.setattr(zap, "_answer", lambda frames: [*plain_answer(frames)[:3], b""])
    liar = server.dealer(plain, server.alice, b"bob")
    liar.send(b"", b"1-0-x")
    wait_dropped(server.messenger, "foreign_identity")
    assert f"! server refused a routing id that was not given to it, of the key {server.alice.public}" in warnings()
    assert len(server.received) == 0
    monkeypatch.undo()
    wait_until(lambda: is_served(server.client(server.alice), server.destination))


def join(server: SecuredServer, plain: PlainPeers, pair: KeyPair, routing_id: bytes | None = None) -> RawSession:
    raw = RawSession(server.dealer(plain, pair, routing_id), identity=pair.name.encode())
    raw.join()
    raw.send_data([b"1024-0-x"])
    raw.receive_until(lambda: b"0-1024-%b said x" % raw.identity in raw.messages)
    return raw


def ask_raw(raw: RawSession, source: int) -> None:
    raw.send_data([b"%d-0-x" % source])
    raw.receive_until(lambda: b"0-%d-%b said x" % (source, raw.identity) in raw.messages)


def stolen(raw: RawSession, server: SecuredServer, plain: PlainPeers, routing_id: bytes | None = None) -> RawSession:
    """The session of another, with all its secrets, in the hands of bob."""
    thief = RawSession(server.dealer(plain, server.bob, routing_id), identity=raw.identity)
    thief.__dict__.update({name: value for name, value in raw.__dict__.items() if name != "dealer"})
    thief.messages = []
    return thief


@pytest.mark.parametrize("kind", [DATA, RESPONSE, GOODBYE])
def test_a_frame_in_anothers_session(server: SecuredServer, plain: PlainPeers, kind: int) -> None:
    """Even who knows both incarnations of a session, which are secret, can say nothing in it, and not end it."""
    server.allow(server.alice, server.bob)
    raw = join(server, plain, server.alice)
    thief = stolen(raw, server, plain)
    if kind == DATA:
        thief.send_data([b"1025-0-stolen"])
    else:
        thief.dealer.send(thief.pack(kind, struct.pack("<Q", 5)))
    wait_dropped(server.messenger, "foreign_identity")
    for source in (1026, 1027):
        ask_raw(raw, source)
    assert not any(message.contents == b"stolen" for message in server.received.wait(3))


def test_a_frame_by_the_routing_id_of_a_session_that_is_away(server: SecuredServer, plain: PlainPeers) -> None:
    """The thief chose the very routing id that the session's owner chose, and still has not its key."""
    server.allow(server.alice, server.bob)
    raw = join(server, plain, server.alice, b"same")
    raw.dealer.close()
    wait_until(lambda: not server.listener.links[0].inflows)
    thief = stolen(raw, server, plain, b"same")
    thief.send_data([b"1025-0-stolen"])
    wait_dropped(server.messenger, "foreign_identity")
    assert not any(message.contents == b"stolen" for message in server.received.wait(1))
    back = stolen(raw, server, plain)
    back.dealer = server.dealer(plain, server.alice, b"same again")
    ask_raw(back, 1030)


def test_a_hello_in_anothers_session(server: SecuredServer, plain: PlainPeers) -> None:
    """Who knows the incarnation of another's session, which is secret, does not get what is sent there."""
    server.allow(server.alice, server.bob)
    raw = join(server, plain, server.alice)
    thief = stolen(raw, server, plain)
    thief.identity = b"bob"
    thief.send_hello()
    wait_dropped(server.messenger, "foreign_identity")
    server.messenger.send_message((server.listener, "alice"), b"secret")
    raw.receive_until(lambda: b"0-0-secret" in raw.messages)


def test_a_server_that_calls_itself_as_another(
    server: SecuredServer, tmp_path: Path, messenger: MessengerFactory
) -> None:
    """A pinned key that was given with a name is believed under this name only."""
    public = tmp_path / "bank.pub"
    public.write_text(f"{server.pair.public} bank\n")
    public.chmod(0o600)
    alice = messenger(security=Security(key=server.alice, servers=public))
    with pytest.raises(NotDelivered, match="calls itself 'server', which is not the identity that goes with its key"):
        ask(alice, server.destination)
    public.write_text(f"{server.pair.public} server\n")
    again = messenger(security=Security(key=server.alice, servers=public))
    assert ask(again, server.destination) == b"alice said hello"


# Revocation.


def test_revocation_ends_a_session_at_once(server: SecuredServer, warnings: Warnings) -> None:
    server.allow(server.alice, server.bob)
    victim, bob = server.client(server.alice), server.client(server.bob)
    # It takes what the server asks, and never answers.
    connection = victim.make_connection(server.destination, callback=lambda _: None)
    assert ask(victim, connection) == b"alice said hello"
    assert ask(bob, server.destination) == b"bob said hello"
    errors: Inbox[Exception] = Inbox()
    server.messenger.send_message((server.listener, "alice"), b"question", lambda _: None, on_error=errors)
    server.allow(server.bob)
    # Whether it was still queued is a race; what became of it is told now, not at its deadline.
    [error] = errors.wait(timeout=1)
    assert isinstance(error, OutcomeUnknown | NotDelivered)
    assert "its key was taken off the allow-list" in str(error)
    with pytest.raises(NotDelivered, match="not on the allow-list"):
        ask(victim, connection)
    assert any("the session with 'alice' was ended" in line for line in warnings())
    assert not any("claims to be of" in line for line in warnings()), "no message came"
    assert ask(bob, server.destination) == b"bob said hello"
    server.allow(server.alice, server.bob)
    wait_until(lambda: is_served(victim, connection))


def test_a_key_that_is_renamed_is_not_its_old_identity_any_more(server: SecuredServer, plain: PlainPeers) -> None:
    """What is meant for who has the name now does not go to who had it."""
    old, dealer = server.client(server.alice), server.dealer(plain, server.alice)
    connection = old.make_connection(server.destination, callback=lambda _: None)
    assert ask(old, connection) == b"alice said hello"
    dealer.send(b"", b"1-0-x")
    assert dealer.receive() == [b"server", b"", b"0-1-alice said x"]
    server.security.reload({server.alice.public: "guest", server.bob.public: "alice"})
    assert_gone(server, "alice")
    assert dealer.is_silent()
    dealer.send(b"", b"2-0-x")
    assert dealer.receive() == [b"server", b"", b"0-2-guest said x"]
    new = server.client(server.bob, "alice")
    assert ask(new, server.destination) == b"alice said hello"


def test_a_session_without_a_link_is_revoked_too(server: SecuredServer, plain: PlainPeers) -> None:
    raw = join(server, plain, server.alice)
    errors: Inbox[Exception] = Inbox()
    [session] = server.messenger._exchange.handshake.sessions
    with server.messenger._loop.lock:
        session.attach(None)
    server.messenger.send_message((server.listener, "alice"), b"question", lambda _: None, on_error=errors)
    server.allow(server.bob)
    [error] = errors.wait()
    assert "its key was taken off the allow-list" in str(error)
    raw.dealer.close()


def test_who_is_revoked_while_it_waits_for_the_word_is_not_let_in(
    server: SecuredServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zap, "GIVE_S", 0.5)
    admitted: Inbox[str] = Inbox()
    plain_admit = zap.Gate.admit

    def admit(gate: zap.Gate, key: str, address: str) -> str | None:
        admitted(key)
        return plain_admit(gate, key, address)

    monkeypatch.setattr(zap.Gate, "admit", admit)
    alice = server.client(server.alice)
    connection = alice.make_connection(server.destination)
    admitted.wait()
    server.allow(server.bob)
    with pytest.raises(NotDelivered, match="not on the allow-list"):
        ask(alice, connection)
    assert len(server.received) == 0


def test_who_goes_on_after_its_key_was_revoked_is_cut_off(server: SecuredServer, plain: PlainPeers) -> None:
    server.allow(server.alice, server.bob)
    raw, dealer = join(server, plain, server.alice), server.dealer(plain, server.alice)
    dealer.send(b"", b"1-0-x")
    assert dealer.receive() == [b"server", b"", b"0-1-alice said x"]
    server.allow(server.bob)
    count = len(server.received)
    link = server.listener.links[0]
    wait_until(lambda: len(link.inflows) == 2)
    raw.send_data([b"1026-0-x"])
    dealer.send(b"", b"2-0-x")
    wait_until(lambda: dropped(server.messenger, "refused_key") >= 2)
    wait_until(lambda: not link.inflows)
    errors: Inbox[Exception] = Inbox()
    server.messenger.send_message((server.listener, "alice"), b"x", lambda _: None, on_error=errors)
    [error] = errors.wait()
    assert isinstance(error, NotDelivered)
    assert len(server.received) == count


def test_a_key_is_rotated_without_a_break(server: SecuredServer) -> None:
    """Two keys are of one identity for a while; then the old one is taken off the list."""
    new = KeyPair.generate("alice")
    old_client = server.client(server.alice)
    assert ask(old_client, server.destination) == b"alice said hello"
    server.allow(server.alice, new)
    assert ask(old_client, server.destination) == b"alice said hello"
    old_client.close()
    new_client = server.client(new)
    assert ask(new_client, server.destination) == b"alice said hello"
    server.allow(new)
    assert ask(new_client, server.destination) == b"alice said hello"
    with pytest.raises(NotDelivered, match="not on the allow-list"):
        ask(server.client(server.alice), server.destination)


def test_the_names_of_one_key_are_numbered_to_a_limit(
    server: SecuredServer, plain: PlainPeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is free again when its connection has ended."""
    monkeypatch.setattr(curve, "NAMES_PER_KEY_MAX", 4)
    alice = server.client(server.alice)
    connections = [alice.make_connection(server.destination, dialect="basic") for _ in range(3)]
    for connection, name in zip(connections, ["alice", "alice#2", "alice#3"], strict=True):
        for _ in range(2):
            assert ask(alice, connection) == f"{name} said hello".encode()
    last, too_many = server.dealer(plain, server.alice), server.dealer(plain, server.alice)
    last.send(b"", b"1-0-x")
    assert last.receive()[2] == b"0-1-alice#4 said x"
    too_many.send(b"", b"1-0-x")
    wait_dropped(server.messenger, "too_many_names")
    connections[1].close()
    wait_until(lambda: b"alice#2" not in server.listener.links[0]._routing_ids)
    too_many.send(b"", b"2-0-x")
    assert too_many.receive()[2] == b"0-2-alice#2 said x"
