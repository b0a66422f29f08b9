"""Who listens where: bare ports on three transports, destinations in use, stale files, addresses that are refused."""

import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zmq

from messenger import (
    DeliveryError,
    Destination,
    DestinationInUse,
    DestinationInvalid,
    Listener,
    Message,
    Messenger,
    NotDelivered,
    Security,
)
from messenger.transports.local import IpcLock, is_deserted
from messenger.transports.sockets import context
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    NewDestination,
    PlainPeers,
    contents_of,
    free_port,
    is_port_free,
    wait_event,
    wait_until,
)

To = str | int


def answer(message: Message) -> None:
    message.reply(b"answer to " + message.contents)


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


PROGRAM_SERVE = """
import sys
from messenger import Messenger
messenger = Messenger("server")
destination = sys.argv[1]
listener = messenger.listen_for_connection(destination, lambda message: message.reply(message.link.link.endpoint))
print(listener.destination, flush=True)
sys.stdin.read()
messenger.close()
"""
PROGRAM_ASK = """
import sys
from messenger import Messenger
with Messenger() as messenger:
    print(messenger.request(sys.argv[1], b"", timeout=10).contents.decode())
"""


class Server:
    """A process that listens, and answers with the endpoint by which the message came."""

    def __init__(self, destination: To) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM_SERVE, str(destination)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.destination = self.process.stdout.readline().strip()
        assert self.destination, "the server process did not start"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        with self.process:
            pass

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def ask_in_a_process(destination: To) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM_ASK, str(destination)], capture_output=True, text=True, timeout=30, check=True
    )
    return finished.stdout.strip()


def serve_endpoint(message: Message) -> None:
    message.reply(message.link.link.endpoint)  # type: ignore[attr-defined]


def ask_until(client: Messenger, destination: To, *transports: str) -> None:
    """Asks until the answer comes by one of the transports; what is under way when a link breaks is lost."""

    def answers() -> bool:
        try:
            return client.request(destination, b"", timeout=0.5).contents.decode().partition(":")[0] in transports
        except DeliveryError:
            return False

    wait_until(answers)


# Bare ports.


def test_bare_port_listens_on_three_transports(messenger: MessengerFactory, runtime_folder: Path) -> None:
    port = free_port()
    server = messenger()
    listener = server.listen_for_connection(port, serve_endpoint)
    endpoints = [f"inproc://{port}", f"ipc://{runtime_folder}/messenger/{port}.ipc", f"tcp://127.0.0.1:{port}"]
    assert listener.endpoints == endpoints
    assert listener.port == port
    for endpoint in endpoints:
        assert messenger().request(endpoint, b"").contents == endpoint.encode()
    assert stat.S_IMODE((runtime_folder / "messenger").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["{}", "127.0.0.1:{}", "localhost:{}"])
def test_sender_in_the_same_process_picks_inproc(messenger: MessengerFactory, name: str) -> None:
    port = free_port()
    messenger().listen_for_connection(port, serve_endpoint)
    client = messenger()
    assert client.request(name.format(port), b"").contents == f"inproc://{port}".encode()
    assert client.make_connection(name.format(port)).endpoint == f"inproc://{port}"


def test_sender_in_another_process_picks_ipc(messenger: MessengerFactory, runtime_folder: Path) -> None:
    port = free_port()
    messenger().listen_for_connection(port, serve_endpoint)
    assert ask_in_a_process(port) == f"ipc://{runtime_folder}/messenger/{port}.ipc"


def test_sender_picks_tcp_where_there_is_nothing_else(messenger: MessengerFactory) -> None:
    port = free_port()
    messenger().listen_for_connection(f"tcp://127.0.0.1:{port}", serve_endpoint)
    assert messenger().request(port, b"").contents == f"tcp://127.0.0.1:{port}".encode()
    assert ask_in_a_process(port) == f"tcp://127.0.0.1:{port}"


