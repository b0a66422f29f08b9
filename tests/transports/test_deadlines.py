"""Deadlines and cancellations reach the receiver: one body, run over tcp, ipc, inproc and a bare port."""

import threading
import time
from collections.abc import Callable

import pytest

from messenger import Cancelled, DeliveryError, Limits, Message, Messenger, NotDelivered, OutcomeUnknown
from messenger.link import FOREVER
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    PlainPeers,
    contents_of,
    dropped,
    quickest,
    wait_dropped,
    wait_event,
    wait_until,
)

To = str | int
# "On the receiver within 100 ms".
NOTICED_S = 0.1


class Patient:
    """A callback that runs until its message is cancelled, and keeps when that was."""

    def __init__(self) -> None:
        self.began: Inbox[Message] = Inbox()
        self.noticed_at: Inbox[float] = Inbox()

    def __call__(self, message: Message) -> None:
        self.began(message)
        give_up_at = time.monotonic() + TIMEOUT_S
        while not message.cancelled:
            if time.monotonic() > give_up_at:
                return
            time.sleep(0.001)
        self.noticed_at(time.monotonic())


def let_pass(client: Messenger, other: Messenger) -> None:
    """Returns when what a client has sent is at the sockets that it is for; and if `other` is who has them, it is read.

    All sockets of the process have one thread of ZeroMQ's, which takes these round trips behind it.
    """
    listener = other.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b""))
    for _ in range(3):
        client.request(listener.destination, b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_callback_notices_the_deadline_of_the_sender(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    server, client = messenger(), messenger()
    patient = Patient()
    server.listen_for_connection(destination, patient, workers=workers)

    def late_s() -> float:
        began_count, expired_count = len(patient.began), dropped(server, "expired")
        deadline_at = time.monotonic() + 0.3
        with pytest.raises((OutcomeUnknown, NotDelivered)) as caught:
            client.request(destination, b"", timeout=0.3)
        is_gone = type(caught.value) is NotDelivered
        wait_until(lambda: is_gone or dropped(server, "expired") > expired_count or len(patient.began) > began_count)
        if len(patient.began) == began_count:
            return FOREVER  # The machine paused, and it was not started any more.
        assert "no response came before the deadline" in str(caught.value)
        message, noticed_at = patient.began.wait()[-1], patient.noticed_at.wait(began_count + 1)[-1]
        assert message.deadline is not None
        assert deadline_at <= min(message.deadline, noticed_at)
        return max(message.deadline, noticed_at) - deadline_at

    assert quickest(late_s, NOTICED_S) <= NOTICED_S


@pytest.mark.parametrize("workers", [0, 2])
def test_a_callback_notices_that_its_message_was_cancelled(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    server, client = messenger(), messenger()
    patient = Patient()
    server.listen_for_connection(destination, patient, workers=workers)
    errors: Inbox[DeliveryError] = Inbox()

    def late_s() -> float:
        count = len(errors) + 1
        message_id = client.send_message(destination, b"", on_error=errors)
        message = patient.began.wait(count)[-1]
        assert not message.cancelled
        cancelled_at = time.monotonic()
        assert client.cancel(message_id)
        assert type(errors.wait(count)[-1]) is Cancelled
        return patient.noticed_at.wait(count)[-1] - cancelled_at

    assert quickest(late_s, NOTICED_S) <= NOTICED_S


def test_a_cancellation_overtakes_a_full_window(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger(limits=Limits(window_msgs=1))
    patient = Patient()
    server.listen_for_connection(destination, patient)
    errors: Inbox[DeliveryError] = Inbox()
    first = client.send_message(destination, b"first", on_error=errors)
    for _ in range(3):
        client.send_message(destination, b"waits behind the window", on_error=errors, timeout=TIMEOUT_S)
    patient.began.wait()
    client.cancel(first)
    patient.noticed_at.wait()


def test_a_callback_notices_that_the_sender_has_ended(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    patient = Patient()
    server.listen_for_connection(destination, patient)
    client.send_message(destination, b"", on_error=lambda _: None)
    patient.began.wait()
    client.close(timeout=0)
    patient.noticed_at.wait()


class Blocked:
    """An SLC that blocks on the first message until it is let go, and keeps what began."""

    def __init__(self) -> None:
        self.began: Inbox[Message] = Inbox()
        self.go_on = threading.Event()

    def __call__(self, message: Message) -> None:
        self.began(message)
        wait_event(self.go_on)
        message.reply(b"answer to " + message.contents)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_past_its_deadline_when_its_turn_comes_is_not_started(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    server, client = messenger(), messenger()
    blocked = Blocked()
    server.listen_for_connection(destination, blocked, workers=workers)
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"first", responses)
    blocked.began.wait()
    # Deadlines of one frame differ.
    for number in range(20):
        timeout = 0.2 if number % 2 else 20.0
        client.send_message(destination, b"%d" % number, responses, on_error=errors, timeout=timeout)
    assert {type(error) for error in errors.wait(10)} == {OutcomeUnknown}
    # A loop that is busy reads late, and counts from then; but what tells it more must have come.
    # The loop of a server with threads of its own is free.
    let_pass(client, server if workers and messenger.driver == "thread" else messenger())
    blocked.go_on.set()
    expected = [b"first", *(b"%d" % number for number in range(0, 20, 2))]
    assert contents_of(responses.wait(11)) == [b"answer to " + contents for contents in expected]
    wait_dropped(server, "expired", 10)
    assert contents_of(blocked.began.wait(11)) == expected
    assert len(errors) == 10
    # They count as processed: the window is free.
    wait_until(lambda: client.make_connection(destination).outlet.is_quiet)
    assert client.request(destination, b"next").contents == b"answer to next"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_cancelled_before_its_turn_is_not_started(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    server, client = messenger(), messenger()
    blocked = Blocked()
    server.listen_for_connection(destination, blocked, workers=workers)
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"first", responses)
    blocked.began.wait()
    second = client.send_message(destination, b"second", responses, on_error=errors)
    client.send_message(destination, b"third", responses)
    wait_until(lambda: not client.statistics().queued_msgs)
    client.cancel(second)
    assert type(errors.wait()[0]) is Cancelled
    # The loop of a server with threads of its own is free.
    let_pass(client, server if workers and messenger.driver == "thread" else messenger())
    blocked.go_on.set()
    assert contents_of(responses.wait(2)) == [b"answer to first", b"answer to third"]
    assert contents_of(blocked.began.wait(2)) == [b"first", b"third"]
    wait_dropped(server, "expired", 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_asked_by_who_has_gone_is_not_started(
    messenger: MessengerFactory, destination: To, workers: int
) -> None:
    server, client = messenger(), messenger()
    began: Inbox[Message] = Inbox()

    def serve(message: Message) -> None:
        began(message)
        if message.contents == b"first":
            wait_until(lambda: message.cancelled)

    server.listen_for_connection(destination, serve, workers=workers)
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, b"first", on_error=errors)
    began.wait()
    client.send_message(destination, b"second", on_error=errors)
    client.send_message(destination, b"wants no response")
    client.close(0.3)  # So long its goodbye may take, on a busy machine too.
    assert {type(error) for error in errors.wait(2)} == {OutcomeUnknown}
    assert contents_of(began.wait(2)) == [b"first", b"wants no response"]
    wait_dropped(server, "expired", 1)


def test_what_wants_no_response_has_no_deadline(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()
    blocked = Blocked()
    server.listen_for_connection(destination, blocked)
    client.send_message(destination, b"first")
    blocked.began.wait()
    client.send_message(destination, b"second", timeout=0.2)
    wait_until(lambda: not client.statistics().queued_msgs)
    time.sleep(0.25)
    blocked.go_on.set()
    for message in blocked.began.wait(2):
        assert message.deadline is None
        assert not message.cancelled
    assert not dropped(server, "expired")


@pytest.mark.threads_only
def test_a_response_is_processed_however_late_its_sender_finds_it(messenger: MessengerFactory, destination: To) -> None:
    """The answer itself waits for an answer and is given up, but it is the outcome of our message all the same."""
    server, client = messenger(), messenger()
    errors: Inbox[DeliveryError] = Inbox()

    def ask_back(message: Message) -> None:
        message.reply(b"and you?", lambda _: None, on_error=errors, timeout=0.05)

    server.listen_for_connection(destination, ask_back)
    blocked = Blocked()
    client.send_message(destination, b"first", blocked)
    blocked.began.wait()
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, b"second", responses)
    errors.wait(2)
    blocked.go_on.set()
    [response] = responses.wait()
    wait_until(lambda: response.cancelled)
    assert not dropped(client, "expired")


@pytest.mark.parametrize("timeout", [30.0, 20.0, 5_000.0, 1e200])
def test_the_deadline_that_the_receiver_knows(messenger: MessengerFactory, destination: To, timeout: float) -> None:
    """30 s is the default, which does not travel; the longest do not fit the frame and count as none."""
    server, client = messenger(), messenger()
    messages: Inbox[Message] = Inbox()

    def answer(message: Message) -> None:
        messages(message)
        message.reply(b"")

    server.listen_for_connection(destination, answer)
    sent_at = time.monotonic()
    client.request(destination, b"", timeout=timeout)
    [message] = messages.wait()
    if timeout > 2**32:
        assert message.deadline is None
    else:
        assert message.deadline is not None
        assert sent_at + timeout <= message.deadline <= time.monotonic() + timeout + 0.001
    assert not message.cancelled


@pytest.mark.threads_only
def test_an_interrupted_request_is_cancelled_at_the_receiver(
    messenger: MessengerFactory, destination: To, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = messenger(), messenger()
    patient = Patient()
    server.listen_for_connection(destination, patient)
    client.make_connection(destination)  # The loop runs.
    lead: Callable[..., None] = client._loop._lead

    def interrupt(*arguments: object) -> None:
        if patient.began.wait(0):
            raise KeyboardInterrupt
        lead(*arguments)

    monkeypatch.setattr(client._loop, "_lead", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.request(destination, b"", timeout=TIMEOUT_S)
    patient.noticed_at.wait()
    assert client.statistics().outstanding_msgs == 0


def test_a_plain_peer_has_no_deadline(messenger: MessengerFactory, plain: PlainPeers) -> None:
    server: Messenger = messenger()
    messages: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(0, messages)
    plain.dealer(listener.port).send(b"", b"1024-0-x")
    [message] = messages.wait()
    assert message.deadline is None
    assert not message.cancelled


@pytest.mark.threads_only
def test_a_timeout_may_be_longer_than_a_lock_can_be_waited_for(messenger: MessengerFactory, destination: To) -> None:
    """Of several threads, those that do not lead got an `OverflowError`."""
    server, client = messenger(), messenger()

    def answer(message: Message) -> None:
        time.sleep(0.05)
        message.reply(b"answer")

    server.listen_for_connection(destination, answer, workers=3)
    answers: Inbox[Message] = Inbox()
    threads = [
        threading.Thread(target=lambda: answers(client.request(destination, b"", timeout=1e18))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert contents_of(answers.wait(3)) == [b"answer"] * 3
    for thread in threads:
        thread.join(TIMEOUT_S)
