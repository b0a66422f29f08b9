"""The commands on messages: listen, send, ping, version."""

import base64
import contextlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

import zmq

from messenger import (
    ECHO,
    BuiltinCallback,
    Connection,
    DeliveryError,
    Limits,
    Message,
    MessengerError,
    NotDelivered,
    __version__,
)

from .keys import new_messenger, secure, security
from .terminal import (
    INTERRUPTED,
    complain,
    end_on,
    option,
    parse_place,
    printable,
    seconds,
    show_progress,
    standard_input,
    told_once,
    wait,
    write,
)

if TYPE_CHECKING:
    import click

END_GRACE_S = 0.2  # A peer loses an answer that it has not read when the link closes (its socket is IMMEDIATE).
WORKERS_MAX = 256  # Each is a thread and a process.
SEND_STATUSES = """\b
Exit status:
  0    the response came (--no-wait: the message has left)
  1    no response in time; the message may have run there
  2    wrong usage, for example a destination that is none
  3    not delivered: it is certain that it did not run
  4    another error
  130  Ctrl-C"""


def make_commands() -> "list[click.Command]":
    """Return the commands, whose help texts are the docstrings."""
    import click

    place = click.Argument(["destination"], metavar="DEST")
    identity = option("--identity", metavar="NAME", help="What others see as the sender; by default a unique name.")
    as_json = option("--json", "as_json", is_flag=True, help="Print JSON.")
    count = click.IntRange(1)
    dialects = click.Choice(["session", "basic"])
    listen = [
        *(place, identity, as_json),
        option("--echo", is_flag=True, help="Answer each message with its own contents."),
        option("--reply", metavar="TEXT", help="Answer each message with TEXT."),
        option("--exec", "command", metavar="CMD", help="Run CMD (no shell): contents on stdin, answer from stdout."),
        option("--workers", type=click.IntRange(1, WORKERS_MAX), default=4, help="Run at most so many CMD at a time."),
        option("--exec-timeout", type=seconds(), default=30.0, help="Seconds after which a CMD is killed."),
        option("--count", type=count, help="End after so many messages."),
    ]
    send = [
        *(place, click.Argument(["contents"]), identity, as_json),
        option("--callback", metavar="ID", default="noop", help="What the receiver is to run: a number, noop or echo."),
        option("--timeout", type=seconds(), default=30.0, help="Seconds to wait for the response."),
        option("--dialect", type=dialects, default="session", help="basic is for plain ZeroMQ servers."),
        option("--no-wait", is_flag=True, help="End when the message has left; want no response."),
    ]
    ping = [
        *(place, identity, as_json),
        option("--count", type=count, default=10, help="How many."),
        option("--size", type=click.IntRange(0, Limits().message_bytes_max), default=64, help="Bytes of contents."),
        option("--interval", type=seconds(min_open=False), default=0.1, help="Seconds between two."),
        option("--timeout", type=seconds(), default=5.0, help="Seconds after which one counts as lost."),
    ]
    return [
        secure(click.Command("listen", callback=_listen, params=listen, help=_listen.__doc__), listens=True),
        secure(click.Command("send", callback=_send, params=send, help=_send.__doc__, epilog=SEND_STATUSES)),
        secure(click.Command("ping", callback=_ping, params=ping, help=_ping.__doc__)),
        click.Command("version", callback=_version, params=[as_json], help=_version.__doc__),
    ]


def _listen(
    destination: str,
    identity: str | None,
    as_json: bool,
    echo: bool,
    reply: str | None,
    command: str | None,
    workers: int,
    exec_timeout: float,
    count: int | None,
) -> int:
    """Listen on DEST and print each message: its sender, source and destination callback ids, and contents.

    What is not printable is escaped. Port 0 takes a free port; stderr says where it listens. A message that asks for
    the built-in echo gets only that answer. Ctrl-C and SIGTERM end it with status 0.
    """
    if echo + (reply is not None) + (command is not None) > 1:
        raise ValueError("--echo, --reply and --exec exclude each other: give one of them")
    place = parse_place(destination)
    if security() is None and not place.is_loopback():
        raise ValueError(
            f"{destination!r} can be reached from other machines: give --key and --allow, to say who may connect, or "
            "--insecure if anybody may"
        )
    program = None if command is None else _Program(command, exec_timeout)
    fixed = None if reply is None else os.fsencode(reply)
    server = _Server(as_json, count, program.run if program else lambda contents: contents if echo else fixed)
    end_on(signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt), new_messenger(identity) as messenger:
        try:
            listener = messenger.listen_for_connection(place, server.take, workers=workers if program else 0)
            complain(f"{messenger.identity!r} listens on {', '.join(listener.endpoints)}")
            if error := wait(server.end):
                raise error
            time.sleep(END_GRACE_S)
        finally:
            if program:
                program.stop()
    return 0


