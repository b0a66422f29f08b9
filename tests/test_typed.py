"""`typed`: what is decoded as what, and that nothing but `ContentsInvalid` comes of anything else."""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from messenger import Message, typed
from messenger.errors import ContentsInvalid
from messenger.link import Outlet
from messenger.typed import Codec, Encoding, codec_of, encode, encode_as, encoding_of

ENCODINGS: list[Encoding] = ["msgpack", "json"]
# More than any decoder may recurse.
DEEP = 200_000


class Add(msgspec.Struct, tag=True):
    first: int
    second: int


class Join(msgspec.Struct, tag=True):
    parts: list[str]
    between: str = "-"


class Pair(msgspec.Struct, array_like=True):
    left: int
    right: Any = None


class Sum(msgspec.Struct):
    value: int


class FakeMessenger:
    def __init__(self) -> None:
        self.answers: list[bytes] = []

    def _answer(self, message: Message, contents: bytes) -> int:
        self.answers.append(contents)
        return 7


def call(callback: Callable[[Message], Any], contents: bytes, source_callback_id: int = 1024) -> list[bytes]:
    messenger = FakeMessenger()
    callback(Message(messenger, contents, source_callback_id, 0, Outlet("listener", None), b"client"))
    return messenger.answers


def add(request: Add) -> Sum:
    return Sum(request.first + request.second)


def dispatch(request: Add | Join) -> Sum | str:
    return add(request) if isinstance(request, Add) else request.between.join(request.parts)


class Adder:
    def __init__(self, more: int) -> None:
        self.more = more

    def __call__(self, request: Add) -> Sum:
        return Sum(request.first + request.second + self.more)

    def method(self, request: Add, message: Message) -> str:
        return f"{request.first + request.second + self.more} for {message.sender}"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_function_from_one_struct_to_another(encoding: Encoding) -> None:
    for handler in (add, Adder(0), dispatch):
        (answer,) = call(typed(handler), encode(Add(1, 2), encoding))
        assert answer == encode(Sum(3), encoding)
    (answer,) = call(typed(Adder(1).method), encode(Add(1, 2), encoding))
    assert answer == encode("4 for client", encoding)
    (answer,) = call(typed(dispatch), encode(Join(["a", "b"]), encoding))
    assert answer == encode("a-b", encoding)


def test_structs_that_are_arrays() -> None:
    def swap(pair: Pair) -> Pair:
        return Pair(0, pair.left)

    assert call(typed(swap), b"[5, 6]") == [b"[0,5]"]
    assert call(typed(swap), b"\x92\x05\x06") == [b"\x92\x00\x05"]


def test_what_wants_no_response_gets_none() -> None:
    assert call(typed(add), encode(Add(1, 2)), source_callback_id=0) == []


def test_none_is_an_answer_unless_the_function_may_have_answered_itself() -> None:
    def nothing(request: Add) -> None:
        return None

    def answer_itself(request: Add, message: Message) -> None:
        message.reply(b"itself")

    assert call(typed(nothing), b'{"type":"Add","first":1,"second":2}') == [b"null"]
    assert call(typed(answer_itself), encode(Add(1, 2))) == [b"itself"]


BAD = [
    pytest.param(b"", "truncated", id="nothing"),
    pytest.param(b"potato", "malformed", id="no json"),
    pytest.param(b"[]", "Expected `object`, got `array`", id="another kind"),
    pytest.param(
        b'{"type":"Add","first":1,"second":"x"}', r"Expected `int`, got `str` - at `\$\.second`", id="a field"
    ),
    pytest.param(b'{"type":"Add","first":1}', "missing required field `second`", id="a field is missing"),
    pytest.param(b'{"type":"Join","parts":["a",7]}', r"at `\$\.parts\[1\]`", id="a field of a field"),
    pytest.param(b'{"type":"Drop"}', r"Invalid value 'Drop' - at `\$\.type`", id="an unknown tag"),
    pytest.param(b'{"type":"Join","parts":["\xff"]}', "", id="text that is not UTF-8"),
    pytest.param(b"\x82\xa4type\xa4Join\xa5parts\x91\xa1\xff", "", id="text that is not UTF-8, packed"),
    pytest.param(b"\x83\xa4type\xa3Add\xa5first\x01\xa6second\xa1x", r"at `\$\.second`", id="a field, packed"),
    pytest.param(b"\x81\xa4type\xdd\xff\xff\xff\xff", "", id="a list that ends early"),
    pytest.param(b"\xdf\xff\xff\xff\xff", "", id="a map that ends early"),
    pytest.param(b"\x82\xa4type\xa3Add\xa4more" + b"\x91" * DEEP, "", id="lists in lists, packed"),
    pytest.param(b'{"type":"Add","more":' + b"[" * DEEP, "", id="lists in lists"),
    pytest.param(b'{"type":"Add","more":' + b'{"a":' * DEEP, "", id="maps in maps"),
    pytest.param(b'{"type":"Add","first":' + b"9" * 100_000 + b',"second":1}', "", id="a long number"),
    pytest.param(b"\xc1", "", id="no msgpack"),
]


@pytest.mark.parametrize(("contents", "text"), BAD)
def test_what_does_not_decode_names_what_is_wrong(contents: bytes, text: str) -> None:
    with pytest.raises(ContentsInvalid, match=text or "do not decode") as raised:
        call(typed(dispatch), contents)
    assert str(raised.value).startswith(f"contents of {len(contents)} bytes do not decode as ")


