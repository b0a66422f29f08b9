"""Plain pyzmq: as its guide shows it (idiomatic), and as fast as it can be written (best).

All without a high-water mark and drained without blocking. Idiomatic sends the frames of the basic dialect; best sends
one frame at the client. Neither keeps callbacks.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

from .contender import ANSWER_TIMEOUT_S, Contender, Measured, measure_clients, pump
from .keys import secure_client, secure_server

# Gives a socket keys.
Secure = Callable[[Any], None]
MORE, NO_WAIT = int(zmq.SNDMORE), int(zmq.NOBLOCK)


def _open(kind: int, secure: Secure | None = None) -> Any:
    socket: Any = zmq.Context.instance().socket(kind)
    socket.set_hwm(0)
    if secure is not None:
        secure(socket)
    return socket


def serve_idiomatic(endpoint: str, secure: Secure | None = None) -> None:
    """Drain with `recv_multipart` until there is nothing, then poll."""
    router = _open(zmq.ROUTER, secure)
    router.bind(endpoint)
    while True:
        try:
            routing_id, empty, message = router.recv_multipart(NO_WAIT)
        except zmq.Again:
            router.poll()
            continue
        source, _, contents = message.split(b"-", 2)
        router.send_multipart([routing_id, b"server", empty, b"0-%b-%b" % (source, contents)])


def measure_idiomatic(
    endpoint: str, size_bytes: int, window: int, count: int, secure: Secure | None = None
) -> Measured:
    """Drain with `recv_multipart` until there is nothing, then poll."""
    dealer = _open(zmq.DEALER, secure)
    dealer.connect(endpoint)
    message = b"1024-0-" + b"x" * size_bytes

    def send() -> None:
        dealer.send_multipart([b"", message])

    def receive() -> None:
        while True:
            try:
                dealer.recv_multipart(NO_WAIT)
            except zmq.Again:
                dealer.poll()
            else:
                return

    return pump(send, receive, window, count)


def serve_best(endpoint: str, copy: bool = True, secure: Secure | None = None) -> None:
    """One `recv` and `send` a frame, without looking whether there is a further frame."""
    router = _open(zmq.ROUTER, secure)
    router.bind(endpoint)
    send, receive = router.send, router.recv
    while True:
        try:
            routing_id = receive(NO_WAIT)
        except zmq.Again:
            router.poll()
            continue
        message = receive(copy=copy)
        send(routing_id, MORE)
        send(message, copy=copy)


def measure_best(
    endpoint: str, size_bytes: int, window: int, count: int, copy: bool = True, secure: Secure | None = None
) -> Measured:
    """One frame a message."""
    dealer = _open(zmq.DEALER, secure)
    dealer.connect(endpoint)
    message = b"1024-0-" + b"x" * size_bytes

    def send() -> None:
        dealer.send(message, copy=copy)

    def receive() -> None:
        while True:
            try:
                dealer.recv(NO_WAIT, copy=copy)
            except zmq.Again:
                dealer.poll()
            else:
                return

    return pump(send, receive, window, count)


# One way. The first message says how many follow, and where PUSH and PULL find the way back.


def _drain(receive: Any, poll: Any, count: int) -> None:
    while count:
        try:
            receive(NO_WAIT)
        except zmq.Again:
            poll()
        else:
            count -= 1


def serve_pull(endpoint: str) -> None:
    """Take messages of one frame by PULL."""
    pull, push = _open(zmq.PULL), _open(zmq.PUSH)
    pull.bind(endpoint)
    count, return_endpoint = pull.recv().split()
    push.connect(return_endpoint.decode())
    _drain(pull.recv, pull.poll, int(count))
    push.send(b"")
    threading.Event().wait()


def measure_push(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send messages of one frame by PUSH."""
    push, pull = _open(zmq.PUSH), _open(zmq.PULL)
    return_port = pull.bind_to_random_port("tcp://127.0.0.1")
    push.connect(endpoint)
    push.send(b"%d tcp://127.0.0.1:%d" % (count, return_port))
    return _send_all(push.send, pull.recv, size_bytes, count)


def serve_router(endpoint: str) -> None:
    """Take messages of one frame, and the routing id in front of each, by ROUTER."""
    router = _open(zmq.ROUTER)
    router.bind(endpoint)
    routing_id, count = router.recv(), router.recv()
    _drain(router.recv, router.poll, 2 * int(count))
    router.send_multipart([routing_id, b""])
    threading.Event().wait()


def measure_dealer(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send messages of one frame by DEALER."""
    dealer = _open(zmq.DEALER)
    dealer.connect(endpoint)
    dealer.send(b"%d" % count)
    return _send_all(dealer.send, dealer.recv, size_bytes, count)


def _send_all(send: Any, receive: Any, size_bytes: int, count: int) -> Measured:
    message = b"x" * size_bytes
    started_at = time.perf_counter()
    for _ in range(count):
        send(message)
    receive()
    return Measured(time.perf_counter() - started_at, [])


# Many connections to one ROUTER.


def _answer_all(dealer: Any, message: bytes) -> int:
    answered_count = 0
    while True:
        try:
            dealer.recv(NO_WAIT)
        except zmq.Again:
            return answered_count
        dealer.send(message)
        answered_count += 1


def run_dealers(
    barrier: threading.Barrier, endpoint: str, size_bytes: int, dealer_count: int, window: int, count: int
) -> None:
    """Be one of the client processes: answer what a poller says is there with the next message."""
    message = b"1024-0-" + b"x" * size_bytes
    poller = zmq.Poller()
    dealers = [_open(zmq.DEALER) for _ in range(dealer_count)]
    for dealer in dealers:
        poller.register(dealer, zmq.POLLIN)
        dealer.connect(endpoint)
        dealer.send(message)
        dealer.recv()
    barrier.wait(ANSWER_TIMEOUT_S)
    for dealer in dealers:
        for _ in range(window):
            dealer.send(message)
    left_count = count
    while left_count > 0:
        for dealer, _ in poller.poll():
            left_count -= _answer_all(dealer, message)
    barrier.wait(ANSWER_TIMEOUT_S)


CONTENDERS = {
    "pyzmq idiomatic": Contender(serve_idiomatic, measure_idiomatic),
    "pyzmq best": Contender(serve_best, measure_best),
    "pyzmq zero-copy": Contender(partial(serve_best, copy=False), partial(measure_best, copy=False)),
    "pyzmq idiomatic, CURVE": Contender(
        partial(serve_idiomatic, secure=secure_server), partial(measure_idiomatic, secure=secure_client)
    ),
    "pyzmq best, CURVE": Contender(
        partial(serve_best, secure=secure_server), partial(measure_best, secure=secure_client)
    ),
    "pyzmq idiomatic, inproc": Contender(serve_idiomatic, measure_idiomatic, "inproc"),
    "pyzmq best, inproc": Contender(serve_best, measure_best, "inproc"),
    "pyzmq best, 1,000 × 1": Contender(serve_best, partial(measure_clients, run_dealers, connection_count=1_000)),
    "pyzmq best, 10 × 100": Contender(serve_best, partial(measure_clients, run_dealers, connection_count=10)),
    "pyzmq PUSH/PULL": Contender(serve_pull, measure_push),
    "pyzmq DEALER/ROUTER": Contender(serve_router, measure_dealer),
}
