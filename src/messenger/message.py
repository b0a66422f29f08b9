"""What users are given: messages that arrived, and counts."""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import msgspec

from .control import Credit
from .errors import DeliveryError
from .link import FOREVER, Outlet
from .wire import MSC_ID_MIN, Buffer, decode_identity

Contents = Buffer | str | msgspec.Struct


class ReplyOptions(TypedDict, total=False):
    """What `Message.reply` takes beside the contents and the callback: `more`, and what `send_message` takes."""

    more: bool
    on_error: "ErrorCallback | None"
    remote_callback: int
    timeout: float
    redeliver: bool


class Message(msgspec.Struct, eq=False):
    """A message that arrived.

    Attributes:
        messenger: The messenger that received it.
        contents: The application's bytes.
        source_callback_id: What an answer names as destination; 0 if the sender waits for none.
        dest_callback_id: The callback that the sender asked for.
        link, peer: Where it arrived: the session, or in the basic dialect the link; and the sender's identity as bytes.
        number, incarnation: Of the message in its session, and of the other end; 0 in the basic dialect.
        deadline_at: When its sender gives it up, in seconds of this machine's monotonic clock; infinite if never.
        redelivered: Whether an earlier process of this identity may have run it already.
        credit: Of a message whose response may come in parts, what may be sent of them.
    """

    messenger: Any
    contents: bytes
    source_callback_id: int
    dest_callback_id: int
    link: Outlet
    peer: bytes
    number: int = 0
    incarnation: int = 0
    deadline_at: float = FOREVER
    redelivered: bool = False
    credit: Credit | None = None

    @property
    def buffer(self) -> memoryview:
        """The contents, without a copy."""
        return memoryview(self.contents)

    @property
    def sender(self) -> str:
        """The sender's identity; of a plain peer its routing id, as `0x` and hex if that is not UTF-8."""
        return decode_identity(self.peer)

    @property
    def deadline(self) -> float | None:
        """When its sender stops to wait for the response, in seconds of `time.monotonic()` of this machine.

        It is late by what the message was under way, and by up to a second if the sender did not choose a timeout.
        None if nobody waits, or nobody can tell: the basic dialect.
        """
        return self.deadline_at if self.source_callback_id and self.deadline_at < FOREVER else None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the response any more: it was cancelled, or is late, or the sender is gone.

        A long callback asks now and then and stops. False of a message that never wanted a response. That a sender was
        killed is as a rule told by its deadline only; see `is_sender_gone`. Thread: any.
        """
        return bool(self.messenger._is_given_up(self))

    def is_given_up(self, now: float) -> bool:
        """Return whether its sender has given it up or is gone, as far as the core knows now."""
        if not self.source_callback_id:
            return False
        return now >= self.deadline_at or self.is_sender_gone or self.source_callback_id in self.link.cancelled

    @property
    def is_sender_gone(self) -> bool:
        """Whether the sender waited for a response, and its session has ended.

        It has closed, or a new process has come with its identity, or nothing was heard of it for
        `limits.session_idle_s_max`. One that was killed says nothing, so it is not known to be gone before.
        """
        if not self.source_callback_id:
            return False
        return self.link.is_closed or self.incarnation != self.link.peer_incarnation

    @property
    def is_response(self) -> bool:
        """Whether it answers a message of ours; such a one is processed however late it is."""
        return self.dest_callback_id >= MSC_ID_MIN

    # `options` are not named each: a call that gives none, as most, then costs nothing for them.
    def reply(self, contents: Contents, callback: "Callback | None" = None, **options: Unpack[ReplyOptions]) -> Any:
        """Answer this message, on the link that it came by; takes and returns what `send_message` does.

        The first answer is the response. A second one is sent too, but the sender waits no more: it is dropped there
        and counted as `late_response`, and runs nothing but the callback of the connection that the message was sent
        on. To a sender that wants no response (`source_callback_id` is 0) an answer is a message of its own, which
        runs that callback.

        With `more=True`, more parts of the response follow, and the last is a `reply` without; the sender reads them
        with `stream`. A part waits for room, at most `timeout` seconds, while the reader has not taken what was sent
        before; on the messenger's own thread it raises `QueueFull` at once instead, so use a listener with `workers`.

        Raises:
            ValueError: With `more`: the sender did not use `stream`, or a `callback` is given.
            Cancelled: With `more`: nobody reads any more. A callback may let it pass.
        """
        if callback is None and not options and type(contents) is bytes:
            return self.messenger._answer(self, contents)
        if options.pop("more", False):
            if callback is not None:
                raise ValueError("a part of a response has no callback; only the last, without more=True, may have one")
            return self.messenger._reply_part(self, contents, **options)
        return self.messenger.send_message(self, contents, callback, **options)

    def __repr__(self) -> str:
        ids = f"{self.source_callback_id}-{self.dest_callback_id}"
        return f"<Message {ids} from {self.sender!r}, {len(self.contents)} bytes>"


Callback = Callable[[Message], object]
ErrorCallback = Callable[[DeliveryError], object]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a messenger has counted since it was made, and holds now.

    Attributes:
        identity: The messenger's.
        sent_msgs: Messages that were accepted to be sent, answers too.
        received_msgs: Messages that arrived, malformed ones included.
        response_msgs: Messages that ran an MSC or ended a `request`.
        not_delivered_msgs, outcome_unknown_msgs: Sent messages that ended so; without a callback they count as dropped.
        callback_error_count: Callbacks that raised.
        outstanding_msgs: Sent messages whose outcome is open now.
        queued_msgs: Messages that wait for a connection now.
        connection_count, listener_count: Open now.
        dropped: What was dropped, by kind (docs/operations.md, "What is dropped and counted").
    """

    identity: str
    sent_msgs: int
    received_msgs: int
    response_msgs: int
    not_delivered_msgs: int
    outcome_unknown_msgs: int
    callback_error_count: int
    outstanding_msgs: int
    queued_msgs: int
    connection_count: int
    listener_count: int
    dropped: Mapping[str, int]
