"""`exchange` and `outcomes`: the core without a network.

First the basic dialect, by hand, then two cores joined by a session. A fake link keeps what would be sent; `run` does
what a driver does.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger import (
    ECHO,
    NOOP,
    DeliveryError,
    LimitReached,
    Limits,
    Message,
    MessageTooLarge,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
)
from messenger.blocks import COUNT_MAX, Control, Option, OptionKind
from messenger.errors import Cancelled, HandlerError, IdentityInUse, NoHandler
from messenger.exchange import BATCH_PROCESSED, Exchange
from messenger.failures import _text_of
from messenger.limits import ERROR_TEXT_MAX, HELLO_S_MAX, LARGE_BYTES_MIN, SILENT_LOG_S, UNHEARD_LOG_MAX
from messenger.link import FOREVER, GoneOutlet, Link, Outlet
from messenger.session import Session, State
from messenger.takers import Waiter
from messenger.wire import (
    ID_MAX,
    MSC_ID_MIN,
    Challenge,
    Kind,
    Reason,
    decode_batch,
    decode_header,
    encode_challenge,
    encode_goodbye,
    encode_header,
    encode_refusal,
)
from tests.conftest import contents_of, data_of


class FakeRandom:
    """Counts up from a start of its own; 0.5 leaves durations as they are."""

    def __init__(self, start: int = 0) -> None:
        self.drawn = start

    def random(self) -> float:
        return 0.5

    def getrandbits(self, k: int, /) -> int:
        self.drawn += 1
        return self.drawn


class FakeLink(Link):
    """A link that belongs to a listener (with siblings) or to a connection; it sends nothing by itself."""

    def __init__(self, owner: object = "owner", callback: Any = None) -> None:
        super().__init__(owner, callback)
        self.others: list[FakeLink] = [self]
        self.flushed_at: list[float] = []

    def siblings(self) -> Iterable[Link]:
        return self.others

    def flush(self, now: float) -> None:
        self.flushed_at.append(now)


class Core:
    """An exchange with one link, and everything that its callbacks were told."""

    def __init__(self, limits: Limits | None = None, **options: Any) -> None:
        self.told: list[Any] = []
        self.unheard: list[DeliveryError] = []
        self.exchange = Exchange("messenger", limits or Limits(), self.unheard.append, b"me", FakeRandom(), **options)
        self.link = FakeLink()
        self.exchange.links.add(self.link)

    def send(self, contents: Any = b"x", callback: Any = None, on_error: Any = None, **options: Any) -> int:
        link = options.pop("link", self.link)
        peer = options.pop("peer", b"")
        dest = options.pop("dest", NOOP)
        deadline_at = options.pop("deadline_at", 30.0)
        return self.exchange.send(link, peer, contents, callback, on_error, dest, deadline_at, **options)

    def run(self) -> list[Any]:
        """Run the calls and return what they were told since the last time."""
        while self.exchange.calls:
            callback, argument = self.exchange.calls.popleft()
            callback(argument)
        told, self.told = self.told, []
        return told

    def tell(self, argument: Any) -> None:
        self.told.append(argument)

    @property
    def statistics(self) -> Any:
        return self.exchange.statistics("me", 1, 2)

    def dropped(self) -> dict[str, int]:
        return dict(self.statistics.dropped)


def sent(outlet: Outlet) -> list[bytes]:
    return [outgoing.data for outgoing in outlet.queue]


# Sending and ids.


def test_a_message_with_a_callback_names_its_id_and_one_without_names_none() -> None:
    core = Core()
    assert core.send(b"a", core.tell) == 1024
    assert core.send(b"b", None, core.tell, dest=7) == 1025
    assert core.send(b"c") == 1026
    assert sent(core.link) == [b"1024-0-a", b"1025-7-b", b"0-0-c"]
    assert core.link.queue_bytes == 8 + 8 + 5
    assert core.exchange.queued_count == 3
    assert core.exchange.outstanding_count == 2


def test_ids_wrap_around_and_skip_what_is_outstanding() -> None:
    core = Core(next_id=ID_MAX - 2)
    assert [core.send(callback=core.tell) for _ in range(5)] == [ID_MAX - 2, ID_MAX - 1, ID_MAX, 1024, 1025]
    again = Core(next_id=1024)
    again.send(callback=again.tell)
    again.exchange._next_id = ID_MAX
    assert [again.send(callback=again.tell) for _ in range(2)] == [ID_MAX, 1025]
    again.exchange.receive(again.link, b"", b"0-1024-first")
    again.exchange.receive(again.link, b"", b"0-%d-last" % ID_MAX)
    assert [message.contents for message in again.run()] == [b"first", b"last"]
    # After the wrap every id may have been given out.
    again.exchange.receive(again.link, b"", b"0-5000-x")
    assert again.dropped() == {"late_response": 1}


def test_contents_above_the_limit_are_refused_with_both_numbers() -> None:
    core = Core(Limits(message_bytes_max=3))
    with pytest.raises(MessageTooLarge, match="contents are 4 bytes, message_bytes_max is 3"):
        core.send(b"1234", core.tell)
    assert core.send(b"123") == 1024
    assert core.exchange.outstanding_count == 0


def test_a_full_queue_refuses_by_count_and_by_bytes() -> None:
    by_count = Core(Limits(queue_msgs_max=2))
    by_count.send()
    by_count.send()
    with pytest.raises(QueueFull, match=r"2 messages, 10 bytes wait for owner; queue_msgs_max is 2"):
        by_count.send(callback=by_count.tell)
    by_bytes = Core(Limits(queue_bytes_max=1))
    by_bytes.send(b"one always fits")
    with pytest.raises(QueueFull):
        by_bytes.send()
    assert by_count.exchange.outstanding_count == 0


def test_too_many_outstanding_messages_are_refused() -> None:
    core = Core(Limits(outstanding_max=1))
    core.send(callback=core.tell)
    with pytest.raises(LimitReached, match="outstanding_max"):
        core.send(callback=core.tell)
    core.send()


# Receiving.


def test_a_message_runs_its_msc_once_and_then_the_slc() -> None:
    core = Core()
    core.link.callback = lambda message: core.tell(("SLC", message.contents))
    message_id = core.send(callback=lambda message: core.tell(("MSC", message.contents)))
    core.exchange.receive(core.link, b"", b"0-%d-first" % message_id)
    core.exchange.receive(core.link, b"", b"0-%d-second" % message_id)
    assert core.run() == [("MSC", b"first"), ("SLC", b"first"), ("SLC", b"second")]
    assert core.dropped() == {"late_response": 1}
    assert core.statistics.response_msgs == 1


def test_what_a_message_shows() -> None:
    core = Core()
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"\xff", b"5-0-a-b")
    (message,) = core.run()
    assert isinstance(message, Message)
    assert (message.contents, bytes(message.buffer), message.sender) == (b"a-b", b"a-b", "0xff")
    assert (message.source_callback_id, message.dest_callback_id, message.redelivered) == (5, 0, False)
    assert message.messenger == "messenger"
    assert repr(message) == "<Message 5-0 from '0xff', 3 bytes>"


def test_a_reply_is_the_messengers_send_message() -> None:
    calls: list[Any] = []

    class FakeMessenger:
        def send_message(self, *arguments: Any, **options: Any) -> int:
            calls.append((arguments, options))
            return 7

    message = Message(FakeMessenger(), b"", 1, 0, FakeLink(), b"")
    assert message.reply(b"yes", None, timeout=1.0) == 7
    assert calls == [((message, b"yes", None), {"timeout": 1.0})]


def test_an_echo_goes_back_on_its_link_and_the_slc_runs_too() -> None:
    core = Core()
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"peer", b"1024-1-a-b")
    (outgoing,) = core.link.queue
    assert (outgoing.data, outgoing.peer) == (b"0-1024-a-b", b"peer")
    assert [message.dest_callback_id for message in core.run()] == [ECHO]
    # An echo of an echo ends there.
    other = Core()
    other.exchange.receive(other.link, b"", b"0-1-x")
    assert sent(other.link) == [b"0-0-x"]


def test_an_echo_into_a_full_queue_is_dropped() -> None:
    core = Core(Limits(queue_msgs_max=1))
    core.exchange.receive(core.link, b"", b"1024-1-x")
    core.exchange.receive(core.link, b"", b"1025-1-y")
    assert sent(core.link) == [b"0-1024-x"]
    assert core.dropped() == {"queue_full": 1}


def test_registered_callbacks_run_every_time() -> None:
    core = Core()
    core.exchange.register_callback(64, core.tell)
    core.exchange.register_callback(1023, core.tell)
    for data in (b"0-64-a", b"0-64-b", b"0-1023-c"):
        core.exchange.receive(core.link, b"", data)
    assert [message.contents for message in core.run()] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("callback_id", [-1, 0, 1, 63, 1024, ID_MAX])
def test_other_ids_cannot_be_registered(callback_id: int) -> None:
    with pytest.raises(ValueError, match=f"callback id {callback_id} is not 64 to 1023"):
        Core().exchange.register_callback(callback_id, print)


def test_an_id_cannot_be_registered_twice() -> None:
    core = Core()
    core.exchange.register_callback(64, core.tell)
    with pytest.raises(ValueError, match="already registered"):
        core.exchange.register_callback(64, core.tell)


@pytest.mark.parametrize("dest", [2, 63, 64, 1023, 1024, ID_MAX])
def test_an_unknown_destination_is_counted_and_the_slc_still_runs(dest: int) -> None:
    core = Core()
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"", b"0-%d-x" % dest)
    assert core.dropped() == {"unknown_callback": 1}
    assert len(core.run()) == 1


def test_malformed_and_oversize_messages_are_counted_and_dropped() -> None:
    core = Core(Limits(message_bytes_max=1))
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"", b"hello")
    core.exchange.receive(core.link, b"", b"0-0-12")
    core.exchange.receive(core.link, b"", b"0-0-1")
    assert core.dropped() == {"malformed_message": 1, "message_too_large": 1}
    assert [message.contents for message in core.run()] == [b"1"]
    assert core.statistics.received_msgs == 3


def test_only_the_peer_that_was_asked_may_answer() -> None:
    core = Core()
    other = FakeLink("somebody else")
    asked = core.send(callback=core.tell, peer=b"asked")
    core.exchange.receive(other, b"asked", b"0-%d-forged" % asked)
    core.exchange.receive(core.link, b"another", b"0-%d-forged" % asked)
    assert core.dropped() == {"foreign_response": 2}
    core.exchange.receive(core.link, b"asked", b"0-%d-true" % asked)
    assert [message.contents for message in core.run()] == [b"true"]


@given(st.binary())
def test_no_bytes_raise(data: bytes) -> None:
    core = Core()
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"peer", data)
    assert core.statistics.received_msgs == 1
    assert len(core.run()) + core.dropped().get("malformed_message", 0) == 1


def test_a_response_to_a_message_with_only_on_error_ends_it_silently() -> None:
    core = Core()
    message_id = core.send(on_error=core.tell)
    core.exchange.receive(core.link, b"", b"0-%d-x" % message_id)
    core.exchange.handle_deadline(31.0)
    assert core.run() == []


# Outcomes.


def test_a_waiter_is_settled_inside_the_core() -> None:
    core = Core()
    answered, expired = Waiter(), Waiter()
    core.exchange.receive(core.link, b"", b"0-%d-yes" % core.send(callback=answered))
    core.send(callback=expired)
    core.link.queue.clear()
    core.exchange.handle_deadline(30.0)
    assert answered.done
    assert answered.response is not None
    assert answered.response.contents == b"yes"
    assert isinstance(expired.error, OutcomeUnknown)
    assert not core.exchange.calls


def test_the_deadline_of_a_message_that_left_is_an_unknown_outcome() -> None:
    core = Core()
    message_id = core.send(callback=core.tell, on_error=core.tell, deadline_at=5.0)
    core.link.queue.clear()
    assert core.exchange.next_deadline_at == 5.0
    core.exchange.handle_deadline(4.9)
    assert core.run() == []
    core.exchange.handle_deadline(5.0)
    (error,) = core.run()
    assert isinstance(error, OutcomeUnknown)
    assert error.message_id == message_id
    assert str(error) == "message 1024 to owner: no response came before the deadline"
    assert core.exchange.next_deadline_at == FOREVER
    core.exchange.receive(core.link, b"", b"0-%d-late" % message_id)
    assert core.run() == []
    assert core.dropped() == {"late_response": 1}
    assert core.statistics.outcome_unknown_msgs == 1


def test_the_deadline_of_a_message_that_nobody_took_is_certain_and_frees_the_queue() -> None:
    core = Core()
    core.send(b"a", core.tell, core.tell, deadline_at=5.0)
    core.send(b"b", core.tell, core.tell, deadline_at=6.0)
    core.send(b"c", deadline_at=4.0)
    core.send(b"d", deadline_at=4.5)
    core.exchange.handle_deadline(5.0)
    (error,) = core.run()
    assert isinstance(error, NotDelivered)
    assert sent(core.link) == [b"1025-0-b"]
    assert core.link.queue_bytes == 8
    assert core.dropped() == {"not_delivered": 2}
    assert [str(error) for error in core.unheard] == [
        "2 messages without a callback, the last to owner: nobody was there to take it"
    ]
    assert core.exchange.next_deadline_at == 6.0
    assert core.statistics.not_delivered_msgs == 1


@pytest.mark.parametrize(
    ("limits", "limit"),
    [(Limits(window_msgs=2), "window_msgs is 2"), (Limits(window_bytes=13), "these fill window_bytes")],
)
def test_what_waited_behind_others_for_a_connected_peer_says_so(limits: Limits, limit: str) -> None:
    world = World(client_limits=limits)
    world.connect()
    node = world.client
    for _ in range(3):
        node.exchange.send(world.session, b"", b"x" * 6, node.tell, node.tell, NOOP, 5.0)
    node.exchange.flush(0.0)
    count = world.session.unprocessed_count
    node.exchange.handle_deadline(5.0)
    texts = [str(error) for error in node.take() if type(error) is NotDelivered]
    assert len(texts) == 3 - count
    assert texts[0].endswith(
        "not delivered before its deadline: "
        f"it waited behind {count} that the peer, which is connected, has not processed; {limit}"
    )


@pytest.mark.parametrize("is_listener", [False, True])
def test_what_waited_for_a_peer_that_was_gone_says_so(is_listener: bool) -> None:
    world = World()
    world.connect()
    node = world.server if is_listener else world.client
    session = world.server_session if is_listener else world.session
    world.link_down()
    assert not session.is_reachable()
    node.exchange.send(session, b"", b"x", node.tell, node.tell, NOOP, 5.0)
    node.exchange.flush(0.0)
    node.exchange.handle_deadline(5.0)
    (error,) = node.take()
    why = "the peer was not connected" if is_listener else "nobody was there to take it"
    assert str(error).endswith(f"not delivered before its deadline: {why}")


def test_after_a_sweep_the_next_deadline_is_later() -> None:
    core = Core()
    for deadline_at in (1.0, 1.0000001, 2.0):
        core.send(callback=core.tell, deadline_at=deadline_at)
    core.exchange.handle_deadline(1.0)
    assert 1.0 < core.exchange.next_deadline_at <= 1.01
    core.exchange.handle_deadline(core.exchange.next_deadline_at)
    assert core.exchange.next_deadline_at == 2.0


def test_an_error_that_nobody_takes_is_reported() -> None:
    core = Core()
    core.send(callback=core.tell)
    core.exchange.handle_deadline(31.0)
    assert core.run() == []
    assert [type(error) for error in core.unheard] == [NotDelivered]


@pytest.mark.parametrize(("kind", "text"), [("peer_gone", "is not connected"), ("peer_full", "does not read")])
def test_a_message_that_the_network_refuses_ends_at_once(kind: str, text: str) -> None:
    core = Core()
    core.send(callback=core.tell, on_error=core.tell, peer=b"peer")
    core.send(peer=b"peer")
    while core.link.queue:
        core.exchange.handle_unsendable(core.link, core.link.queue.popleft(), kind)
    (error,) = core.run()
    assert isinstance(error, NotDelivered)
    assert text in str(error)
    assert core.dropped() == {kind: 2}


def test_a_message_to_a_peer_of_a_listener_tries_each_of_its_links() -> None:
    core = Core()
    second = FakeLink()
    core.link.others = second.others = [core.link, second]
    core.send(callback=core.tell, on_error=core.tell, peer=b"peer", roams=True)
    core.exchange.handle_unsendable(core.link, core.link.queue.popleft(), "peer_gone")
    assert core.run() == []
    assert len(second.queue) == 1
    assert second.queue_bytes == len(second.queue[0].data)
    core.exchange.handle_unsendable(second, second.queue.popleft(), "peer_gone")
    assert [type(error) for error in core.run()] == [NotDelivered]


def test_closing_a_link_ends_all_of_its_owners_messages() -> None:
    core = Core()
    left = core.send(on_error=core.tell)
    core.link.queue.clear()
    queued = core.send(on_error=core.tell)
    core.send()
    other = core.send(on_error=core.tell, link=FakeLink("other"))
    core.exchange.close_link(core.link, "it was closed", 7.0)
    assert core.link.flushed_at == [7.0]  # What can still leave does, before the rest ends.
    assert {error.message_id: type(error) for error in core.run()} == {left: OutcomeUnknown, queued: NotDelivered}
    assert core.exchange.outstanding_count == 1
    assert core.dropped() == {"not_delivered": 1}
    assert not core.link.queue
    assert not core.exchange.links
    assert other not in {left, queued}


def test_a_waiter_that_nobody_waits_on_is_forgotten() -> None:
    core = Core()
    waiter = Waiter()
    message_id = core.send(callback=waiter)
    core.send(callback=core.tell)
    core.exchange.forget(waiter)
    assert core.exchange.outstanding_count == 1
    core.exchange.receive(core.link, b"", b"0-%d-x" % message_id)
    assert type(waiter.error) is Cancelled
    assert core.dropped() == {"late_response": 1}


def test_statistics_cannot_be_changed() -> None:
    statistics = Core().statistics
    assert (statistics.identity, statistics.connection_count, statistics.listener_count) == ("me", 1, 2)
    with pytest.raises(AttributeError):
        statistics.sent_msgs = 1
    with pytest.raises(TypeError):
        statistics.dropped["x"] = 1


def test_a_link_of_a_connection_has_no_siblings() -> None:
    link = Link("owner", None)
    assert list(link.siblings()) == [link]


def test_a_waiter_can_stand_where_a_callback_is_called() -> None:
    waiter = Waiter()
    message = Message("messenger", b"", 0, 0, FakeLink(), b"")
    waiter(message)
    assert waiter.done
    assert waiter.response is message


def test_an_error_of_a_callback_of_a_plain_peers_message_is_only_counted() -> None:
    core = Core()
    core.exchange.report_raised(Message("messenger", b"", 5, 0, core.link, b"peer"), ValueError("text"))
    core.exchange.report_raised(NotDelivered("text", 7), ValueError("text"))
    assert core.statistics.callback_error_count == 2
    assert not core.link.queue


def test_a_plain_peer_that_names_nothing_gets_no_answer() -> None:
    core = Core()
    core.exchange.receive(core.link, b"peer", b"1024-0-x")
    core.exchange.note_one_processed(Message("messenger", b"", 5, 0, core.link, b"peer"))
    assert not core.link.queue


def test_a_cancelled_message_has_its_outcome_at_once_and_once() -> None:
    core = Core()
    message_id = core.send(callback=core.tell, on_error=core.tell)
    assert core.exchange.cancel(message_id)
    assert not core.exchange.cancel(message_id)
    assert not core.exchange.cancel(7)
    (error,) = core.run()
    assert isinstance(error, Cancelled)
    core.link.queue.clear()
    core.exchange.receive(core.link, b"", b"0-%d-x" % message_id)
    core.exchange.handle_deadline(31.0)
    assert core.run() == []
    assert (core.statistics.not_delivered_msgs, core.statistics.outcome_unknown_msgs) == (0, 0)


def test_what_was_queued_is_flushed_once_a_turn() -> None:
    core = Core()
    core.send()
    core.send()
    assert core.exchange.is_dirty
    core.exchange.flush(3.0)
    assert core.link.flushed_at == [3.0]
    assert not core.exchange.is_dirty


@pytest.mark.parametrize("contents", [bytearray(b"x" * LARGE_BYTES_MIN), memoryview(bytearray(b"x" * LARGE_BYTES_MIN))])
def test_large_contents_that_may_still_change_are_copied(contents: bytearray | memoryview) -> None:
    core = Core()
    core.send(contents)
    contents[0] = 0
    (outgoing,) = core.link.queue
    assert outgoing.whole() == b"0-0-" + b"x" * LARGE_BYTES_MIN
    assert outgoing.size_bytes == core.link.queue_bytes == LARGE_BYTES_MIN + 4


# Sessions: two cores, joined.


class WireLink(Link):
    """Keeps the frames that are under way; a listener's knows for whom they are."""

    def __init__(self, handle: object, callback: Any = None) -> None:
        super().__init__(handle, callback)
        self.sent: list[tuple[bytes, list[bytes]]] = []
        self.is_up = True
        self.gone: set[bytes] = set()

    def flush(self, now: float) -> None:
        """Nothing is ever queued at the link itself."""

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        if not self.is_up or routing_id in self.gone:
            return False
        self.sent.append((routing_id, list(frames)))
        return True


