"""What callers give by mistake: each refusal names the argument, its value, and what it must be. Nothing is sent."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from messenger import ECHO, ContentsInvalid, HandlerError, KeyPair, Limits, Message, Messenger, Security, typed
from tests.conftest import Inbox, wait_until


class Add(msgspec.Struct):
    first: int


async def coroutine_function(_: object) -> None:
    raise AssertionError


class CallableObject:
    async def __call__(self, _: object) -> None:
        raise AssertionError


@typed
async def typed_coroutine_function(_: Add) -> Add:
    raise AssertionError


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError


@pytest.fixture
def client() -> Iterator[Messenger]:
    with Messenger("client") as made:
        yield made
        counts = made.statistics()
        assert (counts.sent_msgs, counts.listener_count) == (0, 0)


# What a type checker would refuse.
Call = Callable[[Any], object]
make: Any = Messenger
make_security: Any = Security
CALLS: dict[str, tuple[Call, str]] = {
    "contents None": (lambda m: m.request("inproc://a", None), "contents are None, they must be bytes, .* str"),
    "contents dict": (lambda m: m.send_message("inproc://a", {}), r"contents are \{\}, .*json\.dumps"),
    "contents int": (lambda m: m.stream("inproc://a", 7), "contents are 7, "),
    "contents with gaps": (lambda m: m.send_message("inproc://a", memoryview(b"0123")[::2]), "without gaps"),
    "contents without repr": (
        lambda m: m.send_message("inproc://a", Unshowable()),
        "are an object of type Unshowable, ",
    ),
    "contents long": (lambda m: m.send_message("inproc://a", [0] * 999), r"contents are .{100}… of type list, "),
    "timeout None": (lambda m: m.request("inproc://a", b"", timeout=None), "timeout is None, it must be a number of"),
    "timeout str": (lambda m: m.send_message("inproc://a", b"", timeout="1"), "timeout is '1', it must be a number"),
    "close None": (lambda m: m.close(None), "timeout is None, it must be a number of seconds"),
    "remote_callback str": (
        lambda m: m.request("inproc://a", b"", remote_callback="echo"),
        "remote_callback is 'echo', it must be an integer: ECHO",
    ),
    "remote_callback None": (
        lambda m: m.send_message("inproc://a", b"", remote_callback=None),
        "_callback is None, it",
    ),
    "remote_callback float": (lambda m: m.send_message("inproc://a", b"", remote_callback=1.5), "1.5, it must be an"),
    "to list": (lambda m: m.send_message([1], b""), r"\[1\] is nothing to send to; give a connection, "),
    "registered None": (lambda m: m.register_callback(64, None), "callback is None, it must be callable$"),
    "registered str": (lambda m: m.register_callback("64", print), "callback id '64' is not an integer, 64 to 1023"),
    "workers str": (lambda m: m.listen_for_connection(0, print, workers="2"), "workers is '2', it must be an integer"),
    "listener 5": (lambda m: m.listen_for_connection(0, print, identity=5), "identity is 5, it must be str"),
    "identity 5": (lambda _: make(5), "identity is 5, it must be str: the name that others see"),
    "limits dict": (lambda _: make(limits={}), r"limits is \{\}, it must be Limits, for example Limits\("),
    "security str": (lambda _: make(security="server.key"), "security is 'server.key', it must be Security, "),
    "key int": (lambda _: make_security(key=5, allow="a"), "key is of type int, it must be a KeyPair or the path of a"),
    "allow list": (
        lambda _: make_security(key=KeyPair.generate(), allow=["a.pub"]),
        r"allow is \['a.pub'\], it must be the",
    ),
    "servers list": (
        lambda _: make_security(key=KeyPair.generate(), servers=["a"]),
        r"servers is \['a'\], it must be a pub",
    ),
}


@pytest.mark.parametrize(("call", "text"), CALLS.values(), ids=CALLS.keys())
def test_a_wrong_type_is_named(client: Messenger, call: Call, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call(client)


class Index:
    def __index__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "options", [{"remote_callback": Index()}, {"timeout": Decimal(9)}, {"timeout": 9}, {"remote_callback": True}]
)
def test_what_stands_for_a_number_is_one(options: dict[str, Any]) -> None:
    with Messenger("server") as server, Messenger("client") as client:
        server.listen_for_connection("inproc://numbers", lambda message: message.reply(b"the SLC"))
        options = {"remote_callback": ECHO, **options}
        response: Message = client.request("inproc://numbers", b"echo", **options)
        assert response.contents == b"echo"
        answers: Inbox[Message] = Inbox()
        options["redeliver"] = 1
        client.send_message("inproc://numbers", b"echo", answers, **options)
        assert answers.wait()[0].contents == b"echo"


def test_a_timeout_that_no_clock_reaches_is_refused(client: Messenger) -> None:
    with pytest.raises(ValueError, match="it must be a finite number of seconds above 0"):
        client.request("inproc://a", b"", timeout=10**400)


def test_workers_have_a_limit() -> None:
    with (
        Messenger(limits=Limits(workers_max=3)) as server,
        pytest.raises(ValueError, match=r"workers is 4, limits\.workers_max is 3"),
    ):
        server.listen_for_connection("inproc://a", print, workers=4)
    with Messenger() as server, pytest.raises(ValueError, match=r"limits\.workers_max is 1000"):
        server.listen_for_connection("inproc://a", print, workers=10**9)


def generator_function(_: object) -> Iterator[bytes]:
    yield b"part"


async def async_generator_function(_: object) -> AsyncIterator[bytes]:
    yield b"part"


class GeneratorObject:
    def __call__(self, _: object) -> Iterator[bytes]:
        yield b"part"


def assert_refused_everywhere(client: Messenger, callback: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"^callback is .*{text}"):
        client.listen_for_connection("inproc://a", callback)
    with pytest.raises(TypeError, match=text):
        client.register_callback(64, callback)
    with pytest.raises(TypeError, match=text):
        client.make_connection("inproc://a", callback=callback)
    with pytest.raises(TypeError, match=f"^order_by is .*{text}"):
        client.listen_for_connection("inproc://a", print, workers=1, order_by=callback)


@pytest.mark.parametrize(
    "callback",
    [generator_function, async_generator_function, GeneratorObject(), functools.partial(generator_function)],
)
def test_a_generator_function_is_refused(client: Messenger, callback: Any) -> None:
    """Nothing of it ran, and its senders were told nothing."""
    text = r"a generator function, .* message\.reply\(part, more=True\)"
    assert_refused_everywhere(client, callback, text)
    with Messenger() as server:
        server.listen_for_connection("inproc://a", lambda message: callback(message))
        with Messenger() as other, pytest.raises(HandlerError, match=r"TypeError: .* returned a generator"):
            other.request("inproc://a", b"")


@pytest.mark.parametrize(
    "callback",
    [coroutine_function, CallableObject(), functools.partial(coroutine_function), typed_coroutine_function],
)
def test_a_coroutine_function_is_for_the_other_messenger(client: Messenger, callback: Any) -> None:
    text = "a coroutine function, which nothing would run here; .* use AsyncMessenger"
    assert_refused_everywhere(client, callback, text)


@pytest.mark.parametrize("where", ["callback", "on_error", "listener", "worker"])
def test_a_coroutine_that_a_callback_returns_is_told(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is given with a message is not looked at before it returns, and a lambda is no coroutine function."""

    def returns_one(argument: object) -> Any:
        return coroutine_function(argument)

    answers: Inbox[object] = Inbox()
    with Messenger() as server, Messenger() as client:
        slc = returns_one if where in ("listener", "worker") else lambda message: message.reply(b"")
        if where == "on_error":
            slc = answers
        server.listen_for_connection("inproc://coroutines", slc, workers=int(where == "worker"))
        if where == "callback":
            client.send_message("inproc://coroutines", b"", coroutine_function)
        elif where == "on_error":
            client.cancel(client.send_message("inproc://coroutines", b"", answers, on_error=coroutine_function))
        else:
            client.send_message("inproc://coroutines", b"", answers, on_error=answers)
            assert "returned a coroutine, which nothing runs here; use AsyncMessenger" in str(answers.wait()[0])
        guilty = server if where in ("listener", "worker") else client
        wait_until(lambda: guilty.statistics().callback_error_count)
    assert "returned a coroutine, which nothing runs here; use AsyncMessenger" in caplog.text


def test_json_without_its_encoding_is_hinted_at() -> None:
    def answer(message: Message) -> None:
        message.reply(b'{"first": 1}')

    with Messenger() as server, Messenger() as client:
        server.listen_for_connection("inproc://json", answer)
        with pytest.raises(ContentsInvalid, match='they look like JSON, for which encoding="json" must be given'):
            client.request("inproc://json", b"", response_type=Add)
