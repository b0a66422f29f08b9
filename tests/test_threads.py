"""`threads`: what a leader must have done before it sleeps, and whom it wakes; the rest: tests/transports."""

import time
from pathlib import Path
from typing import Any

from messenger import Messenger
from messenger.exchange import Exchange
from messenger.limits import ACK_DELAY_S, Limits
from messenger.link import Link
from messenger.loop import State
from messenger.threads import ThreadLoop
from messenger.waiting import ThreadWaiter


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


def test_a_leader_sends_what_input_made_ready_before_it_sleeps() -> None:
    """It once went to sleep on it, so that a first request on a new connection could wait for the next deadline."""
    exchange = Exchange("messenger", Limits(), lambda error: None, b"me", FakeRandom())
    endpoints: Any = None  # It has none.
    loop = ThreadLoop("loop", exchange, endpoints, lambda: None)
    waiter = ThreadWaiter()
    wakeup: Any = FakeWakeup(exchange, waiter)
    loop._wakeup = wakeup
    loop.state = State.RUNNING
    link: Any = FakeLink(exchange)
    loop._readable.add(link)
    with loop.lock:
        loop.await_outcome(waiter, link, time.monotonic() + 1)
    assert wakeup.was_dirty == [False]
    assert link.flush_count == 1


def switches_of(thread: int) -> int:
    """Returns how often a thread of this process has gone to sleep."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(status.split("voluntary_ctxt_switches:\t")[1].split()[0])


def test_requests_do_not_wake_the_thread_that_does_not_lead() -> None:
    """They once did, each of them: the thread slept for ever, and so was late for each deadline that came up."""
    with Messenger("server") as server, Messenger("client") as client:
        listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(b""))
        connection = client.make_connection(f"tcp://127.0.0.1:{listener.port}")
        client.request(connection, b"")
        thread = client._loop._own_thread.native_id or 0
        before_count = switches_of(thread)
        began_at = time.monotonic()
        for _ in range(500):
            client.request(connection, b"")
        elapsed_s = time.monotonic() - began_at
        assert switches_of(thread) - before_count < 100 + 2 * elapsed_s / ACK_DELAY_S
