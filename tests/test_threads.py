"""`threads`: what a leader must have done before it sleeps, and whom it wakes; the rest: tests/transports."""

import gc
import statistics
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from messenger import (
    ECHO,
    CalledFromCallback,
    Cancelled,
    Connection,
    DeliveryError,
    DestinationInvalid,
    Message,
    Messenger,
    MessengerClosed,
    NotDelivered,
)
from messenger.exchange import Exchange
from messenger.limits import ACK_DELAY_S, FLUSH_S, Limits
from messenger.link import FOREVER, Link
from messenger.loop import State
from messenger.outgoing import Outgoing
from messenger.threads import ThreadLoop
from messenger.waiting import ThreadWaiter
from tests.conftest import TIMEOUT_S, Inbox, StandingClock, wait_until


class FakeRandom:
    def random(self) -> float:
        return 0.5

    def getrandbits(self, k: int, /) -> int:
        return 1


class FakeLink(Link):
    """Has input once; what comes then makes it ready to send."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__("connection", None)
        self.exchange = exchange
        self.flush_count = 0

    def receive(self) -> None:
        self.exchange.mark_dirty(self)

    def has_input(self) -> bool:
        return False

    def flush(self, now: float) -> None:
        self.flush_count += 1


class FakeWakeup:
    """Keeps whether something waited to be flushed when somebody went to sleep, and ends the wait."""

    def __init__(self, exchange: Exchange, waiter: ThreadWaiter) -> None:
        self.exchange = exchange
        self.waiter = waiter
        self.was_dirty: list[bool] = []

    def take_lead(self) -> None:
        return

    def give_lead_back(self) -> None:
        return

    def wait_input(self, timeout: float) -> list[int]:
        self.was_dirty.append(self.exchange.is_dirty)
        self.waiter.settle(None, None)
        return []

    def take_ready(self) -> list[int]:
        return []


def make_loop(waiter: ThreadWaiter) -> tuple[Any, Any, Any]:
    """Returns a loop that has not started, what it sleeps on, and a link."""
    exchange = Exchange("messenger", Limits(), lambda error: None, b"me", FakeRandom())
    endpoints: Any = SimpleNamespace(limits=Limits(), are_idle=lambda: True)  # It has none.
    loop = ThreadLoop("loop", exchange, endpoints, lambda: None)
    wakeup: Any = FakeWakeup(exchange, waiter)
    loop._wakeup = wakeup
    return loop, wakeup, FakeLink(exchange)


def test_a_leader_sends_what_input_made_ready_before_it_sleeps() -> None:
    """It once went to sleep on it, so that a first request on a new connection could wait for the next deadline."""
    waiter = ThreadWaiter()
    loop, wakeup, link = make_loop(waiter)
    loop.state = State.RUNNING
    loop._readable.add(link)
    with loop.lock:
        loop.await_outcome(waiter, link, time.monotonic() + 1)
    assert wakeup.was_dirty == [False]
    assert link.flush_count == 1


def test_requests_do_not_wake_the_thread_that_does_not_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    """They once did, each of them: the thread slept for ever, and so was late for each deadline that came up."""
    with Messenger("server") as server, Messenger("client") as client:
        listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b""))
        connection = client.make_connection(f"tcp://127.0.0.1:{listener.port}")
        client.request(connection, b"")
        wakeup = client._loop._wakeup
        wake, wake_count = wakeup.announce_calls, 0

        def count_and_wake() -> None:
            nonlocal wake_count
            wake_count += 1
            wake()

        monkeypatch.setattr(wakeup, "announce_calls", count_and_wake)
        began_at = time.monotonic()
        for _ in range(500):
            client.request(connection, b"")
        elapsed_s = time.monotonic() - began_at
        # Acknowledgements become due now and then, the more often the longer it takes.
        assert wake_count < 100 + 2 * elapsed_s / ACK_DELAY_S


# `wait`: a thread that takes an outcome in place of the messenger's own.

Holding = tuple[Messenger, Connection, list[Message]]


def test_what_a_thread_sends_behind_others_leaves_soon() -> None:
    """The loop's thread is woken for the first, and then looks by itself as long as they come."""
    entered, release = threading.Event(), threading.Event()

    def hold(_: Message) -> None:
        entered.set()
        release.wait(TIMEOUT_S)

    with Messenger("server") as server, Messenger("client") as client:
        connection = client.make_connection(server.listen_for_connection("tcp://127.0.0.1:0", hold).destination)
        client.send_message(connection, b"is in the callback, so nothing else is acknowledged")
        assert entered.wait(TIMEOUT_S)
        waits_s = []
        for number in range(60):
            time.sleep((0, FLUSH_S / 4, FLUSH_S, 4 * FLUSH_S)[number % 4])
            client.send_message(connection, b"behind it")
            began_at = time.monotonic()
            while client.statistics().queued_msgs:
                time.sleep(FLUSH_S / 10)
            waits_s.append(time.monotonic() - began_at)
        release.set()
    # A probe, which sends what waits as well, comes after more than 100.
    assert statistics.median(waits_s) < 20 * FLUSH_S


