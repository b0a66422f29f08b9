"""`AsyncMessenger`: what it does that threads do not. What both do is tested by tests/transports over both drivers."""

import asyncio
import functools
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest
import uvloop

from messenger import (
    AsyncMessenger,
    Cancelled,
    ForkedError,
    HandlerError,
    Limits,
    Message,
    MessageTooLarge,
    Messenger,
    MessengerClosed,
    NotDelivered,
    OutcomeUnknown,
    QueueFull,
    typed,
)
from messenger.link import FOREVER
from messenger.tasks import TaskLoop
from tests.asyncio_cancel import cancel_at_random
from tests.conftest import MEASUREMENTS_MAX, TIMEOUT_S, dropped, wait_until

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end, for a limited time, in debug mode, and finds no task left."""

    async def check(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with asyncio.timeout(5 * TIMEOUT_S):
            result = await coroutine
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory, debug=True) as runner:
            return runner.run(check(coroutine))

    return run


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


async def until(predicate: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not predicate():  # noqa: ASYNC110  # What no event tells.
            await asyncio.sleep(0.001)


class Pair:
    """A server with one listener and a client, both closed at the end."""

    def __init__(self, callback: Callable[[Message], object], workers: int = 0, limits: Limits | None = None) -> None:
        self.server, self.client = AsyncMessenger("server"), AsyncMessenger("client", limits=limits)
        self._callback, self._workers = callback, workers

    async def __aenter__(self) -> "Pair":
        self.listener = self.server.listen_for_connection("tcp://127.0.0.1:0", self._callback, workers=self._workers)
        self.to = self.client.make_connection(f"tcp://127.0.0.1:{self.listener.port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.close()


# One API.


def test_both_messengers_have_the_same_names_and_parameters() -> None:
    """What may differ: what is awaited, and how they are used as context managers."""

    def calls(kind: type) -> dict[str, list[inspect.Parameter]]:
        functions = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}
        return {
            name: [each.replace(annotation=None) for each in inspect.signature(function).parameters.values()]
            for name, function in {**functions, "__init__": kind.__init__}.items()  # type: ignore[misc]
        }

    # A `request` that is not awaited at once is what `wait` is for threads.
    assert calls(AsyncMessenger) == {name: call for name, call in calls(Messenger).items() if name != "wait"}
    assert len(calls(Messenger)) >= 9
    waiting = {"send_message", "request", "close"}
    for name in calls(Messenger):
        assert (name in vars(AsyncMessenger)) >= (name in waiting), name


def test_import_of_messenger_does_not_import_asyncio() -> None:
    """It takes as long as half of the rest."""
    code = "import sys, messenger; print('asyncio' in sys.modules, 'AsyncMessenger' in dir(messenger))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split()[0] == "False"
    with pytest.raises(AttributeError, match="Nonsense"):
        getattr(__import__("messenger"), "Nonsense")  # noqa: B009


# Awaitables.


def test_request_in_all_the_ways_of_asyncio(run: Run) -> None:
    async def main() -> None:
        async with Pair(answer) as pair:
            request, to = pair.client.request, pair.to
            assert (await request(to, b"1")).contents == b"answer to 1"
            assert [each.contents for each in await asyncio.gather(request(to, b"2"), request(to, b"3"))] == [
                b"answer to 2",
                b"answer to 3",
            ]
            assert (await asyncio.create_task(request(to, b"4"))).contents == b"answer to 4"
            async with asyncio.TaskGroup() as group:
                task = group.create_task(request(to, b"5"))
                sent = group.create_task(pair.client.send_message(to, b""))
            assert task.result().contents == b"answer to 5"
            assert sent.result() > 1024
            assert (await asyncio.wait_for(request(to, b"6"), 5)).contents == b"answer to 6"
            future = request(to, b"7")
            assert future.message_id == sent.result() + 2
            assert (await future).contents == b"answer to 7"
            assert await pair.client.send_message(to, b"8") == future.message_id + 1

    run(main())


def test_outcomes_are_raised(run: Run) -> None:
    async def fail(message: Message) -> None:
        if message.contents == b"wait":
            await asyncio.sleep(TIMEOUT_S)
        raise ValueError("planted")

    async def main() -> None:
        async with Pair(fail, workers=5) as pair:
            with pytest.raises(HandlerError, match="planted"):
                await pair.client.request(pair.to, b"")
            with pytest.raises(OutcomeUnknown):
                await pair.client.request(pair.to, b"wait", timeout=0.05)
            with pytest.raises(NotDelivered):
                await pair.client.request("inproc://nobody", b"", timeout=0.05)
            with pytest.raises(MessageTooLarge):
                pair.client.request(pair.to, b"x" * (64 * 2**20 + 1))
            waiting = pair.client.request(pair.to, b"wait")
            assert pair.client.cancel(waiting.message_id)
            with pytest.raises(Cancelled):
                await waiting

    run(main())


def test_cancelling_the_task_gives_the_message_up(run: Run) -> None:
    started: list[bytes] = []
    ended: list[str] = []

    async def wait(message: Message) -> None:
        started.append(message.contents)
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            ended.append(f"{message.contents.decode()} {message.cancelled}")
            raise

    async def main() -> None:
        async with Pair(wait) as pair:
            task = asyncio.create_task(pair.client.request(pair.to, b"1"))
            behind = asyncio.create_task(pair.client.request(pair.to, b"2"))
            await until(lambda: started)
            behind.cancel()
            await asyncio.sleep(0.05)
            cancelled_at = time.monotonic()
            task.cancel()
            await until(lambda: ended)
            assert time.monotonic() - cancelled_at < TIMEOUT_S / 2
            for each in (task, behind):
                with pytest.raises(asyncio.CancelledError):
                    await each
            await until(lambda: pair.server.statistics().dropped.get("expired"))
            assert (started, ended) == ([b"1"], ["1 True"])
            assert pair.client.statistics().outstanding_msgs == 0
            assert pair.server.statistics().callback_error_count == 0

    run(main())


def test_deadline_cancels_the_task_of_the_callback(run: Run) -> None:
    ended: list[float] = []

    async def wait(message: Message) -> None:
        try:
            await asyncio.sleep(TIMEOUT_S)
        finally:
            ended.append(time.monotonic())

    async def main() -> None:
        async with Pair(wait) as pair:
            late_s: list[float] = []
            # A machine that pauses makes it late, or it is not even started; not each time.
            while not late_s or (min(late_s) > 0.1 and len(late_s) < MEASUREMENTS_MAX):
                expired_count = dropped(pair.server, "expired")
                ended.clear()
                deadline_at = time.monotonic() + 0.2
                try:
                    await pair.client.request(pair.to, b"", timeout=0.2)
                except OutcomeUnknown:
                    await until(lambda: ended or dropped(pair.server, "expired") > expired_count)  # noqa: B023
                except NotDelivered:
                    pass
                late_s.append(ended[0] - deadline_at if ended else FOREVER)
            assert -0.01 < min(late_s) < 0.1

    run(main())


@pytest.mark.parametrize("way", ["deadline", "cancel and goodbye"])
def test_task_is_cancelled_once_so_that_it_can_clean_up(run: Run, way: str) -> None:
    """At a deadline both ends count; and the deadlines of others come while it cleans up."""
    ended: list[str] = []
    begun_count = 0

    async def work(_: Message) -> None:
        nonlocal begun_count
        begun_count += 1
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            ended.append("begins to clean up")
            await asyncio.sleep(0.3)
            ended.append("is clean")
            raise

    async def main() -> None:
        async with Pair(work, workers=5) as pair:
            if way == "deadline":
                asked = [pair.client.request(pair.to, b"", timeout=0.5 + 0.03 * number) for number in range(5)]
                await asyncio.gather(*asked, return_exceptions=True)
            else:
                asked = [pair.client.request(pair.to, b"") for _ in range(5)]
                await until(lambda: begun_count == 5)  # What is cancelled before is not begun.
                for each in asked:
                    each.cancel()
                await until(lambda: ended)
                await pair.client.close()
            await until(lambda: len(ended) == 10)
            assert ended.count("is clean") == 5

    run(main())


def test_all_tasks_of_a_message_are_cancelled(run: Run) -> None:
    """Of two callbacks that run for it, the first to end took the other out of the list."""
    ended: list[str] = []

    async def short(_: Message) -> None:
        ended.append("short")

    async def long(_: Message) -> None:
        try:
            await asyncio.sleep(TIMEOUT_S)
        finally:
            ended.append("long")

    async def main() -> None:
        async with Pair(short) as pair:
            pair.server.register_callback(100, long)
            asked = pair.client.request(pair.to, b"", remote_callback=100)
            await until(lambda: ended)
            await asyncio.sleep(0.01)
            asked.cancel()
            await until(lambda: ended == ["short", "long"])

    run(main())


def test_task_that_is_cancelled_before_its_first_step_gives_the_message_up(run: Run) -> None:
    """A group does so with its tasks, if its body raises before it awaits."""

    received: list[bytes] = []

    def note(message: Message) -> None:
        received.append(message.contents)
        message.reply(b"")

    async def start_and_raise(call: Coroutine[Any, Any, Any]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(call)
            raise ValueError("planted")

    async def main() -> None:
        async with AsyncMessenger(limits=Limits(queue_msgs_max=1)) as client, AsyncMessenger() as server:
            to = "inproc://later"
            with pytest.raises(ExceptionGroup):
                await start_and_raise(client.request(to, b"cancelled"))
            assert client.statistics().outstanding_msgs == 0
            await client.send_message(to, b"fills the queue")
            with pytest.raises(ExceptionGroup):
                await start_and_raise(client.send_message(to, b"waits for room"))
            server.listen_for_connection(to, note)
            await client.request(to, b"last")
            assert received == [b"fills the queue", b"last"]

    run(main())


def test_the_sender_s_goodbye_cancels_the_task_of_the_callback(run: Run) -> None:
    began: list[Message] = []
    ended: list[tuple[bool, bool]] = []

    async def wait(message: Message) -> None:
        began.append(message)
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            ended.append((message.cancelled, message.is_sender_gone))
            raise

    async def main() -> None:
        async with Pair(wait) as pair:
            outcome = pair.client.request(pair.to, b"")
            await until(lambda: began)
            closed_at = time.monotonic()
            await pair.client.close(0)
            with pytest.raises(OutcomeUnknown):
                await outcome
            await until(lambda: ended)
            assert time.monotonic() - closed_at < 1.0
            assert ended == [(True, True)]
            assert pair.server.statistics().callback_error_count == 0

    run(main())


def test_random_cancellation_loses_nothing(run: Run) -> None:
    """A part of what `make cancel` does."""
    figures = run(cancel_at_random(1_500, seed=int.from_bytes(os.urandom(4))))
    assert figures.sent == figures.answered + figures.cancelled + figures.failed
    assert figures.left_outstanding == 0
    assert min(figures.answered, figures.cancelled) > 100


# Callbacks.


def test_coroutines_start_in_order_and_run_side_by_side(run: Run) -> None:
    started: list[int] = []
    active = most_active = 0

    async def work(message: Message) -> None:
        nonlocal active, most_active
        started.append(int(message.contents))
        active += 1
        most_active = max(most_active, active)
        await asyncio.sleep(0.01 if started[-1] % 2 else 0)
        active -= 1
        await message.reply(message.contents)

    async def main() -> None:
        nonlocal most_active
        for workers, most in ((4, 4), (0, 1), (1, 1)):
            started.clear()
            most_active = 0
            async with Pair(work, workers=workers) as pair:
                responses = await asyncio.gather(*[pair.client.request(pair.to, b"%d" % n) for n in range(40)])
                assert [int(each.contents) for each in responses] == list(range(40))
            assert started == list(range(40))
            assert most_active == most

    run(main())


def test_message_counts_as_processed_when_its_coroutine_has_ended(run: Run) -> None:
    """The window is what shows it: two messages fill it, until one of them is processed."""
    release = asyncio.Event()

    async def hold(_: Message) -> None:
        await release.wait()

    async def main() -> None:
        async with Pair(lambda message: hold(message), limits=Limits(window_msgs=2)) as pair:
            for number in range(3):
                await pair.client.send_message(pair.to, b"%d" % number)
            await until(lambda: pair.client.statistics().queued_msgs == 1)
            await asyncio.sleep(0.1)
            assert pair.client.statistics().queued_msgs == 1
            assert pair.server.statistics().received_msgs == 2
            release.set()
            await until(lambda: pair.server.statistics().received_msgs == 3)

    run(main())


def test_every_callback_may_be_a_coroutine_function(run: Run) -> None:
    seen: list[str] = []

    async def note(text: str, argument: Any) -> None:
        await asyncio.sleep(0)
        seen.append(f"{text} {type(argument).__name__}")
        if text in ("slc", "registered"):
            await argument.reply(b"")

    def noting(text: str) -> Callable[[Any], Awaitable[None]]:
        return lambda argument: note(text, argument)

    async def main() -> None:
        async with Pair(noting("slc")) as pair:
            pair.server.register_callback(100, noting("registered"))
            await pair.client.send_message(pair.to, b"", noting("msc"), remote_callback=100)
            await until(lambda: len(seen) == 3)
            await pair.client.send_message("inproc://nobody", b"", on_error=noting("error"), timeout=0.01)
            await until(lambda: len(seen) == 4)
            await pair.client.send_message(pair.to, b"")
            connection = pair.client.make_connection(f"tcp://127.0.0.1:{pair.listener.port}", callback=noting("back"))
            await pair.client.request(connection, b"")
            await until(lambda: "back Message" in seen)

    run(main())
    assert sorted(seen[:3]) == ["msc Message", "registered Message", "slc Message"]
    assert seen[3] == "error NotDelivered"


def test_sender_is_told_what_a_group_of_tasks_raised(run: Run) -> None:
    async def fail(text: str) -> None:
        raise LookupError(text)

    async def work(_: Message) -> None:
        async with asyncio.TaskGroup() as outer:
            outer.create_task(fail("one"))
            async with asyncio.TaskGroup() as inner:
                inner.create_task(fail("two"))

    async def main() -> None:
        async with Pair(work) as pair:
            with pytest.raises(HandlerError, match="LookupError: one") as raised:
                await pair.client.request(pair.to, b"")
            assert raised.value.type_name == "ExceptionGroup"
            assert "LookupError: two" in str(raised.value)

    run(main())


@pytest.mark.parametrize("raised", [ValueError("planted"), SystemExit(3)], ids=repr)
def test_coroutine_raises(run: Run, raised: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(message: Message) -> None:
        await asyncio.sleep(0)
        if message.contents == b"fail":
            raise raised
        answer(message)

    async def main() -> None:
        async with Pair(fail) as pair:
            with pytest.raises(HandlerError, match=type(raised).__name__):
                await pair.client.request(pair.to, b"fail")
            assert (await pair.client.request(pair.to, b"next")).contents == b"answer to next"
            assert pair.server.statistics().callback_error_count == 1

    run(main())
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [raised]


@pytest.mark.parametrize("is_coroutine", [False, True])
def test_ctrl_c_in_a_callback_ends_the_program(is_coroutine: bool) -> None:
    def stop(_: Message) -> None:
        raise KeyboardInterrupt

    async def stop_later(_: Message) -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    async def main() -> None:
        async with Pair(stop_later if is_coroutine else stop) as pair:
            await pair.client.request(pair.to, b"")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


def test_callback_that_is_a_plain_function_cannot_wait(run: Run) -> None:
    caught: list[Exception] = []

    def fill(message: Message) -> None:
        try:
            for _ in range(3):
                message.reply(b"")
        except QueueFull as error:
            caught.append(error)

    async def main() -> None:
        async with AsyncMessenger(limits=Limits(queue_msgs_max=2)) as server, AsyncMessenger() as client:
            server.listen_for_connection("inproc://full", fill)
            await client.send_message("inproc://full", b"")
            await until(lambda: caught)
            assert "plain function" in str(caught[0])

    run(main())


def test_callback_that_returns_a_generator_is_told(run: Run) -> None:
    async def generate(message: Message) -> AsyncIterator[bytes]:
        yield message.contents

    async def main() -> None:
        with pytest.raises(TypeError, match="a generator function"):
            AsyncMessenger().listen_for_connection("inproc://a", generate)
        async with Pair(lambda message: generate(message)) as pair:
            with pytest.raises(HandlerError, match=r"TypeError: .* returned a generator"):
                await pair.client.request(pair.to, b"")

    run(main())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks")
def test_tasks_of_callbacks_are_not_eager() -> None:
    """They began in the middle of a turn, so they could not wait for room, like plain functions."""

    async def write(message: Message) -> None:
        for _ in range(100):
            await message.reply(b"", more=True)
        await message.reply(b"end")
        await message.messenger.close()

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(vars(asyncio)["eager_task_factory"])
        async with Pair(write, limits=Limits(window_msgs=40)) as pair:
            assert len([part async for part in pair.client.stream(pair.to, b"")]) == 101

    asyncio.run(main())


def test_typed_takes_whatever_returns_a_coroutine(run: Run) -> None:
    class Double(msgspec.Struct):
        value: int

    class Doubler:
        async def __call__(self, command: Double) -> int:
            await asyncio.sleep(0)
            return 2 * command.value

    def decorated(function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*arguments)

        return call

    @decorated
    async def double(command: Double, message: Message) -> int:
        await asyncio.sleep(0)
        assert message.source_callback_id
        return 2 * command.value

    async def main() -> None:
        for handler in (Doubler(), double):
            async with Pair(typed(handler)) as pair:
                assert await pair.client.request(pair.to, Double(4), response_type=int) == 8
        with Messenger() as threads, pytest.raises(TypeError, match="use AsyncMessenger"):
            threads.listen_for_connection("inproc://a", typed(Doubler()))

    run(main())


# Room.


def test_send_waits_for_room_in_order(run: Run) -> None:
    received: list[bytes] = []

    async def main() -> None:
        async with AsyncMessenger(limits=Limits(queue_msgs_max=5)) as client, AsyncMessenger() as server:
            sends = [client.send_message("inproc://later", b"%d" % number) for number in range(8)]
            requests = [client.request("inproc://later", b"8"), client.request("inproc://later", b"9")]
            cancelled = asyncio.ensure_future(sends.pop(6))
            cancelled.cancel()
            requests.pop().cancel()
            await asyncio.sleep(0.01)

            def note_and_answer(message: Message) -> None:
                received.append(message.contents)
                answer(message)

            server.listen_for_connection("inproc://later", note_and_answer)
            ids = [await each for each in sends]
            assert ids == sorted(ids)
            assert (await requests[0]).contents == b"answer to 8"
            assert received == [b"0", b"1", b"2", b"3", b"4", b"5", b"7", b"8"]

    run(main())


def test_nobody_overtakes_those_that_wait_for_room(run: Run) -> None:
    """What came made room at once, and a task that it awoke sent before those that waited were asked."""
    received: list[bytes] = []

    def note(message: Message) -> None:
        received.append(message.contents)
        if message.source_callback_id:
            message.messenger.send_message((message.link.handle, "client"), b"wants an acknowledgement at once")
            message.reply(b"")

    async def main() -> None:
        async with Pair(note, limits=Limits(queue_msgs_max=2, window_msgs=1)) as pair:

            async def send(number: int) -> None:
                await pair.client.send_message(pair.to, b"%d" % number)

            async def ask_and_send() -> None:
                await pair.client.request(pair.to, b"0")
                await send(4)

            await pair.client.request(pair.to, b"-")
            async with asyncio.TaskGroup() as group:
                for step in (ask_and_send(), send(1), send(2), send(3)):
                    group.create_task(step)
        assert received == [b"-", *(b"%d" % number for number in range(5))]
        received.clear()
        async with Pair(note, limits=Limits(queue_msgs_max=2)) as pair:
            await pair.client.request(pair.to, b"-")
            loop = pair.client._loop
            loop._is_look_planned = True  # As after a response, until the tasks that it awakens have had their step.
            sent = [asyncio.ensure_future(pair.client.send_message(pair.to, b"%d" % number)) for number in range(4)]
            loop.flush()
            sent.append(asyncio.ensure_future(pair.client.send_message(pair.to, b"4")))
            loop._look()
            await asyncio.gather(*sent)
        assert received == [b"-", *(b"%d" % number for number in range(5))]

    run(main())


def test_no_room_before_the_timeout(run: Run) -> None:
    async def main() -> None:
        async with AsyncMessenger(limits=Limits(queue_msgs_max=1)) as client:
            await client.send_message("inproc://nobody", b"")
            with pytest.raises(QueueFull, match="stayed so"):
                await client.send_message("inproc://nobody", b"", timeout=0.02)
            with pytest.raises(QueueFull, match="stayed so"):
                await client.request("inproc://nobody", b"", timeout=0.02)
            waiting = client.send_message("inproc://nobody", b"")
            with pytest.raises(QueueFull, match="calls wait"):
                client.request("inproc://nobody", b"")
            await client.close(0)
            with pytest.raises(MessengerClosed):
                await waiting

    run(main())


# Life.


def test_close_drains_and_leaves_no_task(run: Run) -> None:
    ended: list[str] = []

    async def slow(message: Message) -> None:
        try:
            await asyncio.sleep(0.05 if message.contents == b"short" else TIMEOUT_S)
            await message.reply(b"done")
            ended.append("done")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        async with AsyncMessenger() as client:
            server = AsyncMessenger()
            server.listen_for_connection("inproc://slow", slow, workers=3)
            short, long = client.request("inproc://slow", b"short"), client.request("inproc://slow", b"long")
            await until(lambda: server.statistics().received_msgs == 2)
            closing = server.close(timeout=1.5)
            assert "closing" in repr(server)
            await closing
            assert (await short).contents == b"done"
            with pytest.raises((OutcomeUnknown, HandlerError)):
                await long
            assert ended == ["done", "cancelled"]
            await server.close()
            with pytest.raises(MessengerClosed):
                server.request("inproc://slow", b"")

    run(main())


@pytest.mark.parametrize("order_by", [None, len])
def test_close_that_is_over_starts_nothing_more(run: Run, order_by: Any) -> None:
    """Each task that it cancelled made room for one that waited; by keys, also after `close` had returned."""
    events: list[str] = []

    async def slow(_: Message) -> None:
        events.append("starts")
        try:
            await asyncio.sleep(TIMEOUT_S)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def main() -> None:
        async with AsyncMessenger() as client:
            server = AsyncMessenger()
            key = None if order_by is None else lambda message: order_by(message.contents)
            server.listen_for_connection("inproc://slow", slow, workers=2, order_by=key)
            for _ in range(3):
                for contents in (b"1", b"22"):
                    await client.send_message("inproc://slow", contents)
            await until(lambda: server.statistics().received_msgs == 6 and len(events) == 2)
            await server.close(timeout=0.1)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            await asyncio.sleep(0.05)
            assert events == ["starts", "starts", "cancelled", "cancelled"]

    run(main())


def test_close_waits_once_for_what_does_not_end(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stay(_: Message) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        async with AsyncMessenger() as client:
            server = AsyncMessenger()
            server.listen_for_connection("inproc://stay", stay)
            await client.send_message("inproc://stay", b"")
            await until(lambda: server.statistics().received_msgs)
            await asyncio.sleep(0.01)
            started_at = time.monotonic()
            await server.close(0)
            assert 1.0 <= time.monotonic() - started_at < 2.0
            release.set()
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    run(main())
    assert [text for text in caplog.messages if "still run" in text] == ["! 1 callbacks still run after the close"]


def test_callbacks_close_their_messenger(run: Run) -> None:
    async def close(message: Message) -> None:
        await message.messenger.close()
        await message.reply(b"closed")

    def close_at_once(message: Message) -> None:
        message.messenger.close()
        message.reply(b"closed")

    async def main() -> None:
        for number, callback in enumerate((close, close_at_once)):
            async with AsyncMessenger() as client:
                server = AsyncMessenger()
                server.listen_for_connection(f"inproc://close{number}", callback)
                assert (await client.request(f"inproc://close{number}", b"")).contents == b"closed"
                await server.close()
                assert "closed" in repr(server)

    run(main())


def test_cancelled_close_goes_on(run: Run) -> None:
    async def main() -> None:
        messenger = AsyncMessenger()
        await messenger.send_message("inproc://nobody", b"", on_error=lambda _: None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(messenger.close(timeout=0.1), 0.01)
        await until(lambda: "closed" in repr(messenger))
        await messenger.close()

    run(main())


def test_endpoints_close(run: Run) -> None:
    async def main() -> None:
        async with AsyncMessenger() as messenger:
            async with messenger.listen_for_connection("tcp://127.0.0.1:0", answer) as listener:
                port = listener.port
                assert (await messenger.request(f"tcp://127.0.0.1:{port}", b"")).contents == b"answer to "
            async with messenger.listen_for_connection(f"tcp://127.0.0.1:{port}", answer) as listener:
                await listener.close()
            assert messenger.statistics().listener_count == 0

    run(main())


@pytest.mark.parametrize("uses_uvloop", [False, True])
def test_program_that_does_not_close(uses_uvloop: bool) -> None:
    """It ends at once, says goodbye, and warns of nothing."""
    code = """if True:
        import asyncio, sys, logging
        logging.basicConfig()
        from messenger import AsyncMessenger
        async def handle(message):
            await asyncio.sleep(60)
        async def main():
            client, server = AsyncMessenger(), AsyncMessenger()
            server.listen_for_connection("inproc://a", handle)
            await client.send_message(sys.argv[1], b"hello", lambda response: None)
            await client.send_message("inproc://a", b"")
            while client.statistics().queued_msgs or not server.statistics().received_msgs:
                await asyncio.sleep(0.01)
        if sys.argv[2] == "True":
            import uvloop
            uvloop.run(main())
        else:
            asyncio.run(main())
        """
    with Messenger() as peer:
        came: list[Message] = []
        listener = peer.listen_for_connection("tcp://127.0.0.1:0", came.append)
        to = f"tcp://127.0.0.1:{listener.port}"
        # Who handles the message would take 60 s.
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, to, str(uses_uvloop)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        assert "never awaited" not in done.stderr, done.stderr
        assert "destroyed" not in done.stderr, done.stderr
        # Both have come; if the goodbye did before the message had its turn, nobody waits for that any more.
        wait_until(lambda: came[0].is_sender_gone if came else dropped(peer, "expired"))


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
@pytest.mark.parametrize("way", ["a close that is not awaited", "a loop that is closed", "a loop that is left"])
def test_program_whose_event_loop_ends_first(way: str, factory: str) -> None:
    """Peers are told, and nothing is raised or left open by this library, whatever still waits."""
    code = """if True:
        import asyncio, logging, sys
        import uvloop
        logging.basicConfig()
        from messenger import AsyncMessenger, Limits
        async def tell(error):
            pass
        async def read(messenger, to):
            async for _ in messenger.stream(to, b""):
                pass
        async def main():
            one, two = AsyncMessenger("one", limits=Limits(queue_msgs_max=1)), AsyncMessenger("two")
            if sys.argv[2] == "a close that is not awaited":
                await asyncio.gather(*[each.request(sys.argv[1], b"?") for each in (one, two)])
                one.close(), two.close()
                return
            for each in (one, two):
                await each.send_message(sys.argv[1], b"", on_error=tell)
                await each.request(sys.argv[1], b"?")  # A message whose sender goes before its turn is not run.
            if sys.argv[2] == "a loop that is closed":
                waiting = asyncio.create_task(read(one, sys.argv[1]))
                await one.send_message("inproc://nobody", b"")
                room = one.send_message("inproc://nobody", b"")
                await asyncio.sleep(0.01)
                waiting._log_destroy_pending = False  # That is the program's own.
                return waiting, room
        loop = asyncio.new_event_loop() if sys.argv[3] == "asyncio" else uvloop.new_event_loop()
        if sys.argv[2] == "a close that is not awaited":
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(main())
        else:
            kept = loop.run_until_complete(main())
        if sys.argv[2] == "a loop that is closed":
            loop.close()
        """
    with Messenger() as peer:
        came: list[Message] = []

        def note(message: Message) -> None:
            came.append(message)
            if message.contents:
                message.reply(b"")

        to = f"tcp://127.0.0.1:{peer.listen_for_connection('tcp://127.0.0.1:0', note).port}"
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code, to, way, factory], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        for text in ("Traceback", "CRITICAL", "never awaited", "destroyed", "Unclosed socket"):
            assert text not in done.stderr, done.stderr
        wait_until(lambda: {each.sender for each in came if each.is_sender_gone} == {"one", "two"})


def test_wrong_thread_no_event_loop_and_fork(run: Run) -> None:
    with pytest.raises(RuntimeError, match="running event loop"):
        AsyncMessenger().make_connection("inproc://a")
    with pytest.raises(RuntimeError, match="running event loop"):
        AsyncMessenger().request("inproc://a", b"")
    with asyncio.Runner() as runner:

        async def make() -> AsyncMessenger:
            return await AsyncMessenger().__aenter__()

        messenger = runner.run(make())
        with pytest.raises(RuntimeError, match="running event loop"):
            messenger.request("inproc://a", b"")
        runner.run(messenger.__aexit__(None, None, None))

    async def main() -> None:
        async with AsyncMessenger() as messenger:
            with pytest.raises(RuntimeError, match="run_coroutine_threadsafe"):
                await asyncio.to_thread(messenger.statistics)
            with pytest.raises(RuntimeError, match="run_coroutine_threadsafe"):
                await asyncio.to_thread(messenger.request, "inproc://a", b"")
            pid = os.fork()
            if pid == 0:
                try:
                    messenger.make_connection("inproc://a")
                except ForkedError:
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7  # noqa: ASYNC222
            await messenger.close()
        with pytest.raises(ValueError, match="timeout"):
            messenger.close(-1)

    logging.captureWarnings(False)
    run(main())


def test_other_threads_ask_whether_a_message_was_cancelled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a plain function ran here, they took input there, from sockets that only this thread may use."""
    polled_by: set[int] = set()
    poll = TaskLoop.poll

    def note_poll(loop: TaskLoop, now: float) -> None:
        polled_by.add(threading.get_ident())
        poll(loop, now)

    monkeypatch.setattr(TaskLoop, "poll", note_poll)

    def work(message: Message) -> None:
        begun.set()
        while not message.cancelled and not stop.is_set():
            time.sleep(0.0001)

    def busy(message: Message) -> None:
        assert not message.cancelled
        time.sleep(0.05)
        answer(message)

    async def main() -> None:
        async with Pair(lambda message: asyncio.to_thread(work, message)) as pair:
            working = pair.client.request(pair.to, b"")
            await until(begun.is_set)
            await pair.client.request(pair.server.listen_for_connection("inproc://busy", busy).endpoints[0], b"")
            working.cancel()

    begun, stop = threading.Event(), threading.Event()
    try:
        run(main())
    finally:
        stop.set()
    assert polled_by == {threading.get_ident()}


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_close_between_two_runs_of_the_event_loop(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """`loop.run_until_complete(messenger.close())` makes the call before the event loop runs; nothing was closed."""

    async def make(identity: str, to: str) -> AsyncMessenger:
        messenger = AsyncMessenger(identity)
        await messenger.request(to, b"")
        return messenger

    with Messenger() as peer:
        came: list[Message] = []

        def note(message: Message) -> None:
            came.append(message)
            message.reply(b"")

        to = f"tcp://127.0.0.1:{peer.listen_for_connection('tcp://127.0.0.1:0', note).port}"
        loop = factory()
        closed, left = [loop.run_until_complete(make(name, to)) for name in ("one", "two")]
        loop.run_until_complete(closed.close())
        assert "closed" in repr(closed)
        wait_until(lambda: came[0].is_sender_gone)
        loop.close()
        left.close()
        assert "closed" in repr(left)
        wait_until(lambda: came[1].is_sender_gone)


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
def test_program_that_ends_while_a_thread_runs_the_event_loop(factory: str) -> None:
    """Two threads used the sockets then, and libzmq aborted the process."""
    code = """if True:
        import asyncio, sys, threading, time
        import uvloop
        from messenger import AsyncMessenger
        loop = asyncio.new_event_loop() if sys.argv[2] == "asyncio" else uvloop.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        async def ask(messenger):
            try:
                while True:
                    await asyncio.gather(*[messenger.request(sys.argv[1], b"") for _ in range(20)])
            except Exception:
                pass
        async def main():
            messenger = AsyncMessenger("client")
            await messenger.request(sys.argv[1], b"")
            return [loop.create_task(ask(messenger)) for _ in range(5)]
        kept = asyncio.run_coroutine_threadsafe(main(), loop).result()
        time.sleep(0.1)
        """
    with Messenger() as peer:
        came: list[Message] = []

        def note(message: Message) -> None:
            if not came:
                came.append(message)
            message.reply(b"")

        to = f"tcp://127.0.0.1:{peer.listen_for_connection('tcp://127.0.0.1:0', note).port}"
        done = subprocess.run([sys.executable, "-c", code, to, factory], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert "atexit" not in done.stderr, done.stderr
        wait_until(lambda: came[0].is_sender_gone)


def test_request_without_an_event_loop_makes_none() -> None:
    """Up to Python 3.13 a future makes one in the main thread, which nobody closes."""
    code = """if True:
        from messenger import AsyncMessenger
        try:
            AsyncMessenger().request("inproc://a", b"")
        except RuntimeError as error:
            print(error)
        """
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=30)
    assert "running event loop" in done.stdout
    assert not done.stderr


def test_talks_to_a_messenger_of_threads_both_ways(run: Run) -> None:
    with Messenger("threads") as threads:
        threads.listen_for_connection("inproc://threads", answer)

        async def main() -> None:
            async with AsyncMessenger("asyncio") as messenger:
                messenger.listen_for_connection("inproc://asyncio", answer)
                assert (await messenger.request("inproc://threads", b"1")).contents == b"answer to 1"
                response = await asyncio.to_thread(threads.request, "inproc://asyncio", b"2")
                assert (response.contents, response.sender) == (b"answer to 2", "asyncio")

        run(main())


# Streams, and order by key.


def test_streams_are_read_in_order_and_hold_up_their_writers(run: Run) -> None:
    """Of 300 parts that nobody takes yet, no more than the credit is sent; and others are served meanwhile."""
    sent: list[int] = []

    async def write(message: Message) -> None:
        if message.contents:
            answer(message)
            return
        for number in range(300):
            await message.reply(b"%d" % number, more=True)
            sent.append(number)
        await message.reply(b"end")

    async def main() -> None:
        async with Pair(write, workers=2, limits=Limits(window_msgs=40)) as pair:
            stream = pair.client.stream(pair.to, b"")
            assert (await anext(stream)).contents == b"0"
            await asyncio.sleep(0.1)
            assert len(sent) < 40
            for _ in range(100):
                assert (await pair.client.request(pair.to, b"x")).contents == b"answer to x"
            assert [part.contents async for part in stream] == [*(b"%d" % number for number in range(1, 300)), b"end"]
            assert [part.contents async for part in stream] == []

            async def read() -> int:
                return len([part async for part in pair.client.stream(pair.to, b"")])

            assert await asyncio.gather(*[read() for _ in range(5)]) == [301] * 5
        assert pair.server.statistics().callback_error_count == 0

    run(main())


@pytest.mark.parametrize("way", ["break", "close", "cancel", "forget"])
def test_reader_that_stops_cancels_the_writer(run: Run, way: str) -> None:
    ended: list[str] = []

    async def write(message: Message) -> None:
        try:
            while True:
                await message.reply(b"x" * 1000, more=True)
        except (Cancelled, asyncio.CancelledError) as error:
            ended.append(type(error).__name__)
            raise

    async def main() -> None:
        async with Pair(write) as pair:
            if way == "break":
                async for _ in pair.client.stream(pair.to, b""):
                    break
            elif way == "close":
                async with pair.client.stream(pair.to, b"") as stream:
                    await anext(stream)
            elif way == "cancel":

                async def read() -> None:
                    async for _ in pair.client.stream(pair.to, b""):
                        await asyncio.sleep(0)

                task = asyncio.create_task(read())
                await until(lambda: pair.client.statistics().received_msgs > 10)
                task.cancel()
                await asyncio.wait([task])
                del task
            else:
                stream = pair.client.stream(pair.to, b"")
                await anext(stream)
                del stream
            await until(lambda: ended)
            await until(lambda: pair.client.statistics().outstanding_msgs == 0)
        assert pair.server.statistics().callback_error_count == 0

    run(main())


def test_stream_that_waits_for_room_and_is_not_read(run: Run) -> None:
    """It was sent when there was room, for nobody, and its writer waited for its reader for ever."""

    async def main() -> None:
        async with AsyncMessenger(limits=Limits(queue_msgs_max=1)) as client, AsyncMessenger() as server:

            def open_stream(timeout: float = TIMEOUT_S) -> Any:
                return client.stream("inproc://later", b"stream", timeout=timeout)

            await client.send_message("inproc://later", b"")
            stream = open_stream()
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            stream.close()
            with pytest.raises(StopAsyncIteration):
                await reading
            stream = open_stream()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
            assert [part async for part in stream] == []
            stream = open_stream(0.01)
            with pytest.raises(QueueFull):
                await anext(stream)
            assert [part async for part in stream] == []
            stream = open_stream()
            del stream
            received: list[bytes] = []
            server.listen_for_connection("inproc://later", lambda message: received.append(message.contents))
            await until(lambda: received)
            await client.send_message("inproc://later", b"next")
            await until(lambda: len(received) == 2)
            assert received == [b"", b"next"]
            assert client.statistics().outstanding_msgs == 0

    run(main())


def test_parts_that_are_not_awaited_come_before_the_last(run: Run) -> None:
    """A last one that was text, or had options, overtook those that waited for the reader, which were lost."""

    async def write(message: Message) -> None:
        for number in range(50):
            message.reply(b"%d" % number, more=True)
        if message.contents == b"text":
            sent = message.reply("end")
        elif message.contents == b"options":
            sent = message.reply(b"end", timeout=TIMEOUT_S)
        else:
            sent = message.reply(b"end")
        assert type(await sent) is int

    async def main() -> None:
        async with Pair(write, limits=Limits(window_msgs=40)) as pair:
            for contents in (b"bytes", b"text", b"options"):
                parts = [part.contents async for part in pair.client.stream(pair.to, contents)]
                assert parts == [*(b"%d" % number for number in range(50)), b"end"]

    run(main())


def test_one_task_reads_a_stream(run: Run) -> None:
    async def write(message: Message) -> None:
        await message.reply(b"1", more=True)
        await asyncio.sleep(0.05)
        await message.reply(b"2")

    async def main() -> None:
        async with Pair(write) as pair:
            stream = pair.client.stream(pair.to, b"")
            first = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task"):
                await anext(stream)
            assert (await first).contents == b"1"
            assert [part.contents async for part in stream] == [b"2"]

    run(main())


def test_streams_end_with_their_error(run: Run) -> None:
    async def fail(message: Message) -> None:
        await message.reply(b"1", more=True)
        if message.contents == b"wait":
            await asyncio.sleep(TIMEOUT_S)
        raise ValueError("planted")

    async def main() -> None:
        async with Pair(fail, workers=2) as pair:
            for contents, timeout, kind in ((b"", 5.0, HandlerError), (b"wait", 0.1, OutcomeUnknown)):
                stream = pair.client.stream(pair.to, contents, timeout=timeout)
                assert (await anext(stream)).contents == b"1"
                with pytest.raises(kind):
                    await anext(stream)
                assert [part async for part in stream] == []

    run(main())


def test_a_plain_function_writes_a_short_stream_and_messages_of_threads_read_it(run: Run) -> None:
    def write(message: Message) -> None:
        for number in range(5):
            message.reply(b"%d" % number, more=True)
        message.reply(b"end")

    def read(to: str) -> list[bytes]:
        with Messenger() as threads:
            return [part.contents for part in threads.stream(to, b"")]

    async def main() -> None:
        async with Pair(write) as pair:
            to = f"tcp://127.0.0.1:{pair.listener.port}"
            assert await asyncio.to_thread(read, to) == [b"0", b"1", b"2", b"3", b"4", b"end"]

    run(main())


def test_coroutines_of_one_key_run_one_after_the_other(run: Run) -> None:
    active: set[bytes] = set()
    most_active = 0
    order: dict[bytes, list[int]] = {}

    async def work(message: Message) -> None:
        nonlocal most_active
        if message.contents == b"incomparable":
            await message.reply(b"")
            return
        key, number = message.contents[:1], int(message.contents[1:])
        assert key not in active
        active.add(key)
        most_active = max(most_active, len(active))
        order.setdefault(key, []).append(number)
        await asyncio.sleep(0.002)
        active.discard(key)
        await message.reply(b"")

    class Incomparable:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, _: object) -> bool:
            raise ArithmeticError("planted")

    def key_of(message: Message) -> object:
        if message.contents == b"fail":
            raise ValueError("no key")
        if message.contents == b"incomparable":
            return Incomparable()
        return message.contents[:1]

    async def main() -> None:
        async with AsyncMessenger() as server, AsyncMessenger() as client:
            server.listen_for_connection("inproc://keys", work, workers=3, order_by=key_of)
            asked = [client.request("inproc://keys", b"%c%d" % (b"abcdef"[n % 6], n)) for n in range(60)]
            given_up = client.request("inproc://keys", b"a99")
            incomparable = [client.request("inproc://keys", b"incomparable") for _ in range(2)]
            given_up.cancel()
            with pytest.raises(HandlerError, match="no key"):
                await client.request("inproc://keys", b"fail")
            with pytest.raises(HandlerError, match="planted"):
                await incomparable[1]
            await asyncio.gather(*asked)
            assert all(numbers == sorted(numbers) for numbers in order.values())
            assert (len(order), most_active) == (6, 3)
            assert (await client.request("inproc://keys", b"a100")).contents == b""
            sessions = client._exchange.handshake.sessions
            await until(lambda: not any(session.unprocessed_count for session in sessions))

    run(main())
