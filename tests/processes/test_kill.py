"""Processes that are killed, stopped, and started again (FACTS F1 to F4 and F7)."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from messenger import ECHO, DeliveryError, Message, NotDelivered, OutcomeUnknown
from tests.conftest import (
    TIMEOUT_S,
    Inbox,
    MessengerFactory,
    contents_of,
    dropped,
    free_port,
    quickest,
    wait_event,
    wait_until,
)
from tests.processes.programs import ASK, HOLD, SERVE, running

KILLS = 20
IDENTITY_RESTARTS = 30


def test_server_is_killed_again_and_again(messenger: MessengerFactory) -> None:
    """Every message has exactly one outcome, and only what was sent to a process that died is unknown."""
    port = free_port()
    client = messenger("client")
    outcomes: Inbox[tuple[int, str]] = Inbox()
    stop = threading.Event()
    sent_count = 0

    def send() -> None:
        nonlocal sent_count
        for number in itertools.count():
            if stop.is_set():
                break

            def on_response(response: Message, number: int = number) -> None:
                outcomes((number, "response" if response.contents.endswith(b" %d" % number) else "a wrong one"))

            def on_error(error: DeliveryError, number: int = number) -> None:
                outcomes((number, type(error).__name__))

            client.send_message(port, b"%d" % number, on_response, on_error=on_error, timeout=5)
            sent_count = number + 1
            # At most 200 are open, so that each restart finds some of them queued and some under way.
            while sent_count - len(outcomes) > 200 and not stop.is_set():
                outcomes.wait(sent_count - 200)

    sender = threading.Thread(target=send)
    sender.start()
    pids = set()
    try:
        for _ in range(KILLS):
            with running(SERVE, port) as server:
                assert server.read_line() == "ready"
                # From the new process, as those that were queued go there.
                pid = int(client.request(port, b"whose", timeout=TIMEOUT_S).contents.split()[0])
                assert pid == server.pid
                pids.add(pid)
                served_count = len(outcomes)
                outcomes.wait(served_count + 50)
                server.kill()
    finally:
        stop.set()
        sender.join(TIMEOUT_S)
    assert len(pids) == KILLS
    told = outcomes.wait(sent_count, timeout=15)
    assert sorted(number for number, _ in told) == list(range(sent_count))
    kinds = {kind for _, kind in told}
    assert kinds <= {"response", "OutcomeUnknown", "NotDelivered"}
    assert "response" in kinds
    assert client.statistics().outstanding_msgs == 0


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_what_a_killed_process_had_is_unknown_at_once(
    messenger: MessengerFactory, tmp_path: Path, transport: str, never: Inbox[object]
) -> None:
    """And not at its deadline. What may run twice waits for the next process."""
    place = f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else f"ipc://{tmp_path}/server"
    client = messenger("client")
    errors: Inbox[DeliveryError] = Inbox()
    responses: Inbox[Message] = Inbox()
    with running(HOLD, place) as server:
        assert server.read_line() == "ready"
        client.send_message(place, b"held", on_error=errors, timeout=60)
        client.send_message(place, b"again", responses, on_error=never, redeliver=True, timeout=60)
        assert [server.read_line(), server.read_line()] == ["held", "again"]
        server.kill()
        [error] = errors.wait(1)
    assert type(error) is OutcomeUnknown
    assert "the process there has ended" in str(error)
    with running(SERVE, place):
        assert responses.wait(1, timeout=10)[0].contents.endswith(b"again")


def test_one_identity_is_killed_and_started_again(messenger: MessengerFactory) -> None:
    """No peer is ever mute: each process of the identity is served, however the one before has ended."""
    port = free_port()
    server = messenger("server")
    received: Inbox[Message] = Inbox()

    def answer(message: Message) -> None:
        received(message)
        message.reply(b"served")

    server.listen_for_connection(port, answer)
    with running(ASK, port, "phoenix") as first:
        assert first.read_line() == "served"
        first.kill()
    for number in range(IDENTITY_RESTARTS - 1):
        with running(ASK, port, "phoenix") as program:
            assert program.read_line() == "served", number
            program.kill()
    assert {message.sender for message in received.wait(IDENTITY_RESTARTS)} == {"phoenix"}
    assert len(received) == IDENTITY_RESTARTS


def test_two_living_processes_of_one_identity(messenger: MessengerFactory) -> None:
    """The newcomer is refused loudly and the first one stays; when it is killed, the identity is free."""
    port = free_port()
    server = messenger("server")
    server.listen_for_connection(port, lambda message: message.reply(b"served"))
    with running(ASK, port, "twin") as first:
        assert first.read_line() == "served"
        with running(ASK, port, "twin") as second:
            status, _, err = second.wait()
        assert status == 1
        assert "IdentityInUse" in err
        assert dropped(server, "identity_in_use") >= 1
        first.kill()
    with running(ASK, port, "twin") as third:
        assert third.read_line() == "served"


# Sends numbered messages without a callback as fast as it can, until it is killed.
FLOOD = """
import sys
from messenger import Messenger
client = Messenger("flood")
print("ready", flush=True)
number = 0
while True:
    client.send_message(int(sys.argv[1]), b"%d" % number, timeout=60)
    number += 1
