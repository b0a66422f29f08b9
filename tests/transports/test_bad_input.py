"""Bad input against real listeners: it is counted by its kind, and the same messenger goes on serving others.

The bad peers are bare pyzmq sockets, and the session frames are packed here from the tables in docs/protocol.md, so
that a mistake of `messenger.wire` hides nowhere.
"""

import itertools
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import zmq

from messenger import ECHO, DeliveryError, Limits, Message, Messenger, OutcomeUnknown, QueueFull
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    NewDestination,
    PlainPeer,
    PlainPeers,
    contents_of,
    dropped,
    wait_dropped,
    wait_until,
)

To = str | int
KIB = 1024
MIB = 1024 * KIB
MAGIC = 0x4D
HELLO, CHALLENGE, RESPONSE, DATA, UNKNOWN, REFUSED, GOODBYE = range(1, 8)
ASK, RESEND, OPTIONS = 1, 2, 4
HANDLER_ERROR, NO_HANDLER, REDELIVERED = 1, 2, 3
MAX_32, MAX_64 = 2**32 - 1, 2**64 - 1


@pytest.fixture(params=["tcp", "ipc"])
def transport(request: pytest.FixtureRequest) -> str:
    """Plain peers of another process come by these two."""
    name: str = request.param
    return name


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


class Server:
    """A messenger that answers every message, and remembers them."""

    def __init__(self, messenger: Messenger, destination: To) -> None:
        self.messenger = messenger
        self.received: Inbox[Message] = Inbox()

        def answer_and_note(message: Message) -> None:
            self.received(message)
            answer(message)

        self.listener = messenger.listen_for_connection(destination, answer_and_note)


@pytest.fixture
def server(messenger: MessengerFactory, destination: To) -> Server:
    return Server(messenger("server"), destination)


_numbers = itertools.count(1)


def exchange_one(dealer: PlainPeer, contents: bytes = b"still there") -> None:
    """A plain peer asks and is answered."""
    source = 1024 + next(_numbers)
    dealer.send(b"", b"%d-0-%b" % (source, contents))
    assert dealer.receive() == [b"server", b"", b"0-%d-answer to %b" % (source, contents)]


@pytest.fixture(autouse=True)
def others_are_served(
    request: pytest.FixtureRequest, destination: To, messenger: MessengerFactory, plain: PlainPeers
) -> Iterator[None]:
    """After each test a session peer and a plain peer, there from the start, and new ones of both, get answers."""
    if "server" not in request.fixturenames:
        yield
        return
    request.getfixturevalue("server")
    client, dealer = messenger("good peer"), plain.dealer(destination, b"good plain peer")
    assert client.request(destination, b"x").contents == b"answer to x"
    exchange_one(dealer)
    yield
    for asker in (client, messenger("new good peer")):
        assert asker.request(destination, b"y", timeout=TIMEOUT_S).contents == b"answer to y"
    for asking_dealer in (dealer, plain.dealer(destination)):
        exchange_one(asking_dealer)


@pytest.fixture
def bad(plain: PlainPeers, destination: To) -> PlainPeer:
    return plain.dealer(destination, b"bad peer")


# Messages in the basic dialect.


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"5-1",
        b"7",
        b"-1-0-x",
        b" 1-0-x",
        b"1 -0-x",
        b"1- 0-x",
        b"+5-0-x",
        b"1-+5-x",
        b"1_0-0-x",
        b"0x1-0-x",
        b"1.0-0-x",
        b"1-99999999999999999999-x",
        b"99999999999999999999-1-x",
        b"18446744073709551616-0-x",
        b"1-18446744073709551616-x",
        b"000000000000000000001-0-x",
        b"1-" + b"9" * 100_000 + b"-x",
        "\u0661-0-x".encode(),
        "1-\u0968-x".encode(),
        "\uff11-0-x".encode(),
        b"\xb9-0-x",
        b"1-\xb2-x",
        b"\0-0-x",
        b"1-0\0-x",
        b"--x",
        b"-",
        b"--",
        b"---",
        b"",
        b"\n1-0-x",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_header_that_does_not_parse(server: Server, bad: PlainPeer, data: bytes) -> None:
    before_count = len(server.received)
    bad.send(b"", data)
    wait_dropped(server.messenger, "malformed_message")
    exchange_one(bad)
    assert len(server.received) == before_count + 1


