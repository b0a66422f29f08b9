"""`AsyncMessenger`: the public calls of `base.py` on the caller's asyncio event loop (`tasks.py`)."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from .arguments import check_close_timeout
from .base import BaseMessenger
from .endpoint import Connection, Listener, To
from .errors import MessengerError
from .futures import Done, NoRoom, Response, Sent, Steps, TaskParts, TypedResponse
from .limits import CLOSE_TIMEOUT_S, TIMEOUT_S
from .message import Callback, Contents, ErrorCallback, Message
from .tasks import TaskLoop
from .typed import Encoding, codec_of, encode_as
from .wire import NOOP

T = TypeVar("T")


class AsyncMessenger(BaseMessenger):
    """A `Messenger` for programs with asyncio: the same calls, on the event loop that runs when it is first used.

    It has no thread. An async context manager. All calls are made on the event loop; those that may have to wait return
    something to await. Callbacks are functions or coroutine functions. The coroutines of a listener's callback run one
    after the other, or `workers` of them at once, and start in the order in which the messages came; all others run
    as they come. A message counts as processed when its coroutines have ended.

    Args:
        identity, security, limits: As `Messenger` takes them.

    Source: docs/asyncio.md.
    """

    _loop: TaskLoop
    _loop_class = TaskLoop

    def send_message(  # type: ignore[override]  # It may have to wait, and returns the id to those who await it.
        self,
        to: To,
        contents: Contents,
        callback: Callback | None = None,
        *,
        on_error: ErrorCallback | None = None,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        redeliver: bool = False,
    ) -> Coroutine[Any, Any, int]:
        """Queue one message. Await it to have its id, and to wait for room if the queue is full.

        It is queued before this returns, or put behind those that wait for room, so without `await` it is sent too. A
        callback that is a plain function cannot wait; there a full queue is `QueueFull` at once.

        Args:
            to, contents, callback, on_error, remote_callback, timeout, redeliver: As `Messenger.send_message` takes
                them.

        Raises:
            QueueFull: The queue stayed full for `timeout` seconds, or `limits.queue_msgs_max` calls wait for room.
            MessageTooLarge, and others, as `Messenger.send_message` raises them. Nothing was sent.
        """
        send = super().send_message
        options: Any = {
            "on_error": on_error,
            "remote_callback": remote_callback,
            "timeout": timeout,
            "redeliver": redeliver,
        }
        if type(to) is Message and to.credit is not None and self._loop.has_waiting(to):
            full = self._behind_parts(to, timeout)
            return self._later(full, lambda: send(to, contents, callback, **options))
        try:
            return Sent(send(to, contents, callback, **options))
        except NoRoom as error:
            full = error
        return self._later(full, lambda: send(to, contents, callback, **options))

    @overload
    def request(
        self,
        to: To,
        contents: Contents,
        *,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        response_type: None = None,
        encoding: Encoding = "msgpack",
    ) -> Response[Message]: ...

    @overload
    def request(
        self,
        to: To,
        contents: Contents,
        *,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        response_type: type[T],
        encoding: Encoding = "msgpack",
    ) -> Response[T]: ...

    def request(
        self,
        to: To,
        contents: Contents,
        *,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        response_type: Any = None,
        encoding: Encoding = "msgpack",
    ) -> Response[Any]:
        """Send one message and return a future of its response; it is on its way before this returns.

        To cancel the future, or the task that awaits it, gives the message up as `cancel` does.

        Args:
            to, contents, remote_callback, timeout: As `send_message` takes them.
            response_type, encoding: As `Messenger.request` takes them.

        Returns:
            What to await, or to give to `asyncio.gather`, `create_task` or a `TaskGroup`. Awaited, it raises
            NotDelivered, OutcomeUnknown, HandlerError: What became of the message.
            ContentsInvalid: The response does not decode as `response_type`.
            QueueFull: As `send_message` raises it.

        Raises:
            MessageTooLarge, and others, as `Messenger.send_message` raises them. Nothing was sent.
        """
        codec = None if response_type is None else codec_of(response_type)
        if asyncio._get_running_loop() is None:
            # A future would make an event loop of its own. The lock says what to do, or starting does.
            with self._loop.lock:
                self._require_open()
            raise RuntimeError("a request needs a running event loop; make it in a coroutine or a callback")
        response: Response[Any] = Response() if codec is None else TypedResponse(codec, encoding)
        if encoding != "msgpack":
            contents = encode_as(contents, encoding)
        send = super().send_message
        response.messenger = None
        try:
            response.message_id = send(to, contents, response, remote_callback=remote_callback, timeout=timeout)
            response.messenger = self
            return response
        except NoRoom as error:
            full = error

        def send_now() -> None:
            response.message_id = send(to, contents, response, remote_callback=remote_callback, timeout=timeout)
            response.messenger = self

        self._loop.send_later(full, response, send_now)
        return response

    def stream(
        self, to: To, contents: Contents, *, remote_callback: int = NOOP, timeout: float = TIMEOUT_S
    ) -> "AsyncStream":
        """Send one message and read its response, in many parts, as `async for part in messenger.stream(…)`.

        Args:
            to, contents, remote_callback, timeout: As `Messenger.stream` takes them.

        Returns:
            An asynchronous iterator over messages. To leave the loop, or `close` it, tells the sender that nobody reads
            any more; so does cancelling the task that reads.

        Raises:
            ValueError: The receiver speaks the basic dialect, which has no parts. Nothing was sent.
            MessageTooLarge, and others, as `Messenger.send_message` raises them: The same.
        """
        parts = TaskParts()
        send = partial(self._open_stream, to, contents, parts, remote_callback, timeout)
        try:
            send()
            opening = None
        except NoRoom as full:
            opening = self._later(full, send)
        return AsyncStream(self, parts, timeout, opening)

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> Awaitable[None]:
        """Wait until every message has its outcome, for at most `timeout` seconds, then stop. Twice is fine.

        What is still open then ends as `NotDelivered` or `OutcomeUnknown`, and tasks of callbacks are cancelled. It
        closes even if nobody awaits it, or whoever does is cancelled. In a callback the awaitable does not wait, and
        the messenger stops after it. In the child of a fork it does nothing.
        """
        check_close_timeout(timeout)
        return self._loop.close(timeout)

    async def __aenter__(self) -> Self:
        with self._loop.lock:
            self._require_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _later(self, full: NoRoom, send: Callable[[], Any]) -> Steps[Any]:
        """Send when there is room; return what the call then returns."""
        future = self._loop.make_future()
        self._loop.send_later(full, future, lambda: future.set_result(send()))
        return future

    def _behind_parts(self, message: Message, timeout: float) -> NoRoom:
        """Return why something that answers a message must wait, after parts of the same response that do."""
        why = "parts of the same response that were sent before wait for room"
        return NoRoom(message.link, message, monotonic() + timeout, why)

    def _reply_part(  # type: ignore[override]  # As `send_message`.
        self, message: Message, contents: Contents, *, timeout: float = TIMEOUT_S
    ) -> Coroutine[Any, Any, int]:
        reply_part = super()._reply_part

        def reply() -> int:
            message_id = reply_part(message, contents, timeout=timeout)
            if message.credit is not None and message.credit.sent_msgs == 1:
                self._loop.let_go(message)
            return message_id

        if self._loop.has_waiting(message):
            full = self._behind_parts(message, timeout)
        else:
            try:
                return Sent(reply())
            except NoRoom as error:
                full = error
        return self._later(full, reply)

    def _cut_revoked(self) -> None:
        self._loop.call_there(super()._cut_revoked)

    def _close_endpoint(self, endpoint: Connection | Listener) -> Awaitable[None]:
        if self._detach_endpoint(endpoint):
            return self._loop.close_links(endpoint.links)
        return Done()


class AsyncStream:
    """A response in parts, an asynchronous iterator over messages; from `AsyncMessenger.stream`. One task reads it."""

    def __init__(self, messenger: AsyncMessenger, parts: TaskParts, timeout: float, opening: Steps[Any] | None) -> None:
        self._messenger = messenger
        self._parts = parts
        self._timeout = timeout
        # Until the message is sent: what waits for room.
        self._opening = opening

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """Return the next part; wait for it if need be.

        Raises:
            StopAsyncIteration: The last part was taken.
            NotDelivered, OutcomeUnknown, HandlerError, NoHandler: What the stream ended with instead, once; what had
                come before was returned before. QueueFull: Nothing was sent.
        """
        loop, parts = self._messenger._loop, self._parts
        try:
            if self._opening is not None:
                await self._opening
                self._opening = None
            if not parts.done:
                await loop.await_part(parts, monotonic() + self._timeout)
        except (asyncio.CancelledError, MessengerError):
            self.close()
            raise
        part = self._messenger._take_part(parts)
        if part is None:
            raise StopAsyncIteration
        return part

    def close(self) -> Awaitable[None]:
        """Read no more: the sender's next part raises `Cancelled` there, and its task is cancelled. Does not wait."""
        self._messenger._end_stream(self._parts)
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.set_result(None)  # Whoever waits for it finds the end.
        return Done()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._opening is not None:
            self._messenger._loop.call_there(self._opening.cancel)
        if not self._parts.is_over:
            self._messenger._abandon_stream(self._parts)
