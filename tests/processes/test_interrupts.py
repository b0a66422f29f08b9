"""Ctrl-C at any instant (FACTS F18): it is raised at once, and leaves every messenger whole."""

import pytest

from tests.processes.programs import running

# The main thread works until it is interrupted, again and again, by a thread that plays the terminal.
INTERRUPTED = """
import random, signal, sys, threading, time
from messenger import Messenger
way, count = sys.argv[1], int(sys.argv[2])
main = threading.main_thread().ident
told, begun, sent, slowest, sent_at, tick_count = [], [], 0, 0, 0, 0

def ask(client, connection):
    while True:
        client.request(connection, b"asked", timeout=5)

def send(client, connection):
    global sent
    while True:
        client.send_message(connection, b"sent", told.append, on_error=told.append)
        sent += 1

def wait(client, connection):
    global sent
    while True:
        message_id = client.send_message(connection, b"sent", tell, on_error=tell)
        sent += 1
        client.wait(message_id)

def tell(outcome):
    begun.append(outcome)
    time.sleep(0)
    told.append(outcome)

def count_up(client, connection):
    while True:
        client.statistics()

def tick():
    # A clock that stands still while the machine does.
    global tick_count
    while True:
        time.sleep(0.01)
        tick_count += 1

def interrupt():
    global sent_at
    rng = random.Random()
    for _ in range(count):
        due.acquire()
        time.sleep(rng.random() * 0.003)
        sent_at = tick_count
        signal.pthread_kill(main, signal.SIGINT)

with Messenger("server") as server, Messenger("client") as client:
    listener = server.listen_for_connection("tcp://127.0.0.1:0", lambda message: message.reply(message.contents))
    connection = client.make_connection(listener.endpoints[0])
    due = threading.Semaphore(0)
    threading.Thread(target=interrupt, daemon=True).start()
    threading.Thread(target=tick, daemon=True).start()
    for number in range(count):
        due.release()
        try:
            {"ask": ask, "send": send, "wait": wait, "count_up": count_up}[way](client, connection)
        except KeyboardInterrupt:
            slowest = max(slowest, tick_count - sent_at)
        assert client.request(connection, b"%d" % number, timeout=10).contents == b"%d" % number
# A message whose `send_message` was interrupted may have been sent as well.
is_told = sent <= len(told) <= sent + count and len(begun) in (0, len(told))
print(slowest < 100, is_told, all(answer.contents == b"sent" for answer in told))
"""


@pytest.mark.parametrize(("way", "count"), [("ask", 500), ("send", 100), ("wait", 500), ("count_up", 50)])
def test_the_messenger_works_on(way: str, count: int) -> None:
    with running(INTERRUPTED, way, count) as program:
        assert program.read_line() == "True True True"
        status, _, err = program.wait()
    assert (status, err) == (0, "")


HANDLERS = """
import signal, sys, threading
from messenger import Messenger
def keep(number, frame):
    print("mine", flush=True)
def begin():
    Messenger("one").__enter__()
if sys.argv[1] == "own":
    signal.signal(signal.SIGINT, keep)
    begin()
elif sys.argv[1] == "thread":
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
else:
    begin()
expected = {"own": keep, "thread": signal.default_int_handler}.get(sys.argv[1])
print(signal.getsignal(signal.SIGINT) is expected, flush=True)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("raised", flush=True)
"""


@pytest.mark.parametrize(
    ("way", "expected"),
    [("own", ["True", "mine"]), ("thread", ["True", "raised"]), ("main", ["False", "raised"])],
)
def test_only_the_handler_of_python_is_replaced(way: str, expected: list[str]) -> None:
    with running(HANDLERS, way) as program:
        assert [program.read_line(), program.read_line()] == expected
        status, _, err = program.wait()
    assert (status, err) == (0, "")
