"""`session`: one end, by hand and to the number; then two ends over a link that loses and repeats."""

import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger.blocks import Option, OptionKind
from messenger.errors import MalformedMessage
from messenger.limits import (
    ACK_DELAY_S,
    BATCH_BYTES_MAX,
    BATCH_MSGS_MAX,
    IDLE_PROBE_S,
    RTO_INITIAL_S,
    RTO_MAX_S,
    RTO_MIN_S,
    Limits,
)
from messenger.link import FOREVER, GoneOutlet, Link, Outlet
from messenger.outgoing import Outgoing
from messenger.roundtrip import Resends
from messenger.session import Session, State
from messenger.wire import Flag, Kind, decode_batch, decode_header, decode_message
from tests.conftest import Data, data_of

OURS, THEIRS = 11, 22
MANY = 1_000_000


def outgoing(contents: bytes, *, is_large: bool = False, option: Option | None = None) -> Outgoing:
    head = b"0-0-"
    data, large = (head, contents) if is_large else (head + contents, None)
    return Outgoing(
        message_id=1,
        data=data,
        size_bytes=len(head) + len(contents),
        deadline_at=FOREVER,
        large=large,
        option=option,
    )


class Sent(NamedTuple):
    """One DATA frame that went out."""

    flags: int
    first: int
    received_through: int
    processed_through: int
    contents: list[bytes]


class FakeLink(Link):
    """Keeps what is sent; refuses it while it is down."""

    def __init__(self) -> None:
        super().__init__("destination", None)
        self.is_up = True
        self.frames: list[list[bytes]] = []
        self.routing_ids: list[bytes] = []
        # Of further frames, after which the link goes down by itself.
        self.goes_down_after = FOREVER

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        if not self.is_up or self.goes_down_after <= 0:
            return False
        self.goes_down_after -= 1
        self.frames.append(list(frames))
        self.routing_ids.append(routing_id)
        return True

    def take(self) -> list[Sent]:
        """Return what was sent since the last time."""
        taken, self.frames = self.frames, []
        sent = []
        for frame, *extra in taken:
            header = decode_header(frame)
            assert header.kind == Kind.DATA
            assert (header.source_incarnation, header.dest_incarnation) == (OURS, THEIRS)
            data = data_of(frame)
            messages, large, *_ = decode_batch(frame, header.flags, data.msg_count, extra)
            contents = [large.get(index, decode_message(message)[2]) for index, message in enumerate(messages)]
            sent.append(Sent(header.flags & ~(Flag.OPTIONS | Flag.DEADLINES), *data[:3], contents))
        return sent


class FakeRandom:
    """Always gives the same number; 0.5 leaves durations as they are."""

    def __init__(self) -> None:
        self.number = 0.5

    def random(self) -> float:
        return self.number

    def getrandbits(self, k: int, /) -> int:
        raise AssertionError("a session draws no numbers of its own")


class End:
    """A session that is established over a link, and what a test does with it."""

    def __init__(self, limits: Limits | None = None, window_msgs: int = MANY, window_bytes: int = 1 << 40) -> None:
        self.link = FakeLink()
        self.rng = FakeRandom()
        self.session = Session(OURS, "handle", None, limits or Limits(), self.rng)
        self.session.establish(THEIRS, window_msgs, window_bytes, 0.0)
        self.session.attach(self.link, b"route")

    def queue(self, *contents: bytes, is_large: bool = False, option: Option | None = None) -> None:
        for each in contents:
            message = outgoing(each, is_large=is_large, option=option)
            self.session.queue.append(message)
            self.session.queue_bytes += message.size_bytes
            if message.large is not None or message.option is not None:
                self.session.is_plain = False

    def send(self, *contents: bytes, now: float = 0.0) -> list[Sent]:
        """Queue, flush and return what went out."""
        self.queue(*contents)
        self.session.flush(now)
        return self.link.take()

    def receive(
        self,
        first: int = 1,
        count: int = 0,
        *,
        received: int = 0,
        processed: int = 0,
        flags: int = 0,
        size_bytes: int | None = None,
        now: float = 0.0,
    ) -> int | None:
        """Receive a frame; of its messages each has 5 bytes unless told."""
        size_bytes = 5 * count if size_bytes is None else size_bytes
        return self.session.receive(flags, Data(first, received, processed, count), size_bytes, now)

    def flush(self, now: float = 0.0) -> list[Sent]:
        self.session.flush(now)
        return self.link.take()

    def tick(self, now: float) -> list[Sent]:
        self.session.handle_deadline(now)
        return self.link.take()


# Numbering and batches.


def test_nothing_leaves_before_there_is_another_end_and_a_link_to_it() -> None:
    end = End()
    session = Session(OURS, "handle", None, Limits(), end.rng)
    session.queue.append(outgoing(b"a"))
    session.queue_bytes = 5
    assert session.state is State.CONNECTING
    assert session.next_deadline_at == FOREVER
    session.attach(end.link)
    session.flush(0.0)
    session.handle_deadline(100.0)
    session.attach(None)
    session.establish(THEIRS, MANY, MANY, 0.0)
    session.flush(0.0)
    session.handle_deadline(100.0)
    assert end.link.frames == []
    assert len(session.queue) == 1
    session.attach(end.link)
    session.flush(0.0)
    assert end.link.take() == [Sent(0, 1, 0, 0, [b"a"])]


def test_messages_are_numbered_from_1_and_go_to_the_routing_id() -> None:
    end = End()
    assert end.send(b"a", b"b") == [Sent(0, 1, 0, 0, [b"a", b"b"])]
    assert end.send(b"c") == [Sent(0, 3, 0, 0, [b"c"])]
    assert end.link.routing_ids == [b"route", b"route"]
    assert (end.session.unreceived_count, end.session.unprocessed_count) == (3, 3)
    assert (len(end.session.queue), end.session.queue_bytes) == (0, 0)


