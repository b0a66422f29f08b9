"""Sessions on real sockets: outcomes, restarts, back-pressure, and a link that is cut again and again."""

import contextlib
import gc
import logging
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import pytest

from messenger import (
    ECHO,
    Cancelled,
    DeliveryError,
    HandlerError,
    IdentityInUse,
    Limits,
    Message,
    Messenger,
    NoHandler,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from messenger.limits import HELLO_S_MAX
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    contents_of,
    dropped,
    free_port,
    wait_dropped,
    wait_event,
    wait_until,
)

To = str | int
KIB = 1024
MIB = 1024 * KIB


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


# Outcomes.


class PlantedError(Exception):
    """What a callback here raises."""


def test_handler_error(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger("server"), messenger("client")

    def fail(message: Message) -> None:
        raise PlantedError("no such record: " + message.contents.decode())

    server.listen_for_connection(destination, fail)
    errors: Inbox[DeliveryError] = Inbox()
    message_id = client.send_message(destination, b"7", never, on_error=errors)
    [error] = errors.wait()
    assert isinstance(error, HandlerError)
    assert (error.type_name, error.message_id) == ("PlantedError", message_id)
    assert "no such record: 7" in str(error)
    assert "Traceback" not in str(error)
    assert "test_sessions.py" not in str(error)
    with pytest.raises(HandlerError, match="no such record: 8"):
        client.request(destination, b"8")
    assert client.request(destination, b"goes on", remote_callback=ECHO).contents == b"goes on"
    # Nobody waits for this one, so nobody is told.
    client.send_message(destination, b"9")
    wait_until(lambda: server.statistics().callback_error_count == 4)
    assert (client.statistics().outstanding_msgs, len(errors)) == (0, 1)


def test_handler_error_of_a_callback_that_raises_after_its_reply(
    messenger: MessengerFactory, destination: To, never: Inbox[object]
) -> None:
    """The response came first, so it is the outcome."""
    server, client = messenger(), messenger()

    def reply_and_fail(message: Message) -> None:
        answer(message)
        raise PlantedError

    server.listen_for_connection(destination, reply_and_fail)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"x", responses, on_error=never)
    assert contents_of(responses.wait()) == [b"answer to x"]
    wait_until(lambda: dropped(client, "late_response") == 1)