class Node:
    """One process: an exchange, and what its callbacks were told."""

    def __init__(self, name: str, start: int, limits: Limits | None = None) -> None:
        self.unheard: list[DeliveryError] = []
        self.told: list[Any] = []
        self.exchange = Exchange(name, limits or Limits(), self.unheard.append, name.encode(), FakeRandom(start))
        self.slc: Any = self.tell

    def tell(self, argument: Any) -> None:
        self.told.append(argument)

    def run(self) -> None:
        """Run what is to be run, as a driver does."""
        calls = self.exchange.calls
        while calls:
            callback, argument = calls.popleft()
            if callback is BATCH_PROCESSED:
                self.exchange.note_processed(*argument)
                continue
            try:
                callback(argument)
            except Exception as error:
                self.exchange.report_raised(argument, error)

    def take(self) -> list[Any]:
        self.run()
        told, self.told = self.told, []
        return told

    def contents(self) -> list[bytes]:
        return [message.contents for message in self.take()]

    def reply(self, message: Message, contents: bytes, **options: Any) -> int:
        on_error = options.pop("on_error", None)
        callback = options.pop("callback", None)
        dest, deadline_at = message.source_callback_id, 1_000.0
        outlet = message.link
        # As `Endpoints.route` does: an answer is only for the incarnation that asked.
        if message.incarnation != outlet.peer_incarnation:
            outlet = GoneOutlet(outlet.handle)
        return self.exchange.send(outlet, b"", contents, callback, on_error, dest, deadline_at, **options)

    def dropped(self) -> dict[str, int]:
        return dict(self.exchange.dropped)