def test_a_batch_holds_at_most_so_many_messages() -> None:
    end = End()
    sent = end.send(*(b"%d" % number for number in range(1, 601)))
    assert [(frame.first, len(frame.contents)) for frame in sent] == [(1, 250), (251, 250), (501, 100)]
    assert [int(contents) for frame in sent for contents in frame.contents] == list(range(1, 601))
    assert BATCH_MSGS_MAX == 250


def test_a_batch_holds_at_most_so_many_bytes_or_one_message() -> None:
    end = End()
    sent = end.send(*[b"x" * 60_000] * 9)
    assert [len(frame.contents) for frame in sent] == [4, 4, 1]
    assert [len(frame.contents) for frame in end.send(b"x", b"y" * 2 * BATCH_BYTES_MAX, b"z")] == [1, 1, 1]


def test_large_contents_are_frames_of_their_own_and_are_not_copied() -> None:
    end = End()
    first, second = b"l" * 70_000, b"m" * 80_000
    end.queue(b"a")
    end.queue(first, is_large=True)
    end.queue(b"b")
    end.queue(second, is_large=True)
    end.session.flush(0.0)
    ((frame, *extra),) = end.link.frames
    assert len(frame) < 200
    assert extra[0] is first
    assert extra[1] is second
    assert end.link.take()[0].contents == [b"a", first, b"b", second]
    # And again when it is sent again.
    end.session.attach(end.link)
    end.session.flush(0.0)
    assert end.link.frames[0][1] is first


def test_options_name_their_message_by_its_place_in_the_batch() -> None:
    end = End()
    end.queue(b"a", b"b")
    end.queue(b"", option=Option(0, OptionKind.HANDLER_ERROR, "ValueError", "text"))
    end.queue(b"", option=Option(0, OptionKind.NO_HANDLER))
    end.session.flush(0.0)
    ((frame,),) = end.link.frames
    flags = decode_header(frame).flags
    assert flags & Flag.OPTIONS
    assert decode_batch(frame, flags, 4, [])[2] == [
        Option(2, OptionKind.HANDLER_ERROR, "ValueError", "text"),
        Option(3, OptionKind.NO_HANDLER),
    ]


# Windows.


def test_the_window_in_messages_is_freed_by_what_was_processed_only() -> None:
    end = End(Limits(window_msgs=3))
    assert end.send(*[b"x"] * 8)[0].contents == [b"x"] * 3
    assert end.flush() == []
    end.receive(received=3)
    assert end.flush() == []
    end.receive(received=3, processed=2)
    assert end.flush() == [Sent(0, 4, 0, 0, [b"x"] * 2)]
    assert end.session.unprocessed_count == 3
    end.receive(received=5, processed=5)
    assert end.flush() == [Sent(0, 6, 0, 0, [b"x"] * 3)]


def test_the_window_in_bytes_counts_whole_messages() -> None:
    end = End(Limits(window_bytes=20))
    # "0-0-" and 6 bytes each.
    assert end.send(*[b"123456"] * 3) == [Sent(0, 1, 0, 0, [b"123456"] * 2)]
    end.receive(received=2)
    assert end.flush() == []
    # A batch is freed as a whole.
    end.receive(received=2, processed=1)
    assert end.flush() == []
    end.receive(received=2, processed=2)
    assert end.flush() == [Sent(0, 3, 0, 0, [b"123456"])]


def test_a_message_larger_than_the_window_goes_alone() -> None:
    end = End(Limits(window_bytes=20))
    assert end.send(b"x", b"l" * 100, b"y") == [Sent(0, 1, 0, 0, [b"x"])]
    end.receive(received=1, processed=1)
    assert end.flush() == [Sent(0, 2, 0, 0, [b"l" * 100])]
    end.receive(received=2, processed=2)
    assert end.flush() == [Sent(0, 3, 0, 0, [b"y"])]


def test_the_smaller_window_of_both_ends_counts() -> None:
    end = End(Limits(window_msgs=5, window_bytes=1_000), window_msgs=2)
    assert len(end.send(*[b"x"] * 8)[0].contents) == 2
    end = End(Limits(window_msgs=5, window_bytes=1_000), window_bytes=15)
    assert len(end.send(*[b"x"] * 8)[0].contents) == 3
    end = End(window_msgs=0)
    assert end.send(b"x") == []
    assert len(end.session.queue) == 1


def is_refused(end: End, *arguments: int, **options: int) -> bool:
    """Receive; if that is refused, check that nothing of it was taken."""
    before = snapshot(end.session)
    try:
        end.receive(*arguments, **options, now=5.0)
    except MalformedMessage:
        assert snapshot(end.session) == before
        return True
    return False


def snapshot(session: Session) -> tuple[object, ...]:
    numbers = session.received_through, session.unreceived_count, session.unprocessed_count
    return *numbers, session.heard_at, session.next_deadline_at, session.is_urgent


def test_a_peer_that_exceeds_the_window_is_not_listened_to() -> None:
    end = End(Limits(window_msgs=3))
    end.send(b"x")
    # What comes with it is not taken either: not the acknowledgement, not the question.
    assert is_refused(end, 1, 4, received=1, processed=1, flags=Flag.ASK | Flag.RESEND)
    assert end.flush() == []
    assert end.receive(1, 3) == 0
    assert is_refused(end, 4, 1)
    end.session.note_processed(1)
    assert is_refused(end, 4, 2)
    assert end.receive(4, 1) == 0
    assert end.session.received_through == 4


