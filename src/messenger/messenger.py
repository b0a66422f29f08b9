"""`Messenger`: the public calls of `base.py` for threads, on a thread of its own (`threads.py`)."""

from types import TracebackType
from typing import Self

from .base import BaseMessenger, Contents, check_close_timeout
from .endpoint import Connection, Listener, To
from .errors import CalledFromCallback
from .limits import CLOSE_TIMEOUT_S, TIMEOUT_S
from .message import Message
from .threads import ThreadLoop
from .waiting import ThreadWaiter
from .wire import NOOP


class Messenger(BaseMessenger):
    """Sends messages to destinations and runs callbacks on what comes.

    A context manager; it starts its thread on entry or at first use. All methods may be called by any thread, also
    from callbacks, but `request`, which waits, not from a callback.

    Args:
        identity: The stable name that others see as `message.sender`, at most 240 bytes. By default the name of its
            key, or one that is unique.
        security: Who may connect; by default nobody from another machine.
        limits: What this messenger may hold.

    Source: docs/protocol.md.
    """

    _loop: ThreadLoop
    _loop_class = ThreadLoop

    def request(
        self, to: To, contents: Contents, *, remote_callback: int = NOOP, timeout: float = TIMEOUT_S
    ) -> Message:
        """Send one message and wait for its response.

        Args:
            to, contents, remote_callback, timeout: As `send_message` takes them.

        Returns:
            The response.

        Raises:
            NotDelivered, OutcomeUnknown: What became of the message.
            CalledFromCallback: Made on the messenger's own thread. Nothing was sent; use `send_message` with a
            callback. QueueFull, MessageTooLarge, LimitReached, MessengerClosed, ForkedError, DestinationInvalid.

        Thread: any but the messenger's own.
        """
        if self._loop.is_own_thread():
            raise CalledFromCallback("request would wait for itself in a callback; use send_message with a callback")
        waiter = ThreadWaiter()
        self.send_message(to, contents, waiter, remote_callback=remote_callback, timeout=timeout)
        if waiter.error is not None:
            raise waiter.error
        return waiter.response  # type: ignore[return-value]  # Settled without an error.

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until every message has its outcome, for at most `timeout` seconds, then stop. Twice is fine.

        What is still open then ends as `NotDelivered` or `OutcomeUnknown`. In a callback it returns at once and the
        messenger stops after it. In the child of a fork it does nothing.

        Thread: any.
        """
        check_close_timeout(timeout)
        self._loop.close(timeout)

    def __enter__(self) -> Self:
        with self._loop.lock:
            self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _close_endpoint(self, endpoint: Connection | Listener) -> None:
        if self._detach_endpoint(endpoint):
            endpoint.close_links(CLOSE_TIMEOUT_S)
