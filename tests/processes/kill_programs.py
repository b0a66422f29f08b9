"""The two programs of the kill loop, and the records that they leave for whoever killed them.

Each record is written by one system call the moment that it becomes true, so it outlives a SIGKILL. All have the same
size, a power of two, so that none lies across two pages, of which a dying process might write only one.

What is done with a message follows from its number, so that both sides and the checker know it without being told.
"""

import json
import logging
import os
import sys
import threading
from functools import partial
from struct import Struct

from messenger import DeliveryError, Message, Messenger

# A client's: what happened (0 is "given to send_message", others index OUTCOMES), number.
CLIENT_RECORD = Struct("<QQ")
# The server's: its life, the client's number and life times 1,000, the message's number, whether it was redelivered.
EFFECT_RECORD = Struct("<QQQQ")
CONTENTS = Struct("<QQ")
OUTCOMES = ("sent", "response", "NotDelivered", "OutcomeUnknown", "HandlerError", "IdentityInUse", "NoHandler")
# So many may wait for their outcome, so that each kill finds some queued, some under way and some answered.
OPEN_MAX = 1_000
TIMEOUTS_S = (30.0, 0.2, 30.0, 1.0, 30.0, 5.0, 30.0)


def is_redelivered(number: int) -> bool:
    """Returns whether a message was sent with `redeliver=True`."""
    return number % 10 == 3


def is_silent(number: int) -> bool:
    """Returns whether nobody waits for a message's outcome."""
    return number % 10 == 5


def is_raised(number: int) -> bool:
    """Returns whether the receiver's callback raises."""
    return number % 50 == 7


def append_to(path: str) -> int:
    """Returns a descriptor that appends."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


class PlannedError(Exception):
    """What the server's callback raises on purpose."""


def serve(port: str, path: str, life: str) -> None:
    """Writes down each message that is processed, then answers it, until killed."""
    log = append_to(path)

    def work(message: Message) -> None:
        sender, number = CONTENTS.unpack(message.contents)
        os.write(log, EFFECT_RECORD.pack(int(life), sender, number, message.redelivered))
        if is_raised(number):
            raise PlannedError(str(number))
        message.reply(message.contents)

    server = Messenger("server")
    server.listen_for_connection(int(port), work)
    sys.stdin.read()


def send(destination: str, path: str, identity: str, sender: str) -> None:
    """Sends as fast as it may until told to stop, waits for all outcomes, and prints its counts; or is killed."""
    log = append_to(path)
    stop = threading.Event()
    room = threading.Semaphore(OPEN_MAX)

    def note(kind: int, number: int) -> None:
        os.write(log, CLIENT_RECORD.pack(kind, number))

    def on_response(number: int, response: Message) -> None:
        if response.contents != CONTENTS.pack(int(sender), number):
            raise ValueError(f"the response to {number} is {response.contents!r}")
        note(1, number)
        room.release()

    def on_error(number: int, error: DeliveryError) -> None:
        note(OUTCOMES.index(type(error).__name__), number)
        room.release()

    def wait_stop() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait_stop, daemon=True).start()
    client = Messenger(identity)
    number = 0
    while not stop.is_set():
        contents = CONTENTS.pack(int(sender), number)
        timeout = TIMEOUTS_S[number % len(TIMEOUTS_S)]
        if is_silent(number):
            note(0, number)
            client.send_message(destination, contents, timeout=timeout)
        elif room.acquire(timeout=0.1):
            note(0, number)
            client.send_message(
                destination,
                contents,
                partial(on_response, number),
                on_error=partial(on_error, number),
                timeout=timeout,
                redeliver=is_redelivered(number),
            )
        else:
            continue
        number += 1
    for _ in range(OPEN_MAX):
        room.acquire()
    client.close(timeout=30)
    counts = client.statistics()
    print(json.dumps({"dropped": dict(counts.dropped), "callback_error_count": counts.callback_error_count}))


def main() -> None:
    """Runs the program that the command line names."""
    # Each planned exception, and each kill, would be logged into a pipe that nobody reads meanwhile.
    logging.disable(logging.CRITICAL)
    program, *arguments = sys.argv[1:]
    (serve if program == "serve" else send)(*arguments)
