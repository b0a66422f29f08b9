"""An `AsyncMessenger` behind the blocking calls of a `Messenger`, so that one body of tests runs over both.

Each has an event loop of its own on a thread of its own. Calls of other threads are made on the event loop and waited
for; calls of callbacks, which run there already, are plain calls. It adds nothing else, and hides nothing: what a test
sees is what the `AsyncMessenger` does.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from messenger import AsyncMessenger

# Longer than any call of a test waits.
CALL_TIMEOUT_S = 50.0


class Host:
    """An event loop on a thread."""

    def __init__(self, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = make_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="event loop", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == self._thread.ident:
            return function(*arguments, **options)

        async def call() -> Any:
            result = function(*arguments, **options)
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(CALL_TIMEOUT_S)

    def close(self) -> list[str]:
        """Ends the event loop and returns the tasks that it still had."""

        async def find() -> list[str]:
            return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

        left: list[str] = self.call(find)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        return left


class HostedMessenger(AsyncMessenger):
    """Makes every call where its event loop runs."""

    def __init__(self, host: Host, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.host = host
        self._answer = partial(host.call, self._answer)

    def listen_for_connection(self, *arguments: Any, **options: Any) -> Any:
        return self.host.call(super().listen_for_connection, *arguments, **options)

    def make_connection(self, *arguments: Any, **options: Any) -> Any:
        return self.host.call(super().make_connection, *arguments, **options)

    def send_message(self, *arguments: Any, **options: Any) -> Any:
        return self.host.call(super().send_message, *arguments, **options)

    def request(self, *arguments: Any, **options: Any) -> Any:
        return self.host.call(super().request, *arguments, **options)

    def cancel(self, message_id: int) -> Any:
        return self.host.call(super().cancel, message_id)

    def register_callback(self, *arguments: Any) -> Any:
        return self.host.call(super().register_callback, *arguments)

    def statistics(self) -> Any:
        return self.host.call(super().statistics)

    def close(self, *arguments: Any, **options: Any) -> Any:
        return self.host.call(super().close, *arguments, **options)

    def __enter__(self) -> Self:
        self.host.call(super().__aenter__)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _close_endpoint(self, endpoint: Any) -> Any:
        return self.host.call(super()._close_endpoint, endpoint)
