"""Responses in many parts, in order, no faster than their reader takes them.

The parts are numbered messages of the session like all others, and count as processed when they have arrived: a reader
that is slow holds up nothing but its own stream. What bounds the memory is the stream's **credit**: so many messages
and bytes, a quarter of the session's window, may be sent and not taken. The reader tells what it has taken in all, when
that is half of the credit more than it told before; so whoever waits for credit always gets some.

A driver gives the reader a `Parts` of its own that wakes who waits, and calls `open_stream`, `take_part`, `await_part`
and `end_stream`; for the other side, `reply_part`, again when `is_held_up` is over. Each is called under its lock, and
followed by a flush.

What must never happen here: a part that is lost, doubled or out of order without an error; more parts held than the
credit says; a writer that waits though its reader has taken all.

Source: docs/guarantees.md, "Streams".
"""

from typing import Any

from .blocks import Option, OptionKind
from .compiled import mypyc_attr
from .errors import Cancelled, OutcomeUnknown, QueueFull
from .link import FOREVER, Outlet
from .message import Message
from .outcomes import Outcomes
from .outgoing import Outgoing
from .session import Session
from .takers import Parts
from .wire import Buffer


@mypyc_attr(allow_interpreted_subclasses=True)
class Streams(Outcomes):
    """The part of the exchange that knows streams."""

    def send(self, *arguments: Any, **options: Any) -> int:
        """Queue one message; see `Exchange.send`."""
        raise NotImplementedError

    def is_full(self, outlet: Outlet) -> bool:
        """Return whether an outlet's queue takes no further message."""
        raise NotImplementedError

    # Reading.

    def open_stream(
        self, outlet: Outlet, parts: Parts, contents: Buffer, dest_callback_id: int, deadline_at: float
    ) -> None:
        """Queue a message whose response may come in parts.

        Args:
            deadline_at: Until when the first part must have come; of the others, `await_part` says.

        Raises:
            ValueError: The outlet speaks the basic dialect, which has no parts. Nothing was queued.
            MessageTooLarge, QueueFull, LimitReached: The same.
        """
        if not isinstance(outlet, Session):
            raise ValueError(f"{outlet} speaks the basic dialect, which has no responses in parts; use request")
        message_id = self.send(outlet, b"", contents, parts, None, dest_callback_id, deadline_at)
        outlet.queue[-1].option = Option(0, OptionKind.STREAM)
        parts.join(outlet, message_id)

    def take_part(self, parts: Parts) -> Message | None:
        """Return the next part, None if none has come or all were taken."""
        part = parts.take()
        if parts.message_id in self._outstanding:
            self.mark_dirty(self._outstanding[parts.message_id].outlet)
        return part

    def await_part(self, parts: Parts, deadline_at: float) -> None:
        """Have a stream end as `OutcomeUnknown` if nothing comes before an instant."""
        entry = self._outstanding.get(parts.message_id)
        if entry is not None:
            entry.deadline_at = deadline_at
            self._sweep_at = min(self._sweep_at, deadline_at)

    def end_stream(self, parts: Parts) -> None:
        """Nobody reads any more: tell the other end, unless it has sent all, or was never asked."""
        if not parts.message_id:
            parts.done = parts.is_over = True
        self.cancel(parts.message_id)
        parts.waiting.clear()

    def _add_part(self, entry: Outgoing, message: Message) -> None:
        """Keep a part until it is taken. Nobody need wait for the next while there is one, however slow the reader."""
        parts: Parts = entry.callback
        msgs_max, bytes_max = entry.outlet.controls.stream_limits
        if len(parts.waiting) >= msgs_max or parts.waiting_bytes >= bytes_max:
            self.drop("stream_overrun")
            self._give_up(entry)
            self._fail(entry.message_id, OutcomeUnknown, "the peer sends more than its credit")
            return
        entry.deadline_at = FOREVER
        parts.add(message)

    def _give_up_reply(self, session: Session, message: Message) -> None:
        """Tell whoever sends parts that nobody reads them."""
        session.controls.tell_cancelled(message.dest_callback_id)
        self.mark_dirty(session)

    # Writing.

    def _open_reply(self, session: Session, message: Message) -> None:
        """A message has come whose response may come in parts. How long it waits for those the reader says later."""
        message.credit = session.controls.open_reply(message.source_callback_id)
        if message.deadline_at > session.heard_at:
            message.deadline_at = FOREVER

    def reply_part(self, message: Message, contents: Buffer, now: float) -> int:
        """Queue a part of the response to a message; more follow.

        Returns:
            Its id.

        Raises:
            ValueError: The sender did not ask for parts.
            Cancelled: Nobody reads any more.
            QueueFull: The reader has not taken what was sent before; wait while `is_held_up`.
            MessageTooLarge: Nothing was queued.
        """
        credit, session = message.credit, message.link
        if credit is None or not isinstance(session, Session):
            raise ValueError(f"the sender of {message} asked for one response; it must use `stream` to get parts")
        if message.is_given_up(now):
            raise Cancelled(f"{message}: nobody reads its response any more", message.source_callback_id)
        if not credit.has_room:
            raise QueueFull(self.why_held_up(session, message))
        message_id = self.send(session, b"", contents, None, None, message.source_callback_id, FOREVER, is_timed=False)
        session.queue[-1].option = Option(0, OptionKind.MORE)
        session.is_plain = False
        if not credit.sent_msgs:
            # From now on the credit bounds it; a worker that waits for its reader must not hold up the window.
            session.note_unrun(message.number)
        credit.note_sent(len(contents))
        return message_id

    def is_held_up(self, outlet: Outlet, message: Message | None = None) -> bool:
        """Return whether an outlet takes no message now, or no part of the response to one."""
        if message is not None and message.credit is not None:
            if message.is_given_up(0.0):
                return False  # That is to be told.
            if not message.credit.has_room:
                return True
        return self.is_full(outlet)

    def why_held_up(self, outlet: Outlet, message: Message | None = None) -> str:
        """Return what is full, for people."""
        credit = message.credit if message is not None else None
        if credit is not None and not credit.has_room:
            waiting_msgs, waiting_bytes = credit.sent_msgs - credit.taken_msgs, credit.sent_bytes - credit.taken_bytes
            return f"the reader at {outlet} has not taken {waiting_msgs} parts, {waiting_bytes} bytes of a stream"
        return f"the queue to {outlet} is full ({len(outlet.queue)} messages)"