class World:
    """A client with one connection to a server's listener."""

    def __init__(
        self, client_limits: Limits | None = None, server_limits: Limits | None = None, has_slc: bool = True
    ) -> None:
        self.now = 0.0
        self.started_count = 0
        self.link_number = 0
        self.limits = (client_limits, server_limits)
        self.has_slc = has_slc
        self.start_server()
        self.start_client()

    def start_server(self) -> None:
        self.started_count += 1
        self.server = Node("server", 10_000 * self.started_count, self.limits[1])
        server = self.server
        slc = (lambda message: server.slc(message)) if self.has_slc else None
        self.listener_link = WireLink("listener", slc)
        self.server.exchange.links.add(self.listener_link)

    def start_client(self, name: str = "client") -> None:
        self.started_count += 1
        self.client = Node(name, 10_000 * self.started_count, self.limits[0])
        self.connection_link = WireLink("connection", None)
        self.client.exchange.links.add(self.connection_link)
        self.session = self.client.exchange.handshake.open(self.connection_link)

    @property
    def routing_id(self) -> bytes:
        return b"r%d" % self.link_number

    @property
    def server_session(self) -> Session:
        (session,) = self.server.exchange.handshake.sessions
        return session

    def link_up(self) -> None:
        self.link_number += 1
        self.connection_link.is_up = True
        self.client.exchange.handshake.handle_link_up(self.connection_link, self.now)

    def link_down(self) -> None:
        """Cut the link; what was under way is lost."""
        self.listener_link.gone.add(self.routing_id)
        self.connection_link.is_up = False
        self.connection_link.sent.clear()
        self.listener_link.sent.clear()
        self.client.exchange.handshake.handle_link_down(self.connection_link)

    def deliver(self, runs: bool = True) -> None:
        """Deliver, and if wanted run callbacks, until nothing is under way."""
        while True:
            for node in (self.client, self.server):
                if runs:
                    node.run()
                node.exchange.flush(self.now)
            to_server, self.connection_link.sent = self.connection_link.sent, []
            to_client, self.listener_link.sent = self.listener_link.sent, []
            if not to_server and not to_client:
                return
            for _, (frame, *extra) in to_server:
                handshake = self.server.exchange.handshake
                handshake.receive(self.listener_link, self.routing_id, frame, extra, self.now)
            for routing_id, (frame, *extra) in to_client:
                if routing_id == self.routing_id:
                    handshake = self.client.exchange.handshake
                    handshake.receive(self.connection_link, b"", frame, extra, self.now)

    def run(self, until: float) -> None:
        """Let time pass."""
        self.deliver()
        while (due_at := min(node.exchange.next_deadline_at for node in (self.client, self.server))) <= until:
            self.now = max(self.now, due_at)
            for node in (self.client, self.server):
                if node.exchange.next_deadline_at <= self.now:
                    node.exchange.handle_deadline(self.now)
                    assert node.exchange.next_deadline_at > self.now
            self.deliver()
        self.now = until

    def connect(self) -> None:
        self.link_up()
        self.deliver()

    def send(self, contents: bytes = b"x", callback: Any = None, on_error: Any = None, **options: Any) -> int:
        """Send from the client."""
        dest = options.pop("dest", NOOP)
        deadline_at = options.pop("deadline_at", 1_000.0)
        return self.client.exchange.send(self.session, b"", contents, callback, on_error, dest, deadline_at, **options)

    def ask(self, contents: bytes = b"x", **options: Any) -> int:
        """Send from the client, which is told of any outcome."""
        return self.send(contents, self.client.tell, self.client.tell, **options)

    def server_ask(self, contents: bytes = b"x") -> int:
        """Send from the server, which is told of any outcome."""
        node = self.server
        return node.exchange.send(self.server_session, b"", contents, node.tell, node.tell, NOOP, 1_000.0)


def outcomes(told: Iterable[Any]) -> dict[int, type]:
    return {each.message_id: type(each) for each in told}


def test_a_message_and_its_response_travel_in_a_session() -> None:
    world = World()
    message_id = world.ask(b"question")
    assert world.client.exchange.queued_count == 1
    assert not world.client.exchange.is_settled
    world.connect()
    (message,) = world.server.take()
    assert (message.contents, message.sender, message.messenger) == (b"question", "client", "server")
    assert (message.source_callback_id, message.number, message.redelivered) == (message_id, 1, False)
    assert message.incarnation == world.session.incarnation
    world.server.reply(message, b"answer")
    world.run(1.0)
    (response,) = world.client.take()
    assert (response.contents, response.sender) == (b"answer", "server")
    assert response.incarnation == world.server_session.incarnation
    assert response.dest_callback_id == message_id
    for node in (world.client, world.server):
        assert node.exchange.is_settled
        assert not node.unheard
        assert not node.exchange.dropped
    statistics = world.client.exchange.statistics("client", 1, 0)
    assert (statistics.sent_msgs, statistics.response_msgs, statistics.received_msgs) == (1, 1, 1)


def test_a_conversation_may_start_at_the_listener() -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"question")
    world.deliver()
    (message,) = world.client.take()
    world.client.reply(message, b"answer")
    world.deliver()
    # Its MSC, and then the SLC.
    assert world.server.contents() == [b"answer", b"answer"]


def test_many_messages_run_once_and_in_order_whatever_happens_to_the_link() -> None:
    world = World()
    expected = []
    for number in range(1_000):
        world.send(b"%d" % number)
        expected.append(b"%d" % number)
        if number % 300 == 299:
            world.link_up()
            world.client.exchange.flush(world.now)
            world.run(world.now + number % 2)
            world.send(b"lost on its way")
            expected.append(b"lost on its way")
            world.client.exchange.flush(world.now)
            world.link_down()
    world.link_up()
    world.run(world.now + 5.0)
    assert world.server.contents() == expected
    assert world.client.exchange.is_settled


def test_a_batch_is_processed_when_the_callbacks_of_all_of_it_have_returned() -> None:
    world = World()
    world.connect()
    for _ in range(3):
        world.send()
    world.deliver(runs=False)
    assert (world.server_session.received_through, world.server_session.processed_through) == (3, 0)
    calls = world.server.exchange.calls
    assert len(calls) == 4
    while len(calls) > 1:
        assert world.server_session.processed_through == 0
        callback, argument = calls.popleft()
        callback(argument)
    assert world.session.unprocessed_count == 3
    world.run(1.0)
    assert world.server_session.processed_through == 3
    assert world.session.unprocessed_count == 0


def test_a_batch_that_runs_nothing_is_processed_at_once() -> None:
    world = World(has_slc=False)
    world.connect()
    world.send(dest=ECHO)
    world.deliver(runs=False)
    assert not world.server.exchange.calls
    assert world.server_session.processed_through == 1
    # But not before what came earlier.
    world.server.exchange.register_callback(64, world.server.tell)
    world.send(dest=64)
    world.deliver(runs=False)
    world.send(dest=ECHO)
    world.deliver(runs=False)
    assert world.server_session.processed_through == 1
    world.server.run()
    assert world.server_session.processed_through == 3


def test_all_is_settled_when_what_was_sent_has_arrived() -> None:
    world = World()
    world.connect()
    exchange = world.client.exchange
    assert exchange.is_settled
    world.send()
    assert not exchange.is_settled  # It is queued,
    exchange.flush(0.0)
    assert not exchange.is_settled  # under way,
    world.deliver(runs=False)
    assert exchange.is_settled  # there: the other process has it, whether this one goes or not.
    assert world.session.unprocessed_count == 1
    exchange.calls.append((world.client.tell, None))
    assert not exchange.is_settled
    exchange.calls.clear()
    world.ask()
    world.deliver(runs=False)
    assert not exchange.is_settled  # Somebody waits.


def test_a_message_that_nobody_will_answer_is_acknowledged_before_its_callback_runs() -> None:
    world = World()
    world.connect()
    world.ask()
    world.deliver(runs=False)
    # The answer will carry it.
    assert world.session.unreceived_count == 1
    world.send()
    world.deliver(runs=False)
    assert world.session.unreceived_count == 0
    assert world.session.unprocessed_count == 2


def test_the_acknowledgement_of_an_answer_may_wait_for_the_next_question() -> None:
    """A frame for each answer would make a conversation dearer by half."""
    world = World()
    world.connect()
    world.ask(dest=ECHO)
    world.deliver(runs=False)
    assert world.session.received_through == 1
    assert world.server_session.unreceived_count == 1
    world.run(1.0)
    assert world.server_session.unreceived_count == 0


def test_what_is_urgent_is_flushed_before_the_end_of_the_turn() -> None:
    world = World()
    world.connect()
    exchange = world.server.exchange
    assert not exchange.is_urgent
    world.send()
    world.client.exchange.flush(0.0)
    ((_, (frame,)),) = world.connection_link.sent
    for _ in range(2):
        exchange.handshake.receive(world.listener_link, world.routing_id, frame, [], 0.0)
    assert exchange.is_urgent
    exchange.flush(0.0)
    assert not exchange.is_urgent


def test_messages_at_workers_are_processed_when_those_say_so() -> None:
    world = World()
    world.listener_link.has_workers = True
    world.connect()
    for _ in range(3):
        world.send()
    world.deliver()
    first, second, third = world.server.take()
    assert world.server_session.processed_through == 0
    world.server.exchange.note_one_processed(second)
    world.server.exchange.note_one_processed(first)
    assert world.server_session.processed_through == 2
    world.run(1.0)
    assert world.session.unprocessed_count == 1
    world.server.exchange.note_one_processed(third)
    world.run(2.0)
    assert world.client.exchange.is_settled


def test_what_never_reaches_a_worker_holds_up_no_worker() -> None:
    world = World(server_limits=Limits(message_bytes_max=10))
    world.listener_link.has_workers = True
    world.connect()
    session = world.server_session
    error = Option(2, OptionKind.NO_HANDLER)
    world.server.exchange.handle_batch(session, 1, ([b"0-0-" + b"x" * 11, b"hello", b"0-7-"], {}, [error], 100, ()), 0)
    assert session.processed_through == 3
    assert world.server.dropped() == {"message_too_large": 1, "malformed_message": 1, "unknown_callback": 1}


def test_what_was_processed_before_is_skipped() -> None:
    world = World()
    world.connect()
    session = world.server_session
    world.server.exchange.handle_batch(session, 4, ([b"0-0-a", b"0-0-b", b"0-0-c"], {}, [], 100, ()), 2)
    (message,) = world.server.take()
    assert (message.contents, message.number) == (b"c", 6)
    assert world.server.exchange.statistics("server", 0, 1).received_msgs == 1


def test_a_bad_message_harms_no_other_of_its_batch() -> None:
    world = World(server_limits=Limits(message_bytes_max=100))
    world.connect()
    world.send(b"a")
    world.send(b"x" * 101)
    world.send(b"b")
    world.session.queue[1].data, malformed = b"0-0", world.session.queue[1]
    world.session.queue_bytes += 3 - malformed.size_bytes
    malformed.size_bytes = 3
    world.send(b"y" * 101)
    world.run(1.0)
    assert world.server.contents() == [b"a", b"b"]
    assert world.server.dropped() == {"malformed_message": 1, "message_too_large": 1}
    assert world.client.exchange.is_settled


