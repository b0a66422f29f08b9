"""What the tests against real sockets and processes share.

No test sleeps a fixed time: callbacks go into an `Inbox`, which is waited on, and what has no event is asked for with
`wait_until`.
Plain peers are nothing but pyzmq sockets, so that no mistake of the library hides itself.
"""

import asyncio
import fcntl
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import pytest
import uvloop
import zmq
from hypothesis import settings

from messenger import AsyncMessenger, Destination, Limits, Message, Messenger, Security, wire
from messenger.wire import decode_data_frame
from tests.canary import pytest_runtest_makereport
from tests.drivers import Host, HostedMessenger

# A hook of pytest, which it looks for here.
__all__ = ["pytest_runtest_makereport"]

# A shell ignores Ctrl-C for what it starts in the background, and whatever the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Long enough for a machine under load; a test that passes never waits for it.
TIMEOUT_S = 10.0
# A busy machine makes any example slow.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
MEASUREMENTS_MAX = 20
# Below the range from which the kernel takes the local ports of connections, so that those do not get in the way.
PORTS = range(10_000, 32_000)
# Each worker of pytest draws from its own share, and none again soon: it may not have been bound yet.
WORKERS_MAX = 8
_drawn_ports: deque[int] = deque(maxlen=1_000)

T = TypeVar("T")


def wait_until(predicate: Callable[[], object], timeout: float = TIMEOUT_S) -> None:
    """Returns as soon as the predicate holds; for what no callback tells, as counts and files."""
    deadline_at = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline_at, f"the condition did not hold within {timeout} s"
        time.sleep(0.001)


def quickest(measure: Callable[[], float], bound_s: float) -> float:
    """Returns the shortest of some measurements, which end with the first that is within the bound.

    For a promise of how soon something happens: a machine that pauses makes one of them longer, what is slow all.
    """
    shortest_s = measure()
    for _ in range(MEASUREMENTS_MAX - 1):
        if shortest_s <= bound_s:
            break
        shortest_s = min(shortest_s, measure())
    return shortest_s


class StandingClock:
    """A clock that stands still while the machine does: it counts the short sleeps of a thread of its own.

    For a bound on how long something held this process up, where a measurement cannot be made again.
    """

    TICK_S = 0.005

    def __init__(self) -> None:
        self._ticks = 0
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)

    def _run(self) -> None:
        while not self._must_stop.wait(self.TICK_S):
            self._ticks += 1

    def now(self) -> float:
        """Returns seconds, never more than have passed."""
        return self._ticks * self.TICK_S

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._must_stop.set()
        self._thread.join()


@pytest.fixture
def standing_clock() -> Iterator[StandingClock]:
    with StandingClock() as clock:
        yield clock


def dropped(messenger: Messenger | AsyncMessenger, kind: str) -> int:
    return messenger.statistics().dropped.get(kind, 0)


def wait_dropped(messenger: Messenger, kind: str, count: int = 1) -> None:
    """Waits for a count and says what was counted instead if it does not come."""
    try:
        wait_until(lambda: dropped(messenger, kind) >= count)
    except AssertionError:
        pytest.fail(f"{kind} should be {count}: {dict(messenger.statistics().dropped)}")
    assert dropped(messenger, kind) == count


class Inbox(Generic[T]):
    """A callback that keeps what it is called with, and can be waited on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: list[T] = []

    def __call__(self, item: T) -> None:
        with self._condition:
            self._items.append(item)
            self._condition.notify_all()

    def __len__(self) -> int:
        return len(self._items)

    def wait(self, count: int = 1, timeout: float = TIMEOUT_S) -> list[T]:
        """Returns what came, as soon as it is at least `count` items."""
        with self._condition:
            came = self._condition.wait_for(lambda: len(self._items) >= count, timeout)
            assert came, f"{len(self._items)} of {count} came within {timeout} s: {self._items[-5:]}"
            return list(self._items)


@pytest.fixture
def never() -> Iterator[Inbox[object]]:
    """A callback that must not run. What fails inside a callback is caught by the messenger."""
    inbox: Inbox[object] = Inbox()
    yield inbox
    assert inbox.wait(0) == []


class Data(NamedTuple):
    """The numbers of a DATA frame."""

    first: int
    received_through: int
    processed_through: int
    msg_count: int


def data_of(frame: bytes) -> Data:
    """Returns the numbers of a DATA frame."""
    decoded = decode_data_frame(frame)
    assert decoded is not None
    return Data(*decoded[3])


def contents_of(messages: list[Message]) -> list[bytes]:
    return [message.contents for message in messages]


def wait_event(event: threading.Event) -> None:
    assert event.wait(TIMEOUT_S), f"the event did not come within {TIMEOUT_S} s"


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Returns a port that nobody has now, and that no other test here gets; at random, as other test runs draw too."""
    rng = random.SystemRandom()
    own = PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS_MAX :: WORKERS_MAX]
    while (port := rng.choice(own)) in _drawn_ports or not is_port_free(port):
        continue
    _drawn_ports.append(port)
    return port


