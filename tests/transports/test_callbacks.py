"""What callbacks may do, and what happens when they fail: one body, run over tcp, ipc, inproc and a bare port."""

import threading
import time

import pytest

from messenger import (
    ECHO,
    CalledFromCallback,
    Connection,
    DeliveryError,
    DestinationInUse,
    HandlerError,
    Limits,
    Listener,
    Message,
    Messenger,
    MessengerClosed,
    NotDelivered,
    QueueFull,
)
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    NewDestination,
    PlainPeers,
    contents_of,
    dropped,
    wait_dropped,
    wait_event,
    wait_until,
)

To = str | int


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


# Callbacks that raise.

RAISED = [
    ValueError("planted"),
    SystemExit(3),
    # Under asyncio it is the user's Ctrl-C, and ends the program; see tests/test_aio.py.
    pytest.param(KeyboardInterrupt(), marks=pytest.mark.threads_only),
    MessengerClosed("planted"),
]


@pytest.mark.parametrize("raised", RAISED, ids=repr)
def test_server_loop_callback_raises(
    messenger: MessengerFactory, destination: To, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = messenger(), messenger()

    def fail(message: Message) -> None:
        if message.contents == b"fail":
            raise raised
        answer(message)

    server.listen_for_connection(destination, fail)
    client.send_message(destination, b"fail")
    assert client.request(destination, b"next").contents == b"answer to next"
    assert server.statistics().callback_error_count == 1
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None
    assert record.exc_info[1] is raised


@pytest.mark.parametrize("raised", RAISED, ids=repr)
def test_message_specific_callback_raises(
    server: Messenger, client: Messenger, destination: To, raised: BaseException
) -> None:
    def fail(_: Message) -> None:
        raise raised

    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"fail", fail, on_error=errors)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"next", responses)
    assert contents_of(responses.wait()) == [b"answer to next"]
    assert client.statistics().callback_error_count == 1
    assert len(errors) == 0


def test_on_error_raises(messenger: MessengerFactory, client: Messenger, destination: To) -> None:
    def fail(error: DeliveryError) -> None:
        raise error

    client.send_message(destination, b"", on_error=fail, timeout=0.01)
    wait_until(lambda: client.statistics().callback_error_count == 1)
    server = messenger()
    server.listen_for_connection(destination, answer)
    assert client.request(destination, b"next").contents == b"answer to next"


def test_registered_callback_raises_and_the_server_loop_callback_runs(
    messenger: MessengerFactory, destination: To
) -> None:
    server, client = messenger(), messenger()

    def fail(_: Message) -> None:
        raise SystemExit

    server.register_callback(100, fail)
    server.listen_for_connection(destination, answer)
    with pytest.raises(HandlerError) as raised:
        client.request(destination, b"call", remote_callback=100)
    assert raised.value.type_name == "SystemExit"
    # The basic dialect cannot tell; there the answer of the server-loop callback comes first.
    basic = client.make_connection(destination, dialect="basic")
    assert client.request(basic, b"call", remote_callback=100).contents == b"answer to call"
    wait_dropped(client, "late_response", 1)
    assert server.statistics().callback_error_count == 2


# What a callback may do.


@pytest.mark.threads_only
def test_request_in_a_callback_is_refused(server: Messenger, client: Messenger, destination: To) -> None:
    errors: Inbox[Exception] = Inbox()

    def ask(_: Message) -> None:
        try:
            client.request(destination, b"")
        except CalledFromCallback as error:
            errors(error)

    client.send_message(destination, b"", ask)
    errors.wait()
    assert client.statistics().sent_msgs == 1
    # The other messenger's thread is not the client's own.
    assert client.request(destination, b"next").contents == b"answer to next"


def test_request_of_another_messenger_in_a_callback(
    messenger: MessengerFactory, server: Messenger, destination: To, new_destination: NewDestination, transport: str
) -> None:
    """Only a messenger's own thread may not wait; `server` is not asked by its own."""
    middle, client = messenger(), messenger()
    front = new_destination(transport)
    back_office = messenger()

    def forward(message: Message) -> None:
        message.reply(back_office.request(destination, message.contents).contents)

    middle.listen_for_connection(front, forward)
    assert client.request(front, b"x").contents == b"answer to x"


def test_callback_sends(server: Messenger, client: Messenger, destination: To) -> None:
    responses: Inbox[Message] = Inbox()
    client.send_message(
        destination, b"1", lambda message: client.send_message(destination, message.contents, responses)
    )
    assert contents_of(responses.wait()) == [b"answer to answer to 1"]


