"""Workers with an order: messages of one key one after the other, different keys at once."""

import threading

import pytest

from messenger import HandlerError, Limits, Message, Messenger
from tests.conftest import (
    Inbox,
    MessengerFactory,
    PlainPeers,
    contents_of,
    dropped,
    wait_dropped,
    wait_event,
    wait_until,
)

To = str | int
# These read, write and block in plain functions; coroutines have tests of their own.
pytestmark = pytest.mark.threads_only


def first_byte(message: Message) -> bytes:
    return message.contents[:1]


class Work:
    """Keeps what is at work by key, and lets each key go when it is told."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[bytes, int] = {}
        self.most: dict[bytes, int] = {}
        self.began: Inbox[Message] = Inbox()
        self.gates: dict[bytes, threading.Event] = {}

    def __call__(self, message: Message) -> None:
        key = first_byte(message)
        with self.lock:
            self.running[key] = self.running.get(key, 0) + 1
            self.most[key] = max(self.most.get(key, 0), self.running[key])
        self.began(message)
        if key in self.gates:
            wait_event(self.gates[key])
        with self.lock:
            self.running[key] -= 1
        message.reply(b"did " + message.contents)


def test_keys_run_at_once_and_messages_of_one_in_order(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    work = Work()
    work.gates = {b"a": threading.Event(), b"b": threading.Event()}
    listener = server.listen_for_connection(destination, work, workers=4, order_by=first_byte)
    responses: Inbox[Message] = Inbox()
    for contents in (b"a1", b"a2", b"a3", b"b1", b"b2", b"c1"):
        client.send_message(destination, contents, responses)
    # One of each key is at work, also behind those that wait; what has no gate is done.
    assert contents_of(responses.wait()) == [b"did c1"]
    assert sorted(contents_of(work.began.wait(3))) == [b"a1", b"b1", b"c1"]
    wait_until(lambda: listener.workers is not None and listener.workers.pending_count == 5)
    work.gates[b"b"].set()
    assert contents_of(responses.wait(3))[1:] == [b"did b1", b"did b2"]
    work.gates[b"a"].set()
    assert contents_of(responses.wait(6))[3:] == [b"did a1", b"did a2", b"did a3"]
    assert work.most == {b"a": 1, b"b": 1, b"c": 1}
    assert listener.workers is not None
    wait_until(lambda: listener.workers is not None and not listener.workers.pending_count)
    assert not listener.workers._order._waiting


def test_many_keys_from_many_clients(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    work = Work()
    server.listen_for_connection(destination, work, workers=4, order_by=first_byte)
    responses: Inbox[Message] = Inbox()
    for _ in range(2):
        client = messenger()
        for number in range(200):
            client.send_message(destination, b"%c%d" % (97 + number % 7, number), responses)
    responses.wait(400)
    assert set(work.most.values()) == {1}


def test_a_key_function_that_fails_is_told_to_the_sender(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()

    def key_of(message: Message) -> object:
        if message.contents == b"list":
            return []
        return int(message.contents)

    server.listen_for_connection(destination, Work(), workers=1, order_by=key_of)
    with pytest.raises(HandlerError, match="ValueError: invalid literal"):
        client.request(destination, b"x")
    with pytest.raises(HandlerError, match="TypeError: unhashable"):
        client.request(destination, b"list")
    assert client.request(destination, b"1").contents == b"did 1"
    assert server.statistics().callback_error_count == 2
    # They count as processed.
    wait_until(lambda: all(not s.unprocessed_count for s in client._exchange.handshake.sessions))


class Incomparable:
    """A key that can be hashed, and raises when it is compared with another of the same hash."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, _: object) -> bool:
        raise ArithmeticError("planted")


def test_a_key_that_cannot_be_compared_is_told_to_the_sender(messenger: MessengerFactory, destination: To) -> None:
    """It never counted as processed, so it filled the window, and a close waited for it."""
    server, client = messenger(), messenger(limits=Limits(window_msgs=7))
    work = Work()
    work.gates[b"1"] = threading.Event()
    server.listen_for_connection(destination, work, workers=2, order_by=lambda _: Incomparable())
    first: Inbox[Message] = Inbox()
    client.send_message(destination, b"1", first)
    work.began.wait()
    for _ in range(5):
        with pytest.raises(HandlerError, match="ArithmeticError: planted"):
            client.request(destination, b"2")
    work.gates[b"1"].set()
    assert contents_of(first.wait()) == [b"did 1"]
    wait_until(lambda: server._endpoints.are_idle())
    assert client.request(destination, b"3").contents == b"did 3"
    wait_until(lambda: all(not s.unprocessed_count for s in client._exchange.handshake.sessions))


def test_what_waits_for_its_key_runs_before_a_close(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    work = Work()
    work.gates = {b"a": threading.Event()}
    listener = server.listen_for_connection(destination, work, workers=2, order_by=first_byte)
    for number in range(5):
        client.send_message(destination, b"a%d" % number)
    work.began.wait()
    wait_until(lambda: listener.workers is not None and listener.workers.pending_count == 5)
    listener.close()
    work.gates[b"a"].set()
    assert contents_of(work.began.wait(5)) == [b"a%d" % number for number in range(5)]


def test_the_backlog_of_plain_peers_counts_what_waits_for_its_key(
    messenger: MessengerFactory, plain: PlainPeers
) -> None:
    server = messenger(limits=Limits(worker_backlog_max=3))
    work = Work()
    work.gates = {b"a": threading.Event()}
    listener = server.listen_for_connection(0, work, workers=2, order_by=first_byte)
    dealer = plain.dealer(listener.port)
    for number in range(6):
        dealer.send(b"", b"1024-0-a%d" % number)
        work.began.wait()
    wait_dropped(server, "workers_full", 2)
    work.gates[b"a"].set()
    assert contents_of(work.began.wait(4)) == [b"a0", b"a1", b"a2", b"a3"]
    assert dropped(server, "workers_full") == 2


def test_an_order_needs_workers(messenger: MessengerFactory, destination: To) -> None:
    server: Messenger = messenger()
    with pytest.raises(ValueError, match="order_by needs workers"):
        server.listen_for_connection(destination, Work(), order_by=first_byte)
    with pytest.raises(TypeError, match="order_by is 1, it must be callable"):
        server.listen_for_connection(destination, Work(), workers=1, order_by=1)  # type: ignore[arg-type]
