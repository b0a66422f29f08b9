"""`AsyncModelServerManager` and `AsyncModelClient`: the manager and its client for programs with asyncio.

Jobs can be awaited, so the classes of threads do all the work, by a `Messenger` of threads that has the identity, the
keys and the limits of the program's `AsyncMessenger`. The few calls that block are made on another thread.

What must never happen here: a call that blocks the event loop.
"""

import asyncio
from types import TracebackType
from typing import Any, NoReturn, Self

from messenger import AsyncMessenger, Destination, Messenger

from .client import ModelClient
from .jobs import Job
from .limits import CALL_TIMEOUT_S, STOP_S
from .manager import ModelServerManager


def _make_carrier(messenger: AsyncMessenger) -> Messenger:
    return Messenger(messenger.identity, security=messenger.security, limits=messenger.limits)


class AsyncModelServerManager(ModelServerManager):
    """`ModelServerManager` for programs with asyncio, an async context manager.

    The calls are the same. Those that return jobs are awaited: `await manager.infer(…)`. `on_progress` is called on a
    thread.

    Args:
        messenger: Whose identity, keys and limits it uses.
        destination, options: As `ModelServerManager` takes them.

    Source: docs/models.md.
    """

    def __init__(self, messenger: AsyncMessenger, destination: Destination | str | int = 15446, **options: Any) -> None:
        self._carrier = _make_carrier(messenger)
        try:
            super().__init__(self._carrier, destination, **options)
        except BaseException:
            self._carrier.close(0)
            raise

    async def wait_ready(self, timeout: float = CALL_TIMEOUT_S) -> None:  # type: ignore[override]  # noqa: ASYNC109
        """Wait until a server takes commands; see `ModelServerManager.wait_ready`."""
        await self.print_message("", timeout=timeout)

    async def stop(self, timeout: float = STOP_S) -> None:  # type: ignore[override]  # noqa: ASYNC109
        """End the servers; see `ModelServerManager.stop`."""
        await asyncio.to_thread(super().stop, timeout)
        await asyncio.to_thread(self._carrier.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.shield(self.stop())

    def __enter__(self) -> NoReturn:
        raise TypeError("use `async with`")


class AsyncModelClient(ModelClient):
    """`ModelClient` for programs with asyncio, an async context manager; its jobs are awaited.

    Args:
        messenger: Whose identity, keys and limits it uses.
        destination: Of the manager.
    """

    def __init__(self, messenger: AsyncMessenger, destination: Destination | str | int = 15446) -> None:
        self._carrier = _make_carrier(messenger)
        super().__init__(self._carrier, destination)

    async def cancel(self, job: str | Job[Any]) -> bool:  # type: ignore[override]
        """Cancel a job, also by its id; see `ModelCalls.cancel`."""
        return await asyncio.to_thread(super().cancel, job)

    async def close(self) -> None:
        """End it. Twice is fine."""
        await asyncio.to_thread(self._carrier.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