def test_what_was_sent_during_a_nap_leaves_before_callbacks_run() -> None:
    loop, _, link = make_loop(ThreadWaiter())
    loop.state = State.CLOSING  # So that one turn is all.
    loop._naps = True
    loop._exchange.mark_dirty(link)
    flush_counts: list[int] = []
    loop._exchange.calls.append((lambda _: flush_counts.append(link.flush_count), None))
    loop._serve_turns()
    assert flush_counts == [1]


def test_what_is_sent_when_a_callback_begins_leaves_before_that_returns() -> None:
    """The second message was left to the loop, which was in the callback, however long that ran."""
    entered, arrived = threading.Event(), threading.Event()
    has_arrived: list[bool] = []

    def serve(message: Message) -> None:
        if message.source_callback_id:
            message.reply(b"")
        elif message.contents == b"second":
            arrived.set()

    def hold(_: Message) -> None:
        entered.set()
        has_arrived.append(arrived.wait(TIMEOUT_S))

    with Messenger("server") as server, Messenger("client") as client:
        connection = client.make_connection(server.listen_for_connection("tcp://127.0.0.1:0", serve).destination)
        client.request(connection, b"")
        client.send_message(connection, b"", hold)
        assert entered.wait(TIMEOUT_S)
        client.send_message(connection, b"first")
        client.send_message(connection, b"second")
    assert has_arrived == [True]


def test_a_queue_that_could_be_sent_is_not_full() -> None:
    """While a callback ran, who waited for room had not sent what filled it."""
    entered, sent = threading.Event(), threading.Event()

    def hold(_: Message) -> None:
        entered.set()
        sent.wait(TIMEOUT_S)

    with Messenger("server") as server, Messenger("client", limits=Limits(queue_msgs_max=4)) as client:
        listener = server.listen_for_connection(
            "tcp://127.0.0.1:0", lambda message: message.source_callback_id and message.reply(b"")
        )
        connection = client.make_connection(listener.destination)
        client.request(connection, b"")
        client.send_message(connection, b"", hold)
        assert entered.wait(TIMEOUT_S)
        for _ in range(40):
            client.send_message(connection, b"", timeout=TIMEOUT_S / 2)
        sent.set()


