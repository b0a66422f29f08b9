"""The basic dialect: frames exactly as in the table of docs/protocol.md, both ways, against bare pyzmq sockets."""

import subprocess
import sys
from pathlib import Path

import pytest

from messenger import ECHO, Connection, DeliveryError, Listener, Message, Messenger, NotDelivered, OutcomeUnknown
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeer,
    PlainPeers,
    contents_of,
    free_port,
    wait_dropped,
)

To = str | int
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["tcp", "ipc"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


# A plain DEALER and our listener.


def test_plain_dealer_asks(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    messenger("server").listen_for_connection(destination, note_and_answer)
    dealer = plain.dealer(destination, b"a plain peer")
    dealer.send(b"", b"5000-0-record-1")
    assert dealer.receive() == [b"server", b"", b"0-5000-answer to record-1"]
    [message] = received.wait()
    assert (message.sender, message.contents) == ("a plain peer", b"record-1")
    assert (message.source_callback_id, message.dest_callback_id) == (5000, 0)
    assert not message.redelivered


def test_plain_dealer_has_an_echo_and_a_registered_callback(
    messenger: MessengerFactory, plain: PlainPeers, destination: To
) -> None:
    server = messenger("server")
    server.listen_for_connection(destination, None, identity="front desk")
    server.register_callback(64, answer)
    dealer = plain.dealer(destination)
    dealer.send(b"", b"7-1-potato")
    assert dealer.receive() == [b"front desk", b"", b"0-7-potato"]
    dealer.send(b"", b"7-64-potato")
    assert dealer.receive() == [b"front desk", b"", b"0-7-answer to potato"]


def test_listener_asks_a_plain_dealer(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    server = messenger("server")
    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, hellos)
    dealer = plain.dealer(destination, b"plain")
    dealer.send(b"", b"0-0-hello")
    hellos.wait()
    responses: Inbox[Message] = Inbox()
    message_id = server.send_message((listener, "plain"), b"question", responses, remote_callback=99)
    assert dealer.receive() == [b"server", b"", b"%d-99-question" % message_id]
    dealer.send(b"", b"0-%d-because" % message_id)
    assert contents_of(responses.wait()) == [b"because"]
    # The SLC runs on the response too; a second response finds no callback.
    dealer.send(b"", b"0-%d-again" % message_id)
    wait_dropped(server, "late_response")
    assert contents_of(hellos.wait(3)) == [b"hello", b"because", b"again"]
    assert len(responses) == 1


@pytest.mark.parametrize(
    ("routing_id", "name"),
    [
        (b"\xff\xfe", "0xfffe"),
        (b"\x80" * 255, "0x" + "80" * 255),
        (b"0xfffe", "0x" + b"0xfffe".hex()),
        ("grüße".encode(), "grüße"),
        (b"with spaces\n", "with spaces\n"),
    ],
)
def test_routing_ids(
    messenger: MessengerFactory, plain: PlainPeers, destination: To, routing_id: bytes, name: str
) -> None:
    server = messenger("server")
    received: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, received)
    dealer = plain.dealer(destination, routing_id)
    dealer.send(b"", b"8-0-hello")
    [message] = received.wait()
    assert message.sender == name
    message.reply(b"reply")
    assert dealer.receive() == [b"server", b"", b"0-8-reply"]
    server.send_message((listener, name), b"question")
    assert dealer.receive() == [b"server", b"", b"0-0-question"]


def test_random_routing_id(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    """ZeroMQ gives a DEALER without a name one of five bytes that starts with a NUL."""
    server = messenger("server")
    received: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, received)
    dealers = [plain.dealer(destination) for _ in range(20)]
    for number, dealer in enumerate(dealers):
        dealer.send(b"", b"1-0-%d" % number)
    senders = {message.contents: message.sender for message in received.wait(20)}
    assert len(set(senders.values())) == 20
    for number, dealer in enumerate(dealers):
        server.send_message((listener, senders[b"%d" % number]), b"for %d" % number)
        assert dealer.receive() == [b"server", b"", b"0-0-for %d" % number]


def test_plain_peers_beside_sessions(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    """One listener serves both; a name that both have is the session's."""
    server = messenger("server")
    listener = server.listen_for_connection(destination, answer)
    asked: Inbox[Message] = Inbox()
    clients = [messenger(f"session {number}") for number in range(3)]
    connections = [client.make_connection(destination, callback=asked) for client in clients]
    dealers = [plain.dealer(destination, b"plain %d" % number) for number in range(3)]
    responses: Inbox[Message] = Inbox()
    for turn in range(50):
        for number in range(3):
            clients[number].send_message(connections[number], b"%d" % turn, responses)
            dealers[number].send(b"", b"%d-0-%d" % (2_000 + turn, turn))
    for dealer in dealers:
        for turn in range(50):
            assert dealer.receive() == [b"server", b"", b"0-%d-answer to %d" % (2_000 + turn, turn)]
    expected = sorted([b"answer to %d" % turn for turn in range(50)] * 3)
    assert sorted(contents_of(responses.wait(150))) == expected
    before_count = len(asked)
    twin = plain.dealer(destination, b"session 0")
    twin.send(b"", b"1-0-x")
    assert twin.receive() == [b"server", b"", b"0-1-answer to x"]
    server.send_message((listener, "session 0"), b"for the session")
    assert asked.wait(before_count + 1)[before_count].contents == b"for the session"
    assert twin.is_silent()


def test_our_basic_connection_to_our_listener(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger("server"), messenger("client")
    received: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, received)
    asked: Inbox[Message] = Inbox()
    connection = client.make_connection(destination, callback=asked, dialect="basic")
    assert client.request(connection, b"potato", remote_callback=ECHO).contents == b"potato"
    assert received.wait()[0].sender == "client"
    assert server.request((listener, "client"), b"potato too", remote_callback=ECHO).contents == b"potato too"


# Our basic connection and a plain ROUTER.


class PlainServer:
    """A ROUTER that follows the table, with the client that is connected to it."""

    def __init__(self, messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
        self.router: PlainPeer = plain.router(destination)
        self.client: Messenger = messenger("client")
        self.received: Inbox[Message] = Inbox()
        self.connection: Connection = self.client.make_connection(destination, callback=self.received, dialect="basic")


@pytest.fixture
def plain_server(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> PlainServer:
    return PlainServer(messenger, plain, destination)


def test_plain_router_is_asked(plain_server: PlainServer) -> None:
    router, client = plain_server.router, plain_server.client
    responses: Inbox[Message] = Inbox()
    message_id = client.send_message(plain_server.connection, b"record-1", responses, remote_callback=77)
    assert router.receive() == [b"client", b"", b"%d-77-record-1" % message_id]
    router.send(b"client", b"plain server", b"", b"0-%d-answer" % message_id)
    [response] = responses.wait()
    assert (response.contents, response.sender) == (b"answer", "plain server")
    # A connection's callback runs on every message, as an SLC does.
    assert contents_of(plain_server.received.wait()) == [b"answer"]


def test_plain_router_starts_a_conversation(plain_server: PlainServer) -> None:
    router, client = plain_server.router, plain_server.client
    client.send_message(plain_server.connection, b"hello")
    assert router.receive() == [b"client", b"", b"0-0-hello"]
    router.send(b"client", b"plain server", b"", b"4-0-question")
    [question] = plain_server.received.wait()
    question.reply(b"because")
    assert router.receive() == [b"client", b"", b"0-4-because"]
    router.send(b"client", b"plain server", b"", b"4-1-potato")
    assert router.receive() == [b"client", b"", b"0-4-potato"]


def test_large_contents_are_one_frame(plain_server: PlainServer) -> None:
    contents = bytes(range(256)) * 4_096
    plain_server.client.send_message(plain_server.connection, contents)
    assert plain_server.router.receive() == [b"client", b"", b"0-0-" + contents]


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([b"plain server", b""], "malformed_frames"),
        ([b"plain server"], "malformed_frames"),
        ([b"plain server", b"0-0-x"], "malformed_frames"),
        ([b"", b"0-0-x"], "malformed_frames"),
        ([b"plain server", b"", b"0-0-x", b""], "malformed_frames"),
        ([b"plain server", b"", b"hello"], "malformed_message"),
        ([b"plain server", b"", b""], "malformed_message"),
        ([b"plain server", b"", b"0-500-x"], "unknown_callback"),
    ],
)
def test_bad_frames_of_a_plain_router(plain_server: PlainServer, frames: list[bytes], kind: str) -> None:
    router, client = plain_server.router, plain_server.client
    client.send_message(plain_server.connection, b"hello")
    router.receive()
    router.send(b"client", *frames)
    wait_dropped(client, kind)
    router.send(b"client", b"plain server", b"", b"0-0-good")
    count = 2 if kind == "unknown_callback" else 1
    assert contents_of(plain_server.received.wait(count))[-1] == b"good"


def test_plain_router_that_is_silent(plain_server: PlainServer, never: Inbox[object]) -> None:
    """Fire and forget: the deadline tells, and what comes later is counted."""
    errors: Inbox[DeliveryError] = Inbox()
    client = plain_server.client
    message_id = client.send_message(plain_server.connection, b"x", never, on_error=errors, timeout=0.3)
    plain_server.router.receive()
    assert isinstance(errors.wait()[0], OutcomeUnknown)
    plain_server.router.send(b"client", b"plain server", b"", b"0-%d-late" % message_id)
    wait_dropped(client, "late_response")


def test_plain_router_that_is_not_there(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    client = messenger("client")
    connection = client.make_connection(destination, dialect="basic")
    with pytest.raises(NotDelivered):
        client.request(connection, b"too early", timeout=0.05)
    client.send_message(connection, b"waits")
    router = plain.router(destination)
    assert router.receive() == [b"client", b"", b"0-0-waits"]


# The example.


def test_example(messenger: MessengerFactory) -> None:
    port = free_port()
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    listener: Listener = messenger("server").listen_for_connection(port, note_and_answer)
    finished = subprocess.run(
        [sys.executable, ROOT / "examples/plain_dealer.py", str(listener.port), "hello - you"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert finished.stdout.strip() == repr([b"server", b"", b"0-1024-answer to hello - you"])
    assert finished.stderr == ""
    assert [(message.sender, message.contents) for message in received.wait()] == [("plain-dealer", b"hello - you")]
