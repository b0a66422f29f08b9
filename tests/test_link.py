"""`link`: what the ports of the core do by themselves, before a transport fills them in."""

import pytest

from messenger.link import FOREVER, GoneOutlet, Link, Outlet
from messenger.outgoing import Outgoing


def outgoing(data: bytes, large: bytes | None = None) -> Outgoing:
    return Outgoing(message_id=1, data=data, size_bytes=len(data), deadline_at=FOREVER, large=large)


def test_what_a_message_on_its_way_out_is_unless_told() -> None:
    message = outgoing(b"0-0-x")
    assert (message.peer, message.roams, message.redeliver, message.option) == (b"", False, False, None)


def test_nobody_waits_for_a_message_without_a_callback() -> None:
    message = outgoing(b"0-0-x")
    assert message.is_silent
    message.on_error = print
    assert not message.is_silent
    message.callback, message.on_error = print, None
    assert not message.is_silent


@pytest.mark.parametrize(("data", "is_answer"), [(b"0-0-x", False), (b"7-1023-x", False), (b"0-1024-", True)])
def test_an_answer_names_a_callback_of_one_message(data: bytes, is_answer: bool) -> None:
    assert outgoing(data).is_answer is is_answer


def test_what_the_core_itself_answers_is_an_answer() -> None:
    message = outgoing(b"0-0-x")
    message.message_id = 0
    assert message.is_answer


def test_a_large_message_is_joined_only_when_it_is_asked_for_whole() -> None:
    assert outgoing(b"0-0-small").whole() == b"0-0-small"
    assert outgoing(b"0-0-", b"large").whole() == b"0-0-large"
    assert outgoing(b"0-0-", b"").whole() == b"0-0-"


def test_an_outlet_is_open_and_empty_and_its_handle_owns_it() -> None:
    handle = object()
    outlet = Outlet(handle, print)
    assert outlet.owner is outlet.handle is handle
    assert outlet.callback is print
    assert (list(outlet.queue), outlet.queue_bytes, outlet.is_dirty) == ([], 0, False)
    assert (outlet.is_closed, outlet.is_shared, outlet.has_workers, outlet.peer_incarnation) == (False, False, False, 0)
    assert outlet.is_quiet  # The basic dialect knows of nothing that is on its way.
    assert str(Outlet("destination", None)) == "destination"


def test_outlets_share_no_queue() -> None:
    first, second = Outlet("first", None), Outlet("second", None)
    first.queue.append(outgoing(b"0-0-x"))
    assert not second.queue


def test_a_gone_outlet_is_closed_and_keeps_what_is_queued_for_the_exchange_to_end() -> None:
    gone = GoneOutlet("destination")
    gone.queue.append(outgoing(b"0-0-x"))
    gone.flush(0.0)
    assert gone.is_closed
    assert len(gone.queue) == 1
    assert str(gone) == "destination"
    # To abandon it must end no other message of the handle's.
    assert gone.owner is gone


def test_a_link_stands_for_itself_until_a_transport_says_otherwise() -> None:
    link = Link("destination", None)
    assert list(link.siblings()) == [link]
    assert (link.session, link.identity, link.is_closed) == (None, b"", False)


def test_what_moves_bytes_is_for_a_transport_to_say() -> None:
    link = Link("destination", None)
    with pytest.raises(NotImplementedError):
        link.flush(0.0)
    with pytest.raises(NotImplementedError):
        link.send_frames(b"", [b"frame"])