def test_sender_picks_tcp_where_the_runtime_folder_is_another(
    messenger: MessengerFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = free_port()
    messenger().listen_for_connection(port, serve_endpoint)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert ask_in_a_process(port) == f"tcp://127.0.0.1:{port}"


def test_connection_follows_a_component_into_another_process_and_back(messenger: MessengerFactory) -> None:
    port = free_port()
    client = messenger()
    for _ in range(2):
        server = messenger()
        server.listen_for_connection(port, serve_endpoint)
        ask_until(client, port, "inproc")
        server.close()
        with Server(port):
            ask_until(client, port, "tcp", "ipc")
        # Whoever comes back before it is noticed that the other one has gone is reached as that one was.
        with pytest.raises(DeliveryError):
            client.request(port, b"", timeout=0.5)
    assert client.statistics().connection_count == 1


def test_connection_that_was_made_before_the_listener(messenger: MessengerFactory) -> None:
    port = free_port()
    client = messenger()
    connection = client.make_connection(port)
    with Server(port):
        assert client.request(connection, b"").contents == f"tcp://127.0.0.1:{port}".encode()


def test_listener_starts_a_conversation_on_each_transport(messenger: MessengerFactory, plain: PlainPeers) -> None:
    """The peers of one bare port are spread over its three sockets."""
    port = free_port()
    server = messenger("server")
    hellos: Inbox[Message] = Inbox()
    listener = server.listen_for_connection(port, hellos)
    inproc: Inbox[Message] = Inbox()
    client = messenger("by inproc")
    client.send_message(client.make_connection(port, callback=inproc), b"hello")
    dealers = {}
    for endpoint in listener.endpoints[1:]:
        name = f"by {endpoint[:3]}"
        dealers[name] = plain.dealer(endpoint, name.encode())
        dealers[name].send(b"", b"0-0-hello")
    hellos.wait(3)
    server.send_message((listener, "by inproc"), b"hello you")
    assert contents_of(inproc.wait()) == [b"hello you"]
    responses: Inbox[Message] = Inbox()
    for name, dealer in dealers.items():
        server.send_message((listener, name), name, responses)
        identity, empty, data = dealer.receive()
        assert (identity, empty) == (b"server", b"")
        source, dest, contents = data.split(b"-")
        assert (dest, contents) == (b"0", name.encode())
        dealer.send(b"", b"0-" + source + b"-yes")
    assert contents_of(responses.wait(2)) == [b"yes", b"yes"]
    with pytest.raises(NotDelivered):
        server.request((listener, "nobody"), b"")


@pytest.mark.parametrize("name", ["inproc://{port}", "ipc://{folder}/messenger/{port}.ipc", "tcp://127.0.0.1:{port}"])
def test_bare_port_and_its_endpoints_named_singly(messenger: MessengerFactory, runtime_folder: Path, name: str) -> None:
    """Two connections that end at one socket show it two routing ids, however they are named."""
    port = free_port()
    messenger().listen_for_connection(port, answer)
    client = messenger("client")
    single = client.make_connection(name.format(port=port, folder=runtime_folder))
    bare = client.make_connection(port)
    for _ in range(3):
        for connection in (single, bare):
            assert client.request(connection, b"x", timeout=2).contents == b"answer to x"


# Port 0.


@pytest.mark.parametrize("destination", [0, "0", "127.0.0.1:0", "localhost:0"])
def test_port_0_takes_a_free_port(messenger: MessengerFactory, destination: To) -> None:
    server = messenger()
    listeners = [server.listen_for_connection(destination, serve_endpoint) for _ in range(3)]
    assert len({listener.port for listener in listeners} - {0}) == 3
    for listener in listeners:
        assert [endpoint.partition(":")[0] for endpoint in listener.endpoints] == ["inproc", "ipc", "tcp"]
        assert messenger().request(listener.port, b"").contents == f"inproc://{listener.port}".encode()
        assert str(listener.destination) == str(listener.port)


def test_port_0_of_tcp(messenger: MessengerFactory) -> None:
    listener = messenger().listen_for_connection("tcp://127.0.0.1:0", serve_endpoint)
    assert listener.endpoints == [f"tcp://127.0.0.1:{listener.port}"]
    assert messenger().request(listener.destination, b"").contents == listener.endpoints[0].encode()


@pytest.mark.parametrize("destination", [0, "tcp://127.0.0.1:0"])
def test_port_0_is_only_for_listeners(messenger: MessengerFactory, destination: To) -> None:
    client = messenger()
    for call in (lambda: client.make_connection(destination), lambda: client.send_message(destination, b"")):
        with pytest.raises(DestinationInvalid, match="port 0"):
            call()
    assert client.statistics().connection_count == 0


# In use.


def assert_serves(client: Messenger, listener: Listener) -> None:
    for endpoint in listener.endpoints:
        assert client.request(endpoint, b"x").contents == b"answer to x"


@pytest.mark.parametrize("same_messenger", [True, False])
def test_destination_in_use(messenger: MessengerFactory, destination: To, same_messenger: bool) -> None:
    server, client = messenger(), messenger()
    other = server if same_messenger else messenger()
    listener = server.listen_for_connection(destination, answer)
    other.listen_for_connection("inproc://elsewhere", answer)
    for _ in range(3):
        with pytest.raises(DestinationInUse):
            other.listen_for_connection(destination, None)
    assert other.statistics().listener_count == (2 if same_messenger else 1)
    assert_serves(client, listener)
    assert client.request("inproc://elsewhere", b"y").contents == b"answer to y"
    listener.close()
    listener = other.listen_for_connection(destination, answer)
    assert_serves(messenger(), listener)


def test_destination_in_use_by_another_process(messenger: MessengerFactory, destination: To, transport: str) -> None:
    if transport == "inproc":
        # Inproc names are of one process, so there both may have it.
        with Server(destination):
            assert_serves(messenger(), messenger().listen_for_connection(destination, answer))
        return
    server, client = messenger(), messenger()
    with Server(destination):
        with pytest.raises(DestinationInUse):
            server.listen_for_connection(destination, answer)
        assert client.request(destination, b"").contents != b"answer to "
    listener = server.listen_for_connection(destination, answer)
    assert_serves(messenger(), listener)


@pytest.mark.parametrize("taken", ["inproc://{port}", "ipc://{folder}/messenger/{port}.ipc", "tcp://127.0.0.1:{port}"])
def test_bare_port_of_which_one_transport_is_in_use(
    messenger: MessengerFactory, runtime_folder: Path, taken: str
) -> None:
    """Nothing is left open of the other two."""
    port = free_port()
    folder = runtime_folder / "messenger"
    folder.mkdir(mode=0o700)
    server, other = messenger(), messenger()
    holder = server.listen_for_connection(taken.format(port=port, folder=runtime_folder), answer)
    with pytest.raises(DestinationInUse):
        other.listen_for_connection(port, answer)
    assert other.statistics().listener_count == 0
    assert_serves(messenger(), holder)
    assert is_port_free(port) == (not taken.startswith("tcp:"))
    assert (folder / f"{port}.ipc").exists() == taken.startswith("ipc:")
    holder.close()
    assert_serves(messenger(), other.listen_for_connection(port, answer))


def test_tcp_port_of_another_program(messenger: MessengerFactory) -> None:
    port = free_port()
    server = messenger()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        for destination in (port, f"tcp://127.0.0.1:{port}"):
            with pytest.raises(DestinationInUse, match=str(port)):
                server.listen_for_connection(destination, None)
    server.listen_for_connection(port, None)


def test_failed_listen_leaves_no_descriptor(messenger: MessengerFactory, runtime_folder: Path) -> None:
    port = free_port()
    server, other = messenger(), messenger()
    server.listen_for_connection(f"inproc://{port}", answer)
    other.listen_for_connection("inproc://elsewhere", None)

    def fail() -> None:
        with pytest.raises(DestinationInUse):
            other.listen_for_connection(port, answer)

    fail()
    # libzmq keeps a socket's descriptors for the moment that its own threads need to let go.
    before = descriptor_count()
    for _ in range(20):
        fail()
    wait_until(lambda: descriptor_count() <= before)


# Files of ipc.


def test_stale_files_of_a_killed_process(messenger: MessengerFactory, runtime_folder: Path) -> None:
    port = free_port()
    path = runtime_folder / "messenger" / f"{port}.ipc"
    with Server(port) as server:
        server.kill()
    assert path.is_socket()
    # A sender must not pick the dead path.
    assert messenger().make_connection(port).endpoint == f"tcp://127.0.0.1:{port}"
    listener = messenger().listen_for_connection(port, answer)
    assert_serves(messenger(), listener)
    listener.close()
    assert not path.exists()


def test_stale_file_at_a_path_of_the_user(messenger: MessengerFactory, runtime_folder: Path) -> None:
    destination = f"ipc://{runtime_folder}/mine"
    with Server(destination) as server:
        server.kill()
    assert (runtime_folder / "mine").is_socket()
    assert_serves(messenger(), messenger().listen_for_connection(destination, answer))


@pytest.mark.parametrize("kind", ["file", "folder", "symlink", "dangling symlink"])
def test_what_is_no_socket_is_never_removed(messenger: MessengerFactory, runtime_folder: Path, kind: str) -> None:
    path, target = runtime_folder / "mine", runtime_folder / "target"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "symlink":
            target.write_text("precious")
        path.symlink_to(target)
    server = messenger()
    with pytest.raises(DestinationInvalid, match="no socket"):
        server.listen_for_connection(f"ipc://{path}", answer)
    assert path.is_symlink() == kind.endswith("symlink")
    if kind in ("file", "symlink"):
        assert path.read_text() == "precious"
    assert target.exists() == (kind == "symlink")
    other = server.listen_for_connection(f"ipc://{path}2", answer)
    assert_serves(messenger(), other)


def test_lock_file_that_is_a_symlink(messenger: MessengerFactory, runtime_folder: Path) -> None:
    target = runtime_folder / "target"
    (runtime_folder / "mine.lock").symlink_to(target)
    with pytest.raises(DestinationInvalid, match="lock"):
        messenger().listen_for_connection(f"ipc://{runtime_folder}/mine", answer)
    assert not target.exists()


def test_socket_file_is_for_its_user_only(messenger: MessengerFactory, runtime_folder: Path) -> None:
    messenger().listen_for_connection(f"ipc://{runtime_folder}/mine", answer)
    assert stat.S_IMODE((runtime_folder / "mine").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["open to others", "symlink", "file"])
def test_runtime_folder_must_be_ours_alone(messenger: MessengerFactory, runtime_folder: Path, kind: str) -> None:
    folder = runtime_folder / "messenger"
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    elif kind == "file":
        folder.touch()
    else:
        (runtime_folder / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(runtime_folder / "elsewhere")
    port = free_port()
    server = messenger()
    with pytest.raises(DestinationInvalid, match=str(folder)):
        server.listen_for_connection(port, answer)
    assert is_port_free(port)
    assert server.statistics().listener_count == 0


def test_folder_that_does_not_exist(messenger: MessengerFactory, runtime_folder: Path) -> None:
    with pytest.raises(DestinationInvalid, match="does not exist"):
        messenger().listen_for_connection(f"ipc://{runtime_folder}/no/such", answer)
    assert not (runtime_folder / "no").exists()


def test_path_that_is_too_long(messenger: MessengerFactory, runtime_folder: Path) -> None:
    one = messenger()
    path = f"{runtime_folder}/".ljust(107, "x")
    assert_serves(one, one.listen_for_connection(f"ipc://{path}", answer))
    with pytest.raises(DestinationInvalid, match="108 bytes"):
        one.listen_for_connection(f"ipc://{path}x", answer)


def test_sender_that_looks_does_not_hinder_a_listener(messenger: MessengerFactory, runtime_folder: Path) -> None:
    """A sender that looks whether somebody listens holds a shared lock for a moment."""
    port = free_port()
    server = messenger()
    server.listen_for_connection(port, answer).close()
    stop = threading.Event()
    failures: list[Exception] = []

    def look() -> None:
        client = messenger()
        while not stop.is_set():
            client.make_connection(port).close()

    senders = [threading.Thread(target=look) for _ in range(2)]
    for sender in senders:
        sender.start()
    for _ in range(100):
        try:
            server.listen_for_connection(f"ipc://{runtime_folder}/messenger/{port}.ipc", answer).close()
        except DestinationInUse as error:
            failures.append(error)
    stop.set()
    for sender in senders:
        sender.join(TIMEOUT_S)
    assert not failures


def test_sender_that_is_stopped_while_it_looks(messenger: MessengerFactory, runtime_folder: Path) -> None:
    """The same, without chance: the shared lock is held by hand until the listener has met it."""
    lock_path = runtime_folder / "mine.lock"
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    released = threading.Event()

    def release() -> None:
        os.close(descriptor)
        released.set()

    fcntl.flock(descriptor, fcntl.LOCK_SH)
    timer = threading.Timer(0.05, release)
    timer.start()
    assert_serves(messenger(), messenger().listen_for_connection(f"ipc://{runtime_folder}/mine", answer))
    wait_event(released)


# Addresses.


@pytest.mark.parametrize(
    "destination",
    ["tcp://0.0.0.0:{}", "0.0.0.0:{}", "tcp://[::]:{}", "tcp://*:{}", "tcp://192.0.2.1:{}", "tcp://eth0:{}"],
)
def test_listener_that_others_could_reach_is_refused(messenger: MessengerFactory, destination: str) -> None:
    port = free_port()
    server = messenger()
    with pytest.raises(DestinationInvalid, match="insecure"):
        server.listen_for_connection(destination.format(port), answer)
    assert is_port_free(port)
    assert server.statistics().listener_count == 0


def test_listener_that_others_may_reach(messenger: MessengerFactory, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    server = messenger(security=Security(insecure=True))
    server.listen_for_connection(f"tcp://0.0.0.0:{port}", answer)
    assert "without security" in caplog.text
    assert messenger().request(f"tcp://127.0.0.1:{port}", b"").contents == b"answer to "


def test_ipv6(messenger: MessengerFactory) -> None:
    server = messenger()
    try:
        listener = server.listen_for_connection("tcp://[::1]:0", answer)
    except DestinationInvalid:
        pytest.skip("this machine has no IPv6")
    assert messenger().request(f"tcp://[::1]:{listener.port}", b"").contents == b"answer to "


def test_address_of_another_machine_cannot_be_bound(messenger: MessengerFactory) -> None:
    server = messenger(security=Security(insecure=True))
    with pytest.raises(DestinationInvalid, match=r"192\.0\.2\.1"):
        server.listen_for_connection("tcp://192.0.2.1:15445", answer)


def test_inproc_reaches_a_socket_of_the_same_context(
    messenger: MessengerFactory, new_destination: NewDestination
) -> None:
    """A plain socket of the library's own context takes part over inproc too."""
    destination = str(new_destination("inproc"))
    messenger("server").listen_for_connection(destination, answer)
    with context().socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(destination)
        dealer.send_multipart([b"", b"7-0-x"])
        assert dealer.poll(int(TIMEOUT_S * 1000))
        assert dealer.recv_multipart() == [b"server", b"", b"0-7-answer to x"]


def test_equal_destinations_share_one_connection(messenger: MessengerFactory) -> None:
    port = free_port()
    messenger().listen_for_connection(port, answer)
    client = messenger()
    for name in (port, str(port), f"127.0.0.1:{port}", f"localhost:{port}", Destination.parse(port)):
        client.request(name, b"")
    assert client.statistics().connection_count == 1


def test_nobody_is_thought_to_have_ended_when_no_descriptor_is_left(tmp_path: Path) -> None:
    lock = IpcLock(tmp_path / "x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    nobody = f"tcp://127.0.0.1:{free_port()}"
    assert is_deserted(nobody)
    try:
        # No new descriptor has a number this low.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        assert not is_deserted(f"ipc://{tmp_path / 'x'}")
        assert not is_deserted(nobody)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        lock.release()
    assert is_deserted(nobody)
    assert is_deserted(f"ipc://{tmp_path / 'x'}")
