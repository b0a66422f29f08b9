"""`streams` and `control`: responses in parts between two cores, on links that lose and double frames."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messenger import Cancelled, HandlerError, Limits, Message, OutcomeUnknown, QueueFull
from messenger.blocks import Control, ControlKind, Option, OptionKind
from messenger.control import Credit
from messenger.limits import IDLE_PROBE_S, LARGE_BYTES_MIN
from messenger.link import FOREVER
from messenger.takers import Parts, Waiter
from messenger.wire import NOOP
from tests.test_exchange import World


class StreamWorld(World):
    """A client that reads what a server writes; a quarter of the window is 2 messages or 10 bytes."""

    def __init__(self, window_msgs: int = 8, window_bytes: int = 40, **options: Any) -> None:
        super().__init__(Limits(window_msgs=window_msgs, window_bytes=window_bytes), **options)
        self.connect()
        self.parts = Parts()
        self.open(self.parts)
        self.deliver()
        self.message: Message
        (self.message,) = self.server.take()

    def open(self, parts: Parts, deadline_at: float = 1_000.0) -> None:
        self.client.exchange.open_stream(self.session, parts, b"", NOOP, deadline_at)

    def write(self, contents: bytes) -> int:
        return self.server.exchange.reply_part(self.message, contents, self.now)

    def is_held_up(self) -> bool:
        return self.server.exchange.is_held_up(self.message.link, self.message)

    def read(self) -> bytes | None:
        part = self.client.exchange.take_part(self.parts)
        return None if part is None else part.contents

    def read_all(self) -> list[bytes]:
        return list(iter(self.read, None))


def test_parts_and_the_last_part() -> None:
    world = StreamWorld()
    assert not world.parts.done
    world.write(b"a")
    world.write(b"b")
    world.deliver()
    assert world.parts.done
    assert world.read_all() == [b"a", b"b"]
    assert not world.parts.done
    world.server.reply(world.message, b"c")
    world.deliver()
    assert (world.parts.done, world.parts.is_over, world.parts.error) == (True, True, None)
    assert world.read_all() == [b"c"]
    assert world.parts.done
    for node in (world.client, world.server):
        world.run(1.0)
        assert node.exchange.is_settled
        assert not node.exchange.dropped


@pytest.mark.parametrize("contents", [b"x", b"eleven bytes"])
def test_who_writes_waits_until_half_was_taken(contents: bytes) -> None:
    world = StreamWorld()
    count = 2 if len(contents) == 1 else 1
    for _ in range(count):
        assert not world.is_held_up()
        world.write(contents)
    assert world.is_held_up()
    with pytest.raises(QueueFull, match="has not taken"):
        world.write(contents)
    world.deliver()
    assert world.is_held_up()
    assert world.read() == contents
    world.deliver()
    assert not world.is_held_up()
    world.write(contents)
    assert world.is_held_up()


def test_a_queue_that_is_full_holds_up_too() -> None:
    world = StreamWorld(server_limits=Limits(queue_msgs_max=1))
    world.write(b"x")
    assert world.is_held_up()
    with pytest.raises(QueueFull, match="queue_msgs_max"):
        world.write(b"x")
    assert "the queue to" in world.server.exchange.why_held_up(world.message.link, world.message)
    assert world.server.exchange.is_held_up(world.message.link)


def test_other_messages_go_on_while_a_reader_takes_nothing() -> None:
    world = StreamWorld()
    world.write(b"x")
    world.write(b"x")
    for number in range(30):
        world.ask(b"%d" % number)
        world.deliver()
        (message,) = world.server.take()
        world.server.reply(message, message.contents)
        world.deliver()
        assert world.client.contents() == [b"%d" % number]


def test_a_worker_that_writes_holds_up_no_window() -> None:
    world = World(Limits(window_msgs=2))
    world.listener_link.has_workers = True
    world.connect()
    parts = Parts()
    world.client.exchange.open_stream(world.session, parts, b"", NOOP, 1_000.0)
    world.deliver()
    (message,) = world.server.take()
    assert world.server_session.processed_through == 0
    world.server.exchange.reply_part(message, b"x", 0.0)
    assert world.server_session.processed_through == 1
    world.server.exchange.note_one_processed(message)
    assert world.server_session.processed_through == 1
    assert not world.server_session._done_early


def test_large_parts() -> None:
    world = StreamWorld(window_bytes=1 << 20)
    large = bytes(LARGE_BYTES_MIN)
    world.write(large)
    world.deliver()
    assert world.read() == large


def test_an_error_comes_behind_the_parts() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.server.exchange.report_raised(world.message, ValueError("planted"))
    world.deliver()
    assert world.parts.is_over
    assert world.read_all() == [b"a"]
    assert type(world.parts.error) is HandlerError


def test_a_restart_leaves_the_parts_and_an_unknown_outcome() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.deliver()
    world.link_down()
    world.start_server()
    world.link_up()
    world.deliver()
    assert world.read_all() == [b"a"]
    assert type(world.parts.error) is OutcomeUnknown


def test_a_stream_that_was_never_sent_goes_to_the_next_process() -> None:
    world = StreamWorld()
    world.link_down()
    parts = Parts()
    world.open(parts)
    world.start_server()
    world.link_up()
    world.deliver()
    (message,) = world.server.take()
    assert not message.redelivered
    world.server.exchange.reply_part(message, b"a", 0.0)
    world.deliver()
    assert world.client.exchange.take_part(parts) is not None


def test_nobody_took_a_stream_before_its_deadline() -> None:
    world = World()
    parts = Parts()
    world.client.exchange.open_stream(world.session, parts, b"", NOOP, 5.0)
    world.run(6.0)
    assert "nobody was there" in str(parts.error)
    assert world.client.exchange.cancel(parts.message_id) is False


def test_deadlines_count_only_while_the_reader_waits() -> None:
    world = StreamWorld()
    assert world.message.deadline is None
    world.client.exchange.await_part(world.parts, 5.0)
    world.write(b"a")
    world.run(6.0)
    assert world.read() == b"a"
    world.run(2_000.0)
    assert not world.parts.is_over
    world.client.exchange.await_part(world.parts, 2_001.0)
    world.run(2_002.0)
    assert type(world.parts.error) is OutcomeUnknown
    with pytest.raises(Cancelled):
        world.write(b"b")
    # Of one that is over nothing is awaited.
    world.client.exchange.await_part(world.parts, 2_003.0)


def test_a_stream_that_was_given_up_before_it_left_is_not_started() -> None:
    world = World()
    parts = Parts()
    world.client.exchange.open_stream(world.session, parts, b"", NOOP, 5.0)
    world.client.exchange.end_stream(parts)
    world.connect()
    assert type(parts.error) is Cancelled
    message_count = len([message for message in world.server.take() if not message.is_given_up(world.now)])
    assert message_count == 0


def test_who_stops_to_read_stops_who_writes() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.write(b"b")
    world.deliver()
    assert world.is_held_up()
    world.client.exchange.end_stream(world.parts)
    assert world.read_all() == []
    world.deliver()
    assert not world.is_held_up()
    with pytest.raises(Cancelled, match="nobody reads its response any more") as raised:
        world.write(b"c")
    assert raised.value.message_id == world.message.source_callback_id


def test_a_part_that_nobody_reads_tells_so_again() -> None:
    """A cancellation that was lost is said again."""
    world = StreamWorld()
    world.client.exchange.end_stream(world.parts)
    world.session.controls.pending.clear()
    world.write(b"a")
    world.deliver()
    assert world.client.dropped() == {"late_response": 1}
    with pytest.raises(Cancelled):
        world.write(b"b")


def test_a_writer_whose_reader_has_ended() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.write(b"b")
    world.client.exchange.close_link(world.connection_link, "closed", 0.0)
    world.deliver()
    assert not world.is_held_up()
    with pytest.raises(Cancelled):
        world.write(b"c")


def test_a_reader_holds_no_more_than_its_credit_whatever_the_peer_sends() -> None:
    world = StreamWorld()
    world.message.credit = Credit(100, 1_000_000)
    for _ in range(5):
        world.write(b"x")
    world.deliver()
    assert world.read_all() == [b"x", b"x"]
    assert "more than its credit" in str(world.parts.error)
    assert world.client.dropped()["stream_overrun"] == 1
    with pytest.raises(Cancelled):
        world.write(b"x")


def test_credit_is_never_more_than_was_sent_nor_less_than_before() -> None:
    credit = Credit(2, 10)
    credit.note_taken(5, 50)
    assert (credit.taken_msgs, credit.taken_bytes) == (0, 0)
    credit.note_sent(4)
    credit.note_taken(1, 4)
    credit.note_taken(0, -3)
    assert (credit.taken_msgs, credit.taken_bytes) == (1, 4)


def test_credit_of_a_stream_that_is_over_means_nothing() -> None:
    world = StreamWorld()
    message_id = world.message.source_callback_id
    session = world.server_session
    del world.message
    world.server.exchange.handle_controls(session, [Control(ControlKind.CREDIT, message_id, 1, 1)])
    assert len(session.controls._replies) == 0


def test_lost_credit_is_said_again_when_the_writer_asks() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.write(b"b")
    world.deliver()
    world.read_all()
    world.session.controls.pending.clear()
    world.deliver()
    assert world.is_held_up()
    world.run(world.now + 2 * IDLE_PROBE_S)
    assert not world.is_held_up()


def test_lost_credit_is_said_again_on_a_new_link() -> None:
    world = StreamWorld()
    world.write(b"a")
    world.write(b"b")
    world.deliver()
    world.read_all()
    world.client.exchange.flush(0.0)
    world.link_down()
    world.link_up()
    world.deliver()
    assert not world.is_held_up()
    # Not of one that is over.
    world.server.reply(world.message, b"end")
    world.deliver()
    world.link_down()
    world.link_up()
    assert not world.session.controls.pending


def test_a_callback_of_the_connection_runs_on_parts_too() -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    parts = Parts()
    world.client.exchange.open_stream(world.session, parts, b"", NOOP, 1_000.0)
    world.deliver()
    (message,) = world.server.take()
    world.server.exchange.reply_part(message, b"a", 0.0)
    world.server.reply(message, b"b")
    world.deliver()
    assert world.client.contents() == [b"a", b"b"]


def test_a_part_for_who_waits_for_one_response_is_that() -> None:
    world = World()
    world.connect()
    message_id = world.ask()
    messages = [b"0-%d-a" % message_id, b"0-%d-b" % message_id]
    options = [Option(index, OptionKind.MORE) for index in (0, 1)]
    world.client.exchange.handle_batch(world.session, 1, (messages, {}, options, 100, ()), 0)
    assert world.client.contents() == [b"a"]
    assert world.client.dropped() == {"late_response": 1}


def test_parts_are_refused_to_who_wants_one_response() -> None:
    world = World()
    world.connect()
    world.ask()
    world.deliver()
    (message,) = world.server.take()
    with pytest.raises(ValueError, match="asked for one response"):
        world.server.exchange.reply_part(message, b"a", 0.0)
    assert not world.server.exchange.is_held_up(message.link, message)


def test_the_basic_dialect_has_no_streams() -> None:
    world = World()
    with pytest.raises(ValueError, match="basic dialect"):
        world.client.exchange.open_stream(world.connection_link, Parts(), b"", NOOP, 1.0)
    assert not world.client.exchange.outstanding_count


def test_a_reader_that_is_forgotten_is_cancelled() -> None:
    world = StreamWorld()
    world.client.exchange.forget(world.parts)
    world.deliver()
    assert type(world.parts.error) is Cancelled
    assert world.message.is_given_up(0.0)
    world.client.exchange.forget(Waiter())


STEPS = st.lists(st.sampled_from(["write", "write", "read", "deliver", "lose", "double", "cut", "wait"]), max_size=60)


@settings(max_examples=150)
@given(STEPS, st.integers(1, 40), st.integers(1, 60), st.lists(st.integers(0, 12), min_size=1, max_size=5))
def test_whatever_a_link_loses_or_doubles_all_parts_come_once_and_in_order(
    steps: list[str], window_msgs: int, window_bytes: int, sizes: list[int]
) -> None:
    world = StreamWorld(window_msgs, window_bytes)
    written: list[bytes] = []
    seen: list[bytes] = []

    def step(what: str) -> None:
        if what == "write" and not world.is_held_up():
            written.append(b"%d" % len(written) + bytes(sizes[len(written) % len(sizes)]))
            world.write(written[-1])
        elif what == "read":
            seen.extend(filter(None, [world.read()]))
        elif what == "deliver":
            world.deliver()
        elif what in ("lose", "double"):
            for node, link in ((world.client, world.connection_link), (world.server, world.listener_link)):
                node.exchange.flush(world.now)
                link.sent = [] if what == "lose" else link.sent * 2
        elif what == "cut":
            world.link_down()
            world.link_up()
        elif what == "wait":
            world.run(world.now + 1.0)
        limits = world.session.controls.stream_limits
        assert len(world.parts.waiting) <= limits[0]
        assert world.parts.waiting_bytes < limits[1] + 16

    for what in steps:
        step(what)
    # Nothing is lost any more, and the reader reads: all that is written arrives soon.
    world.run(world.now + 3 * IDLE_PROBE_S)
    for _ in range(2 * len(sizes) + 5):
        seen.extend(world.read_all())
        world.run(world.now + 1.0)
        assert not world.is_held_up()
        step("write")
        world.run(world.now + 1.0)
    world.server.reply(world.message, b"end")
    world.run(world.now + 1.0)
    seen.extend(world.read_all())
    assert seen == [*written, b"end"]
    assert world.parts.error is None
    assert world.client.exchange.next_deadline_at < FOREVER
