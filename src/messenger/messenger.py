"""`Messenger`: the public calls of `base.py` for threads, on a thread of its own (`threads.py`)."""

import _thread
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from .arguments import check_close_timeout
from .base import BaseMessenger, log_unheard
from .endpoint import Connection, Listener, To
from .errors import CalledFromCallback
from .limits import CLOSE_TIMEOUT_S, RELOAD_LOCK_S, TIMEOUT_S
from .link import FOREVER
from .loop import State
from .message import Contents, Message
from .threads import ThreadLoop
from .typed import Encoding, codec_of, encode_as
from .waiting import ThreadParts, ThreadWaiter
from .wire import NOOP

T = TypeVar("T")


class Messenger(BaseMessenger):
    """Sends messages to destinations and runs callbacks on what comes.

    A context manager; it starts its thread on entry or at first use. All methods may be called by any thread, also
    from callbacks, but those that wait (`request`, `wait`, `stream`) not from a callback. An argument that is none
    raises `TypeError` or `ValueError` at once, which names it.

    Args:
        identity: The stable name that others see as `message.sender`, at most 240 bytes. By default the name of its
            key, or one that is unique.
        security: Who may connect; by default nobody from another machine.
        limits: What this messenger may hold.

    Source: docs/guarantees.md.
    """

    _loop: ThreadLoop
    _loop_class = ThreadLoop

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
    ) -> Message: ...

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
    ) -> T: ...

    def request(
        self,
        to: To,
        contents: Contents,
        *,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        response_type: Any = None,
        encoding: Encoding = "msgpack",
    ) -> Any:
        """Send one message and wait for its response.

        Args:
            to, contents, remote_callback, timeout: As `send_message` takes them.
            response_type: What the contents of the response are decoded as, such as a `msgspec.Struct`.
            encoding: Of contents that are a struct, and of a response with a type; `"msgpack"` or `"json"`.

        Returns:
            The response; with a `response_type`, what its contents decode to.

        Raises:
            NotDelivered, OutcomeUnknown, HandlerError: What became of the message.
            ContentsInvalid: The response does not decode as `response_type`.
            CalledFromCallback: Made on the messenger's own thread; use `send_message` with a callback.
            QueueFull, MessageTooLarge, and others, as `send_message` raises them. Nothing was sent.

        Thread: any but the messenger's own.
        """
        if self._loop.is_own_thread():
            raise CalledFromCallback("request would wait for itself in a callback; use send_message with a callback")
        codec = None if response_type is None else codec_of(response_type)
        if encoding != "msgpack":
            contents = encode_as(contents, encoding)
        waiter = ThreadWaiter()
        self.send_message(to, contents, waiter, remote_callback=remote_callback, timeout=timeout)
        if waiter.error is not None:
            raise waiter.error
        response: Any = waiter.response
        return response if codec is None else codec.decode(response.contents, encoding)

    def wait(self, message_id: int, timeout: float | None = None) -> bool:
        """Wait for the outcome of a message, and run its callback, or its `on_error`, here.

        This is how a call that must return at once is waited for as fast as a `request`: this thread takes the
        response off the network itself, and no other one has to be woken. Ctrl-C waits until the callback has returned.

        Args:
            message_id: What `send_message` returned, of a message with a callback or an `on_error`.
            timeout: Seconds; by default as long as the message has. When they are over, all is as if nobody had waited.

        Returns:
            Whether the callback was run here. If not, the time is over, another thread waits for this message, or it
            has its outcome already: then its callback has run, or will soon, on the messenger's thread.

        Raises:
            CalledFromCallback: Made on the messenger's own thread.
            ForkedError.

        Thread: any but the messenger's own.
        """
        loop = self._loop
        if loop.is_own_thread():
            raise CalledFromCallback("wait would wait for itself in a callback; do the rest in the message's callback")
        give_up_at = FOREVER if timeout is None else monotonic() + timeout
        waiter = ThreadWaiter()
        callback = on_error = None
        try:
            with loop.lock:
                if loop.state is State.FORKED:
                    self._require_open()
                entry = self._exchange.find_unclaimed(message_id) if loop.is_serving else None
                if entry is None:
                    return False
                callback, on_error = entry.callback, entry.on_error
                entry.callback = waiter
                try:
                    loop.wait_for(waiter, entry.deadline_at, give_up_at)
                finally:
                    if not waiter.done:
                        entry.callback = callback
        finally:
            # Also after Ctrl-C: nobody else will.
            if waiter.error is not None:
                loop.run_here(log_unheard if on_error is None else on_error, waiter.error)
            elif waiter.response is not None and callback is not None:
                loop.run_here(callback, waiter.response)
        return waiter.done

    def stream(
        self, to: To, contents: Contents, *, remote_callback: int = NOOP, timeout: float = TIMEOUT_S
    ) -> "Stream":
        """Send one message and read its response, which may come in many parts, as `for part in messenger.stream(…)`.

        The receiver sends them with `message.reply(part, more=True)` and the last with `message.reply(part)`. It sends
        no more than this end takes: at most a quarter of the session's window is under way and not taken.

        Args:
            to, contents, remote_callback: As `send_message` takes them.
            timeout: Seconds, > 0, for each part, while this end waits for it; the whole may take as long as it likes.

        Returns:
            An iterator over messages. To leave the loop, or `close` it, tells the sender that nobody reads any more.

        Raises:
            ValueError: The receiver speaks the basic dialect, which has no parts. Nothing was sent.
            CalledFromCallback, QueueFull, MessageTooLarge, and others, as `send_message` raises them: The same.

        Thread: any but the messenger's own. Source: docs/guarantees.md, "Streams".
        """
        if self._loop.is_own_thread():
            raise CalledFromCallback("stream would wait for itself in a callback; read it in another thread")
        parts = ThreadParts()
        self._open_stream(to, contents, parts, remote_callback, timeout)
        return Stream(self, parts, timeout)

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until every message has its outcome, for at most `timeout` seconds, then stop. Twice is fine.

        What is still open then ends as `NotDelivered` or `OutcomeUnknown`. A callback that still runs is waited for no
        longer: the log says so, and the messenger stops when it has returned. Called in a callback, this returns at
        once, and the messenger stops after it. In the child of a fork it does nothing.

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

    def _cut_revoked(self) -> None:
        if self._loop.may_wait(RELOAD_LOCK_S):
            super()._cut_revoked()
        else:
            _thread.start_new_thread(super()._cut_revoked, ())  # Not `threading.Thread`, whose start takes locks.

    def _close_endpoint(self, endpoint: Connection | Listener) -> None:
        if self._detach_endpoint(endpoint):
            endpoint.close_links(CLOSE_TIMEOUT_S)