def test_a_peer_that_exceeds_the_window_in_bytes_is_not_listened_to() -> None:
    end = End(Limits(window_bytes=20))
    assert end.receive(1, 2, size_bytes=12) == 0
    assert is_refused(end, 3, 1, size_bytes=9)
    assert end.receive(3, 1, size_bytes=8) == 0
    assert is_refused(end, 4, 1, size_bytes=1)
    # A batch is freed as a whole, as the sender counts it.
    end.session.note_processed(1)
    assert is_refused(end, 4, 1, size_bytes=1)
    end.session.note_processed(2)
    assert is_refused(end, 4, 1, size_bytes=13)
    assert end.receive(4, 1, size_bytes=12) == 0


def test_bytes_are_freed_by_workers_too() -> None:
    end = End(Limits(window_bytes=20))
    end.session.has_workers = True
    end.receive(1, 2, size_bytes=20)
    end.session.note_one_processed(2)
    assert is_refused(end, 3, 1, size_bytes=1)
    end.session.note_one_processed(1)
    assert end.receive(3, 1, size_bytes=20) == 0


def test_a_message_larger_than_the_window_is_taken_while_nothing_else_is_held() -> None:
    end = End(Limits(window_bytes=20))
    assert end.receive(1, 1, size_bytes=1) == 0
    assert is_refused(end, 2, 1, size_bytes=100)
    end.session.note_processed(1)
    assert end.receive(2, 1, size_bytes=100) == 0
    assert is_refused(end, 3, 1, size_bytes=1)


def test_duplicates_and_what_comes_behind_a_gap_are_not_held_and_exceed_nothing() -> None:
    end = End(Limits(window_msgs=3, window_bytes=20))
    assert end.receive(1, 3, size_bytes=20) == 0
    assert end.receive(1, 3, size_bytes=20) is None
    assert end.receive(7, 3, size_bytes=20) is None
    end.session.note_processed(3)
    assert end.receive(4, 3, size_bytes=20) == 0


@pytest.mark.parametrize("sizes", [[6] * 8, [16, 1, 6, 100, 1, 1, 20, 21, 3], [1] * 9])
def test_a_sender_never_exceeds_the_window_of_a_receiver(sizes: list[int]) -> None:
    """Both ends count alike, whichever numbers the acknowledgements name."""
    limits = Limits(window_msgs=4, window_bytes=25)
    sender, receiver = End(limits), End(limits)
    sender.queue(*(b"x" * size for size in sizes))
    while sender.session.queue or sender.session.unprocessed_count:
        for frame in sender.flush():
            size_bytes = sum(4 + len(contents) for contents in frame.contents)
            assert receiver.receive(frame.first, len(frame.contents), size_bytes=size_bytes) == 0
        receiver.session.note_processed(receiver.session.processed_through + 1)
        sender.receive(received=receiver.session.received_through, processed=receiver.session.processed_through)
    assert receiver.session.processed_through == len(sizes)


# Acknowledgements, as the sender takes them.


def test_what_was_received_is_not_sent_again_and_what_was_not_is() -> None:
    end = End()
    for contents in (b"a", b"b", b"c"):
        end.send(contents)
    end.receive(received=2)
    end.session.attach(end.link, b"new route")
    assert end.flush() == [Sent(0, 3, 0, 0, [b"c"])]
    assert end.link.routing_ids[-1] == b"new route"
    assert end.flush() == []
    # What is acknowledged between the attach and the flush is left out.
    end.receive(received=3)
    end.send(b"e")
    end.send(b"d")
    end.session.attach(end.link)
    end.receive(received=4)
    assert [frame.contents for frame in end.flush()] == [[b"d"]]


def test_a_batch_that_was_received_in_part_is_sent_again_whole() -> None:
    end = End()
    end.send(b"a", b"b", b"c")
    end.receive(received=2)
    assert end.session.unreceived_count == 1
    end.session.attach(end.link)
    assert end.flush() == [Sent(0, 1, 0, 0, [b"a", b"b", b"c"])]


def test_a_new_message_goes_behind_what_is_sent_again() -> None:
    end = End()
    end.send(b"a")
    end.send(b"b")
    end.session.attach(end.link)
    assert [frame.contents for frame in end.send(b"c")] == [[b"a"], [b"b"], [b"c"]]


@pytest.mark.parametrize(
    ("received", "processed"), [(3, 0), (3, 3), (2, 3), (0, 1), (2**64 - 1, 0), (2**64 - 1, 2**64 - 1)]
)
def test_absurd_acknowledgements_are_malformed_with_all_that_came_with_them(received: int, processed: int) -> None:
    end = End()
    end.send(b"a", b"b")
    assert is_refused(end, 1, 1, received=received, processed=processed, flags=Flag.ASK | Flag.RESEND)
    assert (end.session.unreceived_count, end.session.unprocessed_count) == (2, 2)
    assert end.session.received_through == 0
    assert end.session.heard_at == 0.0
    assert end.flush() == []


def test_a_session_is_quiet_while_nothing_of_it_is_on_its_way() -> None:
    """Then a thread's message leaves at once, since there is nothing whose acknowledgement would take it along."""
    end = End()
    assert end.session.is_quiet
    end.queue(b"a", b"b")
    assert end.session.is_quiet
    end.flush()
    assert not end.session.is_quiet
    end.receive(received=1)
    assert not end.session.is_quiet
    # What has arrived need not have been processed,
    end.receive(received=2)
    assert end.session.is_quiet
    # and what was for an incarnation that is gone is on no way any more.
    end.send(b"c")
    end.session.end()
    assert end.session.is_quiet


def test_old_acknowledgements_change_nothing() -> None:
    end = End()
    end.send(b"a", b"b")
    end.receive(received=2, processed=2)
    end.receive(received=1, processed=1)
    end.receive()
    assert (end.session.unreceived_count, end.session.unprocessed_count) == (0, 0)


