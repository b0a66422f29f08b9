"""Typed messages between messengers: one body, run over both drivers and all transports."""

import asyncio
import logging

import msgspec
import pytest

from messenger import (
    AsyncMessenger,
    ContentsInvalid,
    DeliveryError,
    HandlerError,
    Message,
    Messenger,
    NotDelivered,
    typed,
)
from messenger.typed import Encoding
from tests.conftest import Inbox, MessengerFactory, PlainPeers, contents_of
from tests.test_typed import ENCODINGS, Add, Adder, Join, Sum, dispatch

To = str | int


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_requests_of_structs(messenger: MessengerFactory, destination: To, encoding: Encoding) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, typed(dispatch), workers=2)
    assert client.request(destination, Add(1, 2), response_type=Sum, encoding=encoding) == Sum(3)
    assert client.request(destination, Join(["a", "b"]), response_type=str, encoding=encoding) == "a-b"
    for field, contents in (("$.first", {"first": "x", "second": 1}), ("second", {"first": 1})):
        bad = msgspec.json.encode({"type": "Add", **contents})
        with pytest.raises(HandlerError, match=r"ContentsInvalid: contents of .* bytes do not decode as ") as raised:
            client.request(destination, bad)
        assert field in str(raised.value)
    with pytest.raises(HandlerError, match="ContentsInvalid"):
        client.request(destination, b"\xff" * 100)
    # And the server goes on.
    assert client.request(destination, Add(3, 4), response_type=Sum, encoding=encoding) == Sum(7)
    with pytest.raises(ContentsInvalid, match=r"do not decode as Join: "):
        client.request(destination, Add(3, 4), response_type=Join, encoding=encoding)
    response = client.request(destination, Add(3, 4), encoding=encoding)
    assert isinstance(response, Message)


class Picky(msgspec.Struct):
    """A type whose own check raises what no decoder does."""

    value: int

    def __post_init__(self) -> None:
        if self.value == 0:
            raise LookupError("planted")
        if self.value < 0:
            next(iter(()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_response_type_that_raises_harms_nobody_else(
    messenger: MessengerFactory, destination: To, encoding: Encoding
) -> None:
    """It ended the `AsyncMessenger`, and whoever waited for the response waited for ever."""
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, typed(dispatch))
    with pytest.raises(LookupError, match="planted"):
        client.request(destination, Add(0, 0), response_type=Picky, encoding=encoding)
    with pytest.raises((StopIteration, RuntimeError), match=r"StopIteration|^$"):
        client.request(destination, Add(0, -1), response_type=Picky, encoding=encoding)
    assert client.request(destination, Add(1, 2), response_type=Picky, encoding=encoding).value == 3


def test_what_does_not_decode_fills_no_log(
    messenger: MessengerFactory, destination: To, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = messenger(), messenger()
    server.listen_for_connection(destination, typed(dispatch))
    errors: Inbox[DeliveryError] = Inbox()
    for _ in range(100):
        client.send_message(destination, b"{}", on_error=errors)
    assert {type(error) for error in errors.wait(100)} == {HandlerError}
    assert server.statistics().callback_error_count == 100
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_structs_in_all_that_is_sent(messenger: MessengerFactory, destination: To) -> None:
    """They are MessagePack unless that is said otherwise."""
    server, client = messenger(), messenger()
    server.register_callback(100, typed(Adder(10)))
    server.listen_for_connection(destination, None)
    responses: Inbox[Message] = Inbox()
    client.send_message(destination, Add(1, 2), responses, remote_callback=100)
    assert contents_of(responses.wait()) == [msgspec.msgpack.encode(Sum(13))]
    errors: Inbox[DeliveryError] = Inbox()
    client.send_message(destination, Join([]), responses, on_error=errors, remote_callback=100)
    assert "Invalid value 'Join' - at `$.type`" in str(errors.wait()[0])


def test_what_cannot_be_encoded_or_is_not_there(messenger: MessengerFactory, destination: To) -> None:
    server, client = messenger(), messenger()

    def answer(_: Add) -> object:
        return object()

    server.listen_for_connection(destination, typed(answer))
    with pytest.raises(HandlerError, match="TypeError"):
        client.request(destination, Add(1, 2), response_type=Sum)
    with pytest.raises(ValueError, match="encoding is 'yaml'"):
        client.request(destination, b"", encoding="yaml")  # type: ignore[call-overload]
    with pytest.raises(NotDelivered):
        client.request("inproc://nobody", Add(1, 2), response_type=Sum, timeout=0.01)
    assert client.statistics().outstanding_msgs == 0


def test_plain_peers_send_json(messenger: MessengerFactory, plain: PlainPeers) -> None:
    server = messenger()
    listener = server.listen_for_connection(0, typed(dispatch))
    dealer = plain.dealer(listener.port)
    dealer.send(b"", b'1024-0-{"type":"Add","first":1,"second":2}')
    assert dealer.receive()[-1] == b'0-1024-{"value":3}'
    # It waits for no response.
    dealer.send(b"", b'0-0-{"type":"Add","first":1,"second":2}')
    dealer.send(b"", b'1025-0-{"type":"Join","parts":[]}')
    assert dealer.receive()[-1] == b'0-1025-""'


def test_coroutine_functions(runtime_folder: object) -> None:
    async def add_slowly(request: Add, message: Message) -> Sum:
        await asyncio.sleep(0.001)
        assert message.source_callback_id
        return Sum(request.first + request.second)

    async def run() -> None:
        async with AsyncMessenger() as server, AsyncMessenger() as client:
            listener = server.listen_for_connection(0, typed(add_slowly), workers=100)
            asked = [client.request(listener.port, Add(n, n), response_type=Sum) for n in range(100)]
            assert await asyncio.gather(*asked) == [Sum(2 * n) for n in range(100)]
            with pytest.raises(HandlerError, match=r"\$\.first"):
                await client.request(listener.port, b'{"type":"Add","first":null,"second":1}', response_type=Sum)
            with pytest.raises(ContentsInvalid):
                await client.request(listener.port, Add(1, 2), response_type=str, encoding="json")
            assert await client.request(listener.port, Add(1, 2), response_type=Sum, encoding="json") == Sum(3)
        with Messenger() as threads, pytest.raises(NotDelivered):
            threads.request("inproc://nobody", Add(1, 2), response_type=Sum, timeout=0.01)

    asyncio.run(run())
