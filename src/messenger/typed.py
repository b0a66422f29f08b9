"""Typed messages: `msgspec.Struct`s in place of bytes, as MessagePack or JSON.

The first byte of the contents tells which of the two they are: MessagePack's maps and arrays, which structs are, begin
with 0x80 or more, and JSON does not. Nothing is decoded but what the type says.

What must never happen here: an exception of a decoder that leaves as anything but `ContentsInvalid`.

Source: docs/typed.md.
"""

import inspect
import types
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import msgspec
import msgspec.inspect

from .errors import ContentsInvalid
from .limits import CODECS_MAX
from .message import Message

T = TypeVar("T")
In = TypeVar("In")
Encoding = Literal["msgpack", "json"]
# Text that is not UTF-8 and lists in lists come out of the decoders as the last two.
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MSGPACK_MIN: Final = 0x80


def encode(value: object, encoding: Encoding = "msgpack") -> bytes:
    """Return a value as contents.

    Raises:
        ValueError: There is no such encoding.
        TypeError: The value, or something in it, cannot be encoded.
    """
    if encoding == "msgpack":
        return msgspec.msgpack.encode(value)
    if encoding == "json":
        return msgspec.json.encode(value)
    raise ValueError(f"encoding is {encoding!r}, it must be 'msgpack' or 'json'")


def encode_as(contents: Any, encoding: Encoding) -> Any:
    """Return contents that are a struct as bytes, and all others as they are.

    Raises:
        ValueError: There is no such encoding.
    """
    if isinstance(contents, msgspec.Struct):
        return encode(contents, encoding)
    encode(None, encoding)  # For its ValueError.
    return contents


class Codec:
    """Decodes contents as one type, and names what does not fit.

    Args:
        type_: What msgspec can decode.

    Raises:
        TypeError: It cannot.
    """

    def __init__(self, type_: Any) -> None:
        self._type = type_
        self._msgpack = msgspec.msgpack.Decoder(type_)
        self._json = msgspec.json.Decoder(type_)

    def decode(self, contents: bytes, encoding: Encoding) -> Any:
        """Return the value of contents.

        Raises:
            ContentsInvalid: They are none; the text names the field, as `$.field`.
        """
        try:
            return (self._msgpack if encoding == "msgpack" else self._json).decode(contents)
        except _DECODE_ERRORS as error:
            name = self._type.__name__ if type(self._type) is type(msgspec.Struct) else self._type
            text = f"contents of {len(contents)} bytes do not decode as {name}: {error}{_hint(contents, encoding)}"
            raise ContentsInvalid(text) from error


def _hint(contents: bytes, encoding: Encoding) -> str:
    """Return what to do about contents that seem to have another encoding."""
    is_json = contents[:1] in (b"{", b"[", b'"')
    if encoding == "msgpack" and is_json:
        return '; they look like JSON, for which encoding="json" must be given'
    if encoding == "json" and contents and encoding_of(contents) == "msgpack":
        return '; they look like MessagePack, for which encoding="msgpack" must be given'
    return ""


@lru_cache(maxsize=CODECS_MAX)
def codec_of(type_: Any) -> Codec:
    """Return the codec of a type, made once."""
    return Codec(type_)


def encoding_of(contents: bytes) -> Encoding:
    """Return how a struct is encoded."""
    return "msgpack" if contents[:1] and contents[0] >= _MSGPACK_MIN else "json"


@overload
def typed(handler: Callable[[In], Any]) -> Callable[[Message], Any]: ...


@overload
def typed(handler: Callable[[In, Message], Any]) -> Callable[[Message], Any]: ...


def typed(handler: Callable[..., Any]) -> Callable[[Message], Any]:
    """Return a callback that decodes a message, calls a function with the struct, and replies with what it returns.

    The answer has the encoding of the message. Contents that do not decode end the message as `HandlerError` at its
    sender, which names the field. To a message that wants no response there is no answer, and a function that takes the
    message too and returns None has answered itself, or nobody.

    Args:
        handler: A function or coroutine function of `(struct)` or `(struct, message)`. The annotation of the first
            parameter is the type: a `msgspec.Struct`, or a union of tagged ones, each told by its tag.

    Raises:
        TypeError: It takes something else, the parameter has no such annotation, or what it is annotated to return
            cannot be encoded.

    Source: docs/typed.md.
    """
    input_type, output_type, takes_message = _inspect(handler)
    _check_output(handler, output_type)
    codec = Codec(input_type)

    def call(message: Message) -> tuple[Any, Encoding]:
        encoding = encoding_of(message.contents)
        value = codec.decode(message.contents, encoding)
        return (handler(value, message) if takes_message else handler(value)), encoding

    def reply(message: Message, result: object, encoding: Encoding) -> Any:
        if message.source_callback_id and not (result is None and takes_message):
            return message.reply(encode(result, encoding))
        return None

    async def finish(message: Message, result: Any, encoding: Encoding) -> None:
        sent = reply(message, await result, encoding)
        if sent is not None:
            await sent

    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__):

        @wraps(handler)
        async def run_async(message: Message) -> None:
            await finish(message, *call(message))

        return run_async

    @wraps(handler)
    def run(message: Message) -> Any:
        result, encoding = call(message)
        if type(result) is types.CoroutineType:
            return finish(message, result, encoding)  # As of a coroutine function with a decorator.
        return reply(message, result, encoding)

    return run


def _inspect(handler: Callable[..., Any]) -> tuple[Any, Any, bool]:
    """Return the type of a handler's first parameter, what it returns, and whether it takes the message too."""
    parameters = list(inspect.signature(handler).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not 1 <= len(parameters) <= 2 or any(parameter.kind not in kinds for parameter in parameters):
        raise TypeError(f"{handler!r} must take (struct) or (struct, message)")
    function: Any = handler if inspect.isroutine(handler) else type(handler).__call__
    hints = get_type_hints(function, include_extras=True)
    annotation = hints.get(parameters[0].name)
    for member in _members(annotation):
        kind = get_origin(member) or member
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            raise TypeError(
                f"the first parameter of {handler!r} is annotated {annotation!r}, it must be a msgspec.Struct or a "
                "union of them"
            )
    return annotation, hints.get("return", Any), len(parameters) == 2


def _check_output(handler: Callable[..., Any], annotation: Any) -> None:
    """Refuse what a function says that it returns if no value of it can be encoded."""
    for member in _members(annotation):
        try:
            info = msgspec.inspect.type_info(member)
        except TypeError:
            continue  # Nothing is known of it.
        # An abstract type, such as `Iterable`, may be that of something that can be encoded.
        if isinstance(info, msgspec.inspect.CustomType) and info.cls is not object and not inspect.isabstract(info.cls):
            raise TypeError(
                f"{handler!r} is annotated to return {annotation!r}, and no {info.cls.__qualname__} can be encoded; "
                "return a msgspec.Struct, or what msgspec encodes"
            )


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
