"""`transports/inflow.py` alone, with a kernel and a socket that do as they are told, and a clock that jumps."""

from types import SimpleNamespace
from typing import Any

import pytest

from messenger.limits import INFLOW_UNWATCHED_BYTES_MAX, LOOK_S, MIB, TURN_LOOKS_MAX
from messenger.link import FOREVER
from messenger.transports.inflow import Inflow, Lookout

WHOLE_BYTES_MAX = 10 * MIB
HELD_BYTES_MAX = 40 * MIB
MUCH = INFLOW_UNWATCHED_BYTES_MAX + WHOLE_BYTES_MAX + 1
DAY_S = 86_400


class Situation:
    """A messenger with one socket; its connections are numbers, of which the kernel knows what they received."""

    def __init__(self, count: int = 1, unread_bytes_max: int = 1 << 60) -> None:
        self.now = 1_000.0
        self.received = dict.fromkeys(range(count), 0)
        self.unread = dict.fromkeys(range(count), 0)
        self.cookies = {descriptor: 100 + descriptor for descriptor in range(count)}
        self.cut: list[int] = []
        self.dropped: list[str] = []
        self.looked_count = 0
        link: Any = SimpleNamespace(
            watched={},
            taken_count=0,
            left_bytes=0,
            emptied_at=0.0,
            whole_bytes_max=WHOLE_BYTES_MAX,
            endpoint="tcp://here:1",
            port=1,
        )
        link.held_bytes_max = HELD_BYTES_MAX
        self.link = link
        self.touched_count = 0
        self.is_taken_over = False
        self.link.touch = self._touch
        self.link.inflows = {descriptor: Inflow(self.link, descriptor, self.now) for descriptor in range(count)}
        kernel: Any = SimpleNamespace(
            received_bytes=self._tell_received,
            unread_bytes=self.unread.__getitem__,
            cookie_of=self.cookies.__getitem__,
            cut=self._cut,
        )
        exchange: Any = SimpleNamespace(drop=self.dropped.append)
        self.lookout = Lookout(exchange, [self.link], kernel, unread_bytes_max)
        self.look_at = self.now

    def _touch(self, link: object) -> None:
        self.touched_count += 1

    def _tell_received(self, descriptor: int) -> int:
        self.looked_count += 1
        return self.received[descriptor]

    def _cut(self, descriptor: int, cookie: int, port: int) -> bool:
        is_same = self.cookies[descriptor] == cookie and not self.is_taken_over
        if is_same:
            self.cut.append(descriptor)
        return is_same

    def look(self, count: int = 1) -> None:
        for _ in range(count):
            self.now = max(self.now, self.look_at)
            self.look_at = self.lookout.look(self.now)

    def take_message(self, descriptor: int, size: int = MIB) -> None:
        """As `SocketLink` does: nobody asks by which connection a message came while none is watched."""
        if self.link.watched:
            self.link.taken_count += 1
            if descriptor in self.link.watched:
                self.link.watched[descriptor].note_message()
                self.link.watched[descriptor].note_frame(size)

    def note_empty(self) -> None:
        """As `SocketLink` does."""
        if self.link.watched:
            self.link.emptied_at = self.now + 0.001
            for inflow in list(self.link.watched.values()):
                if inflow.taken_bytes:
                    inflow.end_watch()

    def send_on(self, descriptor: int, steps: int = 20, is_emptied: bool = True) -> None:
        """Receives without end, and looks."""
        for _ in range(steps):
            self.received[descriptor] += MIB
            if is_emptied:
                self.note_empty()
            self.look()


@pytest.fixture
def one() -> Situation:
    situation = Situation()
    situation.look(2)
    return situation


def test_who_sends_without_end_is_cut(one: Situation, caplog: pytest.LogCaptureFixture) -> None:
    one.send_on(0, steps=14)
    assert one.cut == []
    one.send_on(0, steps=6)
    assert one.cut == [0]
    assert one.dropped == ["endless_message"]
    assert one.link.watched == {}
    assert [record.getMessage() for record in caplog.records] == [
        "! tcp://here:1: a peer was cut that sent more than 10485760 bytes of which no whole message could be taken"
    ]


