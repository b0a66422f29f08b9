"""How connections, listeners and messengers end: one body, run over tcp, ipc, inproc and a bare port."""

import gc
import statistics
import sys
import threading
import time
import weakref

import pytest

from messenger import (
    DeliveryError,
    Limits,
    Message,
    Messenger,
    MessengerClosed,
    MessengerError,
    NotDelivered,
    OutcomeUnknown,
)
from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, contents_of, wait_event, wait_until

To = str | int


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


def is_waiting(thread: threading.Thread) -> bool:
    """Returns whether a thread waits for room, or for the event loop that does."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name in ("wait", "_await")


@pytest.mark.threads_only
def test_close_waits_for_a_callback_no_longer_than_it_was_told(
    messenger: MessengerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    one = messenger()
    began, go_on, told = threading.Event(), threading.Event(), Inbox[DeliveryError]()

    def block(_: Message) -> None:
        began.set()
        wait_event(go_on)

    listener = one.listen_for_connection(0, block)
    one.send_message(listener.port, b"", on_error=told)
    wait_event(began)
    began_at = time.monotonic()
    one.close(0.1)
    one._loop.end_at_exit()
    took_s = time.monotonic() - began_at
    go_on.set()
    assert took_s < 0.7
    assert caplog.text.count("a callback still runs after the close") == 1
    assert type(told.wait()[0]) is OutcomeUnknown  # Its turn comes when that callback has returned.


def test_close_twice(messenger: MessengerFactory, destination: To) -> None:
    one = messenger()
    one.listen_for_connection(destination, answer)
    assert one.request(destination, b"").contents == b"answer to "
    one.close()
    one.close()
    for call in (
        lambda: one.send_message(destination, b""),
        lambda: one.request(destination, b""),
        lambda: one.make_connection(destination),
        lambda: one.listen_for_connection(destination, None),
        one.__enter__,
    ):
        with pytest.raises(MessengerClosed):
            call()
    assert (one.statistics().connection_count, one.statistics().listener_count) == (0, 0)


def test_close_before_start(messenger: MessengerFactory, destination: To) -> None:
    one = messenger()
    one.close()
    with pytest.raises(MessengerClosed):
        one.listen_for_connection(destination, None)


def test_close_by_many_threads(messenger: MessengerFactory, destination: To) -> None:
    one = messenger()
    one.listen_for_connection(destination, answer)
    closed: Inbox[str] = Inbox()

    def close() -> None:
        one.close()
        closed(repr(one))

    for _ in range(8):
        threading.Thread(target=close).start()
    assert all("closed" in text for text in closed.wait(8))


def test_idle_messengers_close_fast(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    server.listen_for_connection(destination, answer)
    clients = [messenger() for _ in range(10)]
    for client in clients:
        client.request(destination, b"")
    took_s = []
    for each in (*clients, server):
        started_at = time.monotonic()
        each.close()
        took_s.append(time.monotonic() - started_at)
    # Each takes about a millisecond; half of them may meet a pause of the machine.
    assert statistics.median(took_s) < 0.2, took_s


def test_what_was_sent_before_close_arrives(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    client = messenger()
    for number in range(100):
        client.send_message(destination, b"%d" % number)
    client.close()
    assert contents_of(received.wait(100)) == [b"%d" % number for number in range(100)]


def test_large_message_sent_before_close_arrives(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    client = messenger()
    client.send_message(destination, bytes(16 * 1024 * 1024))
    client.close(timeout=TIMEOUT_S)
    assert received.wait()[0].contents == bytes(16 * 1024 * 1024)


def test_close_waits_for_responses(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, answer)
    responses: Inbox[Message] = Inbox()
    for _ in range(50):
        client.send_message(destination, b"", responses, on_error=never)
    client.close(timeout=TIMEOUT_S)
    assert len(responses) == 50


def test_close_tells_everybody_once(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    """Those whose message left hear `OutcomeUnknown`, the others `NotDelivered`; threads in `request` too."""
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    told: Inbox[tuple[str, type[MessengerError]]] = Inbox()

    def ask(name: str, to: To) -> None:
        try:
            client.request(to, b"")
        except MessengerError as error:
            told((name, type(error)))

    threads = [threading.Thread(target=ask, args=(f"request {number}", destination)) for number in range(3)]
    threads.append(threading.Thread(target=ask, args=("request to nobody", "inproc://nobody")))
    for thread in threads:
        thread.start()
    for name, to in (("sent", destination), ("to nobody", "inproc://nobody")):

        def on_error(error: DeliveryError, name: str = name) -> None:
            told((name, type(error)))

        client.send_message(to, b"", never, on_error=on_error)
    received.wait(4)
    wait_until(lambda: client.statistics().queued_msgs == 2)
    started_at = time.monotonic()
    client.close(timeout=0.1)
    assert time.monotonic() - started_at < TIMEOUT_S
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    expected = {
        ("sent", OutcomeUnknown),
        ("to nobody", NotDelivered),
        ("request to nobody", NotDelivered),
        *((f"request {number}", OutcomeUnknown) for number in range(3)),
    }
    assert set(told.wait(6)) == expected
    assert len(told) == 6
    assert client.statistics().outstanding_msgs == 0
    # The answers that come now find nobody.
    for message in received.wait(4):
        message.reply(b"late")


def test_closed_connection_tells_its_senders(
    messenger: MessengerFactory, destination: To, never: Inbox[object]
) -> None:
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()
    server.listen_for_connection(destination, received)
    connection = client.make_connection(destination)
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(connection, b"", never, on_error=errors)
    received.wait()
    connection.close()
    assert isinstance(errors.wait()[0], OutcomeUnknown)
    with pytest.raises(MessengerClosed):
        client.send_message(connection, b"")
    # The destination is connected anew.
    client.send_message(destination, b"again")
    assert contents_of(received.wait(2)) == [b"", b"again"]


def test_closed_kept_connection_is_made_anew(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, answer)
    for _ in range(3):
        response = client.request(destination, b"")
        assert response.contents == b"answer to "
        connection = response.link.handle
        connection.close()
        with pytest.raises(MessengerClosed):
            response.reply(b"")
    assert client.statistics().connection_count == 0


def test_closed_listener_tells_its_senders(messenger: MessengerFactory, destination: To, never: Inbox[object]) -> None:
    server, client = messenger(), messenger("client")
    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(destination, hellos)
    replies: Inbox[Message] = Inbox()
    client.send_message(client.make_connection(destination, callback=replies), b"hello")
    [hello] = hellos.wait()
    errors: Inbox[DeliveryError] = Inbox()
    hello.reply(b"", never, on_error=errors)
    listener.close()
    assert isinstance(errors.wait()[0], OutcomeUnknown)
    for to in (hello, (listener, "client")):
        with pytest.raises(MessengerClosed):
            server.send_message(to, b"")


def test_connection_closes_while_a_sender_waits_for_room(messenger: MessengerFactory, destination: To) -> None:
    client = messenger(limits=Limits(queue_msgs_max=1))
    connection = client.make_connection(destination)
    client.send_message(connection, b"")
    raised: Inbox[BaseException] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()

    def send() -> None:
        try:
            client.send_message(connection, b"", on_error=errors, timeout=3 * TIMEOUT_S)
        except BaseException as error:
            raised(error)

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: is_waiting(sender))
    connection.close()
    assert isinstance(raised.wait()[0], MessengerClosed)
    sender.join(TIMEOUT_S)
    assert len(errors) == 0
    assert client.statistics().outstanding_msgs == 0


def test_messenger_closes_while_a_sender_waits_for_room(messenger: MessengerFactory, destination: To) -> None:
    client = messenger(limits=Limits(queue_msgs_max=1))
    client.send_message(destination, b"")
    raised: Inbox[BaseException] = Inbox()

    def send() -> None:
        try:
            client.send_message(destination, b"", timeout=3 * TIMEOUT_S)
        except BaseException as error:
            raised(error)

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: is_waiting(sender))
    client.close(timeout=0.05)
    assert isinstance(raised.wait()[0], MessengerClosed)
    sender.join(TIMEOUT_S)


@pytest.mark.threads_only
@pytest.mark.parametrize("writes_stream", [False, True])
def test_close_ends_a_worker_that_waits_for_room(
    messenger: MessengerFactory, destination: To, writes_stream: bool
) -> None:
    """It may answer while the messenger closes, and tried again and again with the lock held, for ever."""
    server, client = messenger(limits=Limits(queue_msgs_max=5, window_msgs=8)), messenger()
    raised: Inbox[BaseException] = Inbox()
    workers: Inbox[threading.Thread] = Inbox()
    release = threading.Event()

    def write(message: Message) -> None:
        workers(threading.current_thread())
        try:
            while True:
                message.reply(b"", more=writes_stream)
        except BaseException as error:
            raised(error)

    server.listen_for_connection(destination, write, workers=1)
    stream = client.stream(destination, b"") if writes_stream else None
    if stream is not None:
        next(stream)
    else:
        client.send_message(destination, b"", lambda _: release.wait(3 * TIMEOUT_S))
    try:
        [worker] = workers.wait()
        wait_until(lambda: is_waiting(worker))
        server.close(timeout=0.1)
        assert isinstance(raised.wait()[0], MessengerClosed)
        wait_until(lambda: "closed" in repr(server))
    finally:
        release.set()
    if stream is not None:
        with pytest.raises(OutcomeUnknown):
            list(stream)


@pytest.mark.threads_only
def test_close_does_not_wait_for_a_stuck_callback(messenger: MessengerFactory, destination: To) -> None:
    """`close` promises to wait no longer than its timeout."""
    one = messenger()
    stuck, release = threading.Event(), threading.Event()

    def block(_: Message) -> None:
        stuck.set()
        release.wait(3 * TIMEOUT_S)

    one.listen_for_connection(destination, block)
    one.send_message(destination, b"")
    wait_event(stuck)
    started_at = time.monotonic()
    try:
        one.close(timeout=0.1)
        assert time.monotonic() - started_at < TIMEOUT_S
    finally:
        release.set()


def test_messenger_objects_of_another_messenger_are_refused(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    listener = server.listen_for_connection(destination, answer)
    connection = client.make_connection(destination)
    for to in (connection, (listener, "client")):
        other = server if to is connection else client
        with pytest.raises(ValueError, match="belongs to"):
            other.send_message(to, b"")
    assert client.request(connection, b"").contents == b"answer to "


class Component:
    """Knows its messenger, which knows its callbacks: the usual cycle."""

    def __init__(self, messenger: Messenger, destination: To) -> None:
        self.messenger = messenger
        self.connection = messenger.make_connection(destination)
        self.taken: list[object] = []

    def take(self, outcome: object) -> None:
        self.taken.append(outcome)


def test_a_closed_messenger_keeps_no_callback_alive(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    received: Inbox[Message] = Inbox()

    def keep(message: Message) -> None:
        if message.contents == b"answer":
            message.reply(b"")
        received(message)

    server.listen_for_connection(destination, keep)
    component = Component(client, destination)
    taken = component.taken
    for contents in (b"answer", b"keep", b"keep"):
        client.send_message(component.connection, contents, component.take, on_error=component.take)
    received.wait(3)
    wait_until(lambda: taken)
    client.close(0)
    wait_until(lambda: len(taken) == 3)
    kept = weakref.ref(component)
    del component
    gc.collect()
    assert kept() is None