def test_an_echo_in_a_session_comes_back_and_the_slc_runs_too() -> None:
    world = World()
    world.connect()
    world.ask(b"a-b", dest=ECHO)
    world.deliver()
    assert world.server.contents() == [b"a-b"]
    assert world.client.contents() == [b"a-b"]


def test_large_contents_travel_without_a_copy() -> None:
    world = World()
    world.connect()
    contents = b"l" * LARGE_BYTES_MIN
    world.ask(b"small")
    world.ask(contents, dest=ECHO)
    world.client.exchange.flush(0.0)
    ((_, (head, extra)),) = world.connection_link.sent
    assert extra is contents
    assert len(head) < 200
    world.deliver()
    small, message = world.server.take()
    assert small.contents == b"small"
    assert message.contents is contents
    (response,) = world.client.take()
    assert response.contents is contents
    world.run(1.0)
    assert world.session.unprocessed_count == 0


LIMITED = Limits(message_bytes_max=LARGE_BYTES_MIN)


def test_contents_above_the_receivers_limit_are_refused_at_once() -> None:
    world = World(server_limits=LIMITED)
    world.connect()
    with pytest.raises(MessageTooLarge, match=r"contents are 65537 bytes, message_bytes_max of .* is 65536"):
        world.ask(b"l" * (LARGE_BYTES_MIN + 1))
    world.send(b"l" * LARGE_BYTES_MIN)
    world.run(1.0)
    assert len(world.server.take()) == 1
    assert world.client.exchange.is_settled


def test_contents_that_waited_for_a_receiver_that_takes_no_such_are_told_of() -> None:
    """They were sent again and again once, on each new link, and nothing else got through."""
    world = World(server_limits=LIMITED)
    first, too_large, last = (world.ask(b"l" * size) for size in (1, LARGE_BYTES_MIN + 1, LARGE_BYTES_MIN))
    world.send(b"l" * (LARGE_BYTES_MIN + 1))
    world.connect()
    world.run(1.0)
    assert {message.source_callback_id for message in world.server.take()} == {first, last}
    errors = {error.message_id: error for error in world.client.take() if isinstance(error, DeliveryError)}
    assert type(errors[too_large]) is NotDelivered
    assert "larger than message_bytes_max of the receiver, 65536" in str(errors[too_large])
    assert world.client.dropped() == {"not_delivered": 1}
    assert world.session.queue_bytes == 0


def test_contents_too_large_for_the_next_process_may_have_run_at_the_first() -> None:
    world = World()
    world.connect()
    message_id = world.ask(b"l" * (LARGE_BYTES_MIN + 1), redeliver=True)
    world.deliver()
    assert len(world.server.take()) == 1
    world.limits = (None, LIMITED)
    world.link_down()
    world.start_server()
    world.connect()
    world.run(1.0)
    assert outcomes(world.client.take()) == {message_id: OutcomeUnknown}


def test_small_contents_above_the_receivers_limit_are_told_of() -> None:
    world = World(server_limits=Limits(message_bytes_max=100))
    world.connect()
    too_large = world.ask(b"l" * 101)
    world.send(b"l" * 101)
    world.run(1.0)
    (error,) = world.client.take()
    assert (type(error), error.message_id) == (NotDelivered, too_large)
    assert world.server.dropped() == {"message_too_large": 2}


def test_an_echo_that_its_asker_does_not_take_is_told_of() -> None:
    world = World()
    world.connect()
    world.server_session.contents_max = 3
    too_large = world.ask(b"four", dest=ECHO)
    world.run(1.0)
    assert outcomes(world.client.take()) == {too_large: NotDelivered}


def test_the_text_of_a_refusal_is_shown_as_it_is_written() -> None:
    """It is a peer's, and a terminal would obey it."""
    world = World()
    message_id = world.ask()
    world.client.exchange.handle_refused(world.session, Reason.LIMIT, "\x1b[2J" + "x" * 10_000, False)
    (error,) = world.client.take()
    assert (type(error), error.message_id) == (NotDelivered, message_id)
    assert "refused: \\x1b[2Jxxx" in str(error)
    assert len(str(error)) < 3_000


def test_an_answer_is_queued_as_a_message_that_wants_no_answer() -> None:
    world = World(server_limits=Limits(queue_msgs_max=2))
    world.connect()
    message_id = world.ask()
    world.deliver()
    (question,) = world.server.take()
    first_id = world.server.exchange.answer(question, b"yes", 30.0)
    assert sent(world.server_session) == [b"0-%d-yes" % message_id]
    assert world.server.exchange.answer(question, b"twice", 30.0) == first_id + 1
    # What is large, or finds no room, is a case for `send`, and leaves nothing behind.
    assert world.server.exchange.answer(question, b"full", 30.0) == 0
    world.server.exchange.flush(0.0)
    assert world.server.exchange.answer(question, b"x" * LARGE_BYTES_MIN, 30.0) == 0
    assert world.server_session.queue_bytes == 0
    world.deliver()
    assert world.client.contents() == [b"yes"]


def test_ids_of_answers_wrap_around() -> None:
    world = World()
    world.connect()
    world.ask()
    world.deliver()
    (question,) = world.server.take()
    world.server.exchange._next_id = ID_MAX
    assert [world.server.exchange.answer(question, b"", 1.0) for _ in range(2)] == [ID_MAX, 1024]


def test_an_echo_into_the_full_queue_of_a_session_is_counted() -> None:
    world = World(server_limits=Limits(queue_msgs_max=1))
    world.connect()
    for _ in range(2):
        world.ask(dest=ECHO)
    world.deliver()
    assert world.server.dropped() == {"queue_full": 1}
    assert len(world.client.take()) == 1


def test_only_the_session_that_was_asked_may_answer() -> None:
    world = World()
    world.connect()
    message_id = world.server_ask(b"for the first")
    asked = world.server_session
    world.server.exchange.flush(0.0)
    world.listener_link.sent.clear()
    world.start_client("another")
    world.connect()
    world.send(b"forged", dest=message_id)
    world.deliver()
    assert world.server.dropped() == {"foreign_response": 1}
    world.server.exchange.handle_batch(asked, 1, ([b"0-%d-true" % message_id], {}, [], 100, ()), 0)
    assert b"true" in world.server.contents()


# Outcomes in sessions.


@pytest.mark.parametrize("dest", [NOOP, 2, 64, 1023, 1024, ID_MAX])
def test_a_message_that_finds_nothing_to_run_ends_as_no_handler(dest: int) -> None:
    world = World(has_slc=False)
    world.connect()
    message_id = world.ask(dest=dest)
    world.send(dest=dest)
    world.deliver()
    (error,) = world.client.take()
    assert isinstance(error, NoHandler)
    assert isinstance(error, NotDelivered)
    assert error.message_id == message_id
    assert str(error).startswith("message 1024 to connection ('server'): there is nothing to run at the receiver")
    assert world.client.exchange.statistics("client", 1, 0).not_delivered_msgs == 1
    assert world.client.exchange.outstanding_count == 0


def test_what_a_callback_or_a_built_in_takes_has_a_handler() -> None:
    world = World(has_slc=False)
    world.server.exchange.register_callback(64, world.server.tell)
    world.connect()
    world.ask(dest=64)
    world.ask(b"echo", dest=ECHO)
    world.run(1.0)
    assert len(world.server.take()) == 1
    assert world.client.contents() == [b"echo"]
    assert world.client.exchange.outstanding_count == 1
    # With an SLC an unknown id is not without a handler.
    world = World()
    world.connect()
    world.ask(dest=70)
    world.run(1.0)
    assert world.client.take() == []


def test_what_a_callback_raised_is_told_to_the_sender() -> None:
    world = World()
    world.connect()

    def refuse(message: Message) -> None:
        raise ValueError(message.contents.decode() * ERROR_TEXT_MAX)

    world.server.slc = refuse
    message_id = world.ask(b"a")
    world.send(b"b")
    waiter = Waiter()
    world.send(b"c", waiter)
    world.deliver()
    (error,) = world.client.take()
    assert isinstance(error, HandlerError)
    assert (error.message_id, error.type_name) == (message_id, "ValueError")
    assert str(error).endswith("the callback raised ValueError: " + "a" * ERROR_TEXT_MAX)
    assert isinstance(waiter.error, HandlerError)
    assert world.server.exchange.statistics("server", 0, 1).callback_error_count == 3
    assert world.client.exchange.statistics("client", 1, 0).not_delivered_msgs == 0
    world.run(1.0)
    assert world.client.exchange.is_settled


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("and so does its text")


def deep_group() -> BaseException:
    raised: Exception = ValueError("deep")
    for _ in range(5_000):
        raised = ExceptionGroup("a group", [raised])
    return raised


@pytest.mark.parametrize(
    "raised", [OSError("\udcff is no file"), Unprintable(), SystemExit(1), KeyError("\0"), deep_group()]
)
def test_whatever_a_callback_raises_can_be_told(raised: BaseException) -> None:
    world = World()
    world.connect()
    world.server.slc = lambda message: world.server.exchange.report_raised(message, raised)
    message_id = world.ask()
    world.ask(b"another", dest=ECHO)
    world.deliver()
    error, response = sorted(world.client.take(), key=lambda each: isinstance(each, Message))
    assert isinstance(error, HandlerError)
    assert (error.message_id, error.type_name) == (message_id, type(raised).__name__)
    assert response.contents == b"another"


def test_of_a_group_is_told_what_was_raised_in_it() -> None:
    inner = [ExceptionGroup("inner", [ValueError("one"), Unprintable()]), *(KeyError(n) for n in range(1_000))]
    text = _text_of(ExceptionGroup("outer", inner))
    assert text.startswith(
        "outer (1001 sub-exceptions); ValueError: one; Unprintable: (its text cannot be shown); KeyError: 0; KeyError"
    )
    assert len(text) == ERROR_TEXT_MAX


def test_the_second_of_two_outcomes_is_counted() -> None:
    world = World()
    world.connect()

    def answer_and_raise(message: Message) -> None:
        world.server.reply(message, b"answer")
        raise ValueError("too late")

    world.server.slc = answer_and_raise
    world.ask()
    world.deliver()
    assert world.client.contents() == [b"answer"]
    assert world.client.dropped() == {"late_response": 1}


def test_an_option_that_is_not_known_does_no_harm() -> None:
    world = World()
    world.connect()
    message_id = world.ask()
    world.deliver()
    world.client.exchange.handle_batch(world.session, 1, ([b"0-%d-x" % message_id], {}, [Option(0, 200)], 100, ()), 0)
    assert world.client.contents() == [b"x"]


def test_a_cancelled_message_of_a_session_has_no_other_outcome() -> None:
    world = World()
    world.connect()
    message_id = world.ask(dest=ECHO)
    world.client.exchange.flush(0.0)
    assert world.client.exchange.cancel(message_id)
    world.deliver()
    assert outcomes(world.client.take()) == {message_id: Cancelled}
    assert world.client.dropped() == {"late_response": 1}


def test_deadlines_of_a_session_what_was_sent_is_unknown_and_what_was_not_is_certain() -> None:
    world = World()
    queued = world.ask(deadline_at=5.0)
    world.run(5.0)
    assert outcomes(world.client.take()) == {queued: NotDelivered}
    world.connect()
    sent = world.ask(deadline_at=10.0)
    world.run(10.0)
    assert outcomes(world.client.take()) == {sent: OutcomeUnknown}
    assert len(world.server.take()) == 1
    assert world.session.queue_bytes == 0


# The other end goes.