def test_header_at_its_limits_does_parse(server: Server, bad: PlainPeer) -> None:
    bad.send(b"", b"18446744073709551615-00000000000000000000-x")
    assert bad.receive() == [b"server", b"", b"0-18446744073709551615-answer to x"]
    assert not server.messenger.statistics().dropped


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        pytest.param([b""], "malformed_frames", id="nothing behind the empty frame"),
        pytest.param([b"", b"0-0-x", b""], "malformed_frames", id="an empty frame too many"),
        pytest.param([b"", b"0-0-x", b"0-0-y"], "malformed_frames", id="a message too many"),
        pytest.param([b"", b"", b"0-0-x"], "malformed_frames", id="two empty frames"),
        pytest.param([b"", *[b"0-0-x"] * 1_000], "malformed_frames", id="a thousand too many"),
        pytest.param([b"0-0-x"], "unknown_header", id="no empty frame"),
        pytest.param([b"0-0-x", b"0-0-y"], "unknown_header", id="first frame not empty"),
        pytest.param([b"hello", b"", b"0-0-x"], "unknown_header", id="another's envelope"),
        pytest.param([b"\0" * 20], "unknown_header", id="NULs as long as a header"),
        pytest.param([b"M"], "malformed_frames", id="only the magic"),
        pytest.param([b"M\x01\x04" + bytes(16)], "malformed_frames", id="a byte less than a header"),
    ],
)
def test_frames_that_are_no_message(server: Server, bad: PlainPeer, frames: list[bytes], kind: str) -> None:
    before_count = len(server.received)
    bad.send(*frames)
    wait_dropped(server.messenger, kind)
    assert sum(server.messenger.statistics().dropped.values()) == 1
    exchange_one(bad)
    assert len(server.received) == before_count + 1


@pytest.mark.parametrize("dest_id", [2, 63, 64, 1023, 999_999, MAX_64])
def test_destination_id_that_names_nothing(server: Server, bad: PlainPeer, dest_id: int) -> None:
    """The SLC still runs."""
    bad.send(b"", b"77-%d-x" % dest_id)
    assert bad.receive() == [b"server", b"", b"0-77-answer to x"]
    wait_dropped(server.messenger, "unknown_callback")


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"-" * 1_000 + b"\0" * 1_000, id="dashes and NULs"),
        pytest.param(b"1-1-x", id="like a header"),
        pytest.param(bytes(range(256)) * 65_536, id="16 MiB"),
    ],
)
def test_unusual_contents(server: Server, bad: PlainPeer, contents: bytes) -> None:
    bad.send(b"", b"7-%d-%b" % (ECHO, contents))
    frames = bad.receive()
    assert frames[:2] == [b"server", b""]
    assert frames[2] == b"0-7-" + contents
    # The SLC runs too.
    assert bad.receive() == [b"server", b"", b"0-7-answer to " + contents]
    assert not server.messenger.statistics().dropped


def test_answers_to_guessed_ids(
    server: Server, bad: PlainPeer, messenger: MessengerFactory, plain: PlainPeers, destination: To
) -> None:
    """A peer answers a message that was sent to another one: it is counted, and the real answer still runs the MSC."""
    bad.send(b"", b"0-0-hello")
    asked: Inbox[Message] = Inbox()
    victim = messenger("victim")
    victim.send_message(victim.make_connection(destination, callback=asked), b"hello")
    asked.wait(1)
    responses: Inbox[Message] = Inbox()
    message_id = server.messenger.send_message((server.listener, "victim"), b"?", responses)
    [_, question] = asked.wait(2)
    bad.send(b"", b"0-%d-forged" % message_id)
    wait_dropped(server.messenger, "foreign_response")
    raw = RawSession(plain.dealer(destination))
    raw.join()
    raw.send_data([b"0-%d-forged" % message_id])
    raw.send_data([b"0-%d-" % message_id], options=pack_options((0, HANDLER_ERROR, "ForgedError", "forged")))
    wait_dropped(server.messenger, "foreign_response", 3)
    question.reply(b"real")
    assert contents_of(responses.wait()) == [b"real"]


# Peers that come and go.


def test_peer_that_is_gone_before_its_answer(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    server = messenger("server")
    questions: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, questions)
    gone, stays = plain.dealer(destination, b"gone"), plain.dealer(destination, b"stays")
    for dealer in (gone, stays):
        dealer.send(b"", b"1-0-x")
    by_name = {message.sender: message for message in questions.wait(2)}
    gone.close()

    def is_gone() -> bool:
        # ZeroMQ takes messages for a peer until it knows that it is gone.
        by_name["gone"].reply(b"nobody hears this")
        return dropped(server, "peer_gone") > 0

    wait_until(is_gone)
    by_name["stays"].reply(b"y")
    assert stays.receive() == [b"server", b"", b"0-1-y"]


def test_twenty_peers_that_send_and_vanish(server: Server, plain: PlainPeers, destination: To) -> None:
    before_count = len(server.received)
    for number in range(20):
        dealer = plain.dealer(destination, b"vanishes %d" % number)
        dealer.send(b"", b"1-0-%d" % number)
        # It vanishes as soon as its message has left, at whatever moment that is.
        dealer.socket.close(linger=int(TIMEOUT_S * 1000))
    received = server.received.wait(before_count + 20)[before_count:]
    assert {message.sender for message in received} == {f"vanishes {number}" for number in range(20)}


