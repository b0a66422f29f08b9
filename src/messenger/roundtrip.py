"""How long the other end takes to answer, and so how long to wait for it (RFC 6298, section 2); when to send again.

One message is timed at a time, and none that was sent twice: its answer may be to either (Karn's rule).

What must never happen here: a `timeout_s` outside of `RTO_MIN_S` to `RTO_MAX_S`.
"""

import math

from .limits import RESEND_S_MAX, RESENDS_DOUBLED_MAX, RTO_INITIAL_S, RTO_MAX_S, RTO_MIN_S


class RoundTrip:
    """The estimate of one session.

    Attributes:
        timeout_s: After so many seconds without an acknowledgement it is time to ask for one.
        timed_number: Of the message that is timed now, 0 if none is.
        timed_at: When it was sent.
    """

    __slots__ = ("_smoothed_s", "_variation_s", "timed_at", "timed_number", "timeout_s")

    def __init__(self) -> None:
        self.timeout_s = RTO_INITIAL_S
        self.timed_number = 0
        self.timed_at = 0.0
        self._smoothed_s: float | None = None
        self._variation_s = 0.0

    def note(self, seconds: float) -> None:
        """Note the round trip of the message that is timed, and time it no more."""
        self.timed_number = 0
        if self._smoothed_s is None:
            self._smoothed_s, self._variation_s = seconds, seconds / 2
        else:
            self._variation_s += (abs(self._smoothed_s - seconds) - self._variation_s) / 4
            self._smoothed_s += (seconds - self._smoothed_s) / 8
        self.timeout_s = min(max(self._smoothed_s + 4 * self._variation_s, RTO_MIN_S), RTO_MAX_S)


class Resends:
    """When what a peer has not received is sent again, since it says that it lacks it."""

    __slots__ = ("_after", "_at", "_count")

    def __init__(self) -> None:
        self._after = -1
        self._at = -math.inf
        self._count = 0

    def is_due(self, received_through: int, now: float, timeout_s: float) -> bool:
        """Return whether to send again, and note that; at doubled intervals, if the peer receives nothing of it."""
        if received_through != self._after:
            self._count = 0
        elif now < self._at + min(timeout_s / 2 * 2 ** min(self._count, RESENDS_DOUBLED_MAX), RESEND_S_MAX):
            return False
        else:
            self._count += 1
        self._after, self._at = received_through, now
        return True