def test_a_restart_of_the_server_ends_what_was_sent_and_keeps_what_was_queued() -> None:
    world = World()
    world.connect()
    sent = world.ask(b"sent")
    world.client.exchange.flush(0.0)
    world.link_down()
    world.ask(b"queued")
    world.start_server()
    world.link_up()
    world.run(5.0)
    (error,) = world.client.take()
    assert (type(error), error.message_id) == (OutcomeUnknown, sent)
    (message,) = world.server.take()
    assert (message.contents, message.redelivered) == (b"queued", False)
    assert world.client.exchange.statistics("client", 1, 0).outcome_unknown_msgs == 1


def test_redelivered_messages_go_first_in_their_order_and_are_marked() -> None:
    world = World()
    world.connect()
    world.server.slc = world.server.tell
    ids = [world.ask(b"%d" % number, redeliver=number != 2) for number in range(1, 5)]
    world.send(b"silent", redeliver=True)
    world.client.exchange.flush(0.0)
    world.link_down()
    world.ask(b"queued", redeliver=True)
    world.start_server()
    world.link_up()
    world.run(5.0)
    assert outcomes(world.client.take()) == {ids[1]: OutcomeUnknown}
    messages = world.server.take()
    assert [(message.contents, message.redelivered) for message in messages] == [
        *((b"1", True), (b"3", True), (b"4", True), (b"silent", True)),
        (b"queued", False),
    ]
    for message in messages:
        if message.source_callback_id:
            world.server.reply(message, b"done")
    world.run(10.0)
    assert len(world.client.take()) == 4
    assert world.client.exchange.is_settled
    assert world.session.queue_bytes == 0


def test_a_message_that_was_processed_but_not_answered_is_redelivered() -> None:
    world = World()
    world.connect()
    message_id = world.ask(b"a", redeliver=True)
    world.run(1.0)
    assert world.server.contents() == [b"a"]
    assert world.session.unprocessed_count == 0
    world.link_down()
    world.start_server()
    world.link_up()
    world.run(5.0)
    (message,) = world.server.take()
    assert (message.source_callback_id, message.redelivered) == (message_id, True)


def restart_with_redelivery(world: World, *, is_silent: bool = False) -> int:
    """Let a message run, and its process end without an answer; what is redelivered is then still queued."""
    world.connect()
    if is_silent:
        message_id = world.send(b"a", redeliver=True, deadline_at=50.0)
        world.client.exchange.flush(0.0)
        ((_, (frame,)),) = world.connection_link.sent
        world.connection_link.sent.clear()
        world.server.exchange.handshake.receive(world.listener_link, world.routing_id, frame, [], 0.0)
    else:
        message_id = world.ask(b"a", redeliver=True, deadline_at=50.0)
        world.run(0.1)
    assert world.server.contents() == [b"a"]
    world.link_down()
    world.client.exchange.handle_ended(world.session, "its process has ended")
    return message_id


@pytest.mark.parametrize("ended_by", ["deadline", "close", "refusal"])
def test_what_was_to_be_redelivered_may_have_run(ended_by: str) -> None:
    world = World()
    message_id = restart_with_redelivery(world)
    exchange = world.client.exchange
    assert sent(world.session) == [b"%d-0-a" % message_id]
    queued_id = world.ask(b"b", deadline_at=50.0)
    if ended_by == "deadline":
        exchange.handle_deadline(50.0)
        exchange.handle_deadline(51.0)
    elif ended_by == "close":
        exchange.close_link(world.connection_link, "it was closed", world.now)
    else:
        exchange.handle_refused(world.session, Reason.IDENTITY_IN_USE, "taken", True)
    certain = IdentityInUse if ended_by == "refusal" else NotDelivered
    assert outcomes(world.client.take()) == {message_id: OutcomeUnknown, queued_id: certain}


@pytest.mark.parametrize("ended_by", ["deadline", "close"])
def test_what_was_to_be_redelivered_without_a_callback_may_have_run(ended_by: str) -> None:
    world = World()
    restart_with_redelivery(world, is_silent=True)
    assert sent(world.session) == [b"0-0-a"]
    if ended_by == "deadline":
        world.client.exchange.handle_deadline(50.0)
    else:
        world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
    world.client.run()
    assert [type(error) for error in world.client.unheard] == [OutcomeUnknown]
    assert world.client.dropped() == {"outcome_unknown": 1}


def test_what_finds_nothing_to_run_when_it_is_redelivered_may_have_run_before() -> None:
    world = World()
    world.connect()
    message_id = world.ask(b"a", redeliver=True)
    world.run(0.1)
    assert world.server.contents() == [b"a"]
    world.link_down()
    world.has_slc = False
    world.start_server()
    world.link_up()
    first_id = world.ask(b"b", redeliver=True)
    world.run(1.0)
    told = world.client.take()
    assert outcomes(told) == {message_id: OutcomeUnknown, first_id: NoHandler}
    assert "an earlier process may have run it" in str(told[0])


@pytest.mark.parametrize("ended_by", ["answer", "cancel", "deadline"])
def test_what_has_its_outcome_is_neither_redelivered_nor_reported(ended_by: str) -> None:
    world = World()
    world.connect()
    message_id = world.ask(b"a", redeliver=True, dest=ECHO, deadline_at=0.4)
    other_id = world.ask(b"b", dest=ECHO, deadline_at=0.4)
    if ended_by == "answer":
        # The server has answered, and not yet said that it has processed.
        world.deliver(runs=False)
        assert len(world.client.take()) == 2
    else:
        world.client.exchange.flush(0.0)
        world.connection_link.sent.clear()
        if ended_by == "cancel":
            assert world.client.exchange.cancel(message_id)
            assert world.client.exchange.cancel(other_id)
        else:
            world.client.exchange.handle_deadline(0.4)
        assert len(world.client.take()) == 2
    assert world.session.unprocessed_count == 2
    world.link_down()
    world.start_server()
    world.link_up()
    world.run(5.0)
    assert world.server.take() == []
    assert world.client.take() == []
    assert world.client.unheard == []
    assert "outcome_unknown" not in world.client.dropped()


def test_messages_without_a_callback_to_a_process_that_ended_are_reported_together() -> None:
    world = World()
    world.connect()
    for _ in range(3):
        world.send()
    world.client.exchange.flush(0.0)
    world.link_down()
    world.start_server()
    world.link_up()
    world.run(5.0)
    assert world.client.dropped() == {"outcome_unknown": 3}
    (error,) = world.client.unheard
    assert isinstance(error, OutcomeUnknown)
    assert str(error).startswith(
        "3 messages without a callback, the last to connection ('server'): its process has ended"
    )
    assert not error.message_id


def test_of_many_errors_without_on_error_a_few_are_reported_each_and_the_others_together() -> None:
    core = Core()
    for _ in range(UNHEARD_LOG_MAX + 30):
        core.send(b"a", core.tell, deadline_at=5.0)
    core.exchange.handle_deadline(5.0)
    core.run()
    *each, together = core.unheard
    assert [error.message_id for error in each] == list(range(MSC_ID_MIN, MSC_ID_MIN + UNHEARD_LOG_MAX))
    why = "to owner: not delivered before its deadline: nobody was there to take it"
    assert str(together) == f"30 messages without on_error, the last {why}"
    assert type(together) is NotDelivered
    assert core.statistics.not_delivered_msgs == UNHEARD_LOG_MAX + 30
    # The next few are told each again; what goes beyond waits for the time of the next report.
    core.unheard.clear()
    for _ in range(UNHEARD_LOG_MAX + 1):
        core.send(b"a", core.tell, deadline_at=6.0)
    core.exchange.handle_deadline(6.0)
    core.run()
    assert len(core.unheard) == UNHEARD_LOG_MAX
    assert core.exchange.next_deadline_at == 5.0 + SILENT_LOG_S
    core.exchange.handle_deadline(5.0 + SILENT_LOG_S)
    core.run()
    assert str(core.unheard[-1]) == f"1 message without on_error {why}"


def test_errors_without_on_error_are_all_reported_at_the_end() -> None:
    core = Core()
    for _ in range(UNHEARD_LOG_MAX + 2):
        core.send(b"a", core.tell, deadline_at=5.0)
    core.exchange.end_all("it is over")
    core.run()
    assert str(core.unheard[-1]) == "2 messages without on_error, the last to owner: it is over"


def test_what_was_processed_of_a_batch_is_not_reported_as_unknown() -> None:
    world = World()
    world.connect()
    for _ in range(3):
        world.send()
    world.client.exchange.flush(0.0)
    ((_, (frame,)),) = world.connection_link.sent
    world.connection_link.sent.clear()
    messages, *_ = decode_batch(frame, 0, data_of(frame).msg_count, [])
    # The receiver may have seen the batch in two parts.
    server = world.server_session
    assert server.receive(0, data_of(frame)._replace(msg_count=2), sum(map(len, messages[:2])), 0.0) == 0
    world.server.exchange.handle_batch(server, 1, (messages[:2], {}, [], 100, ()), 0)
    world.server.run()
    world.server.exchange.flush(0.0)
    world.server.exchange.handle_deadline(0.02)
    world.deliver()
    assert world.session.unprocessed_count == 1
    world.link_down()
    world.start_server()
    world.link_up()
    world.run(5.0)
    assert world.client.dropped() == {"outcome_unknown": 1}


def test_a_restart_of_the_client_ends_what_the_listener_had_for_it() -> None:
    world = World(server_limits=Limits(window_msgs=8))
    world.connect()
    ids = [world.server_ask(b"%d" % number) for number in range(10)]
    old = world.server_session
    world.server.exchange.flush(0.0)
    world.link_down()
    world.start_client()
    world.link_up()
    world.deliver()
    assert outcomes(world.server.take()) == dict.fromkeys(ids[:8], OutcomeUnknown) | dict.fromkeys(
        ids[8:], NotDelivered
    )
    assert old.state is State.CLOSED
    assert world.server_session is not old
    assert world.server.exchange.outstanding_count == 0


def test_a_queued_echo_to_a_process_that_ended_is_nobodys_message() -> None:
    world = World(server_limits=Limits(window_msgs=1))
    world.connect()
    world.server.exchange.handle_batch(world.server_session, 1, ([b"1024-1-a", b"1025-1-b"], {}, [], 100, ()), 0)
    world.server.exchange.flush(0.0)
    assert len(world.server_session.queue) == 1
    world.link_down()
    world.start_client()
    world.link_up()
    world.deliver()
    assert world.server.unheard == []
    assert world.server.dropped() == {}


def test_an_echo_to_a_process_that_ended_is_nobodys_message() -> None:
    world = World()
    world.connect()
    world.send(dest=ECHO)
    world.client.exchange.flush(0.0)
    ((_, (frame,)),) = world.connection_link.sent
    world.server.exchange.handshake.receive(world.listener_link, world.routing_id, frame, [], 0.0)
    world.server.exchange.flush(0.0)
    assert world.server_session.unprocessed_count == 1
    world.link_down()
    world.start_client()
    world.link_up()
    world.deliver()
    assert world.server.unheard == []
    assert world.server.dropped() == {}


def test_redelivery_is_for_connections_since_a_peer_of_a_listener_comes_back_as_another_session() -> None:
    world = World()
    world.connect()
    node = world.server
    node.exchange.send(world.server_session, b"", b"x", node.tell, node.tell, NOOP, 1_000.0, redeliver=True)
    node.exchange.flush(0.0)
    world.link_down()
    world.start_client()
    world.link_up()
    world.deliver()
    assert [type(error) for error in node.take()] == [OutcomeUnknown]


