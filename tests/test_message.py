"""`message`: what a user is given, and what takes an outcome."""

from typing import Any

import pytest

from messenger.errors import NotDelivered
from messenger.link import Outlet
from messenger.message import Message, Statistics
from messenger.takers import Waiter


def message(contents: bytes = b"contents", peer: bytes = b"client", messenger: Any = None) -> Message:
    return Message(messenger, contents, 1024, 64, Outlet("listener", None), peer)


def test_what_a_message_is_unless_told() -> None:
    """A plain peer numbers nothing and has no incarnations."""
    plain = message()
    assert (plain.number, plain.incarnation, plain.redelivered) == (0, 0, False)


def test_whether_it_was_cancelled_is_asked_of_the_messenger() -> None:
    class FakeMessenger:
        def _is_given_up(self, message: Message) -> bool:
            return message.contents == b"yes"

    assert message(b"yes", messenger=FakeMessenger()).cancelled
    assert not message(b"no", messenger=FakeMessenger()).cancelled


def test_the_buffer_is_no_copy_and_cannot_be_written() -> None:
    contents = b"contents"
    buffer = message(contents).buffer
    assert buffer.obj is contents
    assert buffer.readonly


@pytest.mark.parametrize(("peer", "sender"), [(b"client", "client"), (b"\0\x80", "0x0080"), (b"", "")])
def test_the_sender_is_the_identity_of_the_peer(peer: bytes, sender: str) -> None:
    assert message(peer=peer).sender == sender


def test_a_reply_sends_to_the_message_and_returns_what_that_does() -> None:
    calls: list[Any] = []

    class FakeMessenger:
        def send_message(self, *arguments: Any, **options: Any) -> int:
            calls.append((arguments, options))
            return 7

    question = message(messenger=FakeMessenger())
    assert question.reply(b"yes", print, timeout=1.0) == 7
    assert question.reply("no") == 7
    assert calls == [((question, b"yes", print), {"timeout": 1.0}), ((question, "no", None), {})]


def test_a_plain_reply_takes_the_short_way() -> None:
    class FakeMessenger:
        def _answer(self, question: Message, contents: bytes) -> tuple[Message, bytes]:
            return question, contents

    question = message(messenger=FakeMessenger())
    assert question.reply(b"yes") == (question, b"yes")


def test_a_message_is_shown_without_its_contents() -> None:
    """They may be large, or secret."""
    assert repr(message(b"x" * 1_000, b"\xff")) == "<Message 1024-64 from '0xff', 1000 bytes>"


def test_messages_are_compared_by_identity() -> None:
    """Two may be alike to the byte, and are two all the same."""
    first = message()
    assert first in [first]
    assert first != message()
    assert len({first, message()}) == 2


def test_a_waiter_notes_a_response_or_an_error() -> None:
    waiter = Waiter()
    assert (waiter.done, waiter.response, waiter.error) == (False, None, None)
    error = NotDelivered("text", 7)
    waiter.settle(None, error)
    assert waiter.done
    assert (waiter.response, waiter.error) == (None, error)
    waiter = Waiter()
    response = message()
    waiter(response)
    assert waiter.done
    assert waiter.response is response
    assert waiter.error is None


def test_statistics_cannot_be_changed() -> None:
    counts = dict.fromkeys([name for name in Statistics.__struct_fields__ if name not in ("identity", "dropped")], 3)
    statistics = Statistics(identity="me", dropped={}, **counts)
    assert statistics.sent_msgs == 3
    with pytest.raises(AttributeError):
        statistics.sent_msgs = 4  # type: ignore[misc]


def test_a_part_goes_another_way_and_has_no_callback() -> None:
    calls: list[Any] = []

    class FakeMessenger:
        def _reply_part(self, *arguments: Any, **options: Any) -> int:
            calls.append((arguments, options))
            return 8

        def _answer(self, *arguments: Any) -> int:
            calls.append(arguments)
            return 9

    asked = message(messenger=FakeMessenger())
    assert asked.reply(b"part", more=True, timeout=5.0) == 8
    assert calls.pop() == ((asked, b"part"), {"timeout": 5.0})
    with pytest.raises(ValueError, match="a part of a response has no callback"):
        asked.reply(b"part", print, more=True)
    assert asked.reply(b"last") == 9
    assert calls == [(asked, b"last")]