"""


def test_sender_is_killed_in_the_middle(messenger: MessengerFactory) -> None:
    """What arrived is a start without gaps of what was sent, and the next process of the identity begins anew."""
    port = free_port()
    server = messenger("server")
    received: Inbox[bytes] = Inbox()
    server.listen_for_connection(port, lambda message: received(message.contents))
    for _ in range(3):
        before_count = len(received)
        with running(FLOOD, port) as sender:
            received.wait(before_count + 2_000)
            sender.kill()
        # The echo comes behind all that the dead one's socket still held.
        with running(ASK.replace('b"x"', 'b"end", remote_callback=1'), port, "flood") as last:
            assert last.read_line() == "end"
        wait_until(lambda: received.wait(0)[-1] == b"end")
        *contents, end = received.wait(0)[before_count:]
        assert end == b"end"
        assert contents == [b"%d" % number for number in range(len(contents))]
    assert server.statistics().queued_msgs == 0


def test_stopped_server_goes_on(messenger: MessengerFactory) -> None:
    """SIGSTOP: short deadlines end as `OutcomeUnknown`, long ones get their answer after SIGCONT, none runs twice."""
    port = free_port()
    client = messenger("client")
    with running(SERVE, port) as server:
        server.read_line()
        assert client.request(port, b"before").contents.endswith(b"before")
        server.signal(signal.SIGSTOP)
        os.waitpid(server.pid, os.WUNTRACED)
        responses: Inbox[Message] = Inbox()
        errors: Inbox[DeliveryError] = Inbox()
        for number in range(100):
            client.send_message(port, b"%d" % number, responses, on_error=errors, timeout=TIMEOUT_S)
        client.send_message(port, b"short", responses, on_error=errors, timeout=0.5)
        [error] = errors.wait()
        assert isinstance(error, OutcomeUnknown)
        server.signal(signal.SIGCONT)
        expected = [b"%d %d" % (server.pid, number) for number in range(100)]
        assert contents_of(responses.wait(100)) == expected
        # The one that was given up does not start any more; had it started, its answer would come too late.
        assert client.request(port, b"after").contents.endswith(b"after")
    assert (len(responses), len(errors)) == (100, 1)


def test_stopped_server_is_noticed(messenger: MessengerFactory) -> None:
    """Within five seconds: what is sent then is known not to be delivered, and comes through after SIGCONT."""
    port = free_port()
    client = messenger("client")
    with running(SERVE, port) as server:
        server.read_line()
        connection = client.make_connection(port)

        def notice() -> float:
            client.request(connection, b"before")
            server.signal(signal.SIGSTOP)
            os.waitpid(server.pid, os.WUNTRACED)
            stopped_at = time.monotonic()
            while True:
                # As long as the link seems to be up the message leaves, and its outcome is unknown.
                try:
                    client.request(connection, b"x", timeout=0.1)
                except NotDelivered:
                    break
                except OutcomeUnknown:
                    assert time.monotonic() - stopped_at < 2 * TIMEOUT_S
            took_s = time.monotonic() - stopped_at
            server.signal(signal.SIGCONT)
            assert client.request(connection, b"after", timeout=TIMEOUT_S).contents.endswith(b"after")
            return took_s

        assert quickest(notice, 5) < 5, "a stopped process was not noticed within 5 s"


def test_callback_that_blocks_loses_no_peer(messenger: MessengerFactory) -> None:
    """Three seconds, longer than ZeroMQ's heartbeats: no new link, no resend storm, everything in order."""
    port = free_port()
    server = messenger("server")
    blocked, release = threading.Event(), threading.Event()
    received: Inbox[bytes] = Inbox()

    def block(message: Message) -> None:
        if message.contents == b"block":
            blocked.set()
            release.wait(TIMEOUT_S)
        received(message.contents)
        message.reply(message.contents)

    listener = server.listen_for_connection(port, block)
    clients = [messenger(f"client {number}") for number in range(3)]
    for client in clients:
        client.request(port, b"before", remote_callback=ECHO)
    received.wait(3)
    responses: Inbox[Message] = Inbox()
    errors: Inbox[DeliveryError] = Inbox()
    clients[0].send_message(port, b"block", responses, on_error=errors)
    wait_event(blocked)
    for client in clients:
        for number in range(100):
            client.send_message(port, b"%d" % number, responses, on_error=errors)
    # The one place where time must pass: heartbeats and retransmission timeouts go by while the callback blocks.
    time.sleep(3)
    before_count = server.statistics().received_msgs
    assert before_count <= 3 + 1 + 300, "messages came twice"
    release.set()
    responses.wait(301)
    assert len(errors) == 0
    for number in range(100):
        assert received.wait(304).count(b"%d" % number) == 3
    assert len(received) == 304
    assert server.statistics().received_msgs == 304
    assert not listener.closed
    assert sum(client.statistics().dropped.get("stale_session", 0) for client in clients) == 0
