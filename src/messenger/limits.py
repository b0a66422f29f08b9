"""Every limit, with its unit and its reason, in one place.

`Limits` are a messenger's own and can be given to it. The constants below it are the same for all, because both ends
must agree on them or because no user has a reason to change them.
"""

import msgspec

KIB = 1024
MIB = 1024 * KIB


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one messenger. All are counts or bytes, all are at least 1.

    Attributes:
        message_bytes_max: Contents of one message. Bounds what one message can make the receiver hold.
        queue_msgs_max: Messages that wait in one connection's queue because nobody is there yet to take them, and
            messages that ZeroMQ holds for one plain peer that does not read. Bounds memory for a peer that never
            comes.
        queue_bytes_max: Bytes of the same queue. At least one message always fits.
        outstanding_max: Messages that wait for their response at one time. About 300 bytes each.
        connections_max: Connections of one messenger. Each holds a socket and its descriptors.
        listeners_max: Listeners of one messenger. Each holds up to three sockets.
        worker_backlog_max: Messages that wait for a free thread at a listener with `workers`. Beyond it they are
            dropped and counted, because a plain peer cannot be told to slow down.
    """

    message_bytes_max: int = 64 * MIB
    queue_msgs_max: int = 100_000
    queue_bytes_max: int = 256 * MIB
    outstanding_max: int = 4_000_000
    connections_max: int = 4_096
    listeners_max: int = 1_024
    worker_backlog_max: int = 100_000

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"limits.{field} is {value!r}, it must be an integer of at least 1")


# ZeroMQ allows a routing id of 255 bytes; the rest is for the suffix that tells several connections apart.
IDENTITY_BYTES_MAX = 240
# One turn of the loop takes at most so many messages from one socket, so that both sides of a busy link work at once
# and no socket starves the others (batches of 250 were the fastest of 50, 125, 250 and unbounded).
TURN_MSGS_MAX = 250
# The two callback ids and their dashes in front of the contents: 2 x 20 digits + 2.
HEADER_BYTES_MAX = 42
# Below this size a copy costs less than the bookkeeping of a zero-copy send (7 microseconds).
ZERO_COPY_BYTES_MIN = 64 * KIB
# The longest path that fits a Unix socket address, without its closing NUL.
IPC_PATH_BYTES_MAX = 107
# A close waits so long for what was queued to leave the process.
CLOSE_TIMEOUT_S = 1.0
# Descriptors and sockets of all messengers of a process; ZeroMQ's own default of 1,023 is too small for 1,000 peers.
SOCKETS_MAX = 65_535