def test_it_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    several = Situation(3)
    several.send_on(0)
    several.send_on(1)
    assert several.cut == [0, 1]
    assert len(caplog.records) == 1
    several.now += 60
    several.send_on(2)
    assert len(caplog.records) == 2


def test_whose_messages_end_is_not(one: Situation) -> None:
    """However many they are, and however few looks fall between them."""
    for _ in range(1_000):
        one.received[0] += 9 * MIB
        one.look()
        one.note_empty()
        one.take_message(0)
        one.note_empty()
        one.look()
    assert one.cut == []


def test_the_largest_message_may_take_its_time(one: Situation) -> None:
    for _ in range(5):
        for _ in range(1_000):
            one.received[0] += WHOLE_BYTES_MAX // 1_000
            one.note_empty()
            one.look()
        one.take_message(0)
    assert one.cut == []


def test_a_messenger_that_took_nothing_for_a_minute(one: Situation) -> None:
    """A callback held it up, and whole messages wait; they are more than one may have, and all are taken in the end."""
    one.received[0] += 100 * MUCH
    one.now += 60
    one.look(5)
    one.take_message(0)
    one.note_empty()
    one.look(5)
    # The same again, under the watch.
    one.received[0] += MUCH
    one.look()
    assert one.link.watched
    one.received[0] += 100 * MUCH
    one.now += 60
    one.look(5)
    assert one.cut == []
    one.take_message(0)
    one.note_empty()
    one.look(5)
    assert one.cut == []


def test_who_is_too_far_ahead_is_cut(one: Situation, caplog: pytest.LogCaptureFixture) -> None:
    """It sends whole messages, three times as fast as they are taken."""
    for _ in range(100):
        one.received[0] += 3 * MIB
        one.take_message(0)
        one.look()
        if one.cut:
            break
    waiting_bytes = one.received[0] * 2 // 3
    assert HELD_BYTES_MAX < waiting_bytes < HELD_BYTES_MAX + 2 * INFLOW_UNWATCHED_BYTES_MAX
    assert one.dropped == ["too_far_ahead"]
    assert [record.getMessage() for record in caplog.records] == [
        "! tcp://here:1: a peer was cut that sent more than 41943040 bytes before they could be taken"
    ]