def test_callback_opens_and_closes(
    messenger: MessengerFactory, destination: To, new_destination: NewDestination, transport: str
) -> None:
    """One server-loop callback listens, connects, registers, sends by all of that and closes it again."""
    server, client = messenger("server"), messenger("client")
    other_destination = new_destination(transport)
    opened: Inbox[Listener | Connection] = Inbox()

    def reorganise(message: Message) -> None:
        if message.contents == b"open":
            server.register_callback(100, lambda call: call.reply(b"registered"))
            opened(server.listen_for_connection(other_destination, answer))
            connection = server.make_connection(other_destination)
            opened(connection)
            server.send_message(connection, b"myself", lambda response: message.reply(response.contents))
        else:
            for endpoint in opened.wait(2):
                endpoint.close()
            message.reply(b"closed")

    server.listen_for_connection(destination, reorganise)
    assert client.request(destination, b"open").contents == b"answer to myself"
    assert client.request(other_destination, b"", remote_callback=100).contents == b"registered"
    assert (server.statistics().listener_count, server.statistics().connection_count) == (2, 1)
    assert client.request(destination, b"close").contents == b"closed"
    assert (server.statistics().listener_count, server.statistics().connection_count) == (1, 0)


def test_callback_answers_and_closes_its_own_listener(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    closed = threading.Event()

    def answer_and_close(message: Message) -> None:
        answer(message)
        listener.close()
        closed.set()
        with pytest.raises(MessengerClosed):
            message.reply(b"too late")

    listener = server.listen_for_connection(destination, answer_and_close)
    assert client.request(destination, b"last").contents == b"answer to last"
    wait_event(closed)
    assert server.statistics().listener_count == 0
    assert server.statistics().callback_error_count == 0

    def listens_again() -> bool:
        """Whoever does not await the close of an AsyncMessenger's listener finds its endpoints free a little later."""
        try:
            server.listen_for_connection(destination, answer)
        except DestinationInUse:
            return False
        return True

    wait_until(listens_again)
    assert messenger().request(destination, b"again").contents == b"answer to again"


def test_callback_closes_the_messenger_and_still_answers(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    results: Inbox[object] = Inbox()

    def close_and_answer(message: Message) -> None:
        server.close()
        server.close()
        answer(message)
        results(None)

    server.listen_for_connection(destination, close_and_answer)
    assert client.request(destination, b"last").contents == b"answer to last"
    assert results.wait() == [None]
    server.close()
    with pytest.raises(MessengerClosed):
        server.send_message(destination, b"")


def test_callback_finds_its_queue_full_at_once(messenger: MessengerFactory, destination: To) -> None:
    """It must not wait for the room that only its own thread can make."""
    client = messenger(limits=Limits(queue_msgs_max=2))
    seen: Inbox[float] = Inbox()

    def fill(error: DeliveryError) -> None:
        started_at = time.monotonic()
        assert isinstance(error, NotDelivered)
        for _ in range(2):
            client.send_message(destination, b"")
        with pytest.raises(QueueFull):
            client.send_message(destination, b"", timeout=TIMEOUT_S)
        seen(time.monotonic() - started_at)

    client.send_message(destination, b"", on_error=fill, timeout=0.01)
    assert seen.wait(timeout=2 * TIMEOUT_S)[0] < TIMEOUT_S
    assert client.statistics().callback_error_count == 0


def test_error_callback_that_tries_again_starves_nobody(messenger: MessengerFactory, destination: To) -> None:
    """A message that fails at once and is sent again at once must leave the loop time for others."""
    server, client = messenger(), messenger("client")
    stop = threading.Event()
    tries: Inbox[None] = Inbox()

    def send_again(_: DeliveryError | None) -> None:
        tries(None)
        if not stop.is_set():
            server.send_message((listener, "nobody"), b"", on_error=send_again)

    listener = server.listen_for_connection(destination, answer)
    send_again(None)
    try:
        tries.wait(10)
        assert client.request(destination, b"others", timeout=5).contents == b"answer to others"
    finally:
        stop.set()


def test_callback_replies_to_a_peer_that_is_gone(
    messenger: MessengerFactory, destination: To, never: Inbox[object]
) -> None:
    server = messenger()
    messages: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, messages)
    client = messenger()
    client.send_message(destination, b"", never)
    [message] = messages.wait()
    client.close(timeout=0)
    errors: Inbox[DeliveryError] = Inbox()

    def is_gone() -> bool:
        # Until the goodbye comes, a reply may still be sent, and then its outcome is unknown.
        message.reply(b"", never, on_error=errors, timeout=TIMEOUT_S)
        return dropped(server, "peer_gone") >= 1

    wait_until(is_gone)
    assert isinstance(errors.wait()[-1], NotDelivered)


# Workers.


@pytest.mark.threads_only
def test_workers_run_the_callback_side_by_side(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    together = threading.Barrier(4)

    def meet(message: Message) -> None:
        together.wait(TIMEOUT_S)
        answer(message)

    server.listen_for_connection(destination, meet, workers=4)
    responses: Inbox[Message] = Inbox()
    for number in range(4):
        client.send_message(destination, b"%d" % number, responses)
    assert sorted(contents_of(responses.wait(4))) == [b"answer to %d" % number for number in range(4)]


@pytest.mark.threads_only
def test_busy_workers_leave_the_loop_free(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    release = threading.Event()
    server.listen_for_connection(destination, lambda _: wait_event(release), workers=1)
    client.send_message(destination, b"blocks")
    try:
        for _ in range(3):
            assert client.request(destination, b"potato", remote_callback=ECHO).contents == b"potato"
    finally:
        release.set()


@pytest.mark.threads_only
def test_worker_may_request(messenger: MessengerFactory, destination: To, new_destination: NewDestination) -> None:
    server, client = messenger(), messenger()
    other_destination = new_destination("inproc")
    server.listen_for_connection(other_destination, answer)
    server.listen_for_connection(
        destination, lambda message: message.reply(server.request(other_destination, b"inner").contents), workers=2
    )
    assert client.request(destination, b"outer").contents == b"answer to inner"


def test_worker_raises(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()

    def fail(message: Message) -> None:
        if message.contents == b"fail":
            raise SystemExit
        answer(message)

    server.listen_for_connection(destination, fail, workers=1)
    client.send_message(destination, b"fail")
    assert client.request(destination, b"next").contents == b"answer to next"
    assert server.statistics().callback_error_count == 1


@pytest.mark.threads_only
def test_workers_are_full(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(limits=Limits(worker_backlog_max=2)), messenger()
    release = threading.Event()
    started: Inbox[bytes] = Inbox()

    def block(message: Message) -> None:
        started(message.contents)
        wait_event(release)

    server.listen_for_connection(destination, block, workers=1)
    # A session's window bounds its messages instead.
    connection = client.make_connection(destination, dialect="basic")
    client.send_message(connection, b"0")
    started.wait(1)
    for number in range(1, 6):
        client.send_message(connection, b"%d" % number)
    wait_dropped(server, "workers_full", 3)
    release.set()
    assert started.wait(3) == [b"0", b"1", b"2"]


@pytest.mark.threads_only
def test_worker_answers_while_the_messenger_closes(messenger: MessengerFactory, destination: To) -> None:
    """The close waits for workers, so what they answer must still leave."""
    server, client = messenger(), messenger()
    started, closing = threading.Event(), threading.Event()

    def slow(message: Message) -> None:
        started.set()
        wait_event(closing)
        answer(message)

    server.listen_for_connection(destination, slow, workers=1)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"last", responses)
    wait_event(started)
    closer = threading.Thread(target=server.close, args=(TIMEOUT_S,))
    closer.start()
    wait_until(lambda: "closing" in repr(server))
    closing.set()
    assert contents_of(responses.wait()) == [b"answer to last"]
    closer.join(TIMEOUT_S)
    assert server.statistics().callback_error_count == 0


# Responses, and the SLC.


def test_an_slc_that_is_not_for_responses(messenger: MessengerFactory, destination: To) -> None:
    """Their own callbacks run, and it does not: at a listener, at a connection, and for those that come late."""
    server, client = messenger("server"), messenger("client")
    came, told, responses = Inbox[Message](), Inbox[Message](), Inbox[Message]()
    listener = server.listen_for_connection(destination, came, responses=False)
    connection = client.make_connection(destination, callback=told, responses=False)
    client.send_message(connection, b"hello", lambda _: None)
    [hello] = came.wait()
    server.send_message((listener, "client"), b"asked", responses)
    [asked] = told.wait()
    asked.reply(b"answer")
    assert contents_of(responses.wait()) == [b"answer"]
    client.send_message(asked, b"again")
    wait_dropped(server, "late_response", 1)
    hello.reply(b"hello yourself")
    client.send_message(connection, b"last")
    assert contents_of(came.wait(2)) == [b"hello", b"last"]
    server.send_message((listener, "client"), b"last")
    assert contents_of(told.wait(2)) == [b"asked", b"last"]


def test_an_slc_with_workers_is_for_responses_too(client: Messenger, destination: To) -> None:
    with pytest.raises(ValueError, match="responses=False is not for workers"):
        client.listen_for_connection(destination, answer, workers=2, responses=False)


def test_a_plain_peers_responses_pass_the_slc_by(
    messenger: MessengerFactory, new_destination: NewDestination, plain: PlainPeers
) -> None:
    server = messenger("server")
    destination = str(new_destination("tcp"))
    came, responses = Inbox[Message](), Inbox[Message]()
    server.listen_for_connection(destination, came, responses=False)
    dealer = plain.dealer(destination)
    dealer.send(b"", b"0-0-hello")
    [hello] = came.wait()
    server.send_message(hello, b"asked", responses)
    _, _, asked = dealer.receive()
    dealer.send(b"", b"0-%b-answer" % asked.split(b"-")[0])
    assert contents_of(responses.wait()) == [b"answer"]
    dealer.send(b"", b"0-0-last")
    assert contents_of(came.wait(2)) == [b"hello", b"last"]
