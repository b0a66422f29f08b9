"""What the calls of an `AsyncMessenger` return: awaitables that cost no task.

`create_task` and `TaskGroup` take nothing but coroutines, so these have the methods of a coroutine as well.
"""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from .errors import QueueFull
from .link import Outlet
from .message import Message
from .takers import Parts, Taker
from .typed import Codec, Encoding

T = TypeVar("T")


class Sent(int):
    """The id of a message that was queued. It is awaitable, at once, because every `send_message` is awaited."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, int]:
        """Return the id."""
        return self
        yield

    def send(self, value: None) -> Any:
        """Return the id, as a coroutine does: so `create_task` takes it."""
        raise StopIteration(int(self))

    def throw(self, *error: Any) -> Any:
        """Raise what was thrown in."""
        raise error[0]

    def close(self) -> None:
        """Do nothing."""


class Steps(asyncio.Future[T]):
    """A future that may be given to `create_task` as a coroutine."""

    __slots__ = ("_steps",)

    def send(self, value: None) -> Any:
        """Take a step, as a coroutine does."""
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> Any:
        """Raise at the present step, as a coroutine does."""
        if isinstance(error[0], asyncio.CancelledError):
            self.cancel()  # A task that is cancelled before its first step does not do it.
        return self._coroutine().throw(*error)

    def close(self) -> None:
        """Do nothing: there is nothing to clean up."""

    def _coroutine(self) -> Any:
        try:
            return self._steps
        except AttributeError:
            self._steps: Any = self.__await__()
            return self._steps


class Response(Taker, Steps[T]):
    """What `request` returns: a future of the response.

    To cancel it, or the task that awaits it, gives the message up, as `AsyncMessenger.cancel` does.

    Attributes:
        messenger: Which has sent the message; None as long as it waits for room.
        message_id: Of the message, once it is queued.
    """

    __slots__ = ("message_id", "messenger")
    message_id: int
    messenger: Any

    def settle(self, response: Message | None, error: Exception | None) -> None:
        """Take the outcome."""
        if self.done():
            return
        try:
            if error is None:
                self.set_result(response)  # type: ignore[arg-type]  # Settled without an error.
            else:
                self.set_exception(error)
        except RuntimeError:
            if not self.get_loop().is_closed():
                raise

    def cancel(self, msg: Any = None) -> bool:
        """Give the message up, if it has no outcome yet."""
        if not super().cancel(msg):
            return False
        if self.messenger is not None:
            self.messenger.cancel(self.message_id)
        return True


class TypedResponse(Response[T]):
    """A future of what the contents of a response decode to."""

    __slots__ = ("_codec", "_encoding")

    def __init__(self, codec: Codec, encoding: Encoding) -> None:
        super().__init__()
        self._codec = codec
        self._encoding = encoding

    def settle(self, response: Message | None, error: Exception | None) -> None:
        """Take the outcome; the core calls this, so a `__post_init__` that raises must not raise out of it."""
        value: Any = None
        if response is not None:
            try:
                value = self._codec.decode(response.contents, self._encoding)
            except StopIteration as raised:
                error = RuntimeError(f"to decode the response raised {raised!r}, which no future can raise")
                error.__cause__ = raised
            except Exception as raised:
                error = raised
        super().settle(value, error)


class TaskParts(Parts):
    """The parts of a stream that a task reads.

    Attributes:
        waiter: What the task awaits, if it does.
    """

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        super().__init__()
        self.waiter: asyncio.Future[None] | None = None

    def wake_up(self) -> None:
        """Wake the task."""
        waiter = self.waiter
        if waiter is not None and not waiter.done() and not waiter.get_loop().is_closed():
            waiter.set_result(None)


class NoRoom(QueueFull):
    """A queue is full and the caller, who is no plain function, can wait for room.

    Attributes:
        outlet: Whose queue.
        message: Whose response it is a part of, if it is that.
        deadline_at: Until when.
    """

    def __init__(self, outlet: Outlet, message: Message | None, deadline_at: float, why: str) -> None:
        super().__init__(f"{why}, and stayed so to the timeout")
        self.outlet = outlet
        self.message = message
        self.deadline_at = deadline_at


class Done:
    """An awaitable that waits for nothing."""

    def __await__(self) -> Generator[Any, None, None]:
        """Return."""
        return
        yield


Coroutine.register(Sent)
Coroutine.register(Steps)
