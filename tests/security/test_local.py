"""A6 and A7: listeners that others could reach by accident; other users of this machine.

What the folder and the lock files do about thieves and links stands in tests/transports/test_destinations.py.
"""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from messenger import DestinationInvalid, KeyPair, Messenger, NotDelivered, Security
from messenger.destination import runtime_folder as messengers_folder
from tests.conftest import MessengerFactory, NewDestination, free_port, wait_until
from tests.security.conftest import SecuredServer, answer, ask

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
STRANGER = 12_345
# Imports first: what is another user's is then all that it can reach.
AS_STRANGER = f"import os, sys, socket, fcntl, zmq; os.setgid({STRANGER}); os.setuid({STRANGER})\n"


@pytest.mark.parametrize("destination", ["tcp://0.0.0.0:0", "tcp://[::]:0", "0.0.0.0:0", "tcp://192.0.2.1:0"])
def test_a_listener_that_others_reach_is_refused_with_what_to_do(messenger: MessengerFactory, destination: str) -> None:
    with pytest.raises(DestinationInvalid) as caught:
        messenger().listen_for_connection(destination, answer)
    for what_to_do in ("Security(key=…, allow=…)", "messenger keygen", "loopback address", "Security(insecure=True)"):
        assert what_to_do in str(caught.value)


def test_with_keys_a_listener_may_be_reached(server: SecuredServer, caplog: pytest.LogCaptureFixture) -> None:
    listener = server.messenger.listen_for_connection("tcp://0.0.0.0:0", answer)
    assert ask(server.client(server.alice), f"tcp://127.0.0.1:{listener.port}") == b"alice said hello"
    with pytest.raises(NotDelivered, match="not on the allow-list"):
        ask(server.client(server.mallory), f"tcp://127.0.0.1:{listener.port}")
    assert not [record for record in caplog.records if "without security" in record.getMessage()]


def test_an_abstract_name_is_refused(messenger: MessengerFactory) -> None:
    for connect in (messenger().make_connection, lambda name: messenger().listen_for_connection(name, answer)):
        with pytest.raises(DestinationInvalid, match="abstract ipc names have no file mode"):
            connect("ipc://@anybody")


def test_the_folder_and_the_sockets_are_ours_alone(messenger: MessengerFactory) -> None:
    messenger().listen_for_connection(free_port(), answer)
    folder = messengers_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir()} == {0o600}


CONNECT = """
path = sys.argv[1]
plain = socket.socket(socket.AF_UNIX)
try:
    plain.connect(path)
    print("connected", len(plain.recv(64)))
except OSError as error:
    print(type(error).__name__)
dealer = zmq.Context().socket(zmq.DEALER)
dealer.linger = 0
dealer.connect("ipc://" + path)
dealer.send_multipart([b"", b"1-1-x"])
print("answered" if dealer.poll(700) else "silent")
"""