def test_a_resend_that_is_asked_for_starts_behind_what_was_received() -> None:
    end = End()
    for contents in (b"a", b"b", b"c"):
        end.send(contents)
    end.receive(received=1, flags=Flag.RESEND)
    assert [frame.contents for frame in end.flush()] == [[b"b"], [b"c"]]
    assert end.flush() == []


def test_a_resend_is_answered_once_however_often_it_is_asked_for() -> None:
    """Each answer is up to a window, so that a peer that repeats a question would be flooded."""
    end = End()
    for contents in (b"a", b"b", b"c"):
        end.send(contents)

    def ask(received: int, now: float) -> list[list[bytes]]:
        end.receive(received=received, flags=Flag.RESEND, now=now)
        return [frame.contents for frame in end.flush(now)]

    assert ask(0, 1.0) == [[b"a"], [b"b"], [b"c"]]
    assert ask(0, 1.0) == []
    assert ask(0, 1.0 + RTO_INITIAL_S / 2 - 0.01) == []
    # From half of the timeout on the answer seems lost,
    assert ask(0, 1.0 + RTO_INITIAL_S / 2) == [[b"a"], [b"b"], [b"c"]]
    assert ask(0, 1.0 + RTO_INITIAL_S / 2) == []
    # and another number is another question.
    assert ask(1, 1.0 + RTO_INITIAL_S / 2) == [[b"b"], [b"c"]]
    assert ask(1, 1.0 + RTO_INITIAL_S / 2) == []


def test_who_receives_nothing_has_nothing_queued_again_and_again() -> None:
    """A mute peer could else fill the memory: each of its frames by another link had the whole window sent again."""
    end = End()
    end.send(b"a")
    end.session.attach(end.link, b"another route")
    assert [frame.contents for frame in end.flush()] == [[b"a"]]
    end.session.attach(end.link, b"another route")
    assert end.flush() == []
    for number in range(10):
        end.session.attach(end.link, b"%d" % number)
        assert end.flush() == []
    # It is asked at once, and says what it lacks.
    assert [frame.flags for frame in end.tick(0.1)] == [Flag.ASK]
    end.receive(flags=Flag.RESEND, now=0.2)
    assert [frame.contents for frame in end.flush(0.2)] == [[b"a"]]


def test_a_resend_that_does_not_help_comes_ever_less_often() -> None:
    end = End()
    end.send(b"a")
    sent_count = 0
    for step in range(3_600 * 4):
        end.receive(flags=Flag.RESEND, now=step / 4)
        sent_count += len([frame for frame in end.flush(step / 4) if frame.contents])
    assert sent_count < 70, "in an hour"
    # As soon as it helps all is as before.
    end.receive(received=1, now=4_000.0)
    end.send(b"b", now=4_000.0)
    for now in (4_000.1, 4_000.7):
        end.receive(received=1, flags=Flag.RESEND, now=now)
        assert [frame.contents for frame in end.flush(now)] == [[b"b"]]


def test_a_resend_over_a_slow_network_comes_once_a_minute_at_least() -> None:
    """All that is sent later waits for it, so who could not be reached for an hour must not wait for minutes."""
    resends = Resends()
    due = [now for now in range(7_200) if resends.is_due(0, float(now), RTO_MAX_S)]
    assert max(later - earlier for earlier, later in itertools.pairwise(due)) <= 60


def test_a_resend_may_be_asked_for_at_once_in_the_next_session() -> None:
    end = End()
    end.send(b"a")
    end.receive(flags=Flag.RESEND)
    assert len(end.flush()) == 1
    end.session.establish(THEIRS, MANY, MANY, 0.0)
    end.send(b"b")
    end.receive(flags=Flag.RESEND)
    assert [frame.contents for frame in end.flush()] == [[b"b"]]


def test_a_resend_that_was_asked_for_long_ago_is_ignored() -> None:
    end = End()
    end.send(b"a")
    end.send(b"b")
    end.receive(received=1)
    end.receive(received=0, flags=Flag.RESEND)
    assert end.flush() == []


# Acknowledgements, as the receiver gives them.


def test_an_acknowledgement_waits_for_a_message_to_travel_with() -> None:
    end = End()
    assert end.receive(1, 2, now=5.0) == 0
    assert end.flush(5.0) == []
    assert end.session.next_deadline_at == 5.0 + ACK_DELAY_S
    end.session.note_processed(1)
    assert end.send(b"a", now=5.01) == [Sent(0, 1, 2, 1, [b"a"])]
    assert end.session.next_deadline_at == 5.01 + RTO_INITIAL_S
    assert end.flush(5.02) == []


def test_an_acknowledgement_goes_alone_when_nothing_comes_to_travel_with() -> None:
    end = End()
    end.receive(1, 2, now=5.0)
    end.flush(5.0)
    assert end.flush(5.01) == []
    assert end.tick(5.019) == []
    assert end.tick(5.02) == [Sent(0, 1, 2, 0, [])]
    assert end.session.next_deadline_at > 5.02
    # What was processed is told in the same way.
    end.session.note_processed(2)
    assert end.flush(6.0) == []
    assert end.tick(6.0 + ACK_DELAY_S) == [Sent(0, 1, 2, 2, [])]
    assert end.flush(7.0) == []


def test_many_processed_messages_are_acknowledged_at_once() -> None:
    end = End(Limits(window_msgs=80))
    end.receive(1, 30)
    end.session.note_processed(9)
    assert end.flush() == []
    end.session.note_processed(10)
    assert end.flush() == [Sent(0, 1, 30, 10, [])]
    end.session.note_processed(19)
    assert end.flush() == []


