"""What a thread does that waits for input: when it looks again and again before it sleeps."""

import os
import select
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest

from messenger import spin
from messenger.limits import SPIN_S
from messenger.transports import wakeup
from messenger.transports.wakeup import Wakeup


@pytest.fixture
def new_wakeup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Wakeup]]:
    """Makes one on a machine with so many CPUs."""
    made: list[Wakeup] = []

    def make(cpu_count: int) -> Wakeup:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpu_count)))
        made.append(Wakeup())
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("cpu_count", "spins"), [(1, [0.0] * 6), (2, [0.0, SPIN_S, 0.0, SPIN_S, SPIN_S, 0.0])])
def test_who_slept_shortly_looks_before_the_next_sleep(
    new_wakeup: Callable[[int], Wakeup], monkeypatch: pytest.MonkeyPatch, cpu_count: int, spins: list[float]
) -> None:
    """Not who only looks, and not on a single CPU, for which whoever is to answer would have to wait."""
    each = new_wakeup(cpu_count)
    takes_s = iter((0.0001, 0.0002, 0.0, 0.0001, 0.01, 0.0001))
    now = 0.0
    slept: list[float] = []

    def poll(epoll: object, timeout: float, spin_s: float) -> list[Any]:
        nonlocal now
        now += next(takes_s)
        slept.append(spin_s)
        return []

    monkeypatch.setattr(wakeup, "_poll", poll)
    monkeypatch.setattr(wakeup, "monotonic", lambda: now)
    for timeout in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        assert each.wait_input(timeout) == []
    assert slept == spins


def test_the_loops_thread_looks_if_callbacks_have_asked(
    new_wakeup: Callable[[int], Wakeup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server, whose callbacks only answer, sleeps at once."""
    each = new_wakeup(2)
    now = 0.0
    slept: list[float] = []

    def poll(epoll: object, timeout: float, spin_s: float) -> list[Any]:
        nonlocal now
        now += 0.0001
        slept.append(spin_s)
        return []

    monkeypatch.setattr(wakeup, "_poll", poll)
    monkeypatch.setattr(wakeup, "monotonic", lambda: now)
    for asks in (True, True, False, True):
        each.sleep(1.0, asks)
    assert slept == [0.0, SPIN_S, 0.0, SPIN_S]


@pytest.fixture
def sockets(
    new_wakeup: Callable[[int], Wakeup], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Wakeup, list[int], Callable[[float], list[int]]]]:
    """Gives two descriptors in place of sockets', and sleeps for so many seconds, then returns what has input."""
    each = new_wakeup(2)
    descriptors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for descriptor in descriptors:
        each.add(descriptor)
    now = 0.0
    monkeypatch.setattr(wakeup, "monotonic", lambda: now)
    poll = wakeup._poll

    def sleep(slept_s: float) -> list[int]:
        def poll_later(epoll: select.epoll, timeout: float, spin_s: float) -> list[tuple[int, int]]:
            nonlocal now
            now += slept_s
            return poll(epoll, 0, 0)

        with monkeypatch.context() as patch:
            patch.setattr(wakeup, "_poll", poll_later)
            each.sleep(1.0, asks=False)
        return each.take_ready()

    yield each, descriptors, sleep
    for descriptor in descriptors:
        os.close(descriptor)


def test_input_after_a_sleep_is_taken_for_that_of_the_usual_socket(
    sockets: tuple[Wakeup, list[int], Callable[[float], list[int]]],
) -> None:
    """As long as that was right; what is at another one is found in the next turn, which does not sleep."""
    _, (usual, other), sleep = sockets
    os.eventfd_write(usual, 1)
    assert [sleep(0.001) for _ in range(2)] == [[usual]] * 2
    os.eventfd_write(other, 1)
    assert sleep(0.001) == [usual]
    assert sorted(sleep(0.0)) == sorted([usual, other])
    os.eventfd_read(usual)
    assert sleep(0.001) == [other]


def test_the_usual_socket_keeps_no_other_waiting_for_long(
    sockets: tuple[Wakeup, list[int], Callable[[float], list[int]]],
) -> None:
    """Even if each turn seems to have slept, as on a machine that has no time for this thread."""
    _, (usual, other), sleep = sockets
    os.eventfd_write(usual, 1)
    for _ in range(2):
        sleep(0.001)
    os.eventfd_write(other, 1)
    turns = [sleep(0.001) for _ in range(wakeup.GUESSES_MAX + 1)]
    assert turns[:-1] == [[usual]] * wakeup.GUESSES_MAX
    assert sorted(turns[-1]) == sorted([usual, other])


def test_a_socket_that_is_gone_is_not_guessed(
    sockets: tuple[Wakeup, list[int], Callable[[float], list[int]]],
) -> None:
    """Another one may have its descriptor."""
    each, (usual, other), sleep = sockets
    os.eventfd_write(usual, 1)
    for _ in range(2):
        sleep(0.001)
    each.remove(usual)
    os.eventfd_write(other, 1)
    assert sleep(0.001) == [other]


def test_it_finds_what_comes_while_it_looks(
    new_wakeup: Callable[[int], Wakeup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sleep; it gives way to others in between."""
    each = new_wakeup(2)
    descriptor = os.eventfd(0)
    each.add(descriptor)
    monkeypatch.setattr(os, "sched_yield", lambda: os.eventfd_write(descriptor, 1))
    assert wakeup._poll(each._inner, 0.0, 10.0) == [(descriptor, select.EPOLLIN)]
    os.close(descriptor)


@pytest.mark.parametrize(("cpu_count", "turns"), [(1, [0, 0, 0, 0]), (2, [0, 2, 4, 0])])
def test_an_event_loop_stays_awake_for_an_answer_if_the_last_one_came_soon(
    monkeypatch: pytest.MonkeyPatch, cpu_count: int, turns: list[int]
) -> None:
    """So many turns it has without a sleep until the answer comes, or the time is over."""
    now = 0.0
    planned: list[partial[None]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpu_count)))
    monkeypatch.setattr(spin, "monotonic", lambda: now)
    event_loop = Mock(call_soon=lambda *call: planned.append(partial(*call)))
    staying = spin.Spin()
    had = []
    for answer_s in (SPIN_S / 2, SPIN_S / 2, 2 * SPIN_S, SPIN_S / 2):
        staying.begin(event_loop)
        ends_at, turn_count = now + answer_s, 0
        while now < ends_at:
            now += SPIN_S / 4
            if now >= ends_at:
                staying.end()
            for turn in planned[:]:
                planned.remove(turn)
                turn()
                turn_count += 1
        had.append(turn_count)
        assert not planned
    assert had == turns
