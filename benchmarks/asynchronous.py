"""`AsyncMessenger` on both ends, under uvloop and under asyncio's own event loop, beside other libraries for asyncio.

With one message in flight each is awaited before the next; with more, `asyncio.gather` awaits so many at a time.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from messenger import AsyncMessenger, Message

from .contender import Contender, Measured

T = TypeVar("T")


def _run(coroutine: Coroutine[Any, Any, T], uses_uvloop: bool) -> T:
    if not uses_uvloop:
        return asyncio.run(coroutine)
    import uvloop

    result: T = uvloop.run(coroutine)
    return result


def serve_echo(endpoint: str, uses_uvloop: bool = True, is_coroutine: bool = False) -> None:
    """Answer every message with its contents."""

    async def answer(message: Message) -> None:
        await message.reply(message.contents)

    callback: Callable[[Message], object] = answer if is_coroutine else lambda message: message.reply(message.contents)

    async def serve() -> None:
        async with AsyncMessenger("server") as messenger:
            messenger.listen_for_connection(endpoint, callback, workers=100 if is_coroutine else 0)
            await asyncio.Event().wait()

    _run(serve(), uses_uvloop)


def measure_request(endpoint: str, size_bytes: int, window: int, count: int, uses_uvloop: bool = True) -> Measured:
    """Await `request`, or a `gather` of as many as are to be in flight."""

    async def measure() -> Measured:
        contents = b"x" * size_bytes
        each_s: list[float] = []
        async with AsyncMessenger("client") as messenger:
            connection = messenger.make_connection(endpoint)
            await messenger.request(connection, contents)
            started_at = time.perf_counter()
            if window == 1:
                for _ in range(count):
                    sent_at = time.perf_counter()
                    await messenger.request(connection, contents)
                    each_s.append(time.perf_counter() - sent_at)
            else:
                for _ in range(count // window):
                    await asyncio.gather(*[messenger.request(connection, contents) for _ in range(window)])
            return Measured(time.perf_counter() - started_at, each_s)

    return _run(measure(), uses_uvloop)


CONTENDERS = {
    "AsyncMessenger, uvloop": Contender(serve_echo, measure_request, needs=("uvloop",)),
    "AsyncMessenger, asyncio": Contender(
        partial(serve_echo, uses_uvloop=False), partial(measure_request, uses_uvloop=False)
    ),
    "AsyncMessenger, coroutine callback": Contender(
        partial(serve_echo, is_coroutine=True), measure_request, needs=("uvloop",)
    ),
}