def test_what_waits_of_all_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Parts of messages of which none is too long alone; who has sent less than the others stays."""
    several = Situation(12, unread_bytes_max=64 * MIB)
    several.look(2)
    for step in range(7):
        for descriptor in range(12):
            several.received[descriptor] += MIB if descriptor < 10 or step < 4 else 0
        several.note_empty()
        several.look(2)
    assert several.cut == []
    for _ in range(4):
        for descriptor in range(10):
            several.received[descriptor] += MIB
        several.note_empty()
        several.look(2)
    assert set(several.dropped) == {"too_far_ahead"}
    assert 1 <= len(several.cut) < 10
    assert not {10, 11} & set(several.cut)
    assert sum(inflow.held_bytes for inflow in several.link.watched.values()) <= 64 * MIB
    assert [record.getMessage() for record in caplog.records] == [
        "! tcp://here:1: a peer was cut that sent more than others, before they could be taken: of all there were more "
        "than 67108864 bytes"
    ]


def test_what_ended_connections_have_left_counts() -> None:
    several = Situation(2, unread_bytes_max=8 * MIB)
    several.look(2)
    for _ in range(4):
        several.received[0] += 2 * MIB
        several.look(2)
    assert several.cut == []
    several.link.left_bytes = 4 * MIB
    several.look(4)
    assert several.cut == [0]


def test_many_that_are_busy_and_heard_are_not_cut() -> None:
    """What was taken does not wait, however much it is."""
    several = Situation(20, unread_bytes_max=16 * MIB)
    for _ in range(200):
        for descriptor in range(20):
            several.received[descriptor] += MIB
            several.take_message(descriptor)
        several.look(2)
        several.note_empty()
    assert several.cut == []


def test_of_many_each_is_watched_sooner() -> None:
    many = Situation(TURN_LOOKS_MAX, unread_bytes_max=100 * MIB)
    many.look(2)
    many.received[7] += MIB
    many.look(2)
    assert list(many.link.watched) == [7]


def test_nobody_guesses_in_how_many_frames_the_bytes_that_wait_are(one: Situation) -> None:
    """Whose small messages were taken may have sent large ones behind them."""
    one.send_on(0, steps=6)
    for _ in range(10_000):
        one.take_message(0, 2)
    one.received[0] += 30 * MIB
    one.look(3)
    assert one.cut == []


def test_who_is_behind_for_a_while_is_not(one: Situation) -> None:
    """Its socket is not empty for hours, and as much is taken as comes."""
    one.received[0] += 20 * MIB
    one.look()
    for _ in range(10_000):
        one.received[0] += 3 * MIB
        for _ in range(3):
            one.take_message(0)
        one.look()
    assert one.link.watched
    assert one.cut == []
    one.note_empty()
    assert one.link.watched == {}


def test_nobody_is_cut_before_the_socket_was_looked_at(one: Situation) -> None:
    one.send_on(0, steps=100, is_emptied=False)
    assert one.cut == []
    assert one.touched_count == 1, "it has its events read, also if nothing comes"
    one.note_empty()
    one.look()
    assert one.cut == [0]


def test_others_that_are_busy_hide_nobody() -> None:
    """Their socket is never empty, but each has its turn there."""
    many = Situation(10)
    many.look(2)
    for step in range(40):
        many.received[0] += MIB
        for other in range(1, 10):
            many.received[other] += MIB
            many.take_message(other)
        many.look()
        assert many.cut == [] or step > 14
    assert many.cut == [0]


def test_what_the_kernel_still_has_does_not_count(one: Situation) -> None:
    """libzmq does not read while our queue is full, or while it gets no processor."""
    one.received[0] = MUCH
    one.look()
    for _ in range(100):
        one.received[0] += MIB
        one.unread[0] += MIB
        one.note_empty()
        one.look()
    assert one.cut == []


@pytest.mark.parametrize("bytes_per_s", [20, 110])
def test_heartbeats_are_no_message(one: Situation, bytes_per_s: int) -> None:
    """Those of 10 years, without keys and with; a look each quarter of a second would take the test too long."""
    for _ in range(3_650):
        one.received[0] += bytes_per_s * DAY_S
        one.now += DAY_S
        one.note_empty()
        one.look()
    assert one.link.watched == {}
    assert one.cut == []


def test_heartbeats_are_forgiven_under_the_watch_too(one: Situation) -> None:
    one.send_on(0, steps=6)
    assert one.link.watched
    for _ in range(3_650):
        one.received[0] += 110 * DAY_S
        one.now += DAY_S
        one.note_empty()
        one.look()
    assert one.cut == []


def test_another_connection_has_the_descriptor(one: Situation) -> None:
    """What was received by it is another's, and nothing may end that."""
    one.send_on(0, steps=14)
    assert one.link.watched
    one.cookies[0] = 555
    one.received[0] = 1_000 * MIB
    one.note_empty()
    one.look(5)
    assert (one.cut, one.link.watched) == ([], {})
    # It is taken over at the last moment.
    one.send_on(0, steps=16)
    assert one.link.watched[0].over_at < FOREVER
    one.note_empty()
    one.is_taken_over = True
    one.look()
    assert (one.cut, one.dropped) == ([], [])


def test_a_kernel_that_tells_nothing(one: Situation) -> None:
    one.cookies[0] = 0
    one.send_on(0, steps=100)
    assert (one.cut, one.link.watched) == ([], {})


def test_connections_that_end_are_not_looked_at(one: Situation) -> None:
    one.link.inflows.clear()
    looked_count = one.looked_count
    one.look()
    assert one.look_at == FOREVER
    assert one.looked_count == looked_count


def test_many_are_looked_at_in_portions() -> None:
    """No turn is long, and each has its look in two seconds."""
    many = Situation(4_000)
    many.look()
    began_at, before_count = many.now, many.looked_count
    many.look()
    assert many.looked_count - before_count == TURN_LOOKS_MAX
    many.look(4_000 // TURN_LOOKS_MAX - 1)
    assert many.looked_count - before_count == 4_000
    assert LOOK_S < many.now - began_at <= 2.1


def test_a_watch_is_short(one: Situation) -> None:
    """Who sends a gigabyte a second is found out in half a second."""
    began_at = one.now
    while not one.cut:
        one.received[0] += 100 * MIB
        one.note_empty()
        one.look()
        assert one.now < began_at + 0.6