class Stream:
    """A response in parts, as an iterator over messages; made by `Messenger.stream`. One thread reads it."""

    def __init__(self, messenger: Messenger, parts: ThreadParts, timeout: float) -> None:
        self._messenger = messenger
        self._parts = parts
        self._timeout = timeout

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        """Return the next part; wait for it if need be.

        Raises:
            StopIteration: The last part was taken.
            NotDelivered, OutcomeUnknown, HandlerError, NoHandler: What the stream ended with instead, once; what had
                come before was returned before.
            CalledFromCallback: Made on the messenger's own thread.
        """
        loop, exchange, parts = self._messenger._loop, self._messenger._exchange, self._parts
        if loop.is_own_thread():
            raise CalledFromCallback("a stream would wait for itself in a callback; read it in another thread")
        with loop.lock:
            if not parts.done:
                deadline_at = monotonic() + self._timeout
                exchange.await_part(parts, deadline_at)
                loop.await_outcome(parts, parts.session, deadline_at)
            part = self._messenger._take_part(parts)
        if part is None:
            raise StopIteration
        return part

    def close(self) -> None:
        """Read no more: the sender's next part raises `Cancelled` there, and its `message.cancelled` becomes true."""
        self._messenger._end_stream(self._parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._parts.is_over:
            self._messenger._abandon_stream(self._parts)