def test_an_eighth_of_the_window_that_counts_is_much() -> None:
    end = End(Limits(window_msgs=8_000), window_msgs=80)
    end.receive(1, 30)
    end.session.note_processed(10)
    assert end.flush() == [Sent(0, 1, 30, 10, [])]


@pytest.mark.parametrize("window_msgs", [1, 7])
def test_ends_with_a_small_window_do_not_answer_each_other_for_ever(window_msgs: int) -> None:
    end = End(Limits(window_msgs=window_msgs))
    end.receive()
    assert end.flush() == []
    end.receive(1, 1)
    end.session.note_processed(1)
    assert end.flush() == [Sent(0, 1, 1, 1, [])]
    assert end.flush() == []


def test_who_is_asked_answers_at_once_and_once() -> None:
    end = End()
    end.receive(flags=Flag.ASK)
    assert end.flush() == [Sent(0, 1, 0, 0, [])]
    assert end.flush() == []
    end.receive(flags=Flag.ASK)
    assert end.send(b"a") == [Sent(0, 1, 0, 0, [b"a"])]
    assert end.flush() == []


def test_what_the_other_end_waits_for_is_urgent_until_it_was_sent() -> None:
    end = End()
    assert not end.session.is_urgent
    # A message is not: its acknowledgement may travel with the answer.
    end.receive(1, 1)
    assert not end.session.is_urgent
    end.receive(1, 1)
    assert end.session.is_urgent  # A duplicate,
    end.flush()
    assert not end.session.is_urgent
    end.receive(3, 1)
    assert end.session.is_urgent  # a gap,
    end.flush()
    assert not end.session.is_urgent
    end.receive(2, flags=Flag.ASK)
    assert end.session.is_urgent  # a question,
    end.flush()
    assert not end.session.is_urgent
    end.send(b"a")
    end.receive(2, flags=Flag.RESEND)
    assert end.session.is_urgent  # and what was lost.
    end.flush()
    assert not end.session.is_urgent


def test_an_answer_that_the_exchange_wants_goes_at_the_next_flush() -> None:
    end = End()
    end.receive(1, 1)
    end.session.must_answer = True
    assert end.flush() == [Sent(0, 1, 1, 0, [])]
    assert end.flush() == []


def test_note_processed_never_goes_back() -> None:
    end = End()
    end.receive(1, 5)
    end.session.note_processed(3)
    end.session.note_processed(2)
    assert end.session.processed_through == 3


@pytest.mark.parametrize(("has_workers", "through"), [(False, 0), (True, 1)])
def test_a_message_that_never_runs_holds_up_no_worker(has_workers: bool, through: int) -> None:
    end = End()
    end.session.has_workers = has_workers
    end.receive(1, 2)
    end.session.note_unrun(1)
    assert end.session.processed_through == through


@given(st.permutations(range(1, 9)))
def test_callbacks_that_return_in_any_order_are_acknowledged_up_to_the_first_that_runs(order: list[int]) -> None:
    end = End()
    end.receive(1, 8)
    done: set[int] = set()
    for number in order:
        end.session.note_one_processed(number)
        done.add(number)
        through = end.session.processed_through
        assert set(range(1, through + 1)) <= done
        assert through + 1 not in done
    assert end.session.processed_through == 8


# Duplicates, overlaps and gaps.


def test_a_duplicate_is_answered_because_an_acknowledgement_was_lost() -> None:
    end = End()
    assert end.receive(1, 3) == 0
    end.flush(0.0)
    end.tick(ACK_DELAY_S)
    assert end.receive(1, 3) is None
    assert end.flush() == [Sent(0, 1, 3, 0, [])]
    assert end.receive(2, 1) is None
    assert end.receive(0, 2) is None
    assert end.session.received_through == 3


def test_of_an_overlap_the_known_messages_are_skipped() -> None:
    end = End()
    end.receive(1, 3)
    assert end.receive(2, 4) == 2
    assert end.session.received_through == 5
    assert end.receive(6, 1) == 0


def test_an_empty_frame_is_no_message() -> None:
    end = End()
    assert end.receive(1, 0) is None
    assert end.session.received_through == 0
    assert end.flush() == []


def test_a_gap_asks_for_a_resend_once_for_each_number() -> None:
    end = End()
    assert end.receive(3, 1, now=1.0) is None
    assert end.flush(1.0) == [Sent(Flag.RESEND, 1, 0, 0, [])]
    # Those that come behind the gap do not ask again,
    assert end.receive(4, 1, now=1.0) is None
    assert end.flush(1.0) == []
    # nor does anything before the answer can be there,
    assert end.receive(5, 1, now=1.0 + RTO_INITIAL_S - 0.01) is None
    assert end.flush(1.0) == []
    # but then the question, or the answer, was lost.
    assert end.receive(6, 1, now=1.0 + RTO_INITIAL_S) is None
    assert end.flush(1.0) == [Sent(Flag.RESEND, 1, 0, 0, [])]
    # Another gap is another question.
    assert end.receive(1, 1, now=1.6) == 0
    assert end.receive(3, 1, now=1.6) is None
    assert end.flush(1.6) == [Sent(Flag.RESEND, 1, 1, 0, [])]


def test_the_number_of_the_next_message_shows_that_the_last_ones_were_lost() -> None:
    end = End()
    assert end.receive(3, 0, flags=Flag.ASK) is None
    assert end.flush() == [Sent(Flag.RESEND, 1, 0, 0, [])]


def test_a_resend_is_asked_for_with_messages_too() -> None:
    end = End()
    end.receive(3, 1)
    assert end.send(b"a") == [Sent(Flag.RESEND, 1, 0, 0, [b"a"])]
    assert end.send(b"b") == [Sent(0, 2, 0, 0, [b"b"])]


