"""`AsyncMessenger`: the public calls of `base.py` on the caller's asyncio event loop (`tasks.py`)."""

from collections.abc import Awaitable, Coroutine
from types import TracebackType
from typing import Any, Self

from .base import BaseMessenger, Contents, check_close_timeout
from .endpoint import Connection, Listener, To
from .futures import Done, NoRoom, Response, Sent
from .limits import CLOSE_TIMEOUT_S, TIMEOUT_S
from .message import Callback, ErrorCallback, Message
from .tasks import TaskLoop
from .wire import NOOP


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
            MessageTooLarge, LimitReached, MessengerClosed, ForkedError, DestinationInvalid. Nothing was sent.
        """
        send = super().send_message
        options: Any = {
            "on_error": on_error,
            "remote_callback": remote_callback,
            "timeout": timeout,
            "redeliver": redeliver,
        }
        try:
            return Sent(send(to, contents, callback, **options))
        except NoRoom as error:
            full = error
        future = self._loop.make_future()

        def send_now() -> None:
            future.set_result(send(to, contents, callback, **options))

        self._loop.send_later(full, future, send_now)
        return future

    def request(
        self, to: To, contents: Contents, *, remote_callback: int = NOOP, timeout: float = TIMEOUT_S
    ) -> Response:
        """Send one message and return a future of its response; it is on its way before this returns.

        To cancel the future, or the task that awaits it, gives the message up as `cancel` does.

        Args:
            to, contents, remote_callback, timeout: As `send_message` takes them.

        Returns:
            What to await, or to give to `asyncio.gather`, `create_task` or a `TaskGroup`. Awaited, it raises
            NotDelivered, OutcomeUnknown: What became of the message.
            QueueFull: As `send_message` raises it.

        Raises:
            MessageTooLarge, LimitReached, MessengerClosed, ForkedError, DestinationInvalid. Nothing was sent.
        """
        response = Response()
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

    def _answer(self, message: Message, contents: bytes) -> Any:
        sent: Any = super()._answer(message, contents)
        return sent if type(sent) is not int else Sent(sent)

    def _cut_revoked(self) -> None:
        self._loop.call_there(super()._cut_revoked)

    def _close_endpoint(self, endpoint: Connection | Listener) -> Awaitable[None]:
        if self._detach_endpoint(endpoint):
            return self._loop.close_links(endpoint.links)
        return Done()