def _send(
    destination: str,
    contents: str,
    identity: str | None,
    as_json: bool,
    callback: str,
    timeout: float,
    dialect: Literal["session", "basic"],
    no_wait: bool,
) -> int:
    """Send CONTENTS (- is stdin) to DEST, wait for the response and print its contents.

    Text gets a newline at its end; on a terminal control characters are escaped.
    """
    place = parse_place(destination)
    remote_callback = _parse_callback(callback)
    data = standard_input().buffer.read() if contents == "-" else os.fsencode(contents)
    with told_once(), new_messenger(identity) as messenger:
        connection = messenger.make_connection(place, dialect=dialect)
        if no_wait:
            # What never left is counted, which we tell ourselves.
            message_id = messenger.send_message(connection, data, remote_callback=remote_callback, timeout=timeout)
            messenger.close(timeout)
            dropped = messenger.statistics().dropped
            if dropped.get("not_delivered"):
                why = "nobody was there to take it"
                if dropped.get("refused"):
                    why = "refused there; a send without --no-wait is told why"
                raise NotDelivered(f"message {message_id} to {place}: {why}", message_id)
            return 0
        response, _ = _round_trip(connection, data, remote_callback, timeout)
    text = _text(response.contents)
    if as_json:
        write(_describe(response, as_json))
    elif sys.stdout is not None and sys.stdout.isatty():
        shown = response.contents.decode("utf-8", "backslashreplace")
        write(printable(shown.removesuffix("\n"), keep="\n\t") + "\n")
    else:
        write(response.contents if text is None or text.endswith("\n") else response.contents + b"\n")
    return 0