# Links that go and come.


def test_what_a_dead_link_refuses_is_kept_and_sent_in_order_by_the_next() -> None:
    end = End()
    end.link.goes_down_after = 1
    assert [frame.first for frame in end.send(*[b"x"] * 600)] == [1]
    assert end.session.link is None
    assert end.session.next_deadline_at == FOREVER
    assert end.send(b"y") == []
    assert end.tick(100.0) == []
    new = FakeLink()
    end.session.attach(new, b"new")
    end.session.flush(100.0)
    assert [(frame.first, len(frame.contents)) for frame in new.take()] == [(1, 250), (251, 250), (501, 101)]


def test_an_acknowledgement_that_was_lost_with_a_link_is_told_on_the_next() -> None:
    """Otherwise a sender whose window is full waits for its idle probe."""
    end = End()
    end.receive(1, 2)
    end.session.note_processed(2)
    end.flush(0.0)
    end.tick(ACK_DELAY_S)
    end.session.attach(end.link)
    assert end.flush(1.0) == [Sent(0, 1, 2, 2, [])]
    assert end.flush(1.0) == []


def test_an_acknowledgement_that_the_link_refuses_detaches_it() -> None:
    end = End()
    end.receive(1, 1)
    end.flush(0.0)
    end.link.is_up = False
    end.session.handle_deadline(IDLE_PROBE_S)
    assert end.session.link is None


def refuse_a_batch(end: End) -> None:
    end.send(b"a")


def refuse_an_acknowledgement(end: End) -> None:
    end.session.handle_deadline(IDLE_PROBE_S)


@pytest.mark.parametrize("refuse", [refuse_a_batch, refuse_an_acknowledgement])
def test_a_connection_whose_link_took_nothing_says_hello_even_if_it_never_learns_that_it_was_down(
    refuse: Callable[[End], None],
) -> None:
    end = End()
    end.session.connection_link = end.link
    end.link.is_up = False
    refuse(end)
    assert end.session.link is None
    assert end.session.next_deadline_at == end.session.hello_at == 0.0
    # A listener cannot; its peer will.
    end = End()
    end.link.is_up = False
    refuse(end)
    assert end.session.link is None
    assert end.session.next_deadline_at == end.session.hello_at == FOREVER


def test_whether_the_other_end_can_be_reached_is_found_by_asking_it() -> None:
    end = End()
    assert end.session.is_reachable()
    assert end.link.take() == [Sent(Flag.ASK, 1, 0, 0, [])]
    end.link.is_up = False
    assert not end.session.is_reachable()
    assert end.session.link is None
    assert not end.session.is_reachable()


# Probes, and RFC 6298.


def test_a_probe_asks_when_acknowledgements_stay_away_and_backs_off() -> None:
    end = End()
    end.send(b"a", now=10.0)
    assert end.session.next_deadline_at == 10.5
    assert end.tick(10.4) == []
    now = 10.5
    waits = []
    for _ in range(7):
        assert end.tick(now) == [Sent(Flag.ASK, 2, 0, 0, [])]
        waits.append(end.session.next_deadline_at - now)
        now = end.session.next_deadline_at
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    assert waits[-1] == RTO_MAX_S
    # An answer, even one that acknowledges nothing, ends the back-off.
    end.receive(now=now)
    end.tick(now)
    assert end.session.next_deadline_at - now == 1.0


@pytest.mark.parametrize(("number", "factor"), [(0.0, 0.75), (0.5, 1.0), (0.96, 1.23)])
def test_probes_have_a_jitter(number: float, factor: float) -> None:
    end = End()
    end.rng.number = number
    end.send(b"a")
    end.tick(0.5)
    assert end.session.next_deadline_at == pytest.approx(0.5 + 1.0 * factor)
    # An idle session's too.
    end.receive(received=1, processed=1, now=20.0)
    assert end.session.next_deadline_at == 20.0 + IDLE_PROBE_S
    end.tick(20.0 + IDLE_PROBE_S)
    assert end.session.next_deadline_at == pytest.approx(20.0 + IDLE_PROBE_S * (1 + factor))


def test_a_receiver_that_is_busy_is_asked_with_back_off_and_not_flooded() -> None:
    end = End()
    end.send(*[b"x" * 1_000] * 1_000)
    frame_count, now = 0, 0.0
    while now < 60.0:
        now = end.session.next_deadline_at
        frame_count += len(end.tick(now))
    assert frame_count <= 12


def test_an_idle_session_shows_that_it_lives() -> None:
    end = End()
    assert end.session.next_deadline_at == IDLE_PROBE_S
    assert end.tick(IDLE_PROBE_S) == [Sent(Flag.ASK, 1, 0, 0, [])]
    assert end.session.next_deadline_at == 2 * IDLE_PROBE_S


def test_the_wait_for_callbacks_that_do_not_return_is_asked_after_too() -> None:
    end = End()
    end.send(b"a", now=0.0)
    end.receive(received=1, now=0.25)
    assert end.session.next_deadline_at == 0.25 + IDLE_PROBE_S
    assert end.tick(10.25) == [Sent(Flag.ASK, 2, 0, 0, [])]
    # The measured time is 0.25 s, so the timeout is 0.25 + 4 * 0.125 = 0.75 s, doubled.
    assert end.session.next_deadline_at == 10.25 + 1.5