def test_twenty_sessions_that_vanish_in_the_middle(server: Server, plain: PlainPeers, destination: To) -> None:
    """After the HELLO, after the CHALLENGE, after a message that is answered: what they leave behind harms nobody."""
    for number in range(20):
        dealer = plain.dealer(destination)
        raw = RawSession(dealer, identity=b"vanishes %d" % number)
        if number % 3 == 0:
            raw.send_hello()
        else:
            raw.join()
            if number % 3 == 1:
                raw.send_data([b"1-0-x"])
        dealer.socket.close(linger=int(TIMEOUT_S * 1000))
    server.received.wait(2 + 7)


def test_two_plain_peers_with_one_identity(server: Server, plain: PlainPeers, destination: To) -> None:
    """The newer one has it; nobody else notices."""
    old = plain.dealer(destination, b"twin")
    exchange_one(old)
    new = plain.dealer(destination, b"twin")
    exchange_one(new)
    for number in range(10):
        exchange_one(new, b"%d" % number)
    assert old.is_silent()


# Peers that do not read.


def test_bytes_for_a_plain_peer_that_does_not_read(
    messenger: MessengerFactory, plain: PlainPeers, destination: To
) -> None:
    """They are bounded, however few messages they are in; once it reads, it is served again."""
    server = Server(messenger("server", limits=Limits(queue_bytes_max=2 * MIB)), destination)
    mute = plain.dealer(destination, b"mute", RCVHWM=1, RCVBUF=4 * KIB)
    for count in range(1, 101):
        mute.send(b"", b"1-0-" + bytes(100 * KIB))
        server.received.wait(count)
    exchange_one(plain.dealer(destination, b"other"))
    full_count = dropped(server.messenger, "peer_full")
    assert full_count > 20
    for _ in range(100 - full_count):
        mute.receive()
    # Another thread tells that libzmq has let go of them, some time later.
    [flow] = [link._outflows.of(b"mute") for link in server.listener.links if b"mute" in link._outflows._by_peer]
    wait_until(lambda: not flow.held_bytes())
    mute.send(b"", b"2-0-x")
    assert mute.receive()[2].startswith(b"0-2-")
    assert dropped(server.messenger, "peer_full") == full_count