@pytest.fixture(autouse=True)
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder for each test; the path of a Unix socket has at most 107 bytes, so `tmp_path` is too long."""
    folder = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


NewDestination = Callable[[str], str | int]


@pytest.fixture
def new_destination(runtime_folder: Path) -> NewDestination:
    """Names a destination that nobody has: of `"tcp"`, `"ipc"`, `"inproc"`, or a bare `"port"`."""

    def name_one(transport: str) -> str | int:
        if transport == "ipc":
            return f"ipc://{runtime_folder}/{os.urandom(4).hex()}"
        if transport == "inproc":
            return f"inproc://{os.urandom(8).hex()}"
        port = free_port()
        return port if transport == "port" else f"tcp://127.0.0.1:{port}"

    return name_one


@pytest.fixture(params=["tcp", "ipc", "inproc", "port"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def destination(transport: str, new_destination: NewDestination) -> str | int:
    """Where the one body of tests listens and sends, on each transport in turn."""
    return new_destination(transport)


class MessengerFactory:
    """Makes messengers of one driver and closes them all."""

    def __init__(self, driver: str = "thread") -> None:
        self.driver = driver
        self.made: list[Messenger] = []
        self._hosts: list[Host] = []

    def __call__(
        self, identity: str | None = None, *, limits: Limits | None = None, security: Security | None = None
    ) -> Messenger:
        made: Any
        if self.driver == "thread":
            made = Messenger(identity, limits=limits, security=security)
        else:
            host = Host(asyncio.new_event_loop if self.driver == "asyncio" else uvloop.new_event_loop)
            self._hosts.append(host)
            made = HostedMessenger(host, identity, limits=limits, security=security)
        self.made.append(made)
        return made  # type: ignore[no-any-return]

    def close(self) -> None:
        for made in reversed(self.made):
            made.close(timeout=0)
        for host in self._hosts:
            assert host.close() == []


@pytest.fixture(params=["thread", "asyncio", "uvloop"])
def driver(request: pytest.FixtureRequest) -> str:
    """What the one body of tests runs on."""
    name: str = request.param
    return name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves event loops out where only threads can do something, and outside of the tests of the transports, which are
    the one body for all drivers; and uvloop on all transports but one, to save time. Skips what replaces a part of the
    core, where that is compiled.
    """
    is_compiled = not wire.__file__.endswith(".py")

    def is_wanted(item: pytest.Item) -> bool:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        name = params.get("driver", "thread")
        is_threads_only = item.get_closest_marker("threads_only") is not None
        is_one_body = item.path.parent.name == "transports" and not is_threads_only
        return name == "thread" or (is_one_body and (name != "uvloop" or params.get("transport") == "tcp"))

    items[:] = [item for item in items if is_wanted(item)]
    for item in items:
        if is_compiled and item.get_closest_marker("replaces_core"):
            item.add_marker(pytest.mark.skip("the core is compiled, so no part of it can be replaced"))


@pytest.fixture
def messenger(driver: str) -> Iterator[MessengerFactory]:
    factory = MessengerFactory(driver)
    yield factory
    factory.close()


@pytest.fixture
def plain_context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    """A ZeroMQ context that the library knows nothing of."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


class PlainPeer:
    """A bare pyzmq socket; what it sends and receives are frames, exactly as they are given."""

    def __init__(self, plain: "zmq.Socket[bytes]") -> None:
        self.socket = plain
        plain.setsockopt(zmq.LINGER, 0)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout: float = TIMEOUT_S) -> list[bytes]:
        assert self.socket.poll(int(timeout * 1000)), f"nothing came within {timeout} s"
        return self.socket.recv_multipart()

    def is_silent(self) -> bool:
        return not self.socket.poll(0)

    def close(self) -> None:
        self.socket.close(linger=0)


class PlainPeers:
    """Makes plain DEALERs and ROUTERs."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._context = context
        # An unclosed socket that is forgotten warns, and then hangs the end of its context.
        self._kept: list[PlainPeer] = []

    def _keep(self, peer: PlainPeer) -> PlainPeer:
        self._kept.append(peer)
        return peer

    def dealer(self, destination: object, routing_id: bytes | None = None, **options: int | bytes) -> PlainPeer:
        """Connects a DEALER to a tcp or ipc endpoint, or to the tcp endpoint of a bare port."""
        dealer = self._context.socket(zmq.DEALER)
        if routing_id is not None:
            dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        for name, value in options.items():
            dealer.setsockopt(getattr(zmq, name), value)
        dealer.connect(plain_endpoint(destination))
        return self._keep(PlainPeer(dealer))

    def router(self, destination: object, **options: int) -> PlainPeer:
        """Binds a ROUTER."""
        router = self._context.socket(zmq.ROUTER)
        for name, value in options.items():
            router.setsockopt(getattr(zmq, name), value)
        router.bind(plain_endpoint(destination))
        return self._keep(PlainPeer(router))


def plain_endpoint(destination: Any) -> str:
    return Destination.parse(destination).endpoints()[-1]


@pytest.fixture
def plain(plain_context: "zmq.Context[zmq.Socket[bytes]]") -> PlainPeers:
    return PlainPeers(plain_context)


@pytest.fixture
def fixed_ports() -> Iterator[None]:
    """Keeps others off the ports that documents and examples name, also the tests of another checkout."""
    with (Path(tempfile.gettempdir()) / "messenger-fixed-ports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