def test_an_answer_to_a_peer_whose_session_has_ended_is_certainly_not_delivered() -> None:
    world = World()
    world.connect()
    world.ask(b"question")
    world.deliver()
    (message,) = world.server.take()
    world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
    world.deliver()
    assert not world.server.exchange.handshake.sessions
    message_id = world.server.reply(message, b"answer", on_error=world.server.tell)
    world.server.reply(message, b"nobody waits for what becomes of it")
    world.run(2_000.0)
    assert outcomes(world.server.take()) == {message_id: NotDelivered}
    assert world.server.dropped() == {"peer_gone": 2, "not_delivered": 1}
    (error,) = world.server.unheard
    assert str(error) == "1 message without a callback to listener ('client'): the peer is gone"


def test_what_cannot_be_delivered_and_nobody_waits_for_is_reported_together_and_not_too_often() -> None:
    core = Core()
    core.exchange.handle_deadline(1_000.0)
    gone = GoneOutlet("listener")
    for number in range(7):
        core.send(link=gone, deadline_at=5_000.0)
        core.exchange.flush(0.0)
        if number == 0:
            assert core.exchange.next_deadline_at <= 1_000.0
            core.exchange.handle_deadline(1_000.0)
            assert core.run() == []
    assert core.exchange.next_deadline_at == 1_000.0 + SILENT_LOG_S
    core.exchange.handle_deadline(1_000.0 + SILENT_LOG_S)
    assert core.run() == []
    assert core.exchange.next_deadline_at == FOREVER
    assert [str(error) for error in core.unheard] == [
        "1 message without a callback to listener: the peer is gone",
        "6 messages without a callback, the last to listener: the peer is gone",
    ]
    assert core.dropped() == {"peer_gone": 7, "not_delivered": 7}
    core.send(link=gone, deadline_at=5_000.0)
    core.exchange.flush(1_011.0)
    core.exchange.close_link(core.link, "it was closed", 1_011.0)
    core.run()
    assert len(core.unheard) == 3


@pytest.mark.parametrize("is_closed_here", [False, True])
def test_what_is_asked_by_who_is_gone_is_not_started(is_closed_here: bool) -> None:
    world = World()
    world.connect()
    told: list[object] = []
    world.server.exchange.on_cancelled = lambda *details: told.append(details)
    world.ask(b"question")
    world.send(b"wants no response")
    world.deliver(runs=False)
    session = world.server_session
    if is_closed_here:
        world.server.exchange.close_link(world.listener_link, "it was closed", world.now)
    else:
        world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
        world.deliver(runs=False)
        assert told == [(session, NOOP)]
    assert drop_expired(world.server, world.now) == [b"wants no response"]
    assert world.server.dropped()["expired"] == 1


def test_an_answer_to_who_is_gone_ends_no_message_to_another_peer() -> None:
    """A listener owns what it sent to plain peers, and the answer names the same listener."""
    world = World()
    world.connect()
    node = world.server
    node.exchange.send(world.listener_link, b"plain", b"x", node.tell, node.tell, NOOP, 1_000.0)
    world.listener_link.queue.clear()
    gone = GoneOutlet("listener")
    answer = node.exchange.send(gone, b"", b"answer", None, node.tell, 1024, 1_000.0)
    node.exchange.flush(0.0)
    assert outcomes(node.take()) == {answer: NotDelivered}
    assert node.exchange.outstanding_count == 1


def test_what_is_sent_to_a_session_that_has_ended_is_certainly_not_delivered() -> None:
    world = World()
    world.connect()
    session = world.server_session
    world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
    world.deliver()
    assert session.is_closed
    node = world.server
    message_id = node.exchange.send(session, b"", b"x", node.tell, node.tell, NOOP, 1_000.0)
    world.deliver()
    assert outcomes(node.take()) == {message_id: NotDelivered}
    assert node.dropped() == {"peer_gone": 1}
    assert (len(session.queue), session.queue_bytes) == (0, 0)


@pytest.mark.parametrize("dest", [ECHO, 7])
def test_the_core_answers_no_other_incarnation_than_the_one_that_asked(dest: int) -> None:
    """An ECHO, or an error, that is due when the process that asked is gone."""
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"question")
    world.deliver()
    (message,) = world.client.take()
    world.link_down()
    world.start_server()
    world.link_up()
    world.deliver()
    assert message.incarnation != world.session.peer_incarnation
    message.dest_callback_id = dest
    if dest == ECHO:
        assert world.client.exchange.process_message(message)
    else:
        world.client.exchange.report_raised(message, ValueError("text"))
    assert world.client.dropped() == {"peer_gone": 1}
    assert not world.session.queue


def test_the_core_answers_nobody_between_two_incarnations() -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"question")
    world.deliver()
    (message,) = world.client.take()
    world.server.exchange.close_link(world.listener_link, "it was closed", world.now)
    world.connection_link.is_up = False
    world.deliver()
    assert world.session.state is State.CONNECTING
    world.client.exchange.report_raised(message, ValueError("text"))
    message_id = world.client.reply(message, b"answer", on_error=world.client.tell)
    world.deliver()
    assert outcomes(world.client.take()) == {message_id: NotDelivered}
    assert world.client.dropped() == {"peer_gone": 2}
    assert not world.session.queue


def test_queued_answers_end_with_the_incarnation_that_asked_and_questions_wait_for_the_next() -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"question")
    world.deliver()
    (message,) = world.client.take()
    world.link_down()
    answer = world.client.reply(message, b"answer", on_error=world.client.tell)
    world.client.reply(message, b"nobody waits for what becomes of it")
    world.client.exchange.report_raised(message, ValueError("text"))
    # An ECHO that nobody waits for is an answer too, though it names no callback.
    message.source_callback_id, message.dest_callback_id = NOOP, ECHO
    assert world.client.exchange.process_message(message)
    assert len(world.session.queue) == 4
    question = world.ask(b"a question of ours")
    world.send(b"a message of ours")
    world.start_server()
    world.link_up()
    world.run(1.0)
    assert outcomes(world.client.take()) == {answer: NotDelivered}
    assert [type(error) for error in world.client.unheard] == [NotDelivered]
    assert [each.contents for each in world.server.take()] == [b"a question of ours", b"a message of ours"]
    assert world.client.exchange.outstanding_count == 1
    assert world.client.exchange.cancel(question)
    assert (len(world.session.queue), world.session.queue_bytes) == (0, 0)


def test_an_answer_never_reaches_another_process_than_the_one_that_asked() -> None:
    """The ids of both start at 1024, so it would be taken for the answer to something else."""
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"from the old one")
    world.deliver()
    (message,) = world.client.take()
    world.link_down()
    # One answer is queued when the old process goes, another one is given after that.
    world.client.reply(message, b"early answer")
    world.start_server()
    world.link_up()
    world.deliver()
    answers: list[Message] = []
    node = world.server
    node.exchange.send(world.server_session, b"", b"from the new one", answers.append, None, NOOP, 1_000.0)
    world.client.reply(message, b"late answer")
    world.run(5.0)
    assert [answer.contents for answer in answers] == []
    (question,) = world.client.take()
    world.client.reply(question, b"true answer")
    world.run(10.0)
    assert [answer.contents for answer in answers] == [b"true answer"]


@pytest.mark.parametrize("is_silent", [True, False])
def test_an_answer_is_not_redelivered_to_another_process_than_the_one_that_asked(is_silent: bool) -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    world.server_ask(b"from the old one")
    world.deliver()
    (message,) = world.client.take()
    callback = None if is_silent else world.client.tell
    world.client.reply(message, b"answer", callback=callback, on_error=callback, redeliver=True)
    world.client.exchange.flush(0.0)
    world.link_down()
    world.client.exchange.handle_ended(world.session, "its process has ended")
    assert not world.session.queue
    world.client.exchange.handle_deadline(world.now)
    assert [type(error) for error in [*world.client.take(), *world.client.unheard]] == [OutcomeUnknown]


def test_callbacks_of_an_incarnation_that_is_gone_acknowledge_nothing_to_the_next() -> None:
    world = World()
    world.connection_link.callback = world.session.callback = world.client.tell
    world.connect()
    for _ in range(5):
        world.server_ask()
    world.deliver(runs=False)
    assert len(world.client.exchange.calls) == 6
    world.link_down()
    world.start_server()
    world.link_up()
    world.deliver(runs=False)
    world.client.run()
    assert world.session.processed_through == 0
    world.server_ask(b"new")
    world.run(5.0)
    assert world.client.contents()[-1] == b"new"
    assert world.server_session.unprocessed_count == 0


# Refused, closed.


def start_second(world: World) -> tuple[Node, WireLink]:
    """Start a second living process with the client's identity; return the first."""
    first = world.client, world.connection_link
    world.start_client()
    return first


def test_a_second_living_process_learns_that_its_identity_is_in_use() -> None:
    world = World()
    world.connect()
    first_routing_id = world.routing_id
    start_second(world)
    waiter = Waiter()
    message_id = world.ask(b"not run")
    world.send(b"not run", waiter)
    world.send(b"not run")
    world.link_up()
    world.run(1.0)
    assert outcomes(world.client.take()) == {message_id: IdentityInUse}
    assert isinstance(waiter.error, IdentityInUse)
    assert "another living messenger is 'client' here" in str(waiter.error)
    assert [type(error) for error in world.client.unheard] == [NotDelivered]
    assert world.client.dropped()["refused"] >= 1
    assert world.server.dropped()["identity_in_use"] >= 1
    assert world.session.state is State.CONNECTING
    # So does what it sends later,
    message_id = world.ask(b"not run either")
    world.run(10.0)
    assert outcomes(world.client.take()) == {message_id: IdentityInUse}
    # and none of it runs when the first has gone.
    world.listener_link.gone.add(first_routing_id)
    world.run(20.0)
    world.ask(b"at last")
    world.run(30.0)
    assert world.server.contents() == [b"at last"]


def test_a_refusal_that_was_long_under_way_harms_nothing() -> None:
    world = World()
    world.connect()
    first_routing_id = world.routing_id
    start_second(world)
    world.link_up()
    world.client.exchange.flush(0.0)
    refusals: list[bytes] = []
    while not refusals:
        for _, (frame, *extra) in world.connection_link.sent[:]:
            world.server.exchange.handshake.receive(world.listener_link, world.routing_id, frame, extra, 0.0)
        world.connection_link.sent.clear()
        world.server.exchange.flush(0.0)
        for routing_id, (frame, *extra) in world.listener_link.sent[:]:
            if decode_header(frame).kind == Kind.REFUSED:
                refusals.append(frame)
            elif routing_id == world.routing_id:
                world.client.exchange.handshake.receive(world.connection_link, b"", frame, extra, 0.0)
        world.listener_link.sent.clear()
        world.client.exchange.flush(0.0)
    world.link_down()
    world.listener_link.gone.add(first_routing_id)
    world.now = 60.0
    world.link_up()
    world.run(70.0)
    world.ask(b"a")
    world.deliver()
    (message,) = world.server.take()
    world.client.exchange.handshake.receive(world.connection_link, b"", refusals[0], [], 70.0)
    world.server.reply(message, b"answer")
    world.run(71.0)
    (response,) = world.client.take()
    assert isinstance(response, Message)


