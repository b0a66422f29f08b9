"""Ask a primary or a replica in another process how it stands, or to become the primary."""

import time

import msgspec

from messenger import DeliveryError, Destination, Messenger

from .errors import ReplicationError
from .records import PromoteQuery, StatusQuery, encode
from .status import PrimaryStatus, ReplicaSelfStatus

_POLL_S = 0.05


class _Answer(msgspec.Struct):
    role: str = ""
    error: str = ""
    promoting: str = ""


def query_status(
    messenger: Messenger, destination: Destination | str | int = 15445, *, timeout: float = 5.0
) -> PrimaryStatus | ReplicaSelfStatus:
    """Return what the primary, or the replica, that listens there says of itself.

    Args:
        timeout: Seconds, > 0.

    Raises:
        NotDelivered, OutcomeUnknown: Nobody answered. ReplicationError: What answered is neither.

    Thread: any but the messenger's own.
    """
    answer, contents = _ask(messenger, destination, encode(StatusQuery()), timeout)
    kind: type[PrimaryStatus | ReplicaSelfStatus] = ReplicaSelfStatus if answer.role == "replica" else PrimaryStatus
    try:
        return msgspec.json.decode(contents, type=kind)
    except (ValueError, RecursionError) as error:
        raise ReplicationError(f"what listens at {destination} is no primary and no replica: {error}") from error


def request_promotion(
    messenger: Messenger, destination: Destination | str | int = 15445, *, timeout: float = 5.0
) -> PrimaryStatus:
    """Make the replica that listens there the primary; return what it says of itself then.

    Args:
        timeout: Seconds, > 0, until it is the primary.

    Raises:
        NotDelivered: It was not asked. OutcomeUnknown: It may have been. ReplicationError: It refused, or is not the
        primary after `timeout` seconds, but may become it.

    Thread: any but the messenger's own.
    """
    deadline_at = time.monotonic() + timeout
    _ask(messenger, destination, encode(PromoteQuery()), timeout)
    while time.monotonic() < deadline_at:
        # Between the two it listens to nobody.
        try:
            told = query_status(messenger, destination, timeout=max(_POLL_S, deadline_at - time.monotonic()))
        except DeliveryError:
            continue
        if isinstance(told, PrimaryStatus):
            return told
        time.sleep(_POLL_S)
    raise ReplicationError(f"the replica at {destination} was asked, but is not the primary after {timeout} s")


def _ask(
    messenger: Messenger, destination: Destination | str | int, query: bytes, timeout: float
) -> tuple[_Answer, bytes]:
    contents = messenger.request(destination, query, timeout=timeout).contents
    try:
        answer = msgspec.json.decode(contents, type=_Answer)
    except (ValueError, RecursionError) as error:
        raise ReplicationError(f"what listens at {destination} is no primary and no replica: {error}") from error
    if answer.error:
        raise ReplicationError(answer.error)
    return answer, contents
