"""Either end is killed at named points of one message's way (FACTS F1 and F2); a receiver's effects are in a database.

The points are planted in the child's program, which kills itself there; the product knows nothing of them.
"""

import sqlite3
from pathlib import Path

import pytest

from messenger import DeliveryError, Message, OutcomeUnknown
from tests.conftest import TIMEOUT_S, Inbox, MessengerFactory, free_port
from tests.processes.programs import ASK, running

# Has one effect for each message's contents, in a transaction, and notes each run beside it, committed at once.
SERVER = """
import os, signal, sqlite3, struct, sys, time
from messenger import Messenger
from messenger.exchange import Exchange
from messenger.handshake import Handshake
from messenger.transports.zeromq import SocketLink

port, path, point = sys.argv[1:]
has_run = False

def die_at(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

def plant(kind, name, before):
    real = getattr(kind, name)
    def wrapper(self, *arguments):
        before(*arguments)
        return real(self, *arguments)
    setattr(kind, name, wrapper)

def on_frame(link, routing_id, frame, *rest):
    if b"victim" in frame:
        die_at("before the callback")

def on_flush(now):
    if has_run:
        die_at("after the callback")

def on_send(routing_id, frames):
    if b"done victim" in frames[0]:
        die_at("before the answer")
    # A DATA frame; the warm-up was message 1, so this acknowledges the victim as processed.
    elif frames[0][2] == 4 and struct.unpack_from("<Q", frames[0], 36)[0] == 2:
        time.sleep(0.2)  # ZeroMQ's own thread has sent the answer.
        die_at("between the answer and the acknowledgement")

plant(Handshake, "receive", on_frame)
plant(Exchange, "flush", on_flush)
plant(SocketLink, "send_frames", on_send)

def work(message):
    global has_run
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("INSERT INTO runs VALUES (?, ?, ?)", (message.contents, os.getpid(), message.redelivered))
    is_victim = message.contents == b"victim"
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT OR IGNORE INTO effects VALUES (?)", (message.contents,))
    if is_victim:
        die_at("in the callback, before the commit")
    database.execute("COMMIT")
    database.close()
    if is_victim:
        die_at("in the callback, after the commit")
    message.reply(b"done " + message.contents)
    has_run = is_victim

server = Messenger("server")
# What a worker answers leaves at once; on the loop's own thread the acknowledgement may travel with it.
server.listen_for_connection(int(port), work, workers=int("between" in point))
print("ready", flush=True)
sys.stdin.read()
"""

