"""`timers`: each session gets attention within a tick after its instant, and costs nothing before it."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.exchange import Exchange
from messenger.limits import ACK_DELAY_S, TIMER_TICK_S, Limits
from messenger.link import FOREVER, Link
from messenger.session import Session
from messenger.timers import Timers
from messenger.wire import (
    Hello,
    decode_challenge,
    decode_header,
    encode_data,
    encode_hello,
    encode_response,
)

# Of floats, the last digit is open.
TICK_S = 1.01 * TIMER_TICK_S


def new_session() -> Session:
    return Session(1, "handle", None, Limits(), Random(0))


def test_a_session_is_due_within_a_tick_after_its_instant_and_once() -> None:
    timers, session = Timers(), new_session()
    assert timers.next_at == FOREVER
    timers.plan(session, 1.0)
    assert 1.0 < timers.next_at <= 1.0 + TICK_S
    assert timers.take_due(1.0) == []
    assert timers.take_due(1.0 + TICK_S) == [session]
    assert session.due_at == FOREVER
    assert timers.take_due(100.0) == []
    assert timers.next_at == FOREVER


@pytest.mark.parametrize("again_at", [0.5, 2.0, FOREVER])
def test_what_is_planned_anew_is_due_at_the_new_instant_only(again_at: float) -> None:
    timers, session = Timers(), new_session()
    timers.plan(session, 1.0)
    timers.plan(session, again_at)
    assert session.due_at == again_at
    assert timers.next_at == pytest.approx(again_at, abs=TICK_S)
    assert timers.take_due(1.5) == ([session] if again_at < 1.5 else [])
    assert timers.take_due(3.0) == ([session] if 1.5 < again_at < 3.0 else [])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 20.0) | st.just(FOREVER)), max_size=40))
def test_whatever_is_planned_nothing_is_early_late_or_lost(plans: list[tuple[int, float]]) -> None:
    timers, sessions = Timers(), [new_session() for _ in range(5)]
    wanted = dict.fromkeys(range(5), FOREVER)
    for index, due_at in plans:
        timers.plan(sessions[index], due_at)
        wanted[index] = due_at
    now, found = 0.0, dict.fromkeys(range(5), FOREVER)
    while timers.next_at < FOREVER:
        assert timers.next_at > now
        now = timers.next_at
        for session in timers.take_due(now):
            found[sessions.index(session)] = now
    for index, due_at in wanted.items():
        if due_at == FOREVER:
            assert found[index] == FOREVER
        else:
            assert due_at < found[index] <= due_at + TICK_S


class SilentLink(Link):
    """A listener's link that keeps the last frame that was sent to anybody."""

    frame = b""

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        self.frame = frames[0]
        return True

    def flush(self, now: float) -> None:
        """Send nothing but what sessions send."""


@pytest.mark.replaces_core
def test_idle_sessions_are_not_looked_at_when_another_one_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: Counter[Session] = Counter()
    original = Session.handle_deadline

    def handle_deadline(session: Session, now: float) -> None:
        looked_at[session] += 1
        original(session, now)

    monkeypatch.setattr(Session, "handle_deadline", handle_deadline)
    exchange = Exchange(Mock(), Limits(), print, b"server", Random(0))
    link = SilentLink(Mock(), lambda message: None)
    exchange.links.add(link)
    own = 0
    for number in range(1, 101):
        routing_id = b"peer%d" % number
        hello = Hello(7, 9, 100, 10_000, b"client")
        exchange.handshake.receive(link, routing_id, encode_hello(number, 0, hello), [], 0.0)
        own, nonce = decode_header(link.frame).source_incarnation, decode_challenge(link.frame).nonce
        exchange.handshake.receive(link, routing_id, encode_response(number, own, nonce), [], 0.0)
        exchange.flush(0.0)
    frame = encode_data(100, own, 0, (1, 0, 0, 1), [b"1024-0-x"])
    exchange.handshake.receive(link, b"peer100", frame, [], 1.0)
    exchange.flush(1.0)
    assert exchange.next_deadline_at == pytest.approx(1.0 + ACK_DELAY_S, abs=TICK_S)
    exchange.handle_deadline(exchange.next_deadline_at)
    assert list(looked_at.values()) == [1]
    assert next(iter(looked_at)).peer_incarnation == 100