def test_a_plain_listener_that_does_not_read(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    """Who sends to it waits for room when as many bytes wait as may, and all that was taken arrives."""
    mute = plain.router(destination, RCVHWM=1, RCVBUF=4 * KIB)
    client = messenger(limits=Limits(queue_bytes_max=2 * MIB))
    connection = client.make_connection(destination, dialect="basic")
    count = 0
    while connection.link.queue_bytes < 2 * MIB:
        client.send_message(connection, b"%d-" % count + bytes(100 * KIB), timeout=TIMEOUT_S)
        count += 1
        time.sleep(0.005)
        assert count < 200
    with pytest.raises(QueueFull):
        client.send_message(connection, b"", timeout=0.1)
    assert [int(mute.receive()[2].split(b"-")[2]) for _ in range(count)] == list(range(count))
    client.send_message(connection, b"last", timeout=TIMEOUT_S)
    assert mute.receive()[2] == b"0-0-last"


def test_plain_peer_that_never_reads(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    limits = Limits(queue_msgs_max=300, window_msgs=8)
    server = messenger("server", limits=limits)
    large = bytes(64 * KIB)
    server.listen_for_connection(
        destination, lambda message: message.reply(large if message.contents == b"large" else b"small")
    )
    others = [messenger("other"), messenger("another")]
    mute = plain.dealer(destination, b"mute", RCVHWM=1, RCVBUF=4 * KIB)
    durations_s = []
    for _ in range(40):
        for _ in range(50):
            mute.send(b"", b"1-0-large")
        for other in others:
            started_at = time.monotonic()
            assert other.request(destination, b"", timeout=TIMEOUT_S).contents == b"small"
            durations_s.append(time.monotonic() - started_at)
        if dropped(server, "peer_full"):
            break
    wait_until(lambda: dropped(server, "peer_full") > 0)
    assert sorted(durations_s)[len(durations_s) // 2] < 0.5
    assert server.statistics().queued_msgs == 0
    for number in range(10):
        assert others[number % 2].request(destination, b"", timeout=TIMEOUT_S).contents == b"small"


def test_session_that_never_reads(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    """Its window fills, then its queue, then its answers are refused; what is held for it is bounded."""
    limits = Limits(queue_msgs_max=20, window_msgs=10)
    server = messenger("server", limits=limits)
    large = bytes(64 * KIB)
    server.listen_for_connection(
        destination, lambda message: message.reply(large if message.contents == b"large" else b"small")
    )
    other, dealer = messenger("other"), plain.dealer(destination)
    mute = RawSession(plain.dealer(destination, RCVHWM=1, RCVBUF=4 * KIB), identity=b"mute")
    mute.join()
    for _ in range(10):
        mute.send_data([b"1-0-large"] * 10)
        assert other.request(destination, b"", timeout=TIMEOUT_S).contents == b"small"
        dealer.send(b"", b"1-0-")
        assert dealer.receive() == [b"server", b"", b"0-1-small"]
        assert server.statistics().queued_msgs <= limits.queue_msgs_max
    # Ten are under way, twenty wait, and the callbacks of all others found the queue full.
    wait_until(lambda: server.statistics().callback_error_count == 70)
    assert server.statistics().queued_msgs == limits.queue_msgs_max


@pytest.mark.parametrize("window_msgs", [0, 1])
def test_session_with_a_tiny_window(server: Server, bad: PlainPeer, window_msgs: int) -> None:
    raw = RawSession(bad, window_msgs=window_msgs)
    raw.join()
    raw.send_data([b"1-0-a", b"2-0-b"])
    server.received.wait(4)
    raw.receive_until(lambda: len(raw.messages) >= window_msgs)
    assert raw.messages == [b"0-1-answer to a"][:window_msgs]


# Sizes.


def test_messages_above_the_size_limit(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    server = messenger("server", limits=Limits(message_bytes_max=1_000))
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    dealer = plain.dealer(destination)
    dealer.send(b"", b"1-0-" + bytes(1_001))
    wait_dropped(server, "message_too_large")
    dealer.send(b"", b"1-0-" + bytes(1_900))
    wait_dropped(server, "message_too_large", 2)
    raw = RawSession(dealer)
    raw.join()
    raw.send_data([b"1-0-" + bytes(1_001)])
    raw.send_data([b"1-0-"], large=[bytes(1_001)])
    wait_dropped(server, "message_too_large", 4)
    for size in (0, 1_000):
        dealer.send(b"", b"1-0-" + bytes(size))
    raw.send_data([b"1-0-" + bytes(1_000), b"1-0-"], large=[None, bytes(1_000)])
    assert [len(contents) for contents in contents_of(received.wait(4))] == [0, 1_000, 1_000, 1_000]


def test_message_far_above_the_size_limit(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    """ZeroMQ cuts the offender off, and only the offender."""
    server = messenger("server", limits=Limits(message_bytes_max=100_000))
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    server.listen_for_connection(destination, note_and_answer)
    good, offender = plain.dealer(destination, b"good"), plain.dealer(destination, b"offender")
    client = messenger()
    exchange_one(good)
    monitor = offender.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    offender.send(b"", b"1-0-" + bytes(3 * MIB))
    assert monitor.poll(int(TIMEOUT_S * 1000)), "the offender is still connected"
    offender.socket.disable_monitor()
    monitor.close()
    offender.close()
    exchange_one(good)
    assert client.request(destination, b"x").contents == b"answer to x"
    assert {message.sender for message in received.wait(2)} == {"good", client.identity}


# Session frames.


def pack_header(kind: int, source: int, dest: int, flags: int = 0, version: int = 1) -> bytes:
    return struct.pack("<BBBBQQ", MAGIC, version, kind, flags, source, dest)


def pack_data(first: int, received: int, processed: int, count: int, sizes: list[int], rest: bytes = b"") -> bytes:
    return struct.pack(f"<QQQI{len(sizes)}I", first, received, processed, count, *sizes) + rest


def pack_options(*options: tuple[int, int, str, str]) -> bytes:
    """MessagePack by hand: a list of lists of two small numbers and two short texts."""
    packed = bytes([0x90 | len(options)])
    for index, kind, name, text in options:
        packed += bytes([0x94, index, kind])
        for part in (name, text):
            packed += bytes([0xA0 | len(part)]) + part.encode()
    return struct.pack("<I", len(packed)) + packed


class RawSession:
    """A peer that speaks the session dialect over a bare DEALER, well as long as nothing else is asked of it."""

    def __init__(self, dealer: PlainPeer, *, identity: bytes = b"raw", window_msgs: int = 100) -> None:
        self.dealer = dealer
        self.identity = identity
        self.window_msgs = window_msgs
        self.incarnation = secrets.randbits(63) + 1
        self.process = secrets.randbits(63) + 1
        self.nonce = secrets.randbits(63) + 1
        self.peer_incarnation = 0
        self.peer_nonce = 0
        self.next_number = 1
        self.received_through = 0
        self.messages: list[bytes] = []

    def pack(self, kind: int, body: bytes = b"", flags: int = 0) -> bytes:
        return pack_header(kind, self.incarnation, self.peer_incarnation, flags) + body

    def send_hello(self) -> None:
        body = struct.pack("<QQIQQ", self.nonce, self.process, self.window_msgs, MIB, MAX_64) + self.identity
        self.dealer.send(pack_header(HELLO, self.incarnation, 0) + body)

    def hear_challenge(self) -> None:
        self.send_hello()
        [frame] = self.dealer.receive()
        magic, version, kind, _, source, dest = struct.unpack_from("<BBBBQQ", frame)
        assert (magic, version, kind, dest) == (MAGIC, 1, CHALLENGE, self.incarnation)
        echo, self.peer_nonce, *_ = struct.unpack_from("<QQIQQ", frame, 20)
        assert (echo, frame[56:]) == (self.nonce, b"server")
        self.peer_incarnation = source

    def join(self) -> None:
        self.hear_challenge()
        self.dealer.send(self.pack(RESPONSE, struct.pack("<Q", self.peer_nonce)))

    def send_data(self, messages: list[bytes], *, large: Sequence[bytes | None] = (), options: bytes = b"") -> None:
        """Sends a batch; `large` are the contents of its messages that stand in frames of their own."""
        sizes = [len(message) for message in messages]
        extra = []
        for index, contents in enumerate(large):
            if contents is not None:
                sizes[index] |= 1 << 31
                extra.append(contents)
        body = pack_data(self.next_number, self.received_through, self.received_through, len(messages), sizes)
        self.next_number += len(messages)
        self.dealer.send(self.pack(DATA, body + options + b"".join(messages), OPTIONS if options else 0), *extra)

    def receive_until(self, predicate: Callable[[], bool]) -> None:
        """Reads, and acknowledges nothing but what comes, until the predicate holds."""
        while not predicate():
            frame, *_ = self.dealer.receive()
            if frame[2] != DATA:
                continue
            first, _, _, count = struct.unpack_from("<QQQI", frame, 20)
            assert first == self.received_through + 1
            position = 48 + 4 * count
            for size in struct.unpack_from(f"<{count}I", frame, 48):
                self.messages.append(frame[position : position + size])
                position += size
            self.received_through += count

    def ask(self, contents: bytes) -> None:
        """Sends a message and waits for its answer: the session still works."""
        source = 1024 + next(_numbers)
        self.send_data([b"%d-0-%b" % (source, contents)])
        expected = b"0-%d-answer to %b" % (source, contents)
        self.receive_until(lambda: expected in self.messages)


def test_raw_session_works(server: Server, bad: PlainPeer) -> None:
    """As those below prove nothing otherwise."""
    raw = RawSession(bad)
    raw.join()
    for number in range(3):
        raw.ask(b"%d" % number)
    [*_, message] = server.received.wait(5)
    assert (message.sender, message.contents) == ("raw", b"2")
    assert not server.messenger.statistics().dropped


def wait_processed(server: Server, bad: PlainPeer) -> None:
    """Waits until the server has taken all that the peer has sent before: a link keeps the order."""
    bad.send(b"", b"7-1-in order")
    while bad.receive()[-1] != b"0-7-answer to in order":
        pass


def test_every_truncation_of_a_handshake(server: Server, bad: PlainPeer) -> None:
    raw = RawSession(bad)
    hello = raw.pack(HELLO, struct.pack("<QQIQQ", raw.nonce, raw.process, 100, MIB, MAX_64))
    for length in range(1, len(hello) + 1):  # The whole is one without an identity.
        bad.send(hello[:length])
    wait_dropped(server.messenger, "malformed_frames", len(hello))
    raw.hear_challenge()
    response = raw.pack(RESPONSE, struct.pack("<Q", raw.peer_nonce))
    for length in range(20, len(response)):
        bad.send(response[:length])
    wait_dropped(server.messenger, "malformed_frames", len(hello) + 8)
    raw.join()
    raw.ask(b"x")


def test_every_truncation_of_data(server: Server, bad: PlainPeer) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    options = pack_options((1, REDELIVERED, "", ""))
    messages = [b"1-0-never", b"2-0-never"]
    sizes = [len(message) for message in messages]
    received_count = len(server.received)
    body = pack_data(raw.next_number, 1, 1, 2, sizes, options + b"".join(messages))
    frame = raw.pack(DATA, body, OPTIONS)
    for length in range(1, len(frame)):
        bad.send(frame[:length])
    bad.send(frame + b"x")
    bad.send(frame, b"an extra frame")
    wait_dropped(server.messenger, "malformed_frames", len(frame) + 1)
    assert len(server.received) == received_count
    bad.send(frame)
    raw.next_number += 2
    whole = server.received.wait(received_count + 2)[received_count:]
    assert [(message.contents, message.redelivered) for message in whole] == [(b"never", False), (b"never", True)]
    raw.ask(b"after")


def test_truncated_messages_within_a_batch(server: Server, bad: PlainPeer) -> None:
    """The sizes fit, but a message in the middle does not parse: only that one is dropped."""
    raw = RawSession(bad)
    raw.join()
    before_count = len(server.received)
    raw.send_data([b"0-0-one", b"hello", b"", b"1-", b"0-0-two"])
    assert contents_of(server.received.wait(before_count + 2)[before_count:]) == [b"one", b"two"]
    wait_dropped(server.messenger, "malformed_message", 3)
    raw.ask(b"x")


@pytest.mark.parametrize("version", [0, 2, 255])
@pytest.mark.parametrize("kind", [HELLO, CHALLENGE, DATA, GOODBYE, 99])
def test_unknown_version_is_refused(server: Server, bad: PlainPeer, version: int, kind: int) -> None:
    bad.send(pack_header(kind, 77, 0, version=version) + b"whatever the future holds")
    [frame] = bad.receive()
    assert frame[:20] == pack_header(REFUSED, 0, 77, flags=1)
    assert f"version {version}".encode() in frame[20:]
    wait_dropped(server.messenger, "unknown_version")


def test_unknown_version_of_a_refusal_is_not_answered(server: Server, bad: PlainPeer) -> None:
    """Else two ends that refuse each other would do so for ever."""
    bad.send(pack_header(REFUSED, 77, 0, version=2))
    wait_dropped(server.messenger, "unknown_version")
    wait_processed_silently(bad)


def wait_processed_silently(bad: PlainPeer) -> None:
    """Waits until the server has taken all that the peer has sent before, and nothing but this is answered."""
    bad.send(b"", b"7-0-in order")
    assert bad.receive() == [b"server", b"", b"0-7-answer to in order"]


@pytest.mark.parametrize("kind", [CHALLENGE, RESPONSE, UNKNOWN, REFUSED, GOODBYE, 0, 8, 255])
def test_kinds_that_make_no_sense_at_a_listener(server: Server, bad: PlainPeer, kind: int) -> None:
    bad.send(pack_header(kind, secrets.randbits(63), secrets.randbits(63)) + bytes(100))
    wait_dropped(server.messenger, "stale_session")
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    if kind != GOODBYE:
        bad.send(raw.pack(kind, bytes(100)))
        raw.ask(b"after")


def test_data_of_an_unknown_session(server: Server, bad: PlainPeer) -> None:
    """It is answered with UNKNOWN, upon which an honest peer says HELLO."""
    before_count = len(server.received)
    bad.send(pack_header(DATA, 77, 88) + pack_data(1, 0, 0, 1, [5], b"0-0-x"))
    assert bad.receive() == [pack_header(UNKNOWN, 0, 77)]
    wait_dropped(server.messenger, "unknown_session")
    assert len(server.received) == before_count


@pytest.mark.parametrize(
    "make_body",
    [
        pytest.param(lambda next_number: pack_data(next_number, MAX_64, 0, 0, []), id="received_through"),
        pytest.param(lambda next_number: pack_data(next_number, 0, MAX_64, 0, []), id="processed_through"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 2, 0, []), id="processed before it was received"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, MAX_32, []), id="count"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, MAX_32, [5], b"0-0-x"), id="count of one"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, 257, [5] * 257, b"0-0-x" * 257), id="257"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, 1, [2**31 - 1], b"0-0-x"), id="size"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, 1, [MAX_32], b"0-0-x"), id="size of a large one"),
        pytest.param(lambda next_number: pack_data(next_number, 1, 1, 2, [2**31 - 1] * 2), id="sum of sizes"),
    ],
)
def test_absurd_numbers_in_data(server: Server, bad: PlainPeer, make_body: Callable[[int], bytes]) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    before_count = len(server.received)
    bad.send(raw.pack(DATA, make_body(raw.next_number)))
    wait_dropped(server.messenger, "malformed_frames")
    raw.ask(b"after")
    assert len(server.received) == before_count + 1


