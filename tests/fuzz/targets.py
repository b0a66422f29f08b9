"""What is fuzzed: bytes of a peer into `wire`, and whole conversations into `exchange`.

A target takes any bytes and returns, or something is wrong: it raises what no document names, or breaks a rule that it
checks itself. `tests/fuzz/test_fuzz.py` runs both with hypothesis and over the corpus, `make fuzz` under atheris.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from messenger.blocks import Control, Option
from messenger.errors import Cancelled, DeliveryError, LimitReached, MalformedMessage, MessageTooLarge, QueueFull
from messenger.exchange import BATCH_PROCESSED, Exchange
from messenger.limits import CHALLENGES_MAX, Limits
from messenger.link import Link
from messenger.message import Message
from messenger.session import State
from messenger.takers import Parts
from messenger.wire import (
    MAGIC,
    VERSION,
    Flag,
    Hello,
    Kind,
    decode_batch,
    decode_challenge,
    decode_controls,
    decode_data_frame,
    decode_goodbye,
    decode_header,
    decode_hello,
    decode_identity,
    decode_message,
    decode_refusal,
    decode_response,
    encode_controls,
    encode_data,
    encode_header,
    encode_hello,
    encode_identity,
    encode_message,
    encode_response,
)

LIMITS = Limits(
    message_bytes_max=2_000, queue_msgs_max=20, queue_bytes_max=10_000, outstanding_max=40, window_msgs=16,
    window_bytes=4_000, sessions_max=8, sessions_per_identity_max=4,
)  # fmt: skip


class RuleBroken(Exception):
    """What was fuzzed did not raise, but did what it must not do. No `assert`: it must hold under `python -O` too."""


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise RuleBroken(rule)


def fuzz_wire(data: bytes) -> None:
    """Every decoder, on the same bytes: a value that encodes to the same again, or `MalformedMessage`."""
    for decode in (decode_header, decode_hello, decode_challenge, decode_response, decode_goodbye, decode_refusal):
        try:
            decode(data)
        except MalformedMessage:
            continue
    try:
        source, dest, contents = decode_message(data)
    except MalformedMessage:
        pass
    else:
        require(decode_message(encode_message(source, dest, contents)) == (source, dest, contents), "a message is kept")
    require(encode_identity(decode_identity(data)) == data, "an identity names one routing id")
    decoded = decode_data_frame(data)
    if decoded is None:
        return
    flags, _, _, (*_, count) = decoded
    try:
        decode_controls(data, count)
    except MalformedMessage:
        pass
    for extra in ([], [data], [b"", data]):
        try:
            messages, large, _, size_bytes, left_ms = decode_batch(data, flags, count, extra)
        except MalformedMessage:
            continue
        require(len(messages) == count, "a batch has as many messages as it says")
        require(len(left_ms) in (0, len(messages)), "each message has a deadline, or none has")
        require(len(large) == len(extra), "each large message has its contents")
        require(size_bytes >= sum(map(len, messages)), "a batch counts the bytes of its messages")


class _Bytes:
    """Takes small numbers and pieces off the bytes that are fuzzed; at their end all are empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.piece(size), "little")

    def piece(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def frame(self) -> bytes:
        size = self.number()
        return self.piece(size if size < 250 else self.number(2))


class _FuzzedLink(Link):
    """A link that is up or not, and keeps what was sent last to each peer."""

    def __init__(self, handle: object, callback: Any) -> None:
        super().__init__(handle, callback)
        self.is_up = True
        self.last_sent: dict[bytes, bytes] = {}

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        if self.is_up:
            self.last_sent[routing_id] = frames[0]
        return self.is_up

    def flush(self, now: float) -> None:
        self.queue.clear()
        self.queue_bytes = 0

    def may_speak_for(self, routing_id: bytes, identity: bytes) -> bool:
        return routing_id != b"\3"


class _Conversation:
    """One exchange with a listener's link and a connection's, and peers that say what the bytes say.

    Nobody can guess an incarnation, so the peers know them; everything else of their frames is fuzzed.
    """

    def __init__(self, data: bytes) -> None:
        self.data = _Bytes(data)
        self.now = 0.0
        self.outcomes: Counter[int] = Counter()
        self.streams: list[Parts] = []
        self.sent_ids: set[int] = set()
        self.exchange = Exchange("messenger", LIMITS, self.note_unheard, b"me", random.Random(1))
        self.listener = _FuzzedLink("listener", self.answer)
        self.connection = _FuzzedLink("connection", None)
        self.exchange.links.update((self.listener, self.connection))
        self.session = self.exchange.handshake.open(self.connection)
        self.exchange.handshake.handle_link_up(self.connection, self.now)
        self.exchange.register_callback(64, self.answer)

    def answer(self, message: Message) -> None:
        if message.contents.startswith(b"raise"):
            self.exchange.report_raised(message, ValueError("asked to"))
        elif message.contents.startswith(b"part"):
            try:
                self.exchange.reply_part(message, b"part", self.now)
            except (ValueError, Cancelled, QueueFull, MessageTooLarge):
                return
        elif message.source_callback_id:
            self.send(message.link, message.peer if message.link.is_shared else b"", message.source_callback_id)

    def note_unheard(self, error: DeliveryError) -> None:
        require(isinstance(error, DeliveryError), "on_error gets a DeliveryError")

    def send(self, outlet: Any, peer: bytes, dest: int, contents: bytes = b"x") -> None:
        slot = len(self.sent_ids)

        def note(_: object) -> None:
            self.outcomes[slot] += 1

        redeliver = bool(slot % 2)
        try:
            self.exchange.send(outlet, peer, contents, note, note, dest, self.now + 5, redeliver=redeliver)
        except (QueueFull, LimitReached, MessageTooLarge):
            return
        self.sent_ids.add(slot)

    def incarnations(self, link: _FuzzedLink, routing_id: bytes) -> tuple[int, int]:
        """Return those that a peer gives as its own and as ours, from what we said to it last."""
        if link is self.connection:
            return 77, self.session.incarnation
        last = link.last_sent.get(routing_id)
        ours = 0 if last is None else decode_header(last).source_incarnation
        return 1_000 + routing_id[0], ours

    def step(self) -> None:
        steps = (
            self.take_raw, self.take_basic, self.take_session, self.take_data, self.join, self.join_connection,
            self.pass_time, self.send_some, self.run, self.change_link, self.open_stream, self.read_stream,
        )  # fmt: skip
        steps[self.data.number() % len(steps)]()

    def peer(self) -> tuple[_FuzzedLink, bytes]:
        choice = self.data.number() % 6
        return (self.connection, b"") if choice == 5 else (self.listener, bytes([choice]))

    def take_raw(self) -> None:
        link, routing_id = self.peer()
        extra = [self.data.frame() for _ in range(self.data.number() % 3)]
        self.exchange.handshake.receive(link, routing_id, self.data.frame(), extra, self.now)

    def take_basic(self) -> None:
        _, routing_id = self.peer()
        self.exchange.receive(self.listener, routing_id, self.data.frame())

    def take_session(self) -> None:
        """A frame of any kind, with right incarnations and a fuzzed body."""
        link, routing_id = self.peer()
        source, dest = self.incarnations(link, routing_id)
        header = bytearray(encode_header(Kind(self.data.number() % 7 + 1), source, dest, self.data.number()))
        self.exchange.handshake.receive(link, routing_id, bytes(header) + self.data.frame(), [], self.now)

    def take_data(self) -> None:
        """A DATA frame that decodes, with fuzzed numbers near those that are right."""
        link, routing_id = self.peer()
        source, dest = self.incarnations(link, routing_id)
        messages = [self.data.frame() for _ in range(self.data.number() % 4)]
        numbers = (self.data.number(), self.data.number(), self.data.number(), len(messages))
        flags = self.data.number()
        if flags & Flag.CONTROLS:
            controls = [
                Control(self.data.number() % 4, 1_000 + self.data.number(), self.data.number()) for _ in messages
            ]
            frame = encode_controls(source, dest, flags & 3, (*numbers[:3], 0), controls)
        else:
            left_ms = [self.data.number(2) for _ in messages] if flags & Flag.DEADLINES else ()
            options = [Option(self.data.number(), self.data.number() % 7)] if flags & Flag.OPTIONS else ()
            frame = encode_data(source, dest, flags & 3, numbers, messages, (), options, left_ms)
        self.exchange.handshake.receive(link, routing_id, frame, [], self.now)

    def join(self) -> None:
        """A peer of the listener begins a session as it should."""
        routing_id = bytes([self.data.number() % 5])
        source = 1_000 + routing_id[0]
        hello = Hello(5, self.data.number() % 3, self.data.number(), 4_000, b"peer %d" % (self.data.number() % 4))
        self.exchange.handshake.receive(self.listener, routing_id, encode_hello(source, 0, hello), [], self.now)
        last = self.listener.last_sent.get(routing_id, b"")
        if last[:3] == bytes((MAGIC, VERSION, Kind.CHALLENGE)):
            nonce, ours = decode_challenge(last).nonce, decode_header(last).source_incarnation
            response = encode_response(source, ours, nonce)
            self.exchange.handshake.receive(self.listener, routing_id, response, [], self.now)

    def join_connection(self) -> None:
        """The listener that our connection leads to answers its HELLO as it should."""
        header = encode_header(Kind.CHALLENGE, 77, self.session.incarnation)
        body = self.session.nonce.to_bytes(8, "little") + bytes([self.data.number()]) + bytes(7)
        windows = self.data.number().to_bytes(4, "little") + (4_000).to_bytes(8, "little")
        self.exchange.handshake.receive(self.connection, b"", header + body + windows + b"server", [], self.now)

    def pass_time(self) -> None:
        self.now += self.data.number() / 32
        self.exchange.handle_deadline(self.now)
        self.exchange.flush(self.now)

    def send_some(self) -> None:
        link, routing_id = self.peer()
        outlet: Any = self.session
        if link is self.listener:
            outlet = self.exchange.handshake.find("listener", b"peer %d" % (routing_id[0] % 4)) or self.session
        self.send(outlet, b"", self.data.number() % 3, self.data.frame())

    def open_stream(self) -> None:
        parts = Parts()
        try:
            self.exchange.open_stream(self.session, parts, self.data.frame(), 0, self.now + 5)
        except (QueueFull, LimitReached, MessageTooLarge):
            return
        self.streams.append(parts)

    def read_stream(self) -> None:
        choice = self.data.number()
        if self.streams:
            parts = self.streams[choice % len(self.streams)]
            if choice >= 240:
                self.exchange.end_stream(parts)
            elif self.exchange.take_part(parts) is None:
                self.exchange.await_part(parts, self.now + 1)

    def run(self) -> None:
        while self.exchange.calls:
            callback, argument = self.exchange.calls.popleft()
            if callback is BATCH_PROCESSED:
                self.exchange.note_processed(*argument)
            else:
                callback(argument)

    def change_link(self) -> None:
        self.connection.is_up = not self.connection.is_up
        if self.connection.is_up:
            self.exchange.handshake.handle_link_up(self.connection, self.now)
        else:
            self.exchange.handshake.handle_link_down(self.connection)

    def check(self) -> None:
        handshake = self.exchange.handshake
        require(len(handshake._by_incarnation) <= LIMITS.sessions_max, "sessions are bounded")
        require(len(handshake._challenged) <= CHALLENGES_MAX, "challenges are bounded")
        for session in handshake.sessions:
            require(session.unprocessed_count <= LIMITS.window_msgs, "a window is kept")
            require(session.processed_through <= session.received_through, "what was processed was received")
            require(session.peer != b"peer 3" or session.link is None or session.routing_id != b"\3", "identities hold")
            require(session.state is not State.CLOSED, "a closed session is forgotten")

    def finish(self) -> None:
        """Let all deadlines pass: then each message has its one outcome."""
        for parts in self.streams:
            self.exchange.await_part(parts, self.now + 1)
        for _ in range(3):
            self.run()
            self.now += 1_000
            self.exchange.handle_deadline(self.now)
        self.run()
        require(self.exchange.outstanding_count == 0, "nothing is outstanding after all deadlines")
        require(all(parts.is_over for parts in self.streams), "each stream has an end")
        require(self.outcomes.keys() == self.sent_ids, "each message has an outcome")
        require(set(self.outcomes.values()) <= {1}, "no message has two outcomes")


def fuzz_exchange(data: bytes) -> None:
    """A conversation that the bytes describe: no exception leaves the core, and each message has one outcome."""
    conversation = _Conversation(data[:4_000])
    while conversation.data:
        conversation.step()
        conversation.exchange.flush(conversation.now)
        conversation.check()
    conversation.finish()


TARGETS = {"wire": fuzz_wire, "exchange": fuzz_exchange}
