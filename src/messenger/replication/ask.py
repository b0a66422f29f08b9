"""Asking a primary or a replica in another process, over its destination."""

import time

import msgspec

from messenger import Destination, Messenger, MessengerError

from .errors import ReplicationError
from .records import Position, PromoteQuery, StatusQuery, encode
from .status import PrimaryStatus, ReplicaSelfStatus

_POLL_S = 0.1


class _Refusal(msgspec.Struct):
    error: str


def status(
    messenger: Messenger, destination: Destination | str | int, *, timeout: float = 5.0
) -> PrimaryStatus | ReplicaSelfStatus:
    """Return what the primary, or the replica that listens, at a destination says of itself.

    Raises:
        DeliveryError: Nobody answered in `timeout` seconds. ReplicationError: The answer is none.

    Thread: any but the messenger's own.
    """
    contents = messenger.request(destination, encode(StatusQuery()), timeout=timeout).contents
    try:
        role = msgspec.json.decode(contents, type=dict[str, object]).get("role")
        if role == "replica":
            return msgspec.json.decode(contents, type=ReplicaSelfStatus)
        return msgspec.json.decode(contents, type=PrimaryStatus)
    except msgspec.DecodeError as error:
        raise ReplicationError(f"what is at {destination} is neither a primary nor a replica: {error}") from error


def promote(messenger: Messenger, destination: Destination | str | int, *, timeout: float = 5.0) -> Position:
    """Have the replica that listens at a destination become the primary; return where its term begins.

    Raises:
        DeliveryError: Nobody answered in time. ReplicationError: It refuses, or did not become it in time.

    Thread: any but the messenger's own.
    """
    deadline_at = time.monotonic() + timeout
    contents = messenger.request(destination, encode(PromoteQuery()), timeout=timeout).contents
    try:
        raise ReplicationError(f"{destination}: {msgspec.json.decode(contents, type=_Refusal).error}")
    except msgspec.DecodeError:
        last = "it has not answered since"
    while (left_s := deadline_at - time.monotonic()) > 0:
        try:
            now = status(messenger, destination, timeout=min(left_s, 1.0))
        except MessengerError as error:
            last = str(error)
        else:
            last = f"it is a {now.role} at LSN {now.lsn}"
            if isinstance(now, PrimaryStatus):
                return Position(now.term, now.lsn)
        time.sleep(_POLL_S)
    raise ReplicationError(f"{destination} did not become the primary within {timeout} s: {last}")
