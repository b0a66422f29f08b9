"""Every limit, with its unit and its reason, in one place.

`Limits` are a messenger's own and can be given to it. The constants below it are the same for all, because both ends
must agree on them or because no user has a reason to change them. What bounds nothing that a peer or a user can see,
such as how often a module looks again, stands in that module.

What the core reads for each message or frame is final: compiled, it then costs nothing (docs/design.md).
"""

from typing import Final

import msgspec

KIB: Final = 1024
MIB = 1024 * KIB


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one messenger. All are counts or bytes, all are at least 1.

    Attributes:
        message_bytes_max: Contents of one message. Bounds what one message can make the receiver hold.
        queue_msgs_max: Messages that wait in one connection's queue because nobody is there yet to take them, and
            messages that ZeroMQ holds for one plain peer that does not read. Bounds memory for a peer that never
            comes.
        queue_bytes_max: The same in bytes, though one message always fits. It also bounds the bytes that one connection
            over tcp has sent and that nobody has taken yet: beyond that it is cut.
        unread_bytes_max: Bytes that all connections over tcp together have sent and that nobody has taken yet, of whole
            messages and of others. Beyond that those that have sent the most are cut.
        outstanding_max: Messages that wait for their response at one time. About 300 bytes and the contents each.
        connections_max: Connections of one messenger. Each holds a socket and its descriptors.
        listeners_max: Listeners of one messenger. Each holds up to three sockets.
        worker_backlog_max: Messages of plain peers that wait for a free worker of one listener. Beyond it they are
            dropped and counted, because a plain peer cannot be told to slow down; a session's window does that.
        workers_max: Workers of one listener of a `Messenger`. Each is a thread, and all are started at once.
        window_msgs: Messages of one session that were sent and whose callbacks have not returned. Both ends keep it, so
            the smaller one counts.
        window_bytes: The same in bytes, at least one message.
        peer_connections_max: Connections of peers to one tcp socket of a listener, whether or not they have said who
            they are, so also handshakes in progress. The newest beyond it are cut. Each holds a descriptor; never more
            than half of those that the process may have.
        sessions_max: Sessions of peers that listeners of this messenger know, alive or not. About 3 KB each.
        sessions_per_identity_max: The same of one identity, so that no peer can take what others need.
        session_idle_s_max: Seconds after which a listener forgets a session that it hears nothing of.
    """

    message_bytes_max: int = 64 * MIB
    queue_msgs_max: int = 100_000
    queue_bytes_max: int = 256 * MIB
    unread_bytes_max: int = 2048 * MIB
    outstanding_max: int = 4_000_000
    connections_max: int = 4_096
    listeners_max: int = 1_024
    worker_backlog_max: int = 100_000
    workers_max: int = 1_000
    window_msgs: int = 8_192
    window_bytes: int = 64 * MIB
    peer_connections_max: int = 4_096
    sessions_max: int = 10_000
    sessions_per_identity_max: int = 1_000
    session_idle_s_max: int = 600

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"limits.{field} is {value!r}, it must be an integer of at least 1")


# ZeroMQ allows a routing id of 255 bytes; the rest is for the suffix that tells several connections apart.
IDENTITY_BYTES_MAX = 240
ROUTING_ID_BYTES_MAX = 255
# One turn of the loop takes at most so many messages from one socket, so that both sides of a busy link work at once
# and no socket starves the others (batches of 250 were the fastest of 50, 125, 250 and unbounded).
TURN_MSGS_MAX = 250
# The same for connections that come and go at one socket.
TURN_NEWS_MAX = 50
# So long nobody wakes for those of a listener again: a flood of them took a turn of the loop for every two.
NEWS_PAUSE_S = 0.02
# Characters of what a callback raised there, its text and its name, in our exceptions and log.
ERROR_TEXT_MAX = 2_000
ERROR_NAME_MAX = 200
# Response types whose decoders are kept, two of each.
CODECS_MAX = 256
# A peer may send a message of a million frames, which takes seconds to drop; a turn drops at most so many.
TURN_DROPPED_FRAMES_MAX = 500
# The two callback ids and their dashes in front of the contents: 2 x 20 digits + 2.
HEADER_BYTES_MAX = 42
# Contents from this size on travel as a frame of their own, without a copy. Below, a copy costs less than a frame.
LARGE_BYTES_MIN: Final = 64 * KIB
# The longest path that fits a Unix socket address, without its closing NUL.
IPC_PATH_BYTES_MAX = 107
# What `send_message` and `request` wait if they are not told. The receiver is not told it either, so that ordinary
# messages pay nothing for their deadline; so both ends must agree on it.
TIMEOUT_S: Final = 30.0
# A message that has waited longer than this when it leaves travels with its deadline all the same.
TIMEOUT_SLACK_S: Final = 1.0
# So often a callback that asks whether its message was cancelled looks for input.
POLL_S = 0.01
# A thread, or an event loop, whose last wait for an answer was shorter than this looks for so long before it sleeps. An
# answer of an idle server takes 0.1 to 0.2 ms; who sleeps meanwhile gets it a quarter to a third later.
SPIN_S = 0.0003
# A close waits so long for what was queued to leave the process.
CLOSE_TIMEOUT_S = 1.0
# And so much longer for a callback that still runs when its time is over.
HELD_UP_S = 0.1
# Descriptors and sockets of all messengers of a process; ZeroMQ's own default of 1,023 is too small for 1,000 peers.
SOCKETS_MAX = 65_535
# So many must be free before anything is opened: a ZeroMQ socket with its monitor takes 3, a context 7, and links more.
DESCRIPTORS_RESERVED = 32

# A connection that has not said who it is by then is cut. A handshake with keys takes three round trips.
HANDSHAKE_S = 3.0

# So many routing ids are remembered of those whose connections were cut.
CUT_IDS_MAX = 1_000

# A socket that has as many connections as it may have says so, once in so many seconds.
CROWDED_LOG_S = 60.0
# Messages that nobody waits for and that could not be delivered, such as answers to a peer that has gone, are counted
# each, but logged together, once in so many seconds.
SILENT_LOG_S = 10.0
# So many messages with a callback and no `on_error` are logged one by one when no response comes, the others of the
# same seconds together: a server that dies may have left a million unanswered.
UNHEARD_LOG_MAX = 20

# Messages without an end, and too many (`transports/inflow.py`).

# So often each tcp connection is looked at, and those of a messenger that watches one.
LOOK_S = 0.25
LOOK_WATCHED_S = 0.1
# If callbacks hold up the loop of a `Messenger` for longer than this, another thread looks, so often.
STAND_IN_S = 0.5
# A look at one takes 3 microseconds; many are looked at in portions, so that messages have their turn in between.
TURN_LOOKS_MAX = 50
# A cut takes 30; of two thousand that came at once the last is cut 4 s later than the first.
TURN_CUTS_MAX = 12
LOOK_S_MIN = 0.025
# What a connection may receive before it is asked at each message by which connection it came; and that share of
# `unread_bytes_max` may be received by all before.
INFLOW_UNWATCHED_BYTES_MAX = 4 * MIB
INFLOW_UNWATCHED_SHARE = 0.25
# Heartbeats of an idle peer: PING and PONG each second, with keys.
INFLOW_FORGIVEN_BYTES_PER_S = 128

# What is given to a plain peer (`transports/outflow.py`).

# Of so many bytes one message tells when libzmq has let go of it, which costs 20 microseconds.
OUTFLOW_MARK_BYTES = 64 * KIB
# So many peers are remembered before those are forgotten to whom nothing is on its way.
OUTFLOWS_SWEEP_MIN = 1_000
# A connection whose peer does not read looks so often whether libzmq has room again.
OUTFLOW_LOOK_S = 0.01

# Keys.

ALLOWED_KEYS_MAX = 100_000
ALLOW_FILE_BYTES_MAX = 32 * MIB
KEY_FILE_BYTES_MAX = 4 * KIB
# So long whoever has a key on the list waits for the word that it may come in (`transports/zap.py`). On one busy CPU,
# 5 in a thousand such words came too soon if they did not wait, after 2 ms one in a thousand, after this none.
GIVE_S = 0.02
# A listener starts only when it has refused a random key, which takes milliseconds.
SELF_TEST_S = 5.0
# A reload waits so long for a messenger's lock; longer than that only a signal handler waits that has interrupted who
# holds it.
RELOAD_LOCK_S = 0.02
# A connection that was refused tries again so much later, since the list may have changed.
RETRY_S = 1.0
# A process that ends closes one socket after the other; so long after a link of it broke, it is looked whether anybody
# still listens there.
DESERTED_S = 0.1
# A server that has another key than the one we know just hangs up; after so many times in a row, and so long, that
# counts as refused.
HANDSHAKE_FAILURES_MAX = 3
HANDSHAKE_FAILURES_S = 1.0
# Connections of plain peers with one identity, to one socket, that can be told apart: by `#2` to so many behind it.
NAMES_PER_KEY_MAX = 64
# Refused keys are counted each, but logged once in so many seconds a key, and so many keys in that time.
REFUSAL_LOG_S = 60.0
REFUSAL_LOG_KEYS_MAX = 100

# Sessions.

# A stream may hold such a part of the session's window, in messages and in bytes, until its reader has taken it; so one
# slow reader leaves room for others.
STREAM_SHARE = 4
# A batch never holds more, so that both sides of a busy session work at once.
BATCH_MSGS_MAX: Final = 250
BATCH_BYTES_MAX: Final = 256 * KIB
# The frame that holds one: its messages, and where all of them are error responses, a text of 2,000 characters each.
BATCH_FRAME_BYTES_MAX = BATCH_BYTES_MAX + BATCH_MSGS_MAX * 8 * KIB
# What callbacks send leaves at the end of their turn, but if the turn takes longer than this, in between.
FLUSH_S: Final = 0.001
# An acknowledgement waits so long for a message that it can travel with.
ACK_DELAY_S: Final = 0.02
# Whatever a session waits for may be late by so much; that of many can then be looked at together.
TIMER_TICK_S = 0.005
# RFC 6298 says 1 s for the first two; links here are fast, and what the timeout sends is an empty frame.
RTO_MIN_S = 0.25
RTO_INITIAL_S = 0.5
RTO_MAX_S = 8.0
# What a peer asks for again and again, and never receives, is sent at intervals that double so often.
RESENDS_DOUBLED_MAX = 8
# But no more rarely than this: all behind it waits as well, also once a link works that broke again and again before.
RESEND_S_MAX = 60.0
# A session with nothing under way shows so often that it lives; a listener learns by it when the link was made anew.
IDLE_PROBE_S: Final = 10.0
# A HELLO without an answer is said again after the first time, doubled each time, up to the second.
HELLO_S_MIN = 0.25
HELLO_S_MAX = 2.0
# Challenges that are open at one time, for one identity and in all, and how long a challenge stays open.
CHALLENGES_PER_IDENTITY_MAX = 4
CHALLENGES_MAX = 1_024
CHALLENGE_S = 10.0
# What is read of the text with which a session is refused.
REFUSAL_BYTES_MAX = 1_000