# With each: whether the callback has begun, whether its effect is committed, and whether the answer has left.
POINTS = {
    "before the callback": (False, False, False),
    "in the callback, before the commit": (True, False, False),
    "in the callback, after the commit": (True, True, False),
    "after the callback": (True, True, False),
    "before the answer": (True, True, False),
    "between the answer and the acknowledgement": (True, True, True),
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "effects.db"
    made = sqlite3.connect(path)
    made.execute("CREATE TABLE runs (contents, pid, redelivered)")
    made.execute("CREATE TABLE effects (contents UNIQUE)")
    made.commit()
    made.close()
    return path


def read(path: Path, query: str) -> list[tuple[object, ...]]:
    opened = sqlite3.connect(path)
    try:
        return opened.execute(query).fetchall()
    finally:
        opened.close()


def effect_count(path: Path) -> int:
    return len(read(path, "SELECT * FROM effects WHERE contents = CAST('victim' AS BLOB)"))


VICTIM_RUNS = "SELECT pid, redelivered FROM runs WHERE contents = CAST('victim' AS BLOB) ORDER BY rowid"


@pytest.mark.parametrize("redeliver", [False, True], ids=["once", "redelivered"])
@pytest.mark.parametrize("point", POINTS)
def test_receiver_dies(messenger: MessengerFactory, database: Path, point: str, redeliver: bool) -> None:
    """Without an answer the outcome is unknown, and the successor runs it only if that was asked for."""
    has_begun, has_effect, has_answered = POINTS[point]
    port = free_port()
    client = messenger("client")
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    with running(SERVER, port, database, point) as server:
        assert server.read_line() == "ready"
        assert client.request(port, b"warm-up").contents == b"done warm-up"
        client.send_message(port, b"victim", responses, on_error=errors, redeliver=redeliver)
        # It was killed there, and not by us.
        assert server.process.wait(TIMEOUT_S) == -9
        first_pid = server.pid
    assert effect_count(database) == has_effect
    first_runs = [(first_pid, 0)] if has_begun else []
    assert read(database, VICTIM_RUNS) == first_runs
    with running(SERVER, port, database, "nowhere") as successor:
        assert successor.read_line() == "ready"
        assert client.request(port, b"after", timeout=TIMEOUT_S).contents == b"done after"
        if has_answered:
            assert [response.contents for response in responses.wait()] == [b"done victim"]
            assert read(database, VICTIM_RUNS) == first_runs
            assert effect_count(database) == 1
        elif redeliver:
            assert [response.contents for response in responses.wait()] == [b"done victim"]
            assert read(database, VICTIM_RUNS) == [*first_runs, (successor.pid, 1)]
            assert effect_count(database) == 1
        else:
            assert [type(error) for error in errors.wait()] == [OutcomeUnknown]
            assert read(database, VICTIM_RUNS) == first_runs
            assert effect_count(database) == has_effect
    assert len(responses) + len(errors) == 1


@pytest.mark.parametrize("redeliver", [False, True], ids=["once", "redelivered"])
def test_receiver_dies_after_the_acknowledgement(messenger: MessengerFactory, database: Path, redeliver: bool) -> None:
    """The response is the outcome; nothing of it is told again, or given to the successor."""
    port = free_port()
    client = messenger("client")
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    with running(SERVER, port, database, "nowhere") as server:
        assert server.read_line() == "ready"
        client.send_message(port, b"victim", responses, on_error=errors, redeliver=redeliver)
        responses.wait()
        server.kill()
    with running(SERVER, port, database, "nowhere") as successor:
        assert successor.read_line() == "ready"
        assert client.request(port, b"after", timeout=TIMEOUT_S).contents == b"done after"
    assert read(database, VICTIM_RUNS) == [(server.pid, 0)]
    assert (effect_count(database), len(responses), len(errors)) == (1, 1, 0)


# The sender; it asks twice, so that the session stands when the victim leaves.
CLIENT = """
import os, signal, sys, time
from messenger import Messenger
from messenger.handshake import Handshake
from messenger.transports.zeromq import SocketLink

port, point = sys.argv[1:]

def die_at(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

real_send = SocketLink.send_frames
def send_frames(link, routing_id, frames):
    is_victim = b"victim" in frames[0]
    if is_victim:
        die_at("before it leaves")
    has_left = real_send(link, routing_id, frames)
    if is_victim:
        time.sleep(0.2)  # ZeroMQ's own thread has sent it.
        die_at("after it has left")
    return has_left
SocketLink.send_frames = send_frames

real_receive = Handshake.receive
def receive(handshake, link, routing_id, frame, *rest):
    if b"done victim" in frame:
        die_at("before the response is taken")
    real_receive(handshake, link, routing_id, frame, *rest)
Handshake.receive = receive

client = Messenger("client")
client.request(int(port), b"warm-up")
client.send_message(int(port), b"victim", lambda response: die_at("in the callback"))
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("point", "has_run"),
    [
        ("before it leaves", False),
        ("after it has left", True),
        ("before the response is taken", True),
        ("in the callback", True),
    ],
)
def test_sender_dies(messenger: MessengerFactory, point: str, has_run: bool) -> None:
    """What it sent runs once or not at all, nothing is left of it, and its identity is served again at once."""
    port = free_port()
    server = messenger("server")
    received: Inbox[bytes] = Inbox()
    answered: Inbox[str] = Inbox()

    def work(message: Message) -> None:
        received(message.contents)
        # Who is gone gets no answer, and the answerer is told so.
        message.reply(b"done " + message.contents, on_error=lambda error: answered(type(error).__name__), timeout=2)

    server.listen_for_connection(port, work)
    with running(CLIENT, port, point) as client:
        assert client.process.wait(TIMEOUT_S) == -9
    with running(ASK, port, "client") as successor:
        assert successor.read_line() == "done x"
    assert received.wait(2 + has_run) == [b"warm-up", *[b"victim"] * has_run, b"x"]
    # Nobody answers the answers, so each of them ends.
    assert set(answered.wait(2 + has_run)) <= {"OutcomeUnknown", "NotDelivered", "NoHandler"}
    counts = server.statistics()
    assert (counts.queued_msgs, counts.outstanding_msgs) == (0, 0)