def test_an_answer_that_waited_for_room_is_not_given_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There its id is that of another question."""
    with Messenger("server") as server, Messenger("client", limits=Limits(queue_msgs_max=4)) as client:
        asked: Inbox[Message] = Inbox()
        errors: Inbox[DeliveryError] = Inbox()
        listener = server.listen_for_connection(
            "tcp://127.0.0.1:0", lambda message: message.reply(b"why?", on_error=errors)
        )
        connection = client.make_connection(listener.destination, callback=asked)
        client.send_message(connection, b"hello")
        (question,) = asked.wait()
        session = connection.outlet

        def wait_room(*_: object) -> None:
            session.queue.clear()
            session.peer_incarnation += 1

        monkeypatch.setattr(client._loop, "wait_room", wait_room)
        session.queue.extend([Outgoing(0, b"", 0, FOREVER)] * 4)
        question.reply(b"because")
        assert not session.queue
        assert client.statistics().dropped["peer_gone"] == 1
        client.close(0)


def test_nothing_is_no_destination(holding: Holding) -> None:
    """It was taken for the connection that was sent to last, when that was closed."""
    client, connection, _ = holding
    for _ in range(2):
        with pytest.raises(DestinationInvalid):
            client.send_message(None, b"")  # type: ignore[arg-type]
        client.send_message(connection, b"")
    connection.close()
    with pytest.raises(DestinationInvalid):
        client.send_message(None, b"")  # type: ignore[arg-type]


def test_a_closed_connection_is_let_go() -> None:
    """The one that was sent to last was kept, and each one, compiled."""
    with Messenger("server") as server, Messenger("client") as client:
        listener = server.listen_for_connection("tcp://127.0.0.1:0", None)
        connections = [client.make_connection(listener.destination) for _ in range(3)]
        for connection in connections:
            client.request(connection, b"", remote_callback=ECHO)
            connection.close()
        gone = [weakref.ref(connection) for connection in connections]
        del connection, connections
        gc.collect()
        assert [each() for each in gone] == [None] * 3


@pytest.fixture
def holding() -> Iterator[Holding]:
    """A client whose server keeps messages, and answers what it kept when asked for `now`."""
    kept: list[Message] = []

    def keep(message: Message) -> None:
        if message.contents == b"now":
            kept.pop(0).reply(b"answer")
        else:
            kept.append(message)

    with Messenger("server") as server, Messenger("client") as client:
        listener = server.listen_for_connection("tcp://127.0.0.1:0", keep)
        yield client, client.make_connection(f"tcp://127.0.0.1:{listener.port}"), kept
        client.close(timeout=0)


class Ran(Inbox[Message | DeliveryError]):
    """Keeps outcomes, and the threads that it was told by."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def __call__(self, item: Message | DeliveryError) -> None:
        self.threads.append(threading.get_ident())
        super().__call__(item)


def wait_in_thread(client: Messenger, message_id: int) -> tuple[threading.Thread, Inbox[bool]]:
    returned: Inbox[bool] = Inbox()
    thread = threading.Thread(target=lambda: returned(client.wait(message_id, TIMEOUT_S)))
    thread.start()
    return thread, returned


def is_waited_for(client: Messenger, message_id: int) -> bool:
    return client._exchange.find_unclaimed(message_id) is None


def send_and_wait_in_thread(holding: Holding) -> tuple[int, Ran, threading.Thread, Inbox[bool]]:
    """Returns the id of a message that the other end holds, its outcome, and a thread that waits for it."""
    client, connection, kept = holding
    ran = Ran()
    message_id = client.send_message(connection, b"", ran)
    thread, returned = wait_in_thread(client, message_id)
    wait_until(lambda: is_waited_for(client, message_id) and kept)
    return message_id, ran, thread, returned


def test_a_connection_that_was_sent_to_last_is_refused_when_it_is_closed(holding: Holding) -> None:
    client, connection, _ = holding
    client.send_message(connection, b"the usual way")
    connection.close()
    with pytest.raises(MessengerClosed):
        client.send_message(connection, b"the usual way")


def test_a_callback_runs_in_the_thread_that_waits(holding: Holding) -> None:
    client, connection, _ = holding
    message_id, ran, thread, returned = send_and_wait_in_thread(holding)
    client.send_message(connection, b"now")
    assert returned.wait() == [True]
    assert ran.threads == [thread.ident]
    assert [outcome.contents for outcome in ran.wait() if isinstance(outcome, Message)] == [b"answer"]
    assert not client.wait(message_id), "it has its outcome"


def test_who_waits_in_vain_changes_nothing(holding: Holding) -> None:
    client, connection, kept = holding
    ran = Ran()
    message_id = client.send_message(connection, b"", ran)
    began_at = time.monotonic()
    assert not client.wait(message_id, 0.05)
    assert 0.05 <= time.monotonic() - began_at < TIMEOUT_S
    wait_until(lambda: kept)
    client.send_message(connection, b"now")
    ran.wait()
    assert ran.threads == [client._loop.thread_id]


