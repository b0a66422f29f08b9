"""The public calls that `Messenger` and `AsyncMessenger` share, on the core and the links.

What differs stands in the two drivers: how a call waits, and what runs the server loop (`threads.py`, `tasks.py`).
"""

import logging
import os
import secrets
import socket
from collections import deque
from threading import get_ident
from time import monotonic
from typing import ClassVar, Literal

from .arguments import as_bytes, as_numbers, check_callable, check_callback_id, check_identity, check_workers, given
from .destination import Destination
from .endpoint import Connection, Endpoints, KeyFunction, Listener, To
from .errors import DeliveryError, ForkedError, MessengerClosed, QueueFull
from .exchange import Exchange
from .limits import TIMEOUT_S, Limits
from .loop import Loop, State
from .message import Callback, Contents, ErrorCallback, Message, Statistics
from .security import Security
from .takers import Parts
from .wire import NOOP, encode_identity

logger = logging.getLogger("messenger")
# Draws incarnations and nonces, which others must not guess.
_rng = secrets.SystemRandom()


class BaseMessenger:
    """The calls of a messenger that are the same in every driver; see `Messenger`."""

    _loop_class: ClassVar[type[Loop]]

    def __init__(
        self, identity: str | None = None, *, security: Security | None = None, limits: Limits | None = None
    ) -> None:
        security = given("security", security, Security, 'Security(key="server.key", allow="allowed")')
        if identity is None:
            name = security.key.name if security.key is not None else ""
            identity = name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        check_identity(identity)
        self.identity = identity
        self.limits = given("limits", limits, Limits, "Limits(window_msgs=1_000)")
        self._exchange = Exchange(self, self.limits, log_unheard, encode_identity(identity), _rng)
        self._endpoints = Endpoints(self, self.limits, security, self._exchange)
        self._loop = self._loop_class(f"messenger-{identity}", self._exchange, self._endpoints, self._attach_links)
        # What `Message.reply` calls, for most replies.
        self._answer = self._loop.answer
        self.security = security
        self._abandoned: deque[Parts] = deque()

    def listen_for_connection(
        self,
        destination: Destination | str | int,
        callback: Callback | None,
        *,
        identity: str | None = None,
        workers: int = 0,
        order_by: KeyFunction | None = None,
        responses: bool = True,
    ) -> Listener:
        """Open a destination and run a server-loop callback (SLC) on every message that arrives there.

        Args:
            destination: A bare port or `"host:port"` opens inproc, ipc and tcp at once. Port 0 takes any free one.
            callback: The SLC, run on the messenger's thread; None to only serve built-in and registered callbacks.
            identity: What plain peers see as the sender of its messages; by default the messenger's.
            workers: Run the SLC on so many threads of its own instead; messages start in order but end in any.
            order_by: Names the key of a message, such as `lambda message: message.sender`; with `workers`, messages of
                one key run one after the other, those of different keys at once. It is called on the messenger's
                thread. If it raises, or what it returns cannot be hashed, the sender gets `HandlerError`.
            responses: Whether the SLC also runs on responses, after their own callbacks. False saves a turn of the
                messenger's thread for each that a thread waits for; not with `workers`.

        Raises:
            DestinationInUse: Somebody listens there already. Nothing was opened.
            DestinationInvalid: It cannot be used, or is not loopback and `security` does not allow that.
            SecurityError: There is a key and nobody may connect, or the listener's self-test failed.
            LimitReached, MessengerClosed, ForkedError.

        Thread: any. Source: docs/protocol.md, "Destinations".
        """
        self._check_callback("callback", callback)
        if identity is not None:
            check_identity(identity)
        check_workers(workers, self.limits.workers_max if self._loop.uses_threads else None)
        check_callable("order_by", order_by, may_be_coroutine=False)
        if order_by is not None and not workers:
            raise ValueError("order_by needs workers; without them messages run one after the other anyway")
        if workers and not responses:
            raise ValueError("responses=False is not for workers; let their callback return on a response")
        parsed = Destination.parse(destination)
        with self._loop.lock:
            self._require_open()
            listener = self._endpoints.listen(
                parsed, callback, identity or self.identity, workers, self._loop, order_by
            )
            if not responses:
                for link in listener.links:
                    link.hears_responses = False
        logger.info("= %s listens on %s", self.identity, ", ".join(listener.endpoints))
        return listener

    def make_connection(
        self,
        destination: Destination | str | int,
        *,
        callback: Callback | None = None,
        dialect: Literal["session", "basic"] = "session",
        responses: bool = True,
    ) -> Connection:
        """Connect to a destination. Nobody need be there yet; messages wait until somebody is.

        Args:
            destination: A bare port or `"host:port"` takes the best transport that has a listener now, else tcp.
            callback: Run on every message that arrives on this connection, as an SLC is at a listener.
            dialect: `"basic"` for servers that are plain ZeroMQ programs; fire and forget, as ZeroMQ is.
            responses: Whether `callback` also runs on responses, as at a listener.

        Raises:
            SecurityError: There is a key, and the server's is not known.
            DestinationInvalid, LimitReached, MessengerClosed, ForkedError.

        Thread: any. Source: docs/protocol.md, "Destinations".
        """
        self._check_callback("callback", callback)
        if dialect not in ("session", "basic"):
            raise ValueError(f"dialect is {dialect!r}, it must be 'session' or 'basic'")
        parsed = Destination.parse(destination)
        with self._loop.lock:
            self._require_open()
            connection = self._endpoints.connect(parsed, callback, dialect, self._loop)
            connection.outlet.hears_responses = responses
            return connection

    def send_message(
        self,
        to: To,
        contents: Contents,
        callback: Callback | None = None,
        *,
        on_error: ErrorCallback | None = None,
        remote_callback: int = NOOP,
        timeout: float = TIMEOUT_S,
        redeliver: bool = False,
    ) -> int:
        """Queue one message and return its id, unique in this process's life, at once.

        It is processed exactly once, in order, while both processes live. Exactly one of `callback` and `on_error` is
        called, once, on the messenger's thread, or on one that waits for it by `Messenger.wait`. To a plain peer it is
        fire and forget, and its deadline tells.

        Args:
            to: A connection, a message to answer, a (listener, identity) pair, or a destination (connected once).
            contents: Bytes, text that is sent as UTF-8, or a `msgspec.Struct` that is sent as MessagePack; at most
                `limits.message_bytes_max` bytes.
            callback: The message-specific callback (MSC), run on the response.
            on_error: Told what became of the message if no response came; without it, that is logged, and without
                `callback` too only counted and logged together with others.
            remote_callback: The callback that the receiver is to run; in an answer, by default the one asked for.
            timeout: Seconds, > 0, until the message ends as `NotDelivered` (nobody took it) or `OutcomeUnknown`.
            redeliver: Give it to the receiver's next process too, if the first ends without an answer.

        Raises:
            QueueFull: The queue stayed full for `timeout` seconds; in a callback: is full. Nothing was sent.
            MessageTooLarge, LimitReached, MessengerClosed, ForkedError, DestinationInvalid, SecurityError: The same.

        Thread: any. Source: docs/protocol.md, "Messages".
        """
        if callback is not None and not callable(callback):
            check_callable("callback", callback)
        if on_error is not None and not callable(on_error):
            check_callable("on_error", on_error)
        if type(contents) is not bytes:
            contents = as_bytes(contents)
        if timeout != TIMEOUT_S or remote_callback is not NOOP:
            timeout, remote_callback = as_numbers(timeout, remote_callback)
        if redeliver is not False:
            redeliver = bool(redeliver)
        return self._loop.send(to, contents, callback, on_error, remote_callback, timeout, redeliver)

    def cancel(self, message_id: int) -> bool:
        """Give a message up: its `on_error` gets `Cancelled`, unless it has its outcome already.

        The receiver is told: it does not start the message if it has not yet, and `message.cancelled` becomes true.

        Returns:
            Whether it had no outcome yet.

        Thread: any.
        """
        with self._loop.lock:
            is_open = self._exchange.cancel(message_id)
            if is_open:
                self._loop.flush()
        return is_open

    def register_callback(self, callback_id: int, callback: Callback) -> None:
        """Let peers run `callback`, on the messenger's thread, by naming a fixed id as `remote_callback`.

        Raises:
            ValueError: The id is not 64 to 1023, or is taken.
            TypeError: It is no integer, or the callback cannot be called, or nothing would run it.

        Thread: any.
        """
        check_callback_id(callback_id)
        self._check_callback("callback", callback, may_be_none=False)
        with self._loop.lock:
            self._exchange.register_callback(callback_id, callback)

    def statistics(self) -> Statistics:
        """Return what was counted so far, as one immutable object. Thread: any."""
        with self._loop.lock:
            self._endpoints.count_refusals()
            connections, listeners = self._endpoints.count(Connection), self._endpoints.count(Listener)
            return self._exchange.statistics(self.identity, connections, listeners)

    def _reply_part(self, message: Message, contents: Contents, *, timeout: float = TIMEOUT_S) -> int:
        """Do what `message.reply(contents, more=True)` says. Takes the lock; waits, but not in a callback."""
        timeout, _ = as_numbers(timeout, NOOP)
        data = as_bytes(contents)
        loop = self._loop
        now = monotonic()
        deadline_at = now + timeout
        message_id = 0
        with loop.lock:
            while not message_id:
                self._require_open(is_answer=True)
                try:
                    message_id = self._exchange.reply_part(message, data, monotonic())
                except QueueFull:
                    loop.wait_room(message.link, deadline_at, message)
            if self._exchange.is_urgent:
                loop.flush()
            elif loop.thread_id != get_ident():
                loop.flush_soon(message.link, now)
        return message_id

    def _open_stream(self, to: To, contents: Contents, parts: Parts, remote_callback: int, timeout: float) -> None:
        """Send the message that `parts` answer. Takes the lock, and waits for room."""
        timeout, remote_callback = as_numbers(timeout, remote_callback)
        data = as_bytes(contents)
        deadline_at = monotonic() + timeout
        with self._loop.lock:
            while not (parts.message_id or parts.is_over):
                self._require_open()
                outlet, _, _ = self._endpoints.route(to, self._loop)
                if type(to) is Message:
                    remote_callback = remote_callback or to.source_callback_id
                try:
                    self._exchange.open_stream(outlet, parts, data, remote_callback, deadline_at)
                except QueueFull:
                    self._loop.wait_room(outlet, deadline_at)
            self._loop.flush()

    def _take_part(self, parts: Parts) -> Message | None:
        """Return the next part of a stream, None if all were taken; raise, once, what it ended with instead."""
        part = self._exchange.take_part(parts)
        if self._exchange.is_dirty:
            self._loop.flush()
        if part is None and parts.error is not None:
            error, parts.error = parts.error, None
            raise error
        return part

    def _end_stream(self, parts: Parts) -> None:
        """Read no more of a stream. Takes the lock."""
        with self._loop.lock:
            self._exchange.end_stream(parts)
            parts.error = None
            if self._exchange.is_dirty:
                self._loop.flush()

    def _abandon_stream(self, parts: Parts) -> None:
        """End a stream soon that nobody holds any more. For a destructor, which may run with the lock held."""
        self._abandoned.append(parts)
        self._loop.notice_change()

    def _is_given_up(self, message: Message) -> bool:
        """Do what `message.cancelled` says."""
        now = monotonic()
        if self._loop.is_own_thread():
            # Nobody else may take the input that would tell.
            self._loop.poll(now)
        return message.is_given_up(now)

    def _check_callback(self, name: str, callback: Callback | None, may_be_none: bool = True) -> None:
        check_callable(name, callback, may_be_none=may_be_none, may_be_coroutine=not self._loop.uses_threads)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.identity!r}, {self._loop.state.value}>"

    # Called with the loop's lock held, but for what takes it.

    def _require_open(self, is_answer: bool = False) -> None:
        state = self._loop.state
        if state is State.RUNNING:
            return
        if state is State.NEW:
            self._loop.start()
            # Not before: one that never starts is never stopped either, and would be held for ever.
            self.security.on_reload(self._cut_revoked)
        elif state is State.FORKED:
            raise ForkedError(f"messenger {self.identity!r} was made before a fork; make a new one in the child")
        # While the messenger closes, callbacks may still send, and workers answer.
        elif self._loop.failure is not None:
            raise MessengerClosed(
                f"messenger {self.identity!r} has ended by an error of its own, {self._loop.failure!r}; the log has "
                "the traceback, please report it; make a new one"
            )
        elif state is State.CLOSED or not (is_answer or self._loop.is_own_thread()):
            raise MessengerClosed(f"messenger {self.identity!r} is {state.value}")

    def _detach_endpoint(self, endpoint: Connection | Listener) -> bool:
        """Forget a connection or listener that is to be closed, if it is open; return whether it was."""
        with self._loop.lock:
            if endpoint.closed or self._loop.state is State.FORKED:
                return False
            self._endpoints.discard(endpoint)
            for link in endpoint.links:
                self._loop.remove(link, "it was closed")
        return True

    def _cut_revoked(self) -> None:
        """End the sessions of who is not allowed any more. Called without the lock, by any thread."""
        with self._loop.lock:
            if self._loop.is_serving:
                self._endpoints.cut_revoked()
                self._loop.flush()

    def _attach_links(self) -> None:
        while self._abandoned:
            self._exchange.end_stream(self._abandoned.popleft())
        for link in self._endpoints.attach_connections():
            link.touch(link)


def log_unheard(error: DeliveryError) -> None:
    """Do what is done with an error that no `on_error` was given for, or with one that stands for many messages."""
    advice = " (give on_error= to handle this)" if error.message_id else ""
    logger.warning("! %s: %s%s", type(error).__name__, error, advice)