def measure(end: End, round_trip_s: float, now: float) -> float:
    """Send one message that is acknowledged after so long; return the timeout that is in force then."""
    number = end.session.next_number
    end.send(b"x", now=now)
    end.receive(received=number, processed=number, now=now + round_trip_s)
    end.send(b"x", now=100.0 + now)
    rto_s = end.session.next_deadline_at - (100.0 + now)
    # Sent twice, so it is not measured.
    end.session.attach(None)
    end.session.attach(end.link)
    end.flush(100.0 + now)
    end.receive(received=number + 1, processed=number + 1, now=190.0 + now)
    return rto_s


def test_the_retransmission_timeout_is_that_of_rfc_6298() -> None:
    end = End()
    # The first: SRTT = 1, RTTVAR = 1/2, RTO = 1 + 4 * 1/2.
    assert measure(end, 1.0, 0.0) == pytest.approx(3.0)
    # RTTVAR = 3/4 * 1/2 + 1/4 * |1 - 2| = 0.625, SRTT = 7/8 * 1 + 1/8 * 2 = 1.125, RTO = 1.125 + 4 * 0.625.
    assert measure(end, 2.0, 1_000.0) == pytest.approx(3.625)
    # RTTVAR = 3/4 * 0.625 + 1/4 * |1.125 - 0.125| = 0.71875, SRTT = 7/8 * 1.125 + 1/8 * 0.125 = 1.
    assert measure(end, 0.125, 2_000.0) == pytest.approx(1.0 + 4 * 0.71875)


def test_the_retransmission_timeout_has_bounds() -> None:
    assert measure(End(), 0.001, 0.0) == pytest.approx(RTO_MIN_S)
    assert measure(End(), 10.0, 0.0) == pytest.approx(RTO_MAX_S)


def test_one_message_is_timed_at_a_time_and_by_the_last_of_its_batch() -> None:
    end = End()
    end.send(b"a", b"b", now=0.0)
    end.send(b"c", now=0.9)
    end.receive(received=1, now=0.95)
    end.receive(received=3, now=1.0)
    # 1 s for the first batch; had "c" been timed it were 0.1 s.
    end.send(b"d", now=2.0)
    assert end.session.next_deadline_at == pytest.approx(2.0 + 3.0)


def test_what_was_sent_twice_tells_no_round_trip_time() -> None:
    """Karn's rule."""
    end = End()
    end.send(b"a", now=0.0)
    end.session.attach(end.link)
    end.flush(3.0)
    end.receive(received=1, processed=1, now=3.1)
    end.send(b"b", now=4.0)
    assert end.session.next_deadline_at == 4.0 + RTO_INITIAL_S


def test_an_acknowledgement_of_a_part_starts_the_timeout_anew() -> None:
    end = End()
    end.send(b"a", now=0.0)
    end.send(b"b", now=0.0)
    end.receive(received=1, now=0.4)
    # Measured: 0.4 s, so 0.4 + 4 * 0.2.
    assert end.session.next_deadline_at == pytest.approx(0.4 + 1.2)


def test_a_hello_that_is_due_is_a_deadline_too() -> None:
    end = End()
    end.session.hello_at = 3.0
    assert end.session.next_deadline_at == 3.0
    end.session.attach(None)
    assert end.session.next_deadline_at == 3.0


# The end.


def test_the_end_returns_what_was_sent_and_not_processed() -> None:
    end = End()
    for contents in (b"a", b"b", b"c"):
        end.send(contents)
    end.receive(1, 5, received=2, processed=1, now=3.0)
    end.session.note_one_processed(3)
    end.queue(b"queued")
    assert [message.data for message in end.session.end()] == [b"0-0-b", b"0-0-c"]
    assert end.session.state is State.CONNECTING
    assert (end.session.unreceived_count, end.session.unprocessed_count) == (0, 0)
    assert end.flush() == []
    # The queue is for whoever comes next, and both numberings begin anew.
    end.session.establish(THEIRS, MANY, MANY, 5.0)
    assert end.flush(5.0) == [Sent(0, 1, 0, 0, [b"queued"])]
    assert end.receive(1, 2) == 0
    end.session.note_one_processed(2)
    assert end.session.processed_through == 0
    end.session.note_one_processed(1)
    assert end.session.processed_through == 2


def test_the_end_of_a_session_in_which_nothing_is_open_returns_nothing() -> None:
    end = End()
    assert end.session.end() == []
    end = End()
    end.send(b"a")
    end.receive(received=1, processed=1)
    assert end.session.end() == []


def test_the_end_of_a_batch_that_was_processed_in_part_returns_the_rest_of_it() -> None:
    end = End()
    end.send(b"a", b"b", b"c")
    end.receive(received=3, processed=2)
    assert [message.data for message in end.session.end()] == [b"0-0-c"]


def test_a_connection_that_has_ended_knows_no_other_end_so_that_late_answers_find_nobody() -> None:
    end = End()
    end.session.connection_link = end.link
    end.session.end()
    assert end.session.peer_incarnation == 0
    # A listener's session is closed next, and is still found by its peer.
    end = End()
    end.session.end()
    assert end.session.peer_incarnation == THEIRS


def test_what_was_held_for_an_incarnation_that_is_gone_is_not_held_against_the_next() -> None:
    end = End(Limits(window_bytes=20))
    end.receive(1, 1, size_bytes=20)
    end.session.end()
    end.session.establish(THEIRS, MANY, MANY, 0.0)
    assert end.receive(1, 1, size_bytes=15) == 0
    assert end.receive(2, 1, size_bytes=5) == 0
    end.session.note_processed(2)
    assert end.receive(3, 1, size_bytes=20) == 0


def test_a_goodbye_tells_what_was_processed_first() -> None:
    end = End()
    end.receive(1, 2)
    end.session.note_processed(2)
    end.session.say_goodbye()
    first, (goodbye,) = end.link.frames
    assert data_of(first[0]) == Data(1, 2, 2, 0)
    assert decode_header(goodbye)[1:] == (Kind.GOODBYE, 0, OURS, THEIRS)
    assert end.session.state is State.CLOSED
    assert end.session.is_closed
    # And nothing after it.
    end.link.frames.clear()
    end.send(b"a")
    end.session.say_goodbye()
    assert end.tick(1_000.0) == []


