"""Messenger: by sessions, which are the default, and in the basic dialect; every message has an MSC of its own."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

from messenger import Connection, Message, Messenger, Security

from .contender import ANSWER_TIMEOUT_S, Contender, Measured, measure_clients, resident_bytes, serve_nothing
from .keys import client_security, server_security

Dialect = Literal["session", "basic"]
# Made in the process that uses it.
Secure = Callable[[], Security]


def no_security() -> Security:
    """Return what is the default."""
    return Security()


def serve_echo(endpoint: str, secure: Secure = no_security) -> None:
    """Answer every message with its contents."""
    with Messenger("server", security=secure()) as messenger:
        messenger.listen_for_connection(endpoint, lambda message: message.reply(message.contents))
        threading.Event().wait()


def measure_callback(
    endpoint: str,
    size_bytes: int,
    window: int,
    count: int,
    dialect: Dialect = "session",
    secure: Secure = no_security,
) -> Measured:
    """Send from callbacks: the MSC of each message sends the next."""
    with Messenger("client", security=secure()) as messenger:
        connection = messenger.make_connection(endpoint, dialect=dialect)
        messenger.request(connection, b"")
        return pump_sessions(messenger, [connection], b"x" * size_bytes, window, count)


def pump_sessions(
    messenger: Messenger, connections: list[Connection], contents: bytes, window: int, count: int
) -> Measured:
    """Keep `window` messages in flight on each connection, `count` round trips in all."""
    each_s: list[float] = []
    done = threading.Event()
    is_each_timed = window * len(connections) == 1
    answered_count = 0
    sent_count = window * len(connections)
    sent_at = 0.0

    def start(connection: Connection) -> None:
        def on_response(response: Message) -> None:
            nonlocal answered_count, sent_count, sent_at
            if is_each_timed:
                now = time.perf_counter()
                each_s.append(now - sent_at)
                sent_at = now
            answered_count += 1
            if sent_count < count:
                sent_count += 1
                messenger.send_message(connection, contents, on_response)
            elif answered_count == count:
                done.set()

        for _ in range(window):
            messenger.send_message(connection, contents, on_response)

    started_at = sent_at = time.perf_counter()
    for connection in connections:
        start(connection)
    if not done.wait(ANSWER_TIMEOUT_S):
        raise RuntimeError(f"{answered_count} of {count} answers came; {messenger.statistics()}")
    return Measured(time.perf_counter() - started_at, each_s)


def measure_request(
    endpoint: str,
    size_bytes: int,
    window: int,
    count: int,
    dialect: Dialect = "session",
    secure: Secure = no_security,
) -> Measured:
    """Send with `request` from the main thread, one at a time."""
    contents = b"x" * size_bytes
    each_s: list[float] = []
    with Messenger("client", security=secure()) as messenger:
        connection = messenger.make_connection(endpoint, dialect=dialect)
        messenger.request(connection, contents)
        started_at = time.perf_counter()
        for _ in range(count):
            sent_at = time.perf_counter()
            messenger.request(connection, contents)
            each_s.append(time.perf_counter() - sent_at)
        return Measured(time.perf_counter() - started_at, each_s)


# One way: the SLC counts, and answers only who waits for an answer.


def serve_count(endpoint: str) -> None:
    """Count messages; answer those that wait for an answer with the count."""
    received_count = 0

    def on_message(message: Message) -> None:
        nonlocal received_count
        if message.source_callback_id:
            message.reply(b"%d" % received_count)
        else:
            received_count += 1

    with Messenger("server") as messenger:
        messenger.listen_for_connection(endpoint, on_message)
        threading.Event().wait()


def measure_one_way(endpoint: str, size_bytes: int, window: int, count: int, dialect: Dialect = "session") -> Measured:
    """Send from the main thread without an MSC; the last message asks how many have been processed."""
    contents = b"x" * size_bytes
    with Messenger("client") as messenger:
        connection = messenger.make_connection(endpoint, dialect=dialect)
        messenger.request(connection, b"")
        started_at = time.perf_counter()
        for _ in range(count):
            messenger.send_message(connection, contents)
        answer = messenger.request(connection, b"", timeout=ANSWER_TIMEOUT_S)
        total_s = time.perf_counter() - started_at
        if int(answer.contents) != count:
            raise RuntimeError(
                f"{count} messages were sent, {int(answer.contents)} processed; {messenger.statistics()}"
            )
        return Measured(total_s, [])


# Many sessions on one listener.


def run_sessions(
    barrier: threading.Barrier, endpoint: str, size_bytes: int, session_count: int, window: int, count: int
) -> None:
    """Be one of the client processes."""
    messenger = Messenger()
    connections = [messenger.make_connection(endpoint) for _ in range(session_count)]
    for connection in connections:
        messenger.request(connection, b"")
    barrier.wait(ANSWER_TIMEOUT_S)
    pump_sessions(messenger, connections, b"x" * size_bytes, window, count)
    barrier.wait(ANSWER_TIMEOUT_S)
    messenger.close(0)


# Memory.


def serve_silence(endpoint: str) -> None:
    """Answer only messages without contents, so that the others stay outstanding."""

    def on_message(message: Message) -> None:
        if not message.contents:
            message.reply(b"")

    with Messenger("server") as messenger:
        messenger.listen_for_connection(endpoint, on_message)
        threading.Event().wait()


def measure_outstanding(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send messages that are not answered, each with an MSC, until all have been processed."""
    contents = b"x" * size_bytes
    messenger = Messenger("client")
    connection = messenger.make_connection(endpoint)
    messenger.request(connection, b"")
    grown_bytes = -resident_bytes()
    started_at = time.perf_counter()
    for _ in range(count):
        messenger.send_message(connection, contents, print, timeout=10 * ANSWER_TIMEOUT_S)
    messenger.request(connection, b"", timeout=ANSWER_TIMEOUT_S)
    total_s = time.perf_counter() - started_at
    if messenger.statistics().outstanding_msgs != count:
        raise RuntimeError(f"not all are outstanding: {messenger.statistics()}")
    grown_bytes += resident_bytes()
    messenger.close(0)
    return Measured(total_s, [], grown_bytes)