@pytest.mark.parametrize("contents", [b"\x92\x01" + b"\x91" * DEEP, b"[1," + b"[" * DEEP, b"[1," + b'{"a":' * DEEP])
def test_what_is_nested_in_a_field_of_any_type_is_refused_too(contents: bytes) -> None:
    def take(pair: Pair) -> int:
        return pair.left

    with pytest.raises(ContentsInvalid):
        call(typed(take), contents)


ANY: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)


def is_answered_or_invalid(contents: bytes) -> bool:
    """Anything else raises."""
    try:
        return len(call(typed(dispatch), contents)) == 1
    except ContentsInvalid:
        return True


@given(st.binary(max_size=100))
def test_any_bytes_are_a_struct_or_invalid(contents: bytes) -> None:
    assert is_answered_or_invalid(contents)


@given(ANY, st.sampled_from(["Add", "Join", "Other"]), st.sampled_from(ENCODINGS))
def test_any_fields_are_a_struct_or_invalid(value: Any, tag: str, encoding: Encoding) -> None:
    fields = {**value, "type": tag} if isinstance(value, dict) else value
    with_fields = {"type": tag, "first": value, "second": 1, "parts": value}
    for contents in (encode(fields, encoding), encode(with_fields, encoding)):
        assert is_answered_or_invalid(contents)


@given(st.sampled_from(ENCODINGS), st.integers(), st.integers(0, 255), st.lists(st.text(), max_size=4))
def test_any_changed_byte_gives_a_struct_or_invalid(
    encoding: Encoding, position: int, byte: int, parts: list[str]
) -> None:
    contents = bytearray(encode(Join(parts), encoding))
    contents[position % len(contents)] = byte
    assert is_answered_or_invalid(bytes(contents))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.sampled_from(ENCODINGS))
def test_structs_come_back_and_their_first_byte_tells_the_encoding(first: int, second: int, encoding: Encoding) -> None:
    for value in (Add(first, second), Pair(first, [second])):
        contents = encode(value, encoding)
        assert encoding_of(contents) == encoding
        assert codec_of(type(value)).decode(contents, encoding) == value


def test_encodings_and_what_is_no_struct() -> None:
    assert encode_as(Sum(1), "json") == b'{"value":1}'
    assert encode_as(b"bytes", "json") == b"bytes"
    for function in (encode, encode_as):
        with pytest.raises(ValueError, match="encoding is 'yaml', it must be 'msgpack' or 'json'"):
            function(b"", "yaml")  # type: ignore[arg-type]
    assert encoding_of(b"") == "json"
    assert codec_of(Sum) is codec_of(Sum)
    with pytest.raises(ContentsInvalid, match=r"as list\[int\]: "):
        Codec(list[int]).decode(b'["x"]', "json")


def no_annotation(request):  # type: ignore[no-untyped-def]
    return request


def of_int(request: int) -> int:
    return request


def of_struct_or_none(request: Add | None) -> None: ...


def of_annotated(request: Annotated[int, "x"]) -> None: ...


def of_list(request: list[Add]) -> None: ...


def of_nothing() -> None: ...


def of_three(request: Add, message: Message, more: int) -> None: ...


def of_keyword(*, request: Add) -> None: ...


def of_any(*request: Add) -> None: ...


class Untagged(msgspec.Struct):
    first: int


def of_untagged(request: Untagged | Sum) -> None: ...


def to_complex(request: Add) -> complex:
    raise AssertionError


def to_complex_or_none(request: Add) -> complex | None:
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        *((handler, "must be a msgspec.Struct") for handler in (no_annotation, of_int, of_struct_or_none, of_list)),
        (of_annotated, "must be a msgspec.Struct"),
        *((handler, "must take") for handler in (of_nothing, of_three, of_keyword, of_any)),
        (of_untagged, "must be tagged"),
        (
            to_complex,
            "is annotated to return <class 'complex'>, and no complex can be encoded; return a msgspec.Struct",
        ),
        (to_complex_or_none, "no complex can be encoded"),
    ],
)
def test_what_is_no_typed_handler_is_refused_at_once(handler: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        typed(handler)


def to_anything(request: Add) -> Any:
    raise AssertionError


def to_object(request: Add) -> object:
    raise AssertionError


def to_untagged(request: Add) -> Untagged | Sum | None:
    raise AssertionError


def to_iterable(request: Add) -> Iterable[Sum]:
    raise AssertionError


@pytest.mark.parametrize("handler", [to_anything, to_object, to_untagged, to_iterable])
def test_what_may_be_encoded_is_no_mistake(handler: Any) -> None:
    typed(handler)


def test_a_typed_callback_has_the_name_of_its_handler() -> None:
    assert "function add at" in repr(typed(add))


def test_coroutine_functions_stay_coroutine_functions() -> None:
    async def add_slowly(request: Add) -> Sum:
        return add(request)

    class AsyncFake(FakeMessenger):
        async def _answer(self, message: Message, contents: bytes) -> int:  # type: ignore[override]
            return super()._answer(message, contents)

    callback = typed(add_slowly)
    assert inspect.iscoroutinefunction(callback)
    for source_id in (1024, 0):
        fake = AsyncFake()
        asyncio.run(callback(Message(fake, encode(Add(1, 2)), source_id, 0, Outlet("listener", None), b"")))
        assert fake.answers == ([encode(Sum(3))] if source_id else [])
    assert not inspect.iscoroutinefunction(typed(add))