def test_a_goodbye_to_nobody_only_closes() -> None:
    end = End()
    end.link.is_up = False
    end.session.say_goodbye()
    assert end.session.state is State.CLOSED
    assert end.link.frames == []
    new = Session(OURS, "handle", None, Limits(), end.rng)
    new.attach(FakeLink())
    assert not new.is_closed
    new.say_goodbye()
    assert new.state is State.CLOSED


@pytest.mark.parametrize(
    ("received", "back"),
    [
        (0, b"cdefg"),  # An acknowledgement that came before says more than a goodbye that was overtaken by it.
        (2, b"cdefg"),
        (3, b"defg"),
        (4, b"efg"),
        (5, b"fg"),
        (6, b"g"),
        (7, b""),
        (99, b""),
    ],
)
def test_what_an_end_that_is_gone_has_not_received_is_queued_again(received: int, back: bytes) -> None:
    end = End(window_msgs=6)
    end.send(b"a", b"b")
    end.send(b"c", b"d", b"e")
    end.send(b"f", b"g")
    end.receive(received=2, processed=1)
    end.flush()
    end.queue(b"z")
    end.session.take_back(received)
    waiting = [message.data[-1:] for message in end.session.queue]
    assert b"".join(waiting) == back + b"z"
    assert end.session.queue_bytes == sum(message.size_bytes for message in end.session.queue)
    lost = b"".join(message.data[-1:] for message in end.session.end())
    assert lost + b"".join(waiting) == b"bcdefgz"


def test_how_a_session_is_named() -> None:
    end = End()
    assert str(end.session) == "handle"
    end.session.peer = b"\xff"
    assert str(end.session) == "handle ('0xff')"


# Two ends.


class Pair:
    """Two ends that send each other numbers, over a link that loses or repeats what it is told to."""

    def __init__(self, limits: Limits) -> None:
        self.now = 0.0
        self.links = (FakeLink(), FakeLink())
        self.ends = (Session(1, "left", None, limits, FakeRandom()), Session(2, "right", None, limits, FakeRandom()))
        self.received: tuple[list[int], list[int]] = ([], [])
        self.under_way: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        self.sent_counts = [0, 0]
        for index, end in enumerate(self.ends):
            end.establish(2 - index, limits.window_msgs, limits.window_bytes, 0.0)
            end.attach(self.links[index])

    def send(self, index: int, count: int) -> None:
        for _ in range(count):
            self.sent_counts[index] += 1
            message = outgoing(b"%d" % self.sent_counts[index])
            self.ends[index].queue.append(message)
            self.ends[index].queue_bytes += message.size_bytes

    def step(self, fate: int) -> None:
        """Let both ends do what is due, then lose (0), repeat (1) or deliver what is under way."""
        for index, end in enumerate(self.ends):
            end.flush(self.now)
            if end.next_deadline_at <= self.now:
                end.handle_deadline(self.now)
                assert end.next_deadline_at > self.now
            self.under_way[index].extend(frame for (frame,) in self.links[index].frames)
            self.links[index].frames.clear()
        for index in (0, 1):
            while self.under_way[index]:
                frame = self.under_way[index].popleft()
                for _ in range((0, 2)[fate] if fate < 2 else 1):
                    self.deliver(self.ends[1 - index], self.received[1 - index], frame)

    def deliver(self, end: Session, received: list[int], frame: bytes) -> None:
        data = data_of(frame)
        messages, *_ = decode_batch(frame, decode_header(frame).flags, data.msg_count, [])
        skipped = end.receive(decode_header(frame).flags, data, sum(map(len, messages)), self.now)
        if skipped is not None:
            received.extend(int(message[4:]) for message in messages[skipped:])
            end.note_processed(end.received_through - data.first % 2)

    def settle(self) -> None:
        """Deliver everything from now on, until nothing is left to do."""
        for _ in range(200):
            for end in self.ends:
                end.note_processed(end.received_through)
            self.step(2)
            if not any(end.queue or end.unprocessed_count for end in self.ends):
                return
            self.now = min(end.next_deadline_at for end in self.ends)
        raise AssertionError("it does not come to an end")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 4), st.floats(0, 2)), max_size=40))
def test_whatever_a_link_loses_or_repeats_all_arrives_once_and_in_order(
    steps: list[tuple[int, int, int, float]],
) -> None:
    pair = Pair(Limits(window_msgs=10))
    for index, count, fate, seconds in steps:
        pair.send(index, count)
        pair.now += seconds
        pair.step(fate)
        assert all(end.unprocessed_count <= 10 for end in pair.ends)
        for received in pair.received:
            assert received == list(range(1, len(received) + 1))
    pair.settle()
    for index in (0, 1):
        assert pair.received[1 - index] == list(range(1, pair.sent_counts[index] + 1))


class Handle:
    """A connection, as far as a session knows."""


@pytest.mark.parametrize(
    "make",
    [lambda handle: Session(OURS, handle, None, Limits(), FakeRandom()), lambda handle: GoneOutlet(handle)],
)
def test_what_is_over_lets_go_of_its_handle(make: Callable[[Handle], Outlet]) -> None:
    """Compiled, an attribute that a class sets and its base had set before kept the first value for ever."""
    handle = Handle()
    gone = weakref.ref(handle)
    outlet = make(handle)
    assert (outlet.handle, outlet.owner) == (handle, outlet)
    del outlet, handle
    gc.collect()
    assert gone() is None