@pytest.mark.parametrize("first", [3, 2**63, MAX_64 - 1, MAX_64])
def test_number_of_a_message_that_is_far_off(server: Server, bad: PlainPeer, first: int) -> None:
    """It is a gap, so the sender is asked to send again from where it is."""
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    before_count = len(server.received)
    bad.send(raw.pack(DATA, pack_data(first, 1, 1, 1, [5], b"0-0-x")))
    frame, *_ = bad.receive()
    while not (frame[2] == DATA and frame[3] & RESEND):
        frame, *_ = bad.receive()
    assert struct.unpack_from("<QQ", frame, 20) == (2, 1)
    raw.ask(b"after")
    assert contents_of(server.received.wait(before_count + 1)[before_count:]) == [b"after"]


@pytest.mark.parametrize("first", [0, 1])
def test_duplicates_are_not_processed_again(server: Server, bad: PlainPeer, first: int) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    before_count = len(server.received)
    for _ in range(20):
        bad.send(raw.pack(DATA, pack_data(first, 1, 1, 1, [5], b"0-0-x")))
    raw.ask(b"after")
    assert contents_of(server.received.wait(before_count + 1)[before_count:]) == [b"after"]


def test_peer_that_exceeds_the_window(messenger: MessengerFactory, plain: PlainPeers, destination: To) -> None:
    server = messenger("server", limits=Limits(window_msgs=10))
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    dealer = plain.dealer(destination)
    raw = RawSession(dealer)
    raw.join()
    dealer.send(raw.pack(DATA, pack_data(1, 0, 0, 11, [5] * 11, b"0-0-x" * 11)))
    wait_dropped(server, "malformed_frames")
    raw.send_data([b"0-0-y"] * 10)
    assert contents_of(received.wait(10)) == [b"y"] * 10
    assert messenger().request(destination, b"z", remote_callback=ECHO).contents == b"z"