def measure_futures(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Hold what programs with asyncio hold for each request instead: a Future in a dictionary."""
    import asyncio

    loop = asyncio.new_event_loop()
    grown_bytes = -resident_bytes()
    started_at = time.perf_counter()
    waiting = {number: loop.create_future() for number in range(2**32, 2**32 + count)}
    total_s = time.perf_counter() - started_at
    grown_bytes += resident_bytes()
    waiting.clear()
    return Measured(total_s, [], grown_bytes)


CONTENDERS = {
    "messenger": Contender(serve_echo, measure_callback),
    "messenger, request": Contender(serve_echo, measure_request),
    "messenger basic": Contender(serve_echo, partial(measure_callback, dialect="basic")),
    "messenger basic, request": Contender(serve_echo, partial(measure_request, dialect="basic")),
    "messenger, CURVE": Contender(
        partial(serve_echo, secure=server_security), partial(measure_callback, secure=client_security)
    ),
    "messenger, request, CURVE": Contender(
        partial(serve_echo, secure=server_security), partial(measure_request, secure=client_security)
    ),
    "messenger, inproc": Contender(serve_echo, measure_callback, "inproc"),
    "messenger, one way": Contender(serve_count, measure_one_way),
    "messenger basic, one way": Contender(serve_count, partial(measure_one_way, dialect="basic")),
    "messenger, 1,000 sessions × 1": Contender(
        serve_echo, partial(measure_clients, run_sessions, connection_count=1_000)
    ),
    "messenger, 10 sessions × 100": Contender(serve_echo, partial(measure_clients, run_sessions, connection_count=10)),
    "messenger, outstanding MSC": Contender(serve_silence, measure_outstanding),
    "asyncio.Future in a dict": Contender(serve_nothing, measure_futures, "none"),
}