@pytest.mark.parametrize("did_not_run", [True, False])
def test_what_was_sent_to_an_incarnation_that_refuses_itself_did_not_run(did_not_run: bool) -> None:
    """A CHALLENGE was answered and messages went with the RESPONSE; then no session came of it."""
    world = World()
    world.connect()
    first, second = world.ask(b"1"), world.ask(b"2")
    world.client.exchange.flush(0.0)
    world.connection_link.sent.clear()
    queued = world.ask(b"3")
    world.client.exchange.handle_refused(world.session, Reason.LIMIT, "no room", did_not_run)
    sent_outcome = NotDelivered if did_not_run else OutcomeUnknown
    told = world.client.take()
    assert outcomes(told) == {first: sent_outcome, second: sent_outcome, queued: NotDelivered}
    assert [error.message_id for error in told] == [first, second, queued]
    assert (len(world.session.queue), world.session.queue_bytes) == (0, 0)
    assert world.client.dropped() == {"refused": 1}


@pytest.mark.parametrize("reason", [Reason.VERSION, Reason.LIMIT])
def test_what_waits_for_a_peer_that_refuses_is_not_delivered(reason: Reason) -> None:
    world = World()
    message_id = world.ask()
    world.link_up()
    world.client.exchange.flush(0.0)
    frame = encode_refusal(world.session.incarnation, reason, "session version 1 is not understood here, version 2 is")
    world.client.exchange.handshake.receive(world.connection_link, b"", frame, [], 0.0)
    (error,) = world.client.take()
    assert (type(error), error.message_id) == (NotDelivered, message_id)
    assert "refused: session version 1 is not understood here, version 2 is" in str(error)
    assert world.client.dropped() == {"refused": 1}
    world.client.exchange.handle_deadline(0.26)
    assert world.client.exchange.next_deadline_at == pytest.approx(HELLO_S_MAX, abs=0.01)


def test_a_link_that_is_refused_ends_what_waits_there() -> None:
    """Before any frame, by a server that does not know our key."""
    world = World()
    message_id = world.ask()
    world.client.exchange.handle_link_refused(world.connection_link, "our key is not on the list")
    (error,) = world.client.take()
    assert (type(error), error.message_id) == (NotDelivered, message_id)
    assert str(error).endswith("refused: our key is not on the list")
    core = Core()
    message_id = core.send(b"x", core.tell, core.tell)
    core.exchange.handle_link_refused(core.link, "our key is not on the list")
    (error,) = core.run()
    assert (type(error), error.message_id) == (NotDelivered, message_id)
    assert str(error).endswith("refused: our key is not on the list")
    for dropped in (world.client.dropped(), core.dropped()):
        assert dropped == {"refused": 1}


def test_a_link_that_was_refused_is_revived_at_its_time_and_not_when_it_is_closed() -> None:
    core = Core()
    now = 0.0
    revived: list[tuple[str, float]] = []
    links = {name: FakeLink() for name in ("first", "second", "closed")}
    for name, link in links.items():
        core.exchange.links.add(link)
        link.revive = lambda name=name: revived.append((name, now))  # type: ignore[method-assign, misc]
    assert Link("owner", None).revive() is None  # type: ignore[func-returns-value]
    core.exchange.revive_later(links["second"], 2.0)
    core.exchange.revive_later(links["first"], 1.0)
    core.exchange.revive_later(links["closed"], 1.5)
    core.exchange.close_link(links["closed"], "it was closed", 0.0)
    while core.exchange.next_deadline_at < FOREVER:
        now = core.exchange.next_deadline_at
        core.exchange.handle_deadline(now)
    assert revived == [("first", 1.0), ("second", 2.0)]


def test_what_was_received_before_a_goodbye_is_not_acknowledged_after_it() -> None:
    """Found by the fuzzer: a server says goodbye, and is there again as the same incarnation before callbacks ran."""
    world = World()
    world.connect()
    session = world.session
    world.ask()
    world.deliver()
    (question,) = world.server.take()
    world.server.reply(question, b"answer")
    world.deliver(runs=False)
    # The response has come, and its callback has not returned yet, or is a coroutine.
    exchange, incarnation = world.client.exchange, session.peer_incarnation
    assert (session.received_through, session.processed_through) == (1, 0)
    response = next(argument for _, argument in exchange.calls if isinstance(argument, Message))
    session.running.begin(response.number)

    def receive(frame: bytes) -> None:
        exchange.handshake.receive(world.connection_link, b"", frame, [], 0.0)

    receive(encode_goodbye(incarnation, session.incarnation, 1))
    again = Challenge(session.nonce, 1, 10, 1_000, b"server")
    receive(encode_challenge(incarnation, session.incarnation, again))
    assert (session.peer_incarnation, session.received_through) == (incarnation, 0)
    world.client.take()
    session.note_processed(session.running.end(response.number))
    assert (session.received_through, session.processed_through) == (0, 0)


def test_a_connection_that_was_refused_resumes_nothing() -> None:
    """The server still knows the session, its key was only off the list for a while; both must count from 1 again."""
    world = World()
    world.connect()
    world.ask(b"before")
    world.deliver()
    assert contents_of(world.server.take()) == [b"before"]
    world.link_down()
    world.client.exchange.handle_link_refused(world.connection_link, "our key is not on the list")
    world.client.take()
    world.link_up()
    message_id = world.ask(b"after")
    world.deliver()
    (question,) = world.server.take()
    assert question.contents == b"after"
    world.server.reply(question, b"answer")
    world.deliver()
    (response,) = world.client.take()
    assert (response.contents, response.dest_callback_id) == (b"answer", message_id)


def test_after_a_refusal_the_next_hello_is_not_forgotten() -> None:
    world = World()
    world.connect()
    world.client.exchange.handle_deadline(0.26)
    assert world.client.exchange.next_deadline_at > HELLO_S_MAX + 1.0
    frame = encode_header(Kind.REFUSED, world.session.peer_incarnation, world.session.incarnation, Reason.LIMIT)
    world.client.exchange.handshake.receive(world.connection_link, b"", frame, [], 1.0)
    world.client.exchange.flush(1.0)
    assert world.client.exchange.next_deadline_at == pytest.approx(HELLO_S_MAX + 1.0, abs=0.01)


@pytest.mark.parametrize("is_up", [True, False])
def test_closing_a_connection_says_goodbye_and_ends_its_messages(is_up: bool) -> None:
    world = World()
    world.connect()
    sent = world.ask(b"sent")
    world.deliver()
    world.link_down()
    if is_up:
        world.link_up()
        world.deliver()
    queued = world.ask(b"queued")
    world.server.take()
    world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
    assert outcomes(world.client.take()) == {sent: OutcomeUnknown, queued: OutcomeUnknown if is_up else NotDelivered}
    assert world.session.state is State.CLOSED
    assert not world.client.exchange.links
    assert not world.client.exchange.handshake.sessions
    world.deliver()
    # What was queued went before the goodbye, if there was a way.
    assert bool(world.server.exchange.handshake.sessions) is not is_up
    assert world.server.contents() == [b"queued"] * is_up


def test_of_what_is_queued_at_a_close_only_what_has_room_leaves() -> None:
    world = World(client_limits=Limits(window_msgs=2))
    world.connect()
    ids = [world.ask(b"%d" % number) for number in range(3)]
    world.client.exchange.close_link(world.connection_link, "it was closed", world.now)
    assert outcomes(world.client.take()) == {ids[0]: OutcomeUnknown, ids[1]: OutcomeUnknown, ids[2]: NotDelivered}
    world.deliver()
    assert world.server.contents() == [b"0", b"1"]


def test_closing_a_listener_says_goodbye_to_all_of_its_peers_and_to_no_others() -> None:
    world = World()
    world.connect()
    sent = world.server_ask(b"sent")
    world.server.exchange.flush(0.0)
    other = world.server.exchange.handshake.open(WireLink("another connection"))
    world.server.exchange.close_link(world.listener_link, "it was closed", world.now)
    assert outcomes(world.server.take()) == {sent: OutcomeUnknown}
    assert set(world.server.exchange.handshake.sessions) == {other}
    world.ask(b"too late")
    world.client.exchange.flush(0.0)
    world.deliver()
    # It was on its way when the listener closed, so it did not run, and goes to the next session.
    assert outcomes(world.client.take()) == {}
    assert world.server.contents() == [b"too late"]


@pytest.mark.parametrize("closes", ["listener", "connection"])
def test_what_the_last_acknowledgement_before_a_goodbye_lets_go_did_not_run(closes: str) -> None:
    """It frees the window, so one more message leaves, to an end that takes nothing any more."""
    world = World(Limits(window_msgs=1), Limits(window_msgs=1))
    world.connect()
    ask, closing, link = (
        (world.ask, world.server, world.listener_link)
        if closes == "listener"
        else (world.server_ask, world.client, world.connection_link)
    )
    asking, asking_link = (
        (world.client, world.connection_link) if closes == "listener" else (world.server, world.listener_link)
    )
    session = next(iter(asking.exchange.handshake.sessions))
    ran, freed, queued = ask(b"ran"), ask(b"freed"), ask(b"queued")
    asking.exchange.flush(0.0)
    (_, (frame, *_)), asking_link.sent = asking_link.sent[0], []
    routing_id = world.routing_id if closes == "listener" else b""
    closing.exchange.handshake.receive(link, routing_id, frame, [], 0.0)
    closing.run()
    closing.exchange.close_link(link, "it was closed", 0.0)
    for _, (frame, *_) in link.sent:
        asking.exchange.handshake.receive(asking_link, b"" if routing_id else world.routing_id, frame, [], 0.0)
        asking.exchange.flush(0.0)
    link.sent = []
    assert session.peer_processed_through == 0, "the session has begun anew"
    told = outcomes(asking.take())
    if closes == "connection":
        # There was nothing to run at the connection, which is told before the goodbye.
        assert told == {ran: NoHandler, freed: NotDelivered, queued: NotDelivered}
        return
    assert told == {ran: OutcomeUnknown}
    world.link_down()
    world.start_server()
    world.connect()
    assert world.server.contents() == [b"freed", b"queued"]


# Deadlines of sessions.


def test_the_deadlines_of_sessions_are_those_of_the_exchange() -> None:
    world = World()
    assert world.client.exchange.next_deadline_at == FOREVER
    world.link_up()
    world.client.exchange.flush(0.0)
    assert world.client.exchange.next_deadline_at == pytest.approx(0.25, abs=0.01)
    world.connection_link.sent.clear()
    world.client.exchange.handle_deadline(0.26)
    assert world.client.exchange.next_deadline_at == pytest.approx(0.76, abs=0.01)
    ((_, (frame,)),) = world.connection_link.sent
    assert decode_header(frame).kind == Kind.HELLO
    world.deliver()
    world.ask()
    world.client.exchange.flush(1.0)
    assert world.client.exchange.next_deadline_at <= 1.5