@pytest.mark.parametrize(("window_msgs", "window_bytes"), [(MAX_32, MAX_64), (0, 0), (1, 1)])
def test_absurd_windows(server: Server, bad: PlainPeer, window_msgs: int, window_bytes: int) -> None:
    raw = RawSession(bad)
    body = struct.pack("<QQIQQ", raw.nonce, raw.process, window_msgs, window_bytes, window_bytes) + b"raw"
    bad.send(raw.pack(HELLO, body))
    raw.hear_challenge()
    raw.join()
    before_count = len(server.received)
    raw.send_data([b"1-0-x", b"2-0-y"])
    server.received.wait(before_count + 2)


@pytest.mark.parametrize("length", [241, 300, 60_000])
def test_identity_that_is_too_long(server: Server, bad: PlainPeer, length: int) -> None:
    raw = RawSession(bad, identity=b"i" * length)
    raw.send_hello()
    wait_dropped(server.messenger, "malformed_frames")
    wait_processed_silently(bad)


def test_identity_that_is_not_utf8(server: Server, bad: PlainPeer) -> None:
    raw = RawSession(bad, identity=b"\xff\x00\xfe")
    raw.join()
    raw.ask(b"x")
    assert server.received.wait(3)[-1].sender == "0xff00fe"


def test_too_many_challenges_of_one_identity(server: Server, bad: PlainPeer) -> None:
    """They hold no more than four, and the other identities still get in."""
    for _ in range(50):
        RawSession(bad, identity=b"flood").send_hello()
    wait_dropped(server.messenger, "too_many_challenges", 46)