@as_root
@pytest.mark.parametrize("is_open", [False, True], ids=["as it is", "with everybody's mode"])
def test_another_user_is_not_let_in(messenger: MessengerFactory, runtime_folder: Path, is_open: bool) -> None:
    """Folder and socket keep it out; if somebody opens both, the uid that the kernel tells still does."""
    server = messenger("server")
    path = runtime_folder / "s"
    server.listen_for_connection(f"ipc://{path}", answer)
    if is_open:
        runtime_folder.chmod(0o777)
        path.chmod(0o777)
    command = [sys.executable, "-c", AS_STRANGER + CONNECT, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    expected = ["connected 0", "silent"] if is_open else ["PermissionError", "silent"]
    assert result.stdout.splitlines() == expected, result.stderr
    assert server.statistics().received_msgs == 0
    assert ask(messenger("ours"), f"ipc://{path}") == b"ours said hello"


PRETEND = """
path = sys.argv[1]
lock = open(path + ".lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
router = zmq.Context().socket(zmq.ROUTER)
router.bind("ipc://" + path)
os.chmod(path, 0o777)
os.chmod(path + ".lock", 0o644)
print("ready", flush=True)
print("got something" if router.poll(1_500) else "got nothing", flush=True)
"""


@pytest.fixture
def pretender(runtime_folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another user who listens at a path, with a lock, as a messenger would."""
    folder = messengers_folder()
    folder.mkdir(parents=True)
    os.chown(folder, STRANGER, STRANGER)
    for above in (runtime_folder, folder):
        above.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", AS_STRANGER + PRETEND, str(folder / "15445.ipc")], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@as_root
def test_another_user_who_listens_in_our_stead_gets_nothing(
    messenger: MessengerFactory, pretender: "subprocess.Popen[str]"
) -> None:
    if pretender.stdout is None:
        raise RuntimeError("there is no pipe")
    assert pretender.stdout.readline() == "ready\n"
    path = messengers_folder() / "15445.ipc"
    client = messenger()
    # A bare port is not taken there ...
    assert client.make_connection(15445).endpoint == "tcp://127.0.0.1:15445"
    # ... and who names the path is told.
    with pytest.raises(NotDelivered, match="the socket is not this user's"):
        ask(client, f"ipc://{path}")
    assert pretender.stdout.readline() == "got nothing\n"


def test_a_socket_that_is_gone_when_it_is_looked_at_is_no_refusal(
    messenger: MessengerFactory, new_destination: NewDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listener has just closed; what waits is for the next one."""
    destination = new_destination("ipc")
    messenger().listen_for_connection(destination, answer)
    gone = [str(destination)]
    lstat = os.lstat

    def look(path: str, **options: Any) -> os.stat_result:
        if gone and path in gone.pop():
            raise FileNotFoundError(path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", look)
    assert ask(messenger("late"), destination) == b"late said hello"
    assert not gone


def test_ipc_and_inproc_need_no_keys_and_cannot_be_reached_with_some(
    server: SecuredServer, new_destination: NewDestination
) -> None:
    """A messenger with keys goes on talking to processes of its own user without them."""
    bob = server.client(server.bob)
    for transport in ("ipc", "inproc"):
        destination = new_destination(transport)
        server.messenger.listen_for_connection(destination, answer)
        assert ask(bob, destination) == b"bob said hello"


def test_a_connection_with_keys_moves_between_transports(server: SecuredServer, messenger: MessengerFactory) -> None:
    """From ipc, without CURVE, to tcp, with it, and to inproc."""
    alice = server.client(server.alice)
    port = free_port()
    with Messenger("other", security=Security(key=server.pair, allow={server.alice.public: "alice"})) as other:
        other.listen_for_connection(f"tcp://127.0.0.1:{port}", answer)
        connection = alice.make_connection(port)
        assert ask(alice, connection) == b"alice said hello"
        assert connection.endpoint.startswith("tcp:")
    wait_until(lambda: not connection.link.is_up)
    listener = server.messenger.listen_for_connection(f"inproc://{port}", answer)
    wait_until(lambda: connection.endpoint.startswith("inproc:"))
    assert ask(alice, connection) == b"alice said hello"
    listener.close()
    other = messenger("third", security=Security(key=server.pair, allow={server.alice.public: "alice"}))
    other.listen_for_connection(f"tcp://127.0.0.1:{port}", answer)
    wait_until(lambda: connection.endpoint.startswith("tcp:"))
    assert ask(alice, connection) == b"alice said hello"


def test_a_key_of_our_own_is_not_a_key_for_the_server(messenger: MessengerFactory) -> None:
    """Our own allow-list says nothing of whom we connect to."""
    pair, other = KeyPair.generate("a"), KeyPair.generate("b")
    both = messenger(security=Security(key=pair, allow={other.public: "b"}, servers=other.public))
    listener = both.listen_for_connection("tcp://127.0.0.1:0", answer)
    with pytest.raises(NotDelivered, match="it probably has not the key"):
        ask(both, listener.destination)
