"""Messages and their outcomes: one body, run over tcp, ipc, inproc and a bare port."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from messenger import (
    ECHO,
    Connection,
    DeliveryError,
    HandlerError,
    LimitReached,
    Limits,
    Message,
    MessageTooLarge,
    Messenger,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    NewDestination,
    contents_of,
    dropped,
    wait_dropped,
    wait_event,
    wait_until,
)

To = str | int
MIB = 1024 * 1024


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


@pytest.fixture
def server(messenger: MessengerFactory, destination: To) -> Messenger:
    """Answers every message."""
    server = messenger("server")
    server.listen_for_connection(destination, answer)
    return server


@pytest.fixture
def client(messenger: MessengerFactory) -> Messenger:
    return messenger("client")


# Callbacks.


def test_callback_runs_on_response(server: Messenger, client: Messenger, destination: To) -> None:
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"record", responses, on_error=errors)
    [response] = responses.wait()
    assert response.contents == b"answer to record"
    assert response.sender == "server"
    assert response.messenger is client
    assert not response.redelivered
    assert client.request(destination, b"another").contents == b"answer to another"
    assert (len(responses), len(errors)) == (1, 0)


def test_callbacks_run_on_one_thread_of_the_messenger(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    threads: Inbox[tuple[str, int]] = Inbox()

    def slc(message: Message) -> None:
        threads(("server", threading.get_ident()))
        message.reply(b"")

    server.listen_for_connection(destination, slc)
    for _ in range(3):
        client.send_message(destination, b"", lambda _: threads(("client", threading.get_ident())))
    idents = threads.wait(6)
    assert len(set(idents)) == 2, idents
    assert threading.get_ident() not in {ident for _, ident in idents}


def test_each_response_runs_its_own_callback(server: Messenger, client: Messenger, destination: To) -> None:
    count = 2_000
    pairs: Inbox[tuple[int, bytes]] = Inbox()

    def make_callback(number: int) -> Callable[[Message], None]:
        return lambda response: pairs((number, response.contents))

    ids = {client.send_message(destination, b"%d" % number, make_callback(number)) for number in range(count)}
    assert len(ids) == count
    assert pairs.wait(count) == [(number, b"answer to %d" % number) for number in range(count)]
    assert client.statistics().outstanding_msgs == 0


def test_request_returns_response(server: Messenger, client: Messenger, destination: To) -> None:
    response = client.request(destination, b"record", timeout=TIMEOUT_S)
    assert response.contents == b"answer to record"
    assert response.sender == "server"


@pytest.mark.parametrize("has_slc", [False, True])
def test_echo(messenger: MessengerFactory, destination: To, has_slc: bool) -> None:
    server, client = messenger(), messenger("client")
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received if has_slc else None)
    assert client.request(destination, b"potato", remote_callback=ECHO).contents == b"potato"
    if has_slc:
        [message] = received.wait()
        assert (message.contents, message.sender, message.dest_callback_id) == (b"potato", "client", ECHO)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"again", responses, remote_callback=ECHO)
    assert contents_of(responses.wait()) == [b"again"]


def test_echo_at_the_end_of_a_connection(messenger: MessengerFactory, destination: To) -> None:
    """A listener asks for an echo, and the connection's callback runs too."""
    server, client = messenger(), messenger("client")
    hellos: Inbox[Message] = Inbox()
    asked: Inbox[Message] = Inbox()
    responses: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, hellos)
    client.send_message(client.make_connection(destination, callback=asked), b"hello")
    [hello] = hellos.wait()
    hello.reply(b"potato", responses, remote_callback=ECHO)
    assert contents_of(responses.wait()) == [b"potato"]
    assert contents_of(asked.wait()) == [b"potato"]