def test_wrong_nonce_establishes_nothing(server: Server, bad: PlainPeer) -> None:
    before_count = len(server.received)
    raw = RawSession(bad)
    raw.hear_challenge()
    for nonce in (0, raw.peer_nonce ^ 1, raw.nonce, MAX_64):
        bad.send(raw.pack(RESPONSE, struct.pack("<Q", nonce)))
        raw.send_data([b"0-0-x"])
        raw.next_number = 1
    wait_processed(server, bad)
    assert len(server.received) == before_count + 1
    raw.join()
    raw.ask(b"now")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x91" * 100_000, id="nested lists"),
        pytest.param(b"\x91\x94\x00\x01" + b"\x91" * 100_000, id="nested lists in place of a text"),
        pytest.param(b"\x81\xa0" * 100_000, id="nested maps"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a list of four billion"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four billion"),
        pytest.param(b"\xdb\xff\xff\xff\xff", id="a text of four billion"),
        pytest.param(b"\xdc\xff\xff" + b"\x94\x00\x01\xa0\xa0" * 65_535, id="65535 options"),
        pytest.param(b"\x91\x94\x00\x01\xa1\xff\xa0", id="a text that is not UTF-8"),
        pytest.param(b"\x91\x94\x00\xcb\x7f\xf0\0\0\0\0\0\0\xa0\xa0", id="infinity as a kind"),
        pytest.param(b"\x91\x94\xa1x\x01\xa0\xa0", id="a text as an index"),
        pytest.param(b"\xc1", id="a byte that MessagePack never uses"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x90x", id="more behind the list"),
    ],
)
def test_hostile_options(server: Server, bad: PlainPeer, block: bytes) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    before_count = len(server.received)
    body = pack_data(2, 1, 1, 1, [5], struct.pack("<I", len(block)) + block + b"0-0-x")
    # Of the processor, which a pause of the machine costs nothing.
    before_s = time.process_time()
    bad.send(raw.pack(DATA, body, OPTIONS))
    wait_dropped(server.messenger, "malformed_frames")
    assert time.process_time() - before_s < 1
    assert len(server.received) == before_count
    raw.ask(b"after")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x91\x94\xcc\xff\x03\xa0\xa0", id="an index beyond the batch"),
        pytest.param(b"\x91\x94\xd3\x80\0\0\0\0\0\0\0\x03\xa0\xa0", id="an index below 0"),
        pytest.param(b"\x91\x94\x00\xcc\xff\xa0\xa0", id="a kind of the future"),
        pytest.param(b"\x91\x95\x00\xcc\xff\xa0\xa0\x01", id="a field of the future"),
        pytest.param(b"\x90", id="no options"),
    ],
)
def test_options_that_say_nothing(server: Server, bad: PlainPeer, block: bytes) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    before_count = len(server.received)
    bad.send(raw.pack(DATA, pack_data(2, 1, 1, 1, [5], struct.pack("<I", len(block)) + block + b"0-0-x"), OPTIONS))
    raw.next_number = 3
    [message] = server.received.wait(before_count + 1)[before_count:]
    assert (message.contents, message.redelivered) == (b"x", False)
    raw.ask(b"after")


