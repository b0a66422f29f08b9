"""What a manager knows of the servers that have said hello, and of the commands that they have.

Pure: no sockets, threads or clock. What must never happen here: a command with two outcomes.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from messenger import Message

from .batching import Batch
from .calls import Convert
from .errors import TrainingCancelled
from .jobs import Job
from .limits import BATCHES_PER_SERVER, HUNG_S, SILENT_S
from .protocol import ServerHello
from .supervisor import Slot


class Call(msgspec.Struct, eq=False, kw_only=True):
    """One command, or one batch of `infer`, that a server is to answer once.

    Attributes:
        cmd: Of the command.
        contents: Of the message; of a batch it is made when it is sent.
        deadline_at: An instant.
        job, convert: Of a command.
        batch: Of `infer`.
        message_id: Of the message, once it is sent.
        server: That has it, or none yet.
        is_given_up: Whether its job was cancelled; whoever is about to queue or send it sees to its end.
    """

    cmd: str
    deadline_at: float
    contents: bytes = b""
    job: Job[Any] | None = None
    convert: Convert | None = None
    batch: Batch | None = None
    message_id: int = 0
    server: "Server | None" = None
    is_given_up: bool = False

    def fail(self, error: BaseException) -> None:
        """End the job, or all of the batch, with an error; a training that was cancelled, as cancelled."""
        if self.batch is not None:
            for each in self.batch.calls:
                each.job.settle_error(error)
        elif self.job is not None:
            if isinstance(error, TrainingCancelled):
                self.job.settle_cancelled()
            else:
                self.job.settle_error(error)


class Server(msgspec.Struct, eq=False, kw_only=True):
    """A server that has said hello, one process of it.

    Attributes:
        identity: As its messages show it.
        address: Its hello, by which it is reached.
        about: What it tells of itself.
        slot: That its process was started for, if it was.
        pinged_at: When a ping was sent that has no answer yet, else 0.
        is_ending: Whether it was told to end.
        open: The calls that it has.
        batch_count: Of these, the batches.
    """

    identity: str
    address: Message
    about: ServerHello
    slot: Slot | None
    pinged_at: float = 0.0
    is_ending: bool = False
    open: dict[int, Call] = msgspec.field(default_factory=dict)
    batch_count: int = 0

    def is_ready(self, now: float) -> bool:
        """Return whether it takes commands."""
        return not self.is_ending and (not self.pinged_at or now - self.pinged_at < SILENT_S)

    def is_hung(self, now: float) -> bool:
        """Return whether it has been silent for so long that it should be ended."""
        return bool(self.pinged_at) and now - self.pinged_at >= HUNG_S

    def takes_batch(self, now: float) -> bool:
        """Return whether it takes one more batch."""
        return self.batch_count < BATCHES_PER_SERVER and self.is_ready(now)

    def take(self, call: Call) -> None:
        """Note that it has a call."""
        call.server = self
        self.open[id(call)] = call
        self.batch_count += call.batch is not None

    def let_go(self, call: Call) -> bool:
        """Note that a call has its outcome; return whether it had none yet."""
        if self.open.pop(id(call), None) is None:
            return False
        self.batch_count -= call.batch is not None
        return True


def find_taker(servers: Iterable[Server], now: float) -> Server | None:
    """Return the server that has the fewest batches, if it takes one more."""
    taker = None
    for server in servers:
        if (taker is None or server.batch_count < taker.batch_count) and server.takes_batch(now):
            taker = server
    return taker


def count_open(server: Server) -> int:
    """Return how many calls a server has."""
    return len(server.open)


def as_timeout(left_s: float) -> float:
    """Return the timeout of a message: up to 0.1 s more, because the default timeout costs a message far less.

    Any other one travels with it, and the server processes it apart.
    """
    return max(0.1, round(left_s + 0.05, 1))


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A server, or the place of one.

    Attributes:
        identity: Empty while there is none.
        state: `ready`, `silent` (it does not answer pings), or of a slot `starting`, `waiting` (to be started again),
            `failed` (given up), `stopped`.
        slot: -1 for a server that was started by somebody else.
        pid: 0 if it is not known.
        restarts: Processes that were started after the first.
        open_calls: Commands and batches that it has.
        reason, stderr: Why the last process ended, and its last lines.
    """

    identity: str
    state: str
    slot: int
    pid: int
    restarts: int
    open_calls: int
    reason: str
    stderr: list[str]


class ManagerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a manager knows, at one instant.

    Attributes:
        ready: Whether a server takes commands now.
        servers: All of them.
        waiting_calls: Calls that no server has yet.
        jobs: The state of each training that is remembered: `open`, `done`, `failed`, `cancelled`.
        served: The version of each model that this manager has chosen.
        counts: What has happened since the start, by kind.
    """

    ready: bool
    servers: list[ServerStatus]
    waiting_calls: int
    jobs: dict[str, str]
    served: dict[str, int]
    counts: dict[str, int]