def test_server_loop_callback_runs_after_message_specific_callback(
    messenger: MessengerFactory, destination: To
) -> None:
    server, client = messenger("server"), messenger("client")
    order: Inbox[tuple[str, bytes]] = Inbox()
    listener = server.listen_for_connection(destination, lambda message: order(("slc", message.contents)))
    connection = client.make_connection(destination, callback=lambda message: message.reply(b"pong"))
    client.send_message(connection, b"hello")
    order.wait(1)
    server.send_message((listener, "client"), b"ping", lambda message: order(("msc", message.contents)))
    assert order.wait(3) == [("slc", b"hello"), ("msc", b"pong"), ("slc", b"pong")]


def test_registered_callback_runs_before_server_loop_callback(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    order: Inbox[str] = Inbox()

    def registered(message: Message) -> None:
        order("registered")
        message.reply(b"registered " + message.contents)

    server.register_callback(64, registered)
    server.register_callback(1023, lambda message: message.reply(b"the last"))
    server.listen_for_connection(destination, lambda _: order("slc"))
    assert client.request(destination, b"call", remote_callback=64).contents == b"registered call"
    assert order.wait(2) == ["registered", "slc"]
    assert client.request(destination, b"call", remote_callback=1023).contents == b"the last"


def test_registered_callback_runs_at_a_connection(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger("client")
    server.listen_for_connection(destination, lambda message: message.reply(b"run yours", remote_callback=99))
    ran: Inbox[Message] = Inbox()
    client.register_callback(99, ran)
    client.send_message(destination, b"go")
    assert contents_of(ran.wait()) == [b"run yours"]


def test_conversation_by_a_chain_of_replies(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    steps: Inbox[bytes] = Inbox()

    def continue_chain(message: Message) -> None:
        steps(message.contents)
        length = int(message.contents)
        if length < 20:
            message.reply(b"%d" % (length + 1), continue_chain)

    def start_chain(message: Message) -> None:
        # Later steps run their own callback at the server before this one.
        if message.contents == b"0":
            continue_chain(message)

    server.listen_for_connection(destination, start_chain)
    client.send_message(destination, b"0", continue_chain)
    assert steps.wait(21) == [b"%d" % step for step in range(21)]


def test_listener_starts_a_conversation(messenger: MessengerFactory, destination: To) -> None:
    server = messenger("server")
    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, hellos)
    received: dict[str, Inbox[Message]] = {}
    for name in ("one", "two"):
        received[name] = Inbox()
        client = messenger(name)
        client.send_message(client.make_connection(destination, callback=received[name]), b"hello")
    hellos.wait(2)
    for name, inbox in received.items():
        server.send_message((listener, name), name)
        [message] = inbox.wait()
        assert (message.contents, message.sender) == (name.encode(), "server")
    assert [len(inbox) for inbox in received.values()] == [1, 1]


def test_listener_shows_the_identity_it_was_given(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger("server"), messenger()
    listener = server.listen_for_connection(destination, answer, identity="front desk")
    assert listener.identity == "front desk"
    assert client.request(destination, b"").sender == "front desk"


def test_peer_that_is_not_connected_to_the_listener(
    messenger: MessengerFactory, destination: To, never: Inbox[object]
) -> None:
    server = messenger()
    listener = server.listen_for_connection(destination, None)
    errors: Inbox[DeliveryError] = Inbox()
    message_id = server.send_message((listener, "nobody"), b"", never, on_error=errors)
    [error] = errors.wait()
    assert isinstance(error, NotDelivered)
    assert error.message_id == message_id
    assert "nobody" in str(error)
    with pytest.raises(NotDelivered, match="nobody"):
        server.request((listener, "nobody"), b"")
    assert dropped(server, "peer_gone") == 2


# Contents.


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        pytest.param(b"", b"", id="empty"),
        pytest.param("", b"", id="empty text"),
        pytest.param("grüße ☃", "grüße ☃".encode(), id="text"),
        pytest.param(b"-" * 1_000, b"-" * 1_000, id="dashes"),
        pytest.param(b"-\0" * 70_000, b"-\0" * 70_000, id="dashes and NULs"),
        pytest.param(b"7-1-x", b"7-1-x", id="like a header"),
        pytest.param(bytearray(b"bytearray"), b"bytearray", id="bytearray"),
        pytest.param(memoryview(b"01234567").cast("I"), b"01234567", id="memoryview of integers"),
        pytest.param(bytes(range(256)) * 65_536, bytes(range(256)) * 65_536, id="16 MiB"),
    ],
)
def test_contents_arrive_unchanged(
    messenger: MessengerFactory, destination: To, contents: Any, expected: bytes
) -> None:
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    response = client.request(destination, contents, remote_callback=ECHO)
    assert response.contents == expected
    assert bytes(response.buffer) == expected
    assert contents_of(received.wait()) == [expected]


def test_contents_are_taken_at_the_call(server: Messenger, client: Messenger, destination: To) -> None:
    responses: Inbox[Message] = Inbox()
    contents = bytearray(b"before")
    client.send_message(destination, contents, responses)
    contents[:] = b"behind"
    assert contents_of(responses.wait()) == [b"answer to before"]


@pytest.mark.parametrize("contents", [None, 7, 1.5, ["a"], memoryview(b"0123")[::2]])
def test_contents_of_other_types_are_refused(client: Messenger, destination: To, contents: Any) -> None:
    with pytest.raises(TypeError):
        client.send_message(destination, contents)
    assert client.statistics().sent_msgs == 0


def test_message_too_large(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger(), messenger(limits=Limits(message_bytes_max=1_000))
    server.listen_for_connection(destination, answer)
    with pytest.raises(MessageTooLarge, match="1001 bytes, message_bytes_max is 1000"):
        client.send_message(destination, bytes(1_001), never, on_error=never)
    with pytest.raises(MessageTooLarge):
        client.request(destination, "é" * 501)
    assert client.statistics().outstanding_msgs == 0
    assert client.request(destination, bytes(990), remote_callback=ECHO).contents == bytes(990)


def test_message_too_large_for_its_receiver(messenger: MessengerFactory, destination: To) -> None:
    """Each is told of, and what follows arrives: ZeroMQ cut the link for the first one, again and again."""
    client = messenger()
    large = bytes(5_000_000)
    errors: Inbox[DeliveryError] = Inbox()
    connection = client.make_connection(destination)
    client.send_message(connection, large, lambda _: None, on_error=errors)
    messenger(limits=Limits(message_bytes_max=1_000_000)).listen_for_connection(destination, answer)
    [error] = errors.wait()
    assert isinstance(error, NotDelivered)
    assert "larger than message_bytes_max of the receiver, 1000000" in str(error)
    assert client.request(connection, b"small").contents == b"answer to small"
    with pytest.raises(MessageTooLarge, match=r"5000000 bytes, message_bytes_max of .* is 1000000"):
        client.request(connection, large)
    assert client.request(connection, b"small").contents == b"answer to small"


def test_response_too_large_for_its_receiver(messenger: MessengerFactory, destination: To) -> None:
    client = messenger(limits=Limits(message_bytes_max=1_000_000))
    messenger().listen_for_connection(
        destination, lambda message: message.reply(bytes(5_000_000) if message.contents == b"large" else b"small")
    )
    with pytest.raises(HandlerError, match="raised MessageTooLarge: contents are 5000000 bytes, message_bytes_max of"):
        client.request(destination, b"large")
    assert client.request(destination, b"").contents == b"small"


def test_batches_larger_than_the_largest_message(messenger: MessengerFactory, destination: To) -> None:
    """A batch is one frame, and libzmq cut off whoever sent one of more than twice `message_bytes_max`, for ever."""
    limits = Limits(message_bytes_max=1_000)
    received: Inbox[Message] = Inbox()
    messenger(limits=limits).listen_for_connection(destination, received)
    client = messenger(limits=limits)
    connection = client.make_connection(destination)
    for number in range(1_000):
        client.send_message(connection, b"%d" % number * 200)
    assert contents_of(received.wait(1_000)) == [b"%d" % number * 200 for number in range(1_000)]


def test_batches_of_long_error_texts(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    """The texts stand beside the messages in the same frame, so they count for it as well."""
    limits = Limits(message_bytes_max=1_000)

    def fail(message: Message) -> None:
        raise ValueError("ä" * 3_000)

    messenger(limits=limits).listen_for_connection(destination, fail)
    client = messenger(limits=limits)
    errors: Inbox[DeliveryError] = Inbox()
    for _ in range(1_000):
        client.send_message(destination, b"", never, on_error=errors)
    assert {type(error) for error in errors.wait(1_000)} == {HandlerError}


# Deadlines.


def test_nobody_is_there(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    client = messenger()
    errors: Inbox[DeliveryError] = Inbox()
    started_at = time.monotonic()
    message_id = client.send_message(destination, b"", never, on_error=errors, timeout=0.1)
    [error] = errors.wait()
    assert 0.1 <= time.monotonic() - started_at < TIMEOUT_S
    assert isinstance(error, NotDelivered)
    assert error.message_id == message_id
    with pytest.raises(NotDelivered):
        client.request(destination, b"", timeout=0.05)
    counts = client.statistics()
    assert (counts.not_delivered_msgs, counts.outcome_unknown_msgs) == (2, 0)
    assert (counts.outstanding_msgs, counts.queued_msgs) == (0, 0)
    assert len(errors) == 1


def test_message_without_callback_that_nobody_takes_is_counted(messenger: MessengerFactory, destination: To) -> None:
    client = messenger()
    client.send_message(destination, b"", timeout=0.02)
    wait_dropped(client, "not_delivered")
    assert client.statistics().queued_msgs == 0


@pytest.mark.threads_only
def test_the_deadline_s_error_says_what_is_known(messenger: MessengerFactory) -> None:
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        socket.create_server(("127.0.0.1", 0)) as mute,
        socket.socket() as nobody,
    ):
        nobody.bind(("127.0.0.1", 0))
        places = {
            f"127.0.0.1:{mute.getsockname()[1]}": "did not answer as ZeroMQ does, or is a stopped process",
            f"127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}": "did not answer as a messenger does",
            f"127.0.0.1:{nobody.getsockname()[1]}": "nobody was there to take it",
            "no-such-host.invalid:5": "to take it, or the name 'no-such-host.invalid' does not resolve",
        }
        errors: Inbox[DeliveryError] = Inbox()
        client = messenger()
        for place in places:
            client.send_message(f"tcp://{place}", b"", on_error=errors, timeout=0.3)
        texts = sorted(str(error).partition(" to tcp://")[2] for error in errors.wait(len(places)))
    for text, place in zip(texts, sorted(places), strict=True):
        assert text.startswith(f"{place}: not delivered before its deadline: ")
        assert places[place] in text


def test_expired_message_is_not_delivered_later(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"expires", on_error=errors, timeout=0.02)
    client.send_message(destination, b"waits", timeout=TIMEOUT_S)
    errors.wait()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    assert contents_of(received.wait()) == [b"waits"]


def test_peer_does_not_answer(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    client.request(destination, b"", remote_callback=ECHO)
    errors: Inbox[DeliveryError] = Inbox()
    message_id = client.send_message(destination, b"one", never, on_error=errors, timeout=0.1)
    [error] = errors.wait()
    assert isinstance(error, OutcomeUnknown)
    assert error.message_id == message_id
    with pytest.raises(OutcomeUnknown):
        client.request(destination, b"two", timeout=0.05)
    counts = client.statistics()
    assert (counts.not_delivered_msgs, counts.outcome_unknown_msgs, counts.outstanding_msgs) == (0, 2, 0)
    assert contents_of(received.wait(3)) == [b"", b"one", b"two"]


def test_late_response_is_dropped_and_counted(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    errors: Inbox[DeliveryError] = Inbox()
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"", responses, on_error=errors, timeout=0.3)
    [message] = received.wait()
    errors.wait()
    message.reply(b"late")
    wait_dropped(client, "late_response")
    assert (len(responses), len(errors)) == (0, 1)
    assert client.request(destination, b"next", remote_callback=ECHO).contents == b"next"


def test_second_response_is_dropped_and_counted(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()

    def answer_twice(message: Message) -> None:
        message.reply(b"first")
        message.reply(b"second")

    server.listen_for_connection(destination, answer_twice)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"", responses)
    wait_dropped(client, "late_response")
    assert contents_of(responses.wait()) == [b"first"]


def test_deadlines_are_told_in_time_and_once(messenger: MessengerFactory, destination: To) -> None:
    """Short deadlines come before long ones that were sent first."""
    client = messenger()
    told: Inbox[int] = Inbox()
    timeouts = (5 * TIMEOUT_S, 0.2, 4 * TIMEOUT_S, 0.1)
    numbers = {
        client.send_message(destination, b"", on_error=lambda error: told(error.message_id), timeout=timeout): timeout
        for timeout in timeouts
    }
    # A machine that pauses makes two of them due at once, and then their order means nothing.
    assert sorted(numbers[message_id] for message_id in told.wait(2)) == [0.1, 0.2]
    for message_id in sorted(numbers.keys() - told.wait()):
        assert client.cancel(message_id)
    assert sorted(told.wait(4)) == sorted(numbers)


def test_deadline_that_another_thread_set_while_a_request_led(messenger: MessengerFactory, destination: To) -> None:
    """The thread in `request` takes over the deadlines; when it leaves, somebody must still watch them."""
    server, client = messenger(), messenger()
    held: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, held)
    client.request(destination, b"warm up", remote_callback=ECHO)
    [_] = held.wait(1)
    requester = threading.Thread(target=client.request, args=(destination, b"held"))
    requester.start()
    held.wait(2)
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"", on_error=errors, timeout=0.5)
    held.wait(3)[1].reply(b"the request ends before the deadline")
    requester.join(TIMEOUT_S)
    assert isinstance(errors.wait(timeout=5)[0], OutcomeUnknown)


def test_deadline_of_a_request_while_another_waits_longer(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    held: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, held)
    outcomes: Inbox[str] = Inbox()

    def ask(name: str, timeout: float) -> None:
        try:
            outcomes(f"{name} {client.request(destination, name, timeout=timeout).contents.decode()}")
        except OutcomeUnknown:
            outcomes(f"{name} unknown")

    threads = [
        threading.Thread(target=ask, args=("long", TIMEOUT_S)),
        threading.Thread(target=ask, args=("short", 0.1)),
    ]
    threads[0].start()
    held.wait(1)
    threads[1].start()
    assert outcomes.wait(1) == ["short unknown"]
    held.wait(2)[0].reply(b"answered")
    assert outcomes.wait(2)[1] == "long answered"
    for thread in threads:
        thread.join(TIMEOUT_S)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_timeout_must_be_finite_and_positive(client: Messenger, destination: To, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        client.send_message(destination, b"", timeout=timeout)
    assert client.statistics().connection_count == 0


@pytest.mark.parametrize("callback_id", [-1, 2**64])
def test_remote_callback_must_be_an_id(client: Messenger, destination: To, callback_id: int) -> None:
    with pytest.raises(ValueError, match="remote_callback"):
        client.send_message(destination, b"", remote_callback=callback_id)


# Connections and threads.


def test_several_connections_to_one_target(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger("server"), messenger("client")
    senders: Inbox[str] = Inbox()

    def slc(message: Message) -> None:
        senders(message.sender)
        message.reply(message.contents)

    listener = server.listen_for_connection(destination, slc)
    received: list[Inbox[Message]] = [Inbox() for _ in range(3)]
    connections: list[Connection] = [
        client.make_connection(destination, callback=inbox, dialect="basic") for inbox in received
    ]
    assert [connection.routing_id for connection in connections] == ["client", "client#2", "client#3"]
    for number, connection in enumerate(connections):
        assert client.request(connection, b"%d" % number).contents == b"%d" % number
    assert client.request(destination, b"the kept one").contents == b"the kept one"
    assert senders.wait(4) == ["client", "client#2", "client#3", "client"]
    server.send_message((listener, "client#2"), b"for the second")
    assert contents_of(received[1].wait(2)) == [b"1", b"for the second"]
    # A number that is free again is given again.
    connections[1].close()
    again = client.make_connection(destination, dialect="basic")
    assert again.routing_id == "client#2"
    assert client.request(again, b"again").contents == b"again"


def test_destination_is_connected_once_and_kept(server: Messenger, client: Messenger, destination: To) -> None:
    for _ in range(5):
        client.request(destination, b"")
    assert client.statistics().connection_count == 1
    assert server.statistics().listener_count == 1


def test_two_messengers_in_one_process_ask_each_other(
    messenger: MessengerFactory, destination: To, new_destination: NewDestination, transport: str
) -> None:
    """Each is the other's server, and the requests cross."""
    one, two = messenger("one"), messenger("two")
    other_destination = new_destination(transport)
    one.listen_for_connection(destination, answer)
    two.listen_for_connection(other_destination, answer)
    senders: Inbox[str] = Inbox()

    def ask(who: Messenger, whom: To) -> None:
        for _ in range(100):
            senders(who.request(whom, b"").sender)

    threads = [
        threading.Thread(target=ask, args=(one, other_destination)),
        threading.Thread(target=ask, args=(two, destination)),
    ]
    for thread in threads:
        thread.start()
    assert sorted(senders.wait(200)) == ["one"] * 100 + ["two"] * 100
    for thread in threads:
        thread.join(TIMEOUT_S)


def test_64_threads_send_at_once(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    threads_count, each_count = 64, 50
    received: Inbox[bytes] = Inbox()
    responses: Inbox[bytes] = Inbox()

    def slc(message: Message) -> None:
        received(message.contents)
        message.reply(message.contents)

    server.listen_for_connection(destination, slc)
    start = threading.Barrier(threads_count)

    def send(thread: int) -> None:
        start.wait()
        for number in range(each_count):
            client.send_message(destination, b"%d %d" % (thread, number), lambda response: responses(response.contents))

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for inbox in (received, responses):
        orders: dict[int, list[int]] = {}
        for contents in inbox.wait(threads_count * each_count):
            thread_number, number = map(int, contents.split())
            orders.setdefault(thread_number, []).append(number)
        assert orders == {thread: list(range(each_count)) for thread in range(threads_count)}
    assert client.statistics().connection_count == 1


def test_threads_request_at_once(server: Messenger, client: Messenger, destination: To) -> None:
    answers: Inbox[bool] = Inbox()

    def ask(thread: int) -> None:
        for number in range(20):
            contents = b"%d %d" % (thread, number)
            answers(client.request(destination, contents).contents == b"answer to " + contents)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert answers.wait(320) == [True] * 320


@pytest.mark.threads_only
def test_sleeping_callback_does_not_hold_up_requests(server: Messenger, client: Messenger, destination: To) -> None:
    awake, asleep = threading.Event(), threading.Event()

    def sleep(_: Message) -> None:
        asleep.set()
        wait_event(awake)

    client.send_message(destination, b"", sleep)
    wait_event(asleep)
    try:
        for number in range(10):
            assert client.request(destination, b"%d" % number, timeout=5).contents == b"answer to %d" % number
    finally:
        awake.set()


# Restarts.


def ask_until_answered(client: Messenger, to: To, contents: bytes) -> None:
    """Asks until a response comes: the basic dialect loses what is on its way when a link breaks, and says so."""
    deadline_at = time.monotonic() + TIMEOUT_S
    while True:
        try:
            assert client.request(to, contents, timeout=0.5).contents == b"answer to " + contents
            return
        except DeliveryError:
            assert time.monotonic() < deadline_at, f"{to} does not answer after its restart"


def test_messenger_restarts_while_a_connection_exists(messenger: MessengerFactory, destination: To) -> None:
    client = messenger("client")
    for number in range(5):
        server = messenger("server")
        server.listen_for_connection(destination, answer)
        ask_until_answered(client, destination, b"%d" % number)
        server.close()
    assert client.statistics().connection_count == 1


def test_listener_is_closed_and_opened_again(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger("server"), messenger("client")
    for number in range(10):
        listener = server.listen_for_connection(destination, answer)
        ask_until_answered(client, destination, b"%d" % number)
        listener.close()
        assert listener.closed
        listener.close()
    assert server.statistics().listener_count == 0


def test_destination_is_free_at_once_after_a_close(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    for _ in range(50):
        server.listen_for_connection(destination, None).close()
    assert server.statistics().listener_count == 0


def test_message_waits_for_a_listener_that_comes_later(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"early", responses)
    wait_until(lambda: client.statistics().queued_msgs == 1)
    server.listen_for_connection(destination, answer)
    assert contents_of(responses.wait()) == [b"answer to early"]


# Limits.


def test_queue_is_full(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    client = messenger(limits=Limits(queue_msgs_max=5))
    for _ in range(5):
        client.send_message(destination, b"")
    started_at = time.monotonic()
    with pytest.raises(QueueFull):
        client.send_message(destination, b"", never, on_error=never, timeout=0.1)
    assert time.monotonic() - started_at >= 0.1
    counts = client.statistics()
    assert (counts.queued_msgs, counts.sent_msgs, counts.outstanding_msgs) == (5, 5, 0)


def test_queue_is_full_by_bytes(messenger: MessengerFactory, destination: To) -> None:
    client = messenger(limits=Limits(queue_bytes_max=1_000))
    client.send_message(destination, bytes(2_000))  # One always fits.
    with pytest.raises(QueueFull, match="stayed"):
        client.send_message(destination, b"", timeout=0.01)
    assert client.statistics().queued_msgs == 1


def test_sender_waits_for_room(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger(limits=Limits(queue_msgs_max=5))
    received: Inbox[Message] = Inbox()

    def send_all() -> None:
        for number in range(200):
            client.send_message(destination, b"%d" % number, timeout=TIMEOUT_S)

    sender = threading.Thread(target=send_all)
    sender.start()
    wait_until(lambda: client.statistics().queued_msgs == 5)
    server.listen_for_connection(destination, received)
    assert contents_of(received.wait(200)) == [b"%d" % number for number in range(200)]
    sender.join(TIMEOUT_S)


def test_too_many_outstanding(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    client = messenger(limits=Limits(outstanding_max=2))
    responses: Inbox[Message] = Inbox()
    for _ in range(2):
        client.send_message(destination, b"one", responses)
    with pytest.raises(LimitReached, match="outstanding_max"):
        client.send_message(destination, b"one more", never)
    client.send_message(destination, b"without a callback it may")
    server = messenger()
    server.listen_for_connection(destination, answer)
    responses.wait(2)
    assert client.request(destination, b"room again").contents == b"answer to room again"


def test_too_many_connections_and_listeners(messenger: MessengerFactory, destination: To) -> None:
    one = messenger(limits=Limits(connections_max=1, listeners_max=1))
    listener = one.listen_for_connection(destination, answer)
    with pytest.raises(LimitReached, match="listeners_max"):
        one.listen_for_connection("inproc://another", None)
    assert one.request(destination, b"").contents == b"answer to "
    with pytest.raises(LimitReached, match="connections_max"):
        one.make_connection(destination)
    listener.close()
    one.listen_for_connection("inproc://another", None)
