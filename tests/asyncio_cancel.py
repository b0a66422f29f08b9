"""`python -m tests.asyncio_cancel --requests 100000`: requests of which many are cancelled, at random moments.

Every one must be answered, or reported to whoever awaited it, exactly once; no task may be left, and no coroutine never
awaited.
"""

import argparse
import asyncio
import random
import time
import warnings

import msgspec
import uvloop

from messenger import AsyncMessenger, DeliveryError, Message

IN_FLIGHT_MAX = 500


class Figures(msgspec.Struct):
    """What became of the requests.

    Attributes:
        sent: By the client's own count, those that were cancelled before they were queued included.
        failed: That ended in an error other than a cancellation.
        handled: That the server's callback finished.
    """

    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    handled: int = 0
    left_outstanding: int = 0


async def cancel_at_random(count: int, seed: int) -> Figures:
    rng = random.Random(seed)
    figures = Figures()

    async def handle(message: Message) -> None:
        if message.contents[0] % 2:
            await asyncio.sleep(message.contents[0] / 255 * 0.002)
        await message.reply(message.contents)
        figures.handled += 1

    async with AsyncMessenger("server") as server, AsyncMessenger("client") as client:
        listener = server.listen_for_connection("tcp://127.0.0.1:0", handle, workers=100)
        to = client.make_connection(f"tcp://127.0.0.1:{listener.port}")

        async def ask() -> None:
            contents = rng.randbytes(8)
            figures.sent += 1
            request = client.request(to, contents)
            if rng.random() < 0.5:
                asyncio.get_running_loop().call_later(rng.random() * 0.004, request.cancel)
            try:
                response = await request
            except asyncio.CancelledError:
                figures.cancelled += 1
            except DeliveryError:
                figures.failed += 1
            else:
                if response.contents != contents:
                    raise RuntimeError(f"the response to {contents!r} is {response.contents!r}")
                figures.answered += 1

        async def ask_again() -> None:
            while figures.sent < count:
                task = asyncio.create_task(ask())
                if rng.random() < 0.1:
                    # In its first step, or before it.
                    await asyncio.sleep(0)
                    request_cancelled = task.cancel()
                    if not request_cancelled and not task.done():
                        raise RuntimeError("a task that is not done cannot be cancelled")
                await task

        await asyncio.gather(*[ask_again() for _ in range(min(count, IN_FLIGHT_MAX))])
        sent_msgs = client.statistics().sent_msgs
        if sent_msgs != figures.sent:
            raise RuntimeError(f"{figures.sent} requests were made, {sent_msgs} messages sent")
        figures.left_outstanding = client.statistics().outstanding_msgs
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.asyncio_cancel", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error")
    for name, factory in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):

        async def measure() -> tuple[Figures, int]:
            figures = await cancel_at_random(options.requests, options.seed)
            return figures, len(asyncio.all_tasks()) - 1

        started_at = time.monotonic()
        with asyncio.Runner(loop_factory=factory) as runner:
            figures, task_count = runner.run(measure())
        print(f"{name}: {figures}, {task_count} tasks left, {time.monotonic() - started_at:.1f} s")
        is_right = figures.sent == figures.answered + figures.cancelled + figures.failed
        if not is_right or figures.left_outstanding or task_count:
            raise SystemExit("error: not every request is accounted for")


if __name__ == "__main__":
    main()
