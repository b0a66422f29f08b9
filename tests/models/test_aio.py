"""The model-server manager and its client in a program with asyncio."""

import asyncio
import time
from pathlib import Path

import pytest

from messenger import AsyncMessenger
from messenger.models import CommandFailed, Job
from messenger.models.aio import AsyncModelClient, AsyncModelServerManager
from tests.conftest import TIMEOUT_S, free_port
from tests.models.conftest import make_linear


def test_manager_and_client(folder: Path) -> None:
    make_linear(folder)

    async def main() -> None:
        port = free_port()
        async with (
            AsyncMessenger("asyncio") as messenger,
            AsyncModelServerManager(messenger, port, folder=folder) as manager,
            AsyncModelClient(messenger, port) as client,
        ):
            await manager.wait_ready(30)
            assert manager.is_ready
            inferences = await asyncio.gather(*[manager.infer("sum", [[n, 1]]) for n in range(20)])
            assert [each.predictions for each in inferences] == [[n + 1.0] for n in range(20)]
            assert (await client.infer("sum", [[1, 2]])).predictions == [3.0]
            assert [each.name for each in await client.list_models()] == ["sum"]
            with pytest.raises(CommandFailed):
                await client.load("nothing")
            assert not await client.cancel("no job")
            with pytest.raises(TypeError, match="async with"):
                manager.__enter__()
            servers = manager.status().servers
        assert len(servers) == 1

    asyncio.run(main())


def test_job_is_awaited_and_given_up() -> None:
    async def main() -> None:
        job: Job[int] = Job()
        asyncio.get_running_loop().call_later(0.01, job.settle, 7)
        assert await job == 7
        assert await job == 7
        job = Job()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await job
        assert job.cancelled()

    started_at = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started_at < TIMEOUT_S