def test_large_contents_without_their_frames(server: Server, bad: PlainPeer) -> None:
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    large = 4 | 1 << 31
    bad.send(raw.pack(DATA, pack_data(2, 1, 1, 2, [large, large], b"0-0-0-0-")), b"only one")
    bad.send(raw.pack(DATA, pack_data(2, 1, 1, 1, [large], b"0-0-")), *[b"too many"] * 2)
    bad.send(raw.pack(DATA, pack_data(2, 1, 1, 1, [large], b"0-0-")), *[b"far too many"] * 1_000)
    wait_dropped(server.messenger, "malformed_frames", 3)
    raw.ask(b"after")


def test_random_frames(server: Server, bad: PlainPeer) -> None:
    """Whatever comes behind the right magic and version, for a session that lives."""
    raw = RawSession(bad)
    raw.join()
    raw.ask(b"before")
    for _ in range(2_000):
        kind, flags = secrets.choice([0, HELLO, CHALLENGE, RESPONSE, DATA, UNKNOWN, REFUSED, 9]), secrets.randbits(8)
        bad.send(raw.pack(kind, secrets.token_bytes(secrets.randbelow(100)), flags))
    source = 1024 + next(_numbers)
    bad.send(b"", b"%d-0-after" % source)
    while bad.receive()[-1] != b"0-%d-answer to after" % source:
        pass


# Listeners that are no such thing.


def test_connection_to_a_hostile_server(
    messenger: MessengerFactory, plain: PlainPeers, new_destination: NewDestination, transport: str
) -> None:
    """A session connection counts what makes no sense, and its messenger serves its others."""
    hostile_destination, good_destination = new_destination(transport), new_destination(transport)
    router = plain.router(hostile_destination)
    client = messenger("client")
    Server(messenger("server"), good_destination)
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(hostile_destination, b"x", on_error=errors, timeout=TIMEOUT_S)
    routing_id, hello = router.receive()
    incarnation, nonce = struct.unpack_from("<Q", hello, 4)[0], struct.unpack_from("<Q", hello, 20)[0]
    for frames in ([b"hello"], [b"", b"0-0-x"], [b"server", b"", b"0-1024-forged"], [b"M"], [b""]):
        router.send(routing_id, *frames)
    wait_dropped(client, "unknown_header", 4)
    wait_dropped(client, "malformed_frames", 1)
    for kind in (HELLO, RESPONSE, DATA, GOODBYE, 99):
        router.send(routing_id, pack_header(kind, 5, incarnation) + bytes(100))
    router.send(routing_id, pack_header(CHALLENGE, 5, incarnation + 1) + bytes(100))
    wait_dropped(client, "stale_session", 6)
    # A CHALLENGE with a wrong echo establishes nothing, nor does one without an identity.
    router.send(
        routing_id, pack_header(CHALLENGE, 5, incarnation) + struct.pack("<QQIQQ", nonce ^ 1, 1, 9, 9, 9) + b"id"
    )
    router.send(routing_id, pack_header(CHALLENGE, 5, incarnation) + struct.pack("<QQIQQ", nonce, 1, 9, 9, 9))
    wait_dropped(client, "malformed_frames", 2)
    assert client.request(good_destination, b"y").contents == b"answer to y"
    # The right one does, and the message comes.
    router.send(routing_id, pack_header(CHALLENGE, 5, incarnation) + struct.pack("<QQIQQ", nonce, 1, 9, 999, 9) + b"id")
    frame = hello
    while frame[2] != DATA:
        _, frame = router.receive()
    assert frame.endswith(b"-0-x")
    # Another process says that it is there now: nobody guesses what became of the message.
    router.send(routing_id, pack_header(GOODBYE, 5, incarnation) + struct.pack("<Q", 1))
    assert isinstance(errors.wait()[0], OutcomeUnknown)
    assert client.request(good_destination, b"z").contents == b"answer to z"