def _ping(
    destination: str, identity: str | None, as_json: bool, count: int, size: int, interval: float, timeout: float
) -> int:
    """Measure round trips to the built-in echo of DEST, in microseconds; the first includes connecting.

    Exit status: 0 if all came back, 1 if not, 2 and 4 as for send, 130 after Ctrl-C.
    """
    place = parse_place(destination)
    contents = (b"ping " * (size // 5 + 1))[:size]
    times_us: list[float | None] = []
    status = 0
    try:
        with new_messenger(identity) as messenger, show_progress(count, "ping") as advance:
            connection = messenger.make_connection(place)
            for number in range(1, count + 1):
                time.sleep(interval if number > 1 else 0)
                time_us, line = _ping_once(connection, contents, timeout)
                times_us.append(time_us)
                if not as_json and not (advance and sys.stdout.isatty()):
                    write(f"{number}: {line}\n")
                if advance:
                    advance()
    except KeyboardInterrupt:
        status = INTERRUPTED
    came = sorted(time_us for time_us in times_us if time_us is not None)
    lost_count = len(times_us) - len(came)
    summary: dict[str, float] = {}
    if came:
        p99 = came[math.ceil(len(came) * 0.99) - 1]
        summary = {"min_us": came[0], "median_us": statistics.median(came), "p99_us": p99, "max_us": came[-1]}
    if as_json:
        counts = {"size_bytes": size, "sent": len(times_us), "lost": lost_count}
        write(json.dumps({"destination": str(place), **counts, **summary, "times_us": times_us}) + "\n")
    else:
        values = "".join(f", {name.removesuffix('_us')} {value:.0f} µs" for name, value in summary.items())
        write(f"{len(times_us)} sent, {lost_count} lost{values}\n")
    return status or int(lost_count > 0)


def _version(as_json: bool) -> int:
    """Print the versions of the package, pyzmq, libzmq and Python."""
    versions = {"messenger": __version__, "pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    versions["python"] = platform.python_version()
    lines = [json.dumps(versions)] if as_json else [f"{name} {version}" for name, version in versions.items()]
    write("\n".join(lines) + "\n")
    return 0


class _Server:
    """Prints and answers messages; `take` is the SLC, on one thread or several.

    `end` gets None after the last message that was asked for, or what made printing fail.
    """

    def __init__(self, as_json: bool, count: int | None, answer: Callable[[bytes], bytes | None]) -> None:
        self.end: SimpleQueue[OSError | None] = SimpleQueue()
        self._as_json = as_json
        self._count = count
        self._answer = answer
        self._lock = threading.Lock()
        self._taken_count = self._done_count = 0

    def take(self, message: Message) -> None:
        """Print one message and answer it, unless the built-in echo has."""
        with self._lock:
            if self._taken_count == self._count:
                return
            self._taken_count += 1
            try:
                write(_describe(message, self._as_json))
            except OSError as error:
                self.end.put(error)
                return
        try:
            answer = None if message.dest_callback_id == ECHO else self._answer(message.contents)
            # Who wants no response may be gone, and then it could only be counted as lost.
            if answer is not None and message.source_callback_id:
                message.reply(answer)
        except (MessengerError, OSError) as error:
            complain(f"message {message.source_callback_id} of {message.sender!r} is not answered: {error}")
        with self._lock:
            self._done_count += 1
            if self._done_count == self._count:
                self.end.put(None)


class _Program:
    """A program that answers messages, run anew for each."""

    def __init__(self, command: str, timeout: float) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"--exec {command!r}: {error}") from error
        if not self._words or shutil.which(self._words[0]) is None:
            raise ValueError(f"--exec {command!r} names no program that can be run")
        self._timeout = timeout
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, contents: bytes) -> bytes | None:
        """Return what the program prints when it reads `contents`, None if it is too late to start it.

        Raises:
            ChildProcessError: It took too long, or ended with a status other than 0.
        """
        with self._lock:
            if self._stopped:
                return None
            # A session of its own, so that what it starts is killed with it and does not hold its stdout open.
            pipe = subprocess.PIPE
            process = subprocess.Popen(self._words, stdin=pipe, stdout=pipe, start_new_session=True)
            self._running.add(process)
        trouble = f"took longer than --exec-timeout {self._timeout:g}"
        with process:
            try:
                answer, _ = process.communicate(contents, self._timeout)
                trouble = f"ended with status {process.returncode}" if process.returncode else ""
            except subprocess.TimeoutExpired:
                answer = b""
                os.killpg(process.pid, signal.SIGKILL)
            with self._lock:
                self._running.discard(process)
        if trouble:
            raise ChildProcessError(f"{self._words[0]!r} {trouble}")
        return answer

    def stop(self) -> None:
        """Kill what runs and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _round_trip(connection: Connection, contents: bytes, remote_callback: int, timeout: float) -> tuple[Message, float]:
    """Send one message and return its response and the seconds that it took; the wait can be interrupted."""
    outcomes: SimpleQueue[tuple[Message | DeliveryError, float]] = SimpleQueue()

    def note(outcome: Message | DeliveryError) -> None:
        outcomes.put((outcome, time.perf_counter()))

    send = connection.messenger.send_message
    sent_at = time.perf_counter()
    send(connection, contents, note, on_error=note, remote_callback=remote_callback, timeout=timeout)
    try:
        outcome, done_at = wait(outcomes)
    except KeyboardInterrupt:
        connection.close()  # The messenger would else wait for the response when it closes.
        raise
    if isinstance(outcome, DeliveryError):
        raise outcome
    return outcome, done_at - sent_at


def _ping_once(connection: Connection, contents: bytes, timeout: float) -> tuple[float | None, str]:
    try:
        response, elapsed_s = _round_trip(connection, contents, ECHO, timeout)
    except DeliveryError as error:
        return None, f"lost: {printable(str(error))}"
    if response.contents != contents:
        return None, "lost: other contents came back"
    return round(elapsed_s * 1e6, 1), f"{elapsed_s * 1e6:.0f} µs"


def _parse_callback(text: str) -> int:
    names = {callback.name.lower(): int(callback) for callback in BuiltinCallback}
    if text in names:
        return names[text]
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"--callback {text!r} is neither a number nor one of {', '.join(names)}")
    return int(text)


def _text(contents: bytes) -> str | None:
    """Return contents as text, None if they are not UTF-8."""
    try:
        return contents.decode()
    except UnicodeDecodeError:
        return None


def _describe(message: Message, as_json: bool) -> str:
    """Return a message as a line of JSON, or as a line for people, which is safe on a terminal."""
    text = _text(message.contents)
    if not as_json:
        # repr escapes all that is not printable, in text as in bytes.
        shown = repr(message.contents if text is None else text)
        return f"{message.sender!r} {message.source_callback_id}-{message.dest_callback_id} {shown}\n"
    ids = {"source_callback_id": message.source_callback_id, "dest_callback_id": message.dest_callback_id}
    name, value = (
        ("contents", text) if text is not None else ("contents_base64", base64.b64encode(message.contents).decode())
    )
    return json.dumps({"sender": message.sender, **ids, name: value}) + "\n"
