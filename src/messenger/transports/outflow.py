"""How much libzmq holds of what it was given for one plain peer, which it does not tell.

A peer that does not read must not fill the memory, and libzmq's high-water mark is in messages, of any size. But pyzmq
tells when libzmq has let go of a message that was given without a copy, as a **mark**. They go in order, so of each
`OUTFLOW_MARK_BYTES` for a peer one message is enough, and what was given before it has gone with it.

A session needs none of this: its window bounds what is under way.
"""

from collections import deque

import zmq

from ..limits import OUTFLOW_MARK_BYTES, OUTFLOWS_SWEEP_MIN


class Outflow:
    """What is on its way to one plain peer. It is wrong by less than `OUTFLOW_MARK_BYTES`."""

    __slots__ = ("_held_bytes", "_marks", "_unmarked_bytes")

    def __init__(self) -> None:
        self._marks: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._held_bytes = self._unmarked_bytes = 0

    def held_bytes(self) -> int:
        """Return how many bytes libzmq holds, as far as it has marks."""
        marks = self._marks
        while marks and marks[0][0].done:
            self._held_bytes -= marks.popleft()[1]
        return self._held_bytes

    def add(self, data: bytes) -> bytes | zmq.Frame:
        """Note that a message is given to libzmq; return what to give in its place, which may be a mark."""
        self._unmarked_bytes += len(data)
        if self._unmarked_bytes < OUTFLOW_MARK_BYTES:
            return data
        mark = zmq.Frame(data, track=True, copy_threshold=0)
        self._marks.append((mark.tracker, self._unmarked_bytes))
        self._held_bytes += self._unmarked_bytes
        self._unmarked_bytes = 0
        return mark


class Outflows:
    """Those of all plain peers of a listener, by what its core knows them by."""

    def __init__(self) -> None:
        self._by_peer: dict[bytes, Outflow] = {}
        self._sweep_count = OUTFLOWS_SWEEP_MIN

    def of(self, peer: bytes) -> Outflow:
        """Return that of a peer, and now and then forget those of which nothing is held."""
        outflow = self._by_peer.get(peer)
        if outflow is None:
            if len(self._by_peer) >= self._sweep_count:
                self._by_peer = {other: flow for other, flow in self._by_peer.items() if flow.held_bytes()}
                self._sweep_count = max(OUTFLOWS_SWEEP_MIN, 2 * len(self._by_peer))
            outflow = self._by_peer[peer] = Outflow()
        return outflow