def test_handler_error_of_a_worker(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()

    def fail(_: Message) -> None:
        raise PlantedError("in a worker")

    server.listen_for_connection(destination, fail, workers=2)
    for _ in range(3):
        with pytest.raises(HandlerError, match="in a worker"):
            client.request(destination, b"")


def test_handler_error_of_a_connections_callback(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger("client")

    def fail(_: Message) -> None:
        raise PlantedError("at a connection")

    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, hellos)
    client.send_message(client.make_connection(destination, callback=fail), b"hello")
    hellos.wait()
    with pytest.raises(HandlerError, match="at a connection"):
        server.request((listener, "client"), b"")


@pytest.mark.parametrize("text", ["\udcff", "x" * 100_000, "\0\n\r"], ids=["surrogate", "long", "controls"])
def test_handler_error_with_a_text_that_is_hard_to_send(
    messenger: MessengerFactory, destination: To, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    # What is logged goes into the test's report, and pytest-xdist cannot send a surrogate either.
    caplog.set_level(logging.CRITICAL + 1, logger="messenger")
    server, client = messenger(), messenger()

    def fail(_: Message) -> None:
        raise PlantedError(text)

    server.listen_for_connection(destination, fail)
    with pytest.raises(HandlerError) as raised:
        client.request(destination, b"")
    assert raised.value.type_name == "PlantedError"
    assert len(str(raised.value)) < 10_000


@pytest.mark.parametrize("remote_callback", [0, 2, 64, 1023])
def test_no_handler(messenger: MessengerFactory, destination: To, remote_callback: int, never: Inbox[object]) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, None)
    errors: Inbox[DeliveryError] = Inbox()
    message_id = client.send_message(destination, b"", never, on_error=errors, remote_callback=remote_callback)
    [error] = errors.wait()
    assert type(error) is NoHandler
    assert error.message_id == message_id
    server.register_callback(99, answer)
    assert client.request(destination, b"x", remote_callback=99).contents == b"answer to x"
    assert client.statistics().not_delivered_msgs == 1


def test_cancel(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger(), messenger()
    questions: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, questions)
    errors: Inbox[DeliveryError] = Inbox()
    message_id = client.send_message(destination, b"", never, on_error=errors)
    [question] = questions.wait()
    assert client.cancel(message_id)
    [error] = errors.wait()
    assert type(error) is Cancelled
    assert error.message_id == message_id
    assert not client.cancel(message_id)
    assert not client.cancel(message_id + 1)
    question.reply(b"late")
    wait_until(lambda: dropped(client, "late_response") == 1)
    assert (client.statistics().outstanding_msgs, len(errors)) == (0, 1)


def test_cancel_of_a_message_that_waits_for_a_listener(
    messenger: MessengerFactory, destination: To, never: Inbox[object]
) -> None:
    client = messenger()
    errors: Inbox[DeliveryError] = Inbox()
    assert client.cancel(client.send_message(destination, b"", never, on_error=errors))
    assert type(errors.wait()[0]) is Cancelled


def test_cancel_of_a_message_that_has_its_response(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, answer)
    responses: Inbox[Message] = Inbox()
    message_id = client.send_message(destination, b"", responses)
    responses.wait()
    assert not client.cancel(message_id)


# One identity.


def test_identity_in_use(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server = messenger("server")
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    listener = server.listen_for_connection(destination, note_and_answer)
    first = messenger("twin")
    asked: Inbox[Message] = Inbox()
    connection = first.make_connection(destination, callback=asked)
    assert first.request(connection, b"first").contents == b"answer to first"
    second = messenger("twin")
    errors: Inbox[DeliveryError] = Inbox()
    second.send_message(destination, b"second", never, on_error=errors)
    [error] = errors.wait()
    assert type(error) is IdentityInUse
    assert "twin" in str(error)
    with pytest.raises(IdentityInUse):
        second.request(destination, b"second")
    assert dropped(server, "identity_in_use") >= 1
    # The first is not harmed, and what is for its name goes to it alone.
    server.send_message((listener, "twin"), b"for the first")
    assert asked.wait(2)[1].contents == b"for the first"
    assert first.request(connection, b"again").contents == b"answer to again"
    assert contents_of(received.wait(2)) == [b"first", b"again"]


def test_identity_is_taken_over_when_the_first_is_gone(messenger: MessengerFactory, destination: To) -> None:
    server = messenger("server")
    server.listen_for_connection(destination, answer)
    for number in range(10):
        one = messenger("heir")
        assert one.request(destination, b"%d" % number, timeout=TIMEOUT_S).contents == b"answer to %d" % number
        one.close()
    assert dropped(server, "identity_in_use") == 0


def test_refused_identity_gets_in_when_it_is_free(messenger: MessengerFactory, destination: To) -> None:
    server, first, second = messenger("server"), messenger("twin"), messenger("twin")
    server.listen_for_connection(destination, answer)
    first.request(destination, b"")
    with pytest.raises(IdentityInUse):
        second.request(destination, b"")
    first.close()

    def is_served() -> bool:
        try:
            # Longer than a connection that was refused waits before it says HELLO again.
            return second.request(destination, b"x", timeout=HELLO_S_MAX + 1).contents == b"answer to x"
        except NotDelivered:
            return False

    wait_until(is_served)


def test_connections_of_one_messenger_share_its_identity(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger("server"), messenger("client")
    senders: Inbox[str] = Inbox()

    def note_and_answer(message: Message) -> None:
        senders(message.sender)
        answer(message)

    server.listen_for_connection(destination, note_and_answer)
    for _ in range(5):
        assert client.request(client.make_connection(destination), b"x").contents == b"answer to x"
    assert senders.wait(5) == ["client"] * 5


# Restarts.


@pytest.mark.threads_only
def test_restart_of_the_listeners_messenger(messenger: MessengerFactory, destination: To) -> None:
    """What was sent ends as `OutcomeUnknown` and runs nowhere else; what was queued goes to the successor."""
    client = messenger("client", limits=Limits(window_msgs=5))
    first = messenger("server")
    held: Inbox[Message] = Inbox()
    release = threading.Event()

    def hold(message: Message) -> None:
        held(message)
        wait_event(release)

    # In a worker, so that the messenger can close while it holds.
    first.listen_for_connection(destination, hold, workers=1)
    outcomes: Inbox[tuple[int, str]] = Inbox()

    def send(number: int) -> None:
        client.send_message(
            destination,
            b"%d" % number,
            lambda response: outcomes((number, response.contents.decode())),
            on_error=lambda error: outcomes((number, type(error).__name__)),
        )

    for number in range(10):
        send(number)
    held.wait(1)
    wait_until(lambda: client.statistics().queued_msgs == 5)
    try:
        first.close(timeout=0)
    finally:
        release.set()
    second = messenger("server")
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    second.listen_for_connection(destination, note_and_answer)
    told = outcomes.wait(10)
    assert sorted(told[:5]) == [(number, "OutcomeUnknown") for number in range(5)]
    assert told[5:] == [(number, f"answer to {number}") for number in range(5, 10)]
    assert contents_of(received.wait(5)) == [b"%d" % number for number in range(5, 10)]
    assert not any(message.redelivered for message in received.wait(5))
    assert len(outcomes) == 10


def test_redeliver_over_a_restart(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    client, first = messenger("client"), messenger("server")
    held: Inbox[Message] = Inbox()
    first.listen_for_connection(destination, held)
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    for number in range(6):
        # Every other one may be given to a successor.
        is_even = number % 2 == 0
        client.send_message(
            destination,
            b"%d" % number,
            responses if is_even else never,
            on_error=never if is_even else errors,
            redeliver=is_even,
        )
    client.send_message(destination, b"silent", redeliver=True)
    assert not any(message.redelivered for message in held.wait(7))
    first.close(timeout=0)
    second = messenger("server")
    received: Inbox[Message] = Inbox()

    def note_and_answer(message: Message) -> None:
        received(message)
        answer(message)

    second.listen_for_connection(destination, note_and_answer)
    assert contents_of(responses.wait(3)) == [b"answer to 0", b"answer to 2", b"answer to 4"]
    assert {type(error) for error in errors.wait(3)} == {OutcomeUnknown}
    for message in received.wait(3):
        assert message.redelivered
    client.send_message(destination, b"after", responses)
    responses.wait(4)
    contents = contents_of(received.wait(4))
    assert contents[-1] == b"after"
    assert set(contents[:-1]) - {b"silent"} == {b"0", b"2", b"4"}
    assert not received.wait(4)[-1].redelivered


def test_peer_of_a_listener_restarts(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    """What a listener has sent to a peer that is gone does not go to its successor."""
    server = messenger("server")
    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, hellos)
    asked: Inbox[Message] = Inbox()
    first = messenger("client")
    first.send_message(first.make_connection(destination, callback=asked), b"hello")
    [hello] = hellos.wait()
    errors: Inbox[DeliveryError] = Inbox()
    server.send_message((listener, "client"), b"for the first", never, on_error=errors)
    asked.wait()
    first.close(timeout=0)
    second = messenger("client")
    second.send_message(second.make_connection(destination, callback=answer), b"hello")
    assert isinstance(errors.wait()[0], OutcomeUnknown)
    hellos.wait(2)
    assert server.request((listener, "client"), b"x").contents == b"answer to x"
    # An answer to the first one's question is not for the second.
    hello.reply(b"for the first", never, on_error=errors)
    assert isinstance(errors.wait(2)[1], NotDelivered)


# Back-pressure.


def test_blocking_send_waits_for_a_slow_callback(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger(limits=Limits(queue_msgs_max=5, window_msgs=5))
    release = threading.Event()
    received: Inbox[Message] = Inbox()

    def hold(message: Message) -> None:
        wait_event(release)
        received(message)

    server.listen_for_connection(destination, hold)
    for number in range(5):
        client.send_message(destination, b"%d" % number)
    # The window takes what it can before the queue fills.
    wait_until(lambda: client.statistics().queued_msgs == 0)
    for number in range(5, 10):
        client.send_message(destination, b"%d" % number)
    started_at = time.monotonic()
    with pytest.raises(QueueFull):
        client.send_message(destination, b"too much", timeout=0.1)
    # uvloop's timers are rounded to milliseconds.
    assert 0.099 <= time.monotonic() - started_at < TIMEOUT_S
    assert client.statistics().sent_msgs == 10
    sent: Inbox[int] = Inbox()

    def send_one_more() -> None:
        sent(client.send_message(destination, b"10", timeout=TIMEOUT_S))

    sender = threading.Thread(target=send_one_more)
    sender.start()
    release.set()
    sent.wait()
    sender.join(TIMEOUT_S)
    assert contents_of(received.wait(11)) == [b"%d" % number for number in range(11)]


@pytest.mark.parametrize("workers", [0, 1])
def test_slow_callback_bounds_memory_and_loses_nothing(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    """40 MiB go to a callback that is slower than the sender; neither side ever holds more than the limits."""
    limits = Limits(window_msgs=16, window_bytes=MIB, queue_msgs_max=16, queue_bytes_max=MIB)
    server, client = messenger(limits=limits), messenger(limits=limits)
    size_bytes, count = 64 * KIB - 100, 640
    numbers: Inbox[int] = Inbox()
    peaks: list[int] = []

    def slow(message: Message) -> None:
        number = int(message.contents[:8])
        # Slow, by work and not by sleep: each takes about as long as sending several.
        for _ in range(20):
            message.contents.count(b"x")
        peaks.append(tracemalloc.get_traced_memory()[0])
        numbers(number)

    server.listen_for_connection(destination, slow, workers=workers)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            client.send_message(destination, b"%8d" % number + b"x" * size_bytes, timeout=TIMEOUT_S)
        assert numbers.wait(count, timeout=30) == list(range(count))
    finally:
        tracemalloc.stop()
    # The sender's queue and window, and the receiver's share of the window, twice for copies under way, and as much
    # again for threads that hold theirs while a busy machine lets others run: 8.3 MiB were seen.
    assert max(peaks) < 16 * MIB, f"{max(peaks)} bytes were held"


def test_one_slow_receiver_among_others(messenger: MessengerFactory, destination: To) -> None:
    """Its own sender gets `QueueFull`; the others are served as before."""
    slow_server, fast_server = messenger(), messenger()
    client = messenger(limits=Limits(queue_msgs_max=10, window_msgs=10))
    release = threading.Event()
    slow_server.listen_for_connection(destination, lambda _: wait_event(release))
    fast_destination = f"tcp://127.0.0.1:{free_port()}"
    fast_server.listen_for_connection(fast_destination, answer)
    try:
        for _ in range(10):
            client.send_message(destination, b"")
        # The window takes the first ten; the next stay in the queue.
        wait_until(lambda: client.statistics().queued_msgs == 0)
        for _ in range(10):
            client.send_message(destination, b"")
        with pytest.raises(QueueFull):
            client.send_message(destination, b"", timeout=0.05)
        for number in range(100):
            assert client.request(fast_destination, b"%d" % number).contents == b"answer to %d" % number
    finally:
        release.set()


# Links that break.


class CuttingProxy:
    """Forwards TCP both ways, and cuts each connection after so many bytes of either direction."""

    def __init__(self, target_port: int, cut_bytes: int, port: int = 0) -> None:
        self.cut_count = 0
        self._target_port = target_port
        self._cut_bytes = cut_bytes
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", port))
        self.port: int = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port), timeout=TIMEOUT_S)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._forward, args=(source, sink))
                self._threads.append(thread)
                thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        left_bytes = self._cut_bytes
        with contextlib.suppress(OSError):
            while data := source.recv(min(65_536, left_bytes)):
                sink.sendall(data)
                left_bytes -= len(data)
                if not left_bytes:
                    self.cut_count += 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._threads[0].join(TIMEOUT_S)
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        for end in self._sockets:
            end.close()


@pytest.fixture
def server_port() -> int:
    return free_port()


@pytest.fixture
def proxy(server_port: int) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(server_port, 300 * KIB)
    yield proxy
    proxy.close()


def test_20000_messages_over_a_link_that_is_cut(
    messenger: MessengerFactory, server_port: int, proxy: CuttingProxy, never: Inbox[object]
) -> None:
    """Each is processed exactly once and in order at the server, and so is each answer at the client."""
    count = 20_000
    server, client = messenger("server"), messenger("client")
    received: list[int] = []

    def note_and_answer(message: Message) -> None:
        received.append(int(message.contents[:8]))
        message.reply(message.contents[:8])

    server.listen_for_connection(f"tcp://127.0.0.1:{server_port}", note_and_answer)
    answers: Inbox[int] = Inbox()
    for number in range(count):
        client.send_message(
            f"tcp://127.0.0.1:{proxy.port}",
            b"%8d" % number + bytes(100),
            lambda response: answers(int(response.contents)),
            on_error=never,
            timeout=50,
        )
    assert answers.wait(count, timeout=50) == list(range(count))
    assert received == list(range(count))
    assert proxy.cut_count >= 5, "the link was hardly ever cut, so this proves nothing"
    assert client.statistics().outcome_unknown_msgs == 0


def test_a_process_that_is_taken_for_dead(messenger: MessengerFactory, server_port: int) -> None:
    """A proxy has ended, which looks like the end of the process behind it; with the next proxy the session goes on."""
    server, client = messenger("server"), messenger("client")
    held: Inbox[Message] = Inbox()
    server.listen_for_connection(f"tcp://127.0.0.1:{server_port}", held)
    errors: Inbox[DeliveryError] = Inbox()
    answers: Inbox[Message] = Inbox()
    proxy = CuttingProxy(server_port, 300 * KIB)
    place = f"tcp://127.0.0.1:{proxy.port}"
    try:
        client.send_message(place, b"held", answers, on_error=errors, timeout=3 * TIMEOUT_S)
        held.wait(1)
    finally:
        proxy.close()
    assert [type(error) for error in errors.wait(1)] == [OutcomeUnknown]
    held.wait(1)[0].reply(b"late")
    proxy = CuttingProxy(server_port, 300 * KIB, proxy.port)
    try:
        client.send_message(place, b"next", answers, on_error=errors, timeout=TIMEOUT_S)
        held.wait(2)[1].reply(b"in time")
        assert contents_of(answers.wait(1)) == [b"in time"]
        assert [message.contents for message in held.wait(2)] == [b"held", b"next"]
        assert held.wait(2)[1].number == 2, "the session did not go on"
        wait_dropped(client, "late_response", 1)
    finally:
        proxy.close()


def test_large_messages_over_a_link_that_is_cut(
    messenger: MessengerFactory, server_port: int, never: Inbox[object]
) -> None:
    """Contents with frames of their own are resent whole."""
    proxy = CuttingProxy(server_port, 3 * MIB)
    try:
        server, client = messenger("server", limits=Limits(window_bytes=2 * MIB)), messenger("client")
        received: Inbox[tuple[int, int]] = Inbox()
        server.listen_for_connection(
            f"tcp://127.0.0.1:{server_port}",
            lambda message: received((int(message.contents[:8]), len(message.contents))),
        )
        for number in range(60):
            client.send_message(f"tcp://127.0.0.1:{proxy.port}", b"%8d" % number + bytes(200 * KIB), timeout=TIMEOUT_S)
        expected = [(number, 200 * KIB + 8) for number in range(60)]
        assert received.wait(60, timeout=20) == expected
        assert proxy.cut_count >= 2
    finally:
        proxy.close()


def test_both_directions_over_a_link_that_is_cut(
    messenger: MessengerFactory, server_port: int, proxy: CuttingProxy
) -> None:
    """A listener's own messages survive the cuts too."""
    count = 3_000
    server: Messenger = messenger("server")
    client = messenger("client")
    at_server: Inbox[Message] = Inbox()
    at_client: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(f"tcp://127.0.0.1:{server_port}", at_server)
    connection = client.make_connection(f"tcp://127.0.0.1:{proxy.port}", callback=at_client)
    client.send_message(connection, b"hello")
    at_server.wait()

    def send_all() -> None:
        for number in range(count):
            server.send_message((listener, "client"), b"%8d" % number + bytes(400))

    sender = threading.Thread(target=send_all)
    sender.start()
    for number in range(count):
        client.send_message(connection, b"%8d" % number + bytes(400))
    sender.join(TIMEOUT_S)
    for inbox, first in ((at_server, 1), (at_client, 0)):
        numbers = [int(contents[:8]) for contents in contents_of(inbox.wait(first + count, timeout=30))[first:]]
        assert numbers == list(range(count)), Counter(numbers).most_common(3)
    assert proxy.cut_count >= 2