def test_only_one_thread_waits_for_a_message(holding: Holding) -> None:
    client, connection, _ = holding
    message_id, ran, thread, returned = send_and_wait_in_thread(holding)
    assert not client.wait(message_id, 0)
    client.send_message(connection, b"now")
    assert returned.wait() == [True]
    assert ran.threads == [thread.ident]


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_an_error_is_told_in_the_thread_that_waits(holding: Holding, end: str) -> None:
    client, connection, _ = holding
    ran = Ran()
    message_id = client.send_message(connection, b"", on_error=ran)
    thread, returned = wait_in_thread(client, message_id)
    wait_until(lambda: is_waited_for(client, message_id))
    if end == "cancel":
        assert client.cancel(message_id)
    else:
        client.close(timeout=0)
    assert returned.wait() == [True]
    assert ran.threads == [thread.ident]
    if end == "cancel":
        assert type(ran.wait()[0]) is Cancelled


def test_a_deadline_ends_the_wait() -> None:
    ran = Ran()
    with Messenger() as client:
        message_id = client.send_message("tcp://127.0.0.1:9", b"anybody?", on_error=ran, timeout=0.05)
        assert client.wait(message_id)
    assert [type(outcome) for outcome in ran.wait()] == [NotDelivered]
    assert ran.threads == [threading.get_ident()]


@pytest.mark.parametrize("error", [ValueError("planted"), SystemExit(3), KeyboardInterrupt()])
def test_a_callback_that_raises_where_it_was_waited_for(
    holding: Holding, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    client, connection, kept = holding

    def fail(_: Message) -> None:
        raise error

    message_id = client.send_message(connection, b"", fail)
    _, returned = wait_in_thread(client, message_id)
    wait_until(lambda: is_waited_for(client, message_id) and kept)
    client.send_message(connection, b"now")
    assert returned.wait() == [True]
    assert "a callback raised" in caplog.text


def test_a_coroutine_that_nothing_runs_is_told_where_it_was_waited_for(
    holding: Holding, caplog: pytest.LogCaptureFixture
) -> None:
    client, connection, kept = holding

    async def coroutine_function(_: Message) -> None:
        raise AssertionError

    message_id = client.send_message(connection, b"", coroutine_function)
    _, returned = wait_in_thread(client, message_id)
    wait_until(lambda: is_waited_for(client, message_id) and kept)
    client.send_message(connection, b"now")
    assert returned.wait() == [True]
    assert "returned a coroutine, which nothing runs here; use AsyncMessenger" in caplog.text


def test_a_callback_must_not_wait(holding: Holding) -> None:
    client, connection, kept = holding
    raised: Inbox[CalledFromCallback] = Inbox()
    pending_id = client.send_message(connection, b"", lambda _: None)

    def wait(_: Message) -> None:
        try:
            client.wait(pending_id)
        except CalledFromCallback as error:
            raised(error)

    client.send_message(connection, b"", wait)
    wait_until(lambda: len(kept) == 2)
    kept.reverse()
    client.send_message(connection, b"now")
    raised.wait()


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_leader_whose_message_another_thread_ends_is_woken(
    tmp_path: Path, standing_clock: StandingClock, how: str
) -> None:
    """Over ipc, where nothing else wakes it for seconds."""
    with Messenger("server") as server, Messenger("client") as client:
        server.listen_for_connection(f"ipc://{tmp_path}/s", lambda message: None)
        connection = client.make_connection(f"ipc://{tmp_path}/s")
        client.request(connection, b"", remote_callback=ECHO)
        outcomes: list[object] = []
        message_id = client.send_message(connection, b"", outcomes.append, on_error=outcomes.append)
        ended: Inbox[float] = Inbox()

        def wait() -> None:
            client.wait(message_id)
            ended(standing_clock.now())

        thread = threading.Thread(target=wait)
        thread.start()
        # The last acknowledgement, and the time to ask for one, are over by then.
        time.sleep(1.2)
        ended_at = standing_clock.now()
        if how == "cancel":
            client.cancel(message_id)
        else:
            connection.close()
        assert ended.wait(timeout=20)[0] - ended_at < 0.5
        thread.join(TIMEOUT_S)
        assert len(outcomes) == 1
