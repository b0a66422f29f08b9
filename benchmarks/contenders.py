"""What is measured against what: each contender is a server and a client, run in a process each.

`serve(endpoint)` answers every message with the same contents until it is killed. `measure(endpoint, size_bytes,
window, count)` makes `count` round trips with `window` in flight and returns the time that each took, in seconds, in
the order of completion, and last the time of all. A client must see every answer, or it raises.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from messenger import Message, Messenger


class Measured(NamedTuple):
    """The times of one run, in seconds; `each` is filled only with one message in flight."""

    total_s: float
    each_s: list[float]


# Messenger: every message has an MSC, which sends the next one.


def serve_messenger(endpoint: str) -> None:
    """Answer on the public API."""
    with Messenger("server") as messenger:
        messenger.listen_for_connection(endpoint, lambda message: message.reply(message.contents))
        threading.Event().wait()


def measure_messenger(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send from callbacks: the MSC of each message sends the next."""
    contents = b"x" * size_bytes
    each: list[float] = []
    done = threading.Event()
    answered_count = 0
    sent_count = window
    sent_at = 0.0

    with Messenger("client") as messenger:
        connection = messenger.make_connection(endpoint)
        messenger.request(connection, contents)

        def on_response(response: Message) -> None:
            nonlocal answered_count, sent_count, sent_at
            if window == 1:
                now = time.perf_counter()
                each.append(now - sent_at)
                sent_at = now
            answered_count += 1
            if sent_count < count:
                sent_count += 1
                messenger.send_message(connection, contents, on_response)
            elif answered_count == count:
                done.set()

        started_at = sent_at = time.perf_counter()
        for _ in range(window):
            messenger.send_message(connection, contents, on_response)
        if not done.wait(120):
            raise RuntimeError(f"{answered_count} of {count} answers came")
        return Measured(time.perf_counter() - started_at, each)


def measure_request(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send with `request` from the main thread, one at a time."""
    contents = b"x" * size_bytes
    each: list[float] = []
    with Messenger("client") as messenger:
        connection = messenger.make_connection(endpoint)
        messenger.request(connection, contents)
        started_at = time.perf_counter()
        for _ in range(count):
            sent_at = time.perf_counter()
            messenger.request(connection, contents)
            each.append(time.perf_counter() - sent_at)
        return Measured(time.perf_counter() - started_at, each)


# Plain pyzmq, the same frames as the basic dialect: as its guide shows it, and as fast as it can be written.


def _open(kind: int) -> Any:
    socket = zmq.Context().socket(kind)
    socket.set_hwm(0)
    return socket


def serve_idiomatic(endpoint: str) -> None:
    """Drain with `recv_multipart` until there is nothing, then poll."""
    router = _open(zmq.ROUTER)
    router.bind(endpoint)
    while True:
        try:
            routing_id, empty, message = router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            router.poll()
            continue
        source, _, contents = message.split(b"-", 2)
        router.send_multipart([routing_id, b"server", empty, b"0-%b-%b" % (source, contents)])


def measure_idiomatic(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Drain with `recv_multipart` until there is nothing, then poll; no callbacks, no table."""
    dealer = _open(zmq.DEALER)
    dealer.connect(endpoint)
    message = b"1024-0-" + b"x" * size_bytes

    def send() -> None:
        dealer.send_multipart([b"", message])

    def receive() -> None:
        while True:
            try:
                dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                dealer.poll()
            else:
                return

    return _pump(send, receive, window, count)


def serve_best(endpoint: str) -> None:
    """One `recv` and `send` a frame, without looking whether there is a further frame."""
    router = _open(zmq.ROUTER)
    router.bind(endpoint)
    send, receive = router.send, router.recv
    more, no_wait = int(zmq.SNDMORE), int(zmq.NOBLOCK)
    while True:
        try:
            routing_id = receive(no_wait)
        except zmq.Again:
            router.poll()
            continue
        message = receive()
        send(routing_id, more)
        send(message)


def measure_best(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """One frame a message."""
    dealer = _open(zmq.DEALER)
    dealer.connect(endpoint)
    message = b"1024-0-" + b"x" * size_bytes
    no_wait = int(zmq.NOBLOCK)

    def send() -> None:
        dealer.send(message)

    def receive() -> None:
        while True:
            try:
                dealer.recv(no_wait)
            except zmq.Again:
                dealer.poll()
            else:
                return

    return _pump(send, receive, window, count)


def _pump(send: Callable[[], None], receive: Callable[[], None], window: int, count: int) -> Measured:
    send()
    receive()
    each: list[float] = []
    started_at = time.perf_counter()
    if window == 1:
        for _ in range(count):
            sent_at = time.perf_counter()
            send()
            receive()
            each.append(time.perf_counter() - sent_at)
    else:
        for _ in range(window):
            send()
        for _ in range(count - window):
            receive()
            send()
        for _ in range(window):
            receive()
    return Measured(time.perf_counter() - started_at, each)


class Contender(NamedTuple):
    """A server and a client that belong together."""

    serve: Callable[[str], None]
    measure: Callable[[str, int, int, int], Measured]


CONTENDERS = {
    "messenger": Contender(serve_messenger, measure_messenger),
    "messenger request": Contender(serve_messenger, measure_request),
    "pyzmq idiomatic": Contender(serve_idiomatic, measure_idiomatic),
    "pyzmq best": Contender(serve_best, measure_best),
}
