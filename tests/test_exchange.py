"""`exchange`: the core without a network. A fake link keeps what would be sent; `run` does what a driver does."""

from collections.abc import Iterable
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
from messenger.exchange import FOREVER, Exchange, Link, Waiter
from messenger.wire import ID_MAX


class FakeLink(Link):
    """A link that belongs to a listener (with siblings) or to a connection."""

    def __init__(self, owner: object = "owner", callback: Any = None) -> None:
        super().__init__(owner, callback)
        self.others: list[FakeLink] = [self]

    def siblings(self) -> Iterable[Link]:
        return self.others


class Core:
    """An exchange with one link, and everything that its callbacks were told."""

    def __init__(self, limits: Limits | None = None, **options: Any) -> None:
        self.told: list[Any] = []
        self.unheard: list[DeliveryError] = []
        self.exchange = Exchange("messenger", limits or Limits(), self.unheard.append, **options)
        self.link = FakeLink()
        self.exchange.links.add(self.link)

    def send(self, contents: bytes = b"x", callback: Any = None, on_error: Any = None, **options: Any) -> int:
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


def sent(link: Link) -> list[bytes]:
    return [outgoing.data for outgoing in link.queue]


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
        "2 messages without a callback to owner: nobody was there to take them"
    ]
    assert core.exchange.next_deadline_at == 6.0
    assert core.statistics.not_delivered_msgs == 1


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
    core.exchange.abandon(core.link, "it was closed")
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
    assert not waiter.done
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