def test_nothing_is_swept_while_nothing_is_due() -> None:
    world = World()
    world.connect()
    world.ask(deadline_at=500.0)
    world.deliver()
    world.client.exchange.handle_deadline(0.0)
    assert world.client.take() == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "answer", "cancel", "down", "up", "server", "client", "run", "tick"]),
            st.integers(0, 7),
        ),
        max_size=40,
    )
)
def test_whatever_happens_each_message_has_one_outcome_and_a_true_one(steps: list[tuple[str, int]]) -> None:
    world = World()
    told: dict[bytes, list[Any]] = {}
    ran: list[bytes] = []
    waiting: list[tuple[Node, Message]] = []
    sent: dict[bytes, int] = {}

    def note(contents: bytes) -> Any:
        told[contents] = []
        return told[contents].append

    for step, number in [*steps, ("up", 0), ("run", 0)]:
        if step == "ask":
            contents = b"%d" % len(told)
            callback = note(contents)
            sent[contents] = world.send(contents, callback, callback, deadline_at=world.now + 10.0 * (number + 1))
        elif step == "answer" and waiting:
            node, message = waiting.pop(number % len(waiting))
            if node is world.server:
                node.reply(message, message.contents)
        elif step == "cancel" and sent:
            world.client.exchange.cancel(list(sent.values())[number % len(sent)])
        elif step == "down":
            world.link_down()
        elif step == "up":
            world.link_down()
            world.link_up()
        elif step == "server":
            world.link_down()
            world.start_server()
        elif step == "client":
            world.client.exchange.flush(world.now)
        elif step in ("run", "tick"):
            world.run(world.now + (5.0 if step == "run" else 0.01))
        for message in world.server.take():
            assert message.contents not in ran
            ran.append(message.contents)
            waiting.append((world.server, message))
    world.run(world.now + 1_000.0)
    world.client.run()
    for contents, outcome in told.items():
        assert len(outcome) == 1
        if isinstance(outcome[0], NotDelivered):
            assert contents not in ran
        if isinstance(outcome[0], Message):
            assert outcome[0].contents == contents
            assert contents in ran
    assert not world.client.unheard


# Deadlines and cancellations at the receiver.


def drop_expired(node: Node, now: float) -> list[Any]:
    """Drop what is past its deadline; return the contents of what is left to run."""
    node.exchange.drop_expired(now)
    return [argument.contents for _, argument in node.exchange.calls if isinstance(argument, Message)]


def test_each_message_of_a_batch_has_its_own_deadline_at_the_receiver() -> None:
    world = World()
    world.connect()
    deadlines = [1.0, 5.0, 5.0, 1_000.0, FOREVER, 0.5]
    for deadline_at in deadlines:
        world.ask(b"%f" % deadline_at, deadline_at=deadline_at)
    world.ask(b"default", deadline_at=30.0, is_timed=False)
    world.send(b"nobody waits")
    world.deliver(runs=False)
    messages = [argument for _, argument in world.server.exchange.calls if isinstance(argument, Message)]
    told = [message.deadline for message in messages]
    for expected, deadline in zip([*deadlines[:4], None, 0.5, 30.0, None], told, strict=True):
        assert deadline == (expected and pytest.approx(expected, abs=0.0011))
    assert world.server.exchange.expires_at == pytest.approx(0.5, abs=0.0011)
    left = [b"%f" % deadline_at for deadline_at in deadlines]
    assert drop_expired(world.server, 0.4) == [*left, b"default", b"nobody waits"]
    assert drop_expired(world.server, 2.0) == [*left[1:5], b"default", b"nobody waits"]
    assert world.server.exchange.expires_at == pytest.approx(5.0, abs=0.0011)
    assert drop_expired(world.server, 2_000.0) == [left[4], b"nobody waits"]
    assert world.server.exchange.expires_at == FOREVER
    assert world.server.dropped() == {"expired": 6}
    # What was not started counts as processed all the same.
    world.run(0.1)
    assert world.session.unprocessed_count == 0


def test_messages_of_the_default_timeout_travel_without_a_deadline_unless_they_waited() -> None:
    world = World()
    world.connect()
    world.ask(deadline_at=30.0, is_timed=False)
    world.client.exchange.flush(0.0)
    ((_, (frame,)),) = world.connection_link.sent
    assert not decode_header(frame).flags
    world.deliver()
    (message,) = world.server.take()
    assert message.deadline == 30.0
    world.link_down()
    world.ask(deadline_at=31.0, is_timed=False)
    world.now = 11.0
    world.link_up()
    world.deliver()
    (message,) = world.server.take()
    assert message.deadline == pytest.approx(31.0, abs=0.0011)


def test_a_large_message_has_a_deadline_too() -> None:
    world = World()
    world.connect()
    world.ask(bytes(LARGE_BYTES_MIN), deadline_at=7.0)
    world.send(b"", deadline_at=8.0)
    world.deliver(runs=False)
    assert drop_expired(world.server, 6.0) == [bytes(LARGE_BYTES_MIN), b""]
    assert drop_expired(world.server, 7.1) == [b""]


def test_a_response_is_not_dropped_however_late() -> None:
    world = World()
    world.connect()
    world.ask(b"question")
    world.deliver()
    (message,) = world.server.take()
    data = b"%d-%d-and you?" % (5_000, message.source_callback_id)
    world.client.exchange.handle_batch(world.session, 1, ([data], {}, [], 100, (1,)), 0)
    assert drop_expired(world.client, 100.0) == [b"and you?"]


def test_a_cancelled_message_that_has_not_left_is_not_started_if_it_does() -> None:
    world = World()
    first, second = world.ask(b"first", deadline_at=20.0), world.ask(b"second", deadline_at=20.0)
    assert world.client.exchange.cancel(first)
    world.connect()
    assert outcomes(world.client.take()) == {first: Cancelled}
    world.server.told.clear()
    world.ask(b"third")
    world.client.exchange.cancel(second)
    world.deliver(runs=False)
    assert drop_expired(world.server, world.now) == [b"third"]


@pytest.mark.parametrize("was_connected", [False, True])
def test_what_is_cancelled_while_nobody_is_there_is_not_kept(was_connected: bool) -> None:
    """Each stayed in the queue until the deadline of the first, and what was to be said of it until somebody came."""
    world = World()
    if was_connected:
        world.connect()
        sent = world.ask(b"sent")
        world.client.exchange.flush(0.0)
        world.link_down()
        world.client.exchange.cancel(sent)
    kept = [world.ask(b"kept", deadline_at=3_600.0) for _ in range(10)]
    for number in range(2_000):
        message_id = world.ask(b"cancelled", deadline_at=3_600.0 + number)
        assert world.client.exchange.cancel(message_id)
        assert len(world.session.queue) <= 2 * len(kept) + 1
        assert len(world.session.controls.pending) <= len(kept) + 2
    assert world.session.queue_bytes == sum(outgoing.size_bytes for outgoing in world.session.queue)
    assert len(outcomes(world.client.take())) == 2_000 + was_connected
    if was_connected:
        world.link_up()
    else:
        assert not world.session.controls.pending
        world.connect()
    world.deliver()
    received = [message.contents for message in world.server.take()]
    assert received.count(b"kept") == len(kept)
    assert received.count(b"cancelled") <= len(kept)
    assert not world.session.queue


def test_what_is_sent_again_after_it_was_given_up_is_not_started() -> None:
    world = World()
    world.connect()
    message_id = world.ask(b"lost", deadline_at=29.5, is_timed=False)
    world.client.exchange.flush(0.0)
    world.link_down()
    world.client.exchange.cancel(message_id)
    world.link_up()
    world.deliver(runs=False)
    assert drop_expired(world.server, world.now) == []
    assert world.server.dropped() == {"expired": 1}


def test_a_cancellation_waits_for_no_window_and_marks_the_message() -> None:
    world = World(client_limits=Limits(window_msgs=1))
    world.connect()
    told: list[object] = []
    world.server.exchange.on_cancelled = lambda *details: told.append(details)
    first, second = world.ask(b"first"), world.ask(b"second")
    world.deliver(runs=False)
    (message,) = [argument for _, argument in world.server.exchange.calls if isinstance(argument, Message)]
    assert not message.is_given_up(0.0)
    world.client.exchange.cancel(second)
    world.client.exchange.cancel(first)
    world.deliver(runs=False)
    assert message.is_given_up(0.0)
    assert told == [(world.server_session, first)]  # The second one never leaves.
    assert world.server.exchange.expires_at == -FOREVER
    assert drop_expired(world.server, 0.0) == []


def test_a_deadline_tells_the_receiver_and_so_does_a_waiter_that_is_forgotten() -> None:
    world = World()
    world.connect()
    late = world.ask(deadline_at=0.1)
    waiter = Waiter()
    forgotten = world.send(b"", waiter)
    world.deliver()
    early, kept = world.server.take()
    world.run(0.2)
    assert list(world.server_session.cancelled) == [late]
    assert early.is_given_up(0.0)
    world.client.exchange.forget(waiter)
    world.deliver()
    assert list(world.server_session.cancelled) == [late, forgotten]
    assert kept.is_given_up(0.0)
    assert world.client.exchange.outstanding_count == 0


def test_a_message_is_given_up_if_it_was_cancelled_or_its_sender_is_gone() -> None:
    world = World()
    world.connect()
    world.ask()
    world.deliver()
    (message,) = world.server.take()
    assert not message.is_sender_gone
    message.link.cancelled[message.source_callback_id] = None
    assert message.is_given_up(0.0)
    del message.link.cancelled[message.source_callback_id]
    assert not message.is_given_up(0.0)
    message.incarnation += 1
    assert message.is_sender_gone
    assert message.is_given_up(0.0)
    world.send()
    world.deliver()
    (silent,) = world.server.take()
    silent.incarnation += 1
    assert not silent.is_sender_gone
    assert not silent.is_given_up(FOREVER)


def test_a_control_that_is_not_known_does_no_harm() -> None:
    world = World()
    world.connect()
    world.server.exchange.handle_controls(world.server_session, [Control(99, 5)])
    assert not world.server_session.cancelled


def test_only_the_latest_cancellations_are_known() -> None:
    world = World(server_limits=Limits(window_msgs=3))
    world.connect()
    for number in range(5):
        world.session.controls.tell_cancelled(number)
    world.client.exchange.mark_dirty(world.session)
    world.deliver()
    assert list(world.server_session.cancelled) == [2, 3, 4]


def test_more_cancellations_than_a_frame_has_room_for() -> None:
    world = World()
    world.connect()
    for number in range(COUNT_MAX + 1):
        world.session.controls.tell_cancelled(number)
    world.client.exchange.mark_dirty(world.session)
    world.client.exchange.flush(0.0)
    assert len(world.connection_link.sent) == 2
    world.deliver()
    assert list(world.server_session.cancelled) == list(range(COUNT_MAX + 1))


def test_what_is_not_started_by_a_worker_counts_as_processed() -> None:
    world = World()
    world.listener_link.has_workers = True
    submitted: list[Message] = []
    world.server.slc = submitted.append
    world.connect()
    world.server.exchange.register_callback(64, world.server.tell)
    session = world.server_session
    session.callback = world.server.tell
    for dest in (NOOP, 64):
        world.ask(dest=dest, deadline_at=0.1)
    world.deliver(runs=False)
    assert drop_expired(world.server, 1.0) == []
    # Of the second both the registered callback and the one of the endpoint.
    assert world.server.dropped() == {"expired": 3}
    assert session.processed_through == 2
    assert not session._done_early


def test_messages_of_the_basic_dialect_are_given_up_by_nobody() -> None:
    core = Core()
    core.link.callback = core.tell
    core.exchange.receive(core.link, b"", b"7-0-x")
    core.exchange.drop_expired(1e9)
    (message,) = core.run()
    assert message.deadline is None
    assert not message.is_given_up(1e9)
    assert not message.is_sender_gone
    message_id = core.send(callback=core.tell, on_error=core.tell)
    assert core.exchange.cancel(message_id)


def test_a_plain_batch_may_have_what_is_no_message_and_a_response_that_nobody_takes() -> None:
    world = World()
    world.connect()
    message_id = world.send(b"x", None, world.client.tell)
    world.client.exchange.handle_batch(world.session, 1, ([b"no", b"0-%d-x" % message_id], {}, [], 100, ()), 0)
    assert world.client.take() == []
    assert world.client.dropped() == {"malformed_message": 1}
    assert world.client.exchange.outstanding_count == 0
