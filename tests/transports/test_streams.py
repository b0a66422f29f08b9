"""Responses in many parts: one body, run over tcp, ipc, inproc and a bare port."""

import gc
import threading
import time
from collections.abc import Callable

import pytest

from messenger import (
    ECHO,
    CalledFromCallback,
    Cancelled,
    DeliveryError,
    HandlerError,
    Limits,
    Message,
    Messenger,
    NoHandler,
    NotDelivered,
    OutcomeUnknown,
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
    wait_until,
)

To = str | int
# These read, write and block in plain functions; coroutines have tests of their own.
pytestmark = pytest.mark.threads_only
# A stream may have a quarter of it under way.
WINDOW = Limits(window_msgs=40, window_bytes=4 * 1024 * 1024)


def count_to(message: Message) -> None:
    """Answers a number with as many parts."""
    count = int(message.contents)
    for number in range(1, count):
        message.reply(b"%d" % number, more=True)
    message.reply(b"%d" % count)


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(1, count + 1)]


@pytest.fixture
def server(messenger: MessengerFactory, destination: To) -> Messenger:
    server = messenger("server", limits=WINDOW)
    server.listen_for_connection(destination, count_to, workers=2)
    return server


@pytest.fixture
def client(messenger: MessengerFactory) -> Messenger:
    return messenger("client")


@pytest.mark.parametrize("count", [1, 2, 10, 11, 1_000])
def test_parts_come_in_order_and_end(server: Messenger, client: Messenger, destination: To, count: int) -> None:
    stream = client.stream(destination, b"%d" % count)
    assert contents_of(list(stream)) == numbers(count)
    assert list(stream) == []
    assert client.statistics().outstanding_msgs == 0
    assert not dropped(client, "late_response")
    # Another time, and several at once.
    streams = [client.stream(destination, b"3") for _ in range(2)]
    assert [contents_of(list(zip_parts)) for zip_parts in streams] == [numbers(3)] * 2


def test_an_answer_in_one_part_is_a_stream_of_one(server: Messenger, client: Messenger, destination: To) -> None:
    assert contents_of(list(client.stream(destination, b"1", remote_callback=ECHO))) == [b"1"]


class Writer:
    """An SLC that sends parts until nobody reads, and keeps how many it has sent and what it was told."""

    def __init__(self, contents: bytes = b"part", timeout: float = TIMEOUT_S) -> None:
        self.contents = contents
        self.timeout = timeout
        self.sent_count = 0
        self.told: Inbox[BaseException] = Inbox()
        self.messages: Inbox[Message] = Inbox()

    def __call__(self, message: Message) -> None:
        self.messages(message)
        try:
            while True:
                message.reply(self.contents, more=True, timeout=self.timeout)
                self.sent_count += 1
        except BaseException as error:
            self.told(error)
            raise

    def wait_held_up(self, count: int) -> None:
        """Waits until it has sent so many parts, and looks a while whether it sends more."""
        wait_until(lambda: self.sent_count >= count)
        time.sleep(0.05)
        assert self.sent_count == count


def test_a_writer_waits_for_a_slow_reader_and_others_do_not(
    messenger: MessengerFactory, client: Messenger, destination: To
) -> None:
    server = messenger(limits=WINDOW)
    writer = Writer()

    def dispatch(message: Message) -> None:
        if message.contents == b"stream":
            writer(message)
        else:
            message.reply(b"at once")

    server.listen_for_connection(destination, dispatch, workers=2)
    stream = client.stream(destination, b"stream")
    writer.wait_held_up(10)
    # The session goes on, in both directions.
    for _ in range(30):
        assert client.request(destination, b"").contents == b"at once"
    for _ in range(5):
        next(stream)
    writer.wait_held_up(15)
    assert contents_of([next(stream) for _ in range(100)]) == [b"part"] * 100
    stream.close()
    assert type(writer.told.wait()[0]) is Cancelled


