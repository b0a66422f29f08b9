"""`ordering`: keys at work, and what waits for them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.link import Outlet
from messenger.message import Message
from messenger.ordering import KeyOrder


def message(number: int) -> Message:
    return Message(None, b"%d" % number, 0, 0, Outlet("listener", None), b"")


def test_a_key_that_cannot_be_hashed_is_an_error_and_nothing_else() -> None:
    order: KeyOrder[Message] = KeyOrder()
    key: Any = []
    with pytest.raises(TypeError):
        order.admit(key, message(1))
    assert order.admit(1, message(2))


@given(st.lists(st.integers(0, 4)), st.randoms())
def test_one_of_a_key_at_a_time_in_order_and_nothing_is_kept(keys: list[int], rng: Any) -> None:
    order: KeyOrder[Message] = KeyOrder()
    running: dict[int, Message] = {}
    began: dict[int, list[bytes]] = {}
    waiting_count = 0

    def begin(key: int, started: Message) -> None:
        assert key not in running
        running[key] = started
        began.setdefault(key, []).append(started.contents)

    def end_one() -> None:
        nonlocal waiting_count
        key = rng.choice(sorted(running))
        del running[key]
        following = order.release(key)
        if following is not None:
            waiting_count -= 1
            begin(key, following)

    for number, key in enumerate(keys):
        arrived = message(number)
        if order.admit(key, arrived):
            begin(key, arrived)
        else:
            assert key in running
            waiting_count += 1
        assert order.waiting_count == waiting_count
        if running and rng.random() < 0.5:
            end_one()
    while running:
        end_one()
    for key in set(keys):
        assert began[key] == [b"%d" % number for number, other in enumerate(keys) if other == key]
    assert order.waiting_count == 0
    assert not order._waiting


def test_what_waits_is_taken_and_nothing_follows() -> None:
    order: KeyOrder[int] = KeyOrder()
    assert [order.admit(key, number) for number, key in enumerate("aabab")] == [True, False, True, False, False]
    assert order.take_waiting() == [1, 3, 4]
    assert order.waiting_count == 0
    assert (order.release("a"), order.release("b")) == (None, None)
    assert order.admit("a", 5)