def test_a_writer_of_large_parts_holds_no_more_than_the_window(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(limits=WINDOW), messenger()
    writer = Writer(bytes(600_000))
    server.listen_for_connection(destination, writer, workers=1)
    with client.stream(destination, b"") as stream:
        # A quarter of 4 MiB, and the part that exceeds it.
        writer.wait_held_up(2)
        for _ in range(20):
            assert len(next(stream).contents) == 600_000
    writer.told.wait()


def leave_by_break(client: Messenger, destination: To) -> None:
    for _ in client.stream(destination, b""):
        break


def leave_by_error(client: Messenger, destination: To) -> None:
    def read() -> None:
        for part in client.stream(destination, b""):
            raise LookupError(part)

    with pytest.raises(LookupError):
        read()
    gc.collect()


def leave_by_close(client: Messenger, destination: To) -> None:
    with client.stream(destination, b"") as stream:
        next(stream)
    assert list(stream) == []
    stream.close()


def leave_unread(client: Messenger, destination: To) -> None:
    stream = client.stream(destination, b"")
    wait_until(lambda: stream._parts.done)


def leave_in_a_cycle(client: Messenger, destination: To) -> None:
    """The garbage collector may find it while a lock is held."""
    stream = client.stream(destination, b"")
    next(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del cycle, stream
    with client._loop.lock:
        gc.collect()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_error, leave_by_close, leave_unread, leave_in_a_cycle],
    ids=lambda leave: leave.__name__,
)
def test_leaving_a_stream_ends_it_at_the_writer(
    messenger: MessengerFactory,
    client: Messenger,
    destination: To,
    leave: Callable[[Messenger, To], None],
    workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = messenger()
    told: Inbox[BaseException] = Inbox()

    def write(message: Message) -> None:
        message.reply(b"first", more=True)
        # On the loop's own thread no part may leave before the end of the turn.
        thread = threading.Thread(target=go_on, args=(message,))
        thread.start()

    def go_on(message: Message) -> None:
        wait_until(lambda: message.cancelled)
        try:
            message.reply(b"second", more=True)
        except Cancelled as error:
            told(error)

    server.listen_for_connection(destination, write, workers=workers)
    left_at = time.monotonic()
    leave(client, destination)
    [error] = told.wait()
    assert "nobody reads its response any more" in str(error)
    assert time.monotonic() - left_at < 5
    wait_until(lambda: client.statistics().outstanding_msgs == 0)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_callback_may_let_pass_that_nobody_reads(
    messenger: MessengerFactory, client: Messenger, destination: To, caplog: pytest.LogCaptureFixture
) -> None:
    server = messenger()
    writer = Writer()
    server.listen_for_connection(destination, writer, workers=1)
    leave_by_break(client, destination)
    writer.told.wait()
    server.close()
    assert server.statistics().callback_error_count == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_a_callback_that_raises_ends_the_stream_after_its_parts(
    messenger: MessengerFactory, client: Messenger, destination: To
) -> None:
    server = messenger()

    def fail(message: Message) -> None:
        message.reply(b"first", more=True)
        message.reply(b"second", more=True)
        raise LookupError("planted")

    server.listen_for_connection(destination, fail)
    stream = client.stream(destination, b"")
    assert contents_of([next(stream), next(stream)]) == [b"first", b"second"]
    with pytest.raises(HandlerError, match="LookupError: planted"):
        next(stream)
    assert list(stream) == []


def test_a_writer_that_ends_leaves_its_parts_and_an_unknown_outcome(
    messenger: MessengerFactory, client: Messenger, destination: To
) -> None:
    server = messenger()
    server.listen_for_connection(destination, lambda message: message.reply(b"first", more=True))
    stream = client.stream(destination, b"")
    assert next(stream).contents == b"first"
    server.close()
    with pytest.raises(OutcomeUnknown, match="the other end has closed"):
        next(stream)


def test_a_part_that_does_not_come_is_an_unknown_outcome(
    messenger: MessengerFactory, client: Messenger, destination: To
) -> None:
    server = messenger()
    messages: Inbox[Message] = Inbox()

    def begin(message: Message) -> None:
        message.reply(b"first", more=True)
        messages(message)

    server.listen_for_connection(destination, begin)
    stream = client.stream(destination, b"", timeout=0.3)
    [message] = messages.wait()
    assert message.deadline is None
    wait_until(lambda: client.statistics().received_msgs == 1)
    time.sleep(0.4)
    # Only the time in which the reader waits counts.
    assert next(stream).contents == b"first"
    began_at = time.monotonic()
    with pytest.raises(OutcomeUnknown, match="deadline"):
        next(stream)
    assert 0.29 <= time.monotonic() - began_at < TIMEOUT_S
    wait_until(lambda: message.cancelled)


def test_nobody_and_nothing_there(messenger: MessengerFactory, client: Messenger, destination: To) -> None:
    with pytest.raises(NotDelivered):
        next(client.stream(destination, b"", timeout=0.05))
    messenger().listen_for_connection(destination, None)
    with pytest.raises(NoHandler):
        next(client.stream(destination, b""))


def test_parts_for_who_asked_for_one_response_are_an_error(
    server: Messenger, client: Messenger, destination: To
) -> None:
    assert client.request(destination, b"1").contents == b"1"
    with pytest.raises(
        HandlerError, match=r"ValueError: the sender of .* asked for one response; it must use `stream`"
    ):
        client.request(destination, b"2")


def test_plain_peers_have_no_streams(messenger: MessengerFactory, plain: PlainPeers, never: Inbox[object]) -> None:
    server, client = messenger(), messenger()
    errors: Inbox[Exception] = Inbox()

    def write(message: Message) -> None:
        try:
            message.reply(b"", more=True)
        except ValueError as error:
            errors(error)

    listener = server.listen_for_connection(0, write)
    plain.dealer(listener.port).send(b"", b"1024-0-x")
    [error] = errors.wait()
    assert "asked for one response" in str(error)
    with pytest.raises(ValueError, match="speaks the basic dialect"):
        client.stream(client.make_connection(listener.port, dialect="basic"), b"")
    assert client.statistics().outstanding_msgs == 0


def test_a_callback_on_the_loops_thread_does_not_wait(
    messenger: MessengerFactory, client: Messenger, destination: To
) -> None:
    server = messenger(limits=WINDOW)
    server.listen_for_connection(destination, Writer())
    stream = client.stream(destination, b"")
    assert contents_of([next(stream) for _ in range(10)]) == [b"part"] * 10
    with pytest.raises(HandlerError, match=r"QueueFull: the reader .* has not taken 10 parts"):
        next(stream)


def test_a_part_that_finds_no_room_in_time(messenger: MessengerFactory, client: Messenger, destination: To) -> None:
    server = messenger(limits=WINDOW)
    writer = Writer(timeout=0.05)
    server.listen_for_connection(destination, writer, workers=1)
    stream = client.stream(destination, b"")
    [error] = writer.told.wait()
    assert type(error) is QueueFull
    assert "stayed so" in str(error)
    stream.close()


def test_what_parts_cannot_have(messenger: MessengerFactory, client: Messenger, destination: To) -> None:
    server = messenger()
    errors: Inbox[Exception] = Inbox()

    def write(message: Message) -> None:
        for options in ({"callback": print}, {"timeout": 0}, {"on_error": print}):
            try:
                message.reply(b"", more=True, **options)
            except (ValueError, TypeError) as error:
                errors(error)
        message.reply("text", more=True)
        message.reply(b"end", more=False)

    server.listen_for_connection(destination, write)
    assert contents_of(list(client.stream(destination, "text"))) == [b"text", b"end"]
    assert len(errors.wait(3)) == 3
    for options in ({"timeout": 0}, {"remote_callback": -1}):
        with pytest.raises(ValueError, match="it must be"):
            client.stream(destination, b"", **options)


def test_a_stream_in_a_callback_is_refused(
    messenger: MessengerFactory, server: Messenger, client: Messenger, destination: To
) -> None:
    errors: Inbox[DeliveryError | CalledFromCallback] = Inbox()
    stream = client.stream(destination, b"1")

    def read(_: Message) -> None:
        for ask in (lambda: client.stream(destination, b""), lambda: next(stream)):
            try:
                ask()
            except CalledFromCallback as error:
                errors(error)

    client.send_message(destination, b"1", read)
    assert len(errors.wait(2)) == 2
    assert contents_of(list(stream)) == [b"1"]


def test_a_stream_from_a_listener_to_its_peer(messenger: MessengerFactory, client: Messenger, destination: To) -> None:
    """The same in the other direction, and as an answer."""
    server = messenger()
    messages: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, messages)
    client.send_message(client.make_connection(destination, callback=count_to), b"")
    messages.wait()
    wait_until(lambda: server._exchange.handshake.find(listener, b"client") is not None)
    assert contents_of(list(server.stream((listener, "client"), b"3"))) == numbers(3)


def test_a_reader_is_interrupted(
    messenger: MessengerFactory, client: Messenger, destination: To, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = messenger()
    messages: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, messages)
    stream = client.stream(destination, b"")
    [message] = messages.wait()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client._loop, "_lead", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    wait_until(lambda: message.cancelled)
    with pytest.raises(Cancelled):
        next(stream)


def test_a_close_ends_a_reader_and_a_writer(
    messenger: MessengerFactory, client: Messenger, new_destination: NewDestination, transport: str
) -> None:
    server = messenger(limits=WINDOW)
    destination = new_destination(transport)
    writer = Writer()
    server.listen_for_connection(destination, writer, workers=1)
    stream = client.stream(destination, b"")
    writer.wait_held_up(10)
    # They must have arrived, or the close leaves them behind.
    wait_until(lambda: client.statistics().received_msgs >= 10)
    client.close(timeout=0)
    assert type(writer.told.wait()[0]) is Cancelled
    assert contents_of([next(stream) for _ in range(10)]) == [b"part"] * 10
    with pytest.raises(OutcomeUnknown, match="closed"):
        next(stream)
