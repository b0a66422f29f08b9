"""A network that loses, doubles, delays, reorders and cuts, as the seed says, and that ZeroMQ's sockets stand on.

A **wire** is one life of a ZeroMQ connection between a connection's link and a listener's; a listener's link knows it
by a routing id of its own. A cut ends a wire; both ends notice it later, each at its own time, and the connection then
makes a new one. Until an end has noticed, what it sends is taken and goes nowhere, as with ZeroMQ.

Modes: FIFO is what TCP gives (nothing is lost but with its wire), LOSSY keeps the order but loses and doubles, HARSH
also reorders freely and delivers what a wire carried after it was cut.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from messenger.link import Link

if TYPE_CHECKING:
    from .process import Process

# Directions of a wire.
TO_LISTENER = 0
TO_CONNECTION = 1

Packet = tuple[bytes, ...]


class Mode(Enum):
    """How faithful a wire is while it lasts."""

    FIFO = "fifo"
    LOSSY = "lossy"
    HARSH = "harsh"


class Weather(msgspec.Struct, kw_only=True):
    """What happens to single packets; the fault-free default is what healing brings back.

    Attributes:
        delay_s: Of every packet, at least and at most.
        late_share: Of the packets, that come 0.2 to 3 s late.
    """

    mode: Mode
    delay_s: tuple[float, float]
    late_share: float = 0.0
    loss: float = 0.0
    doubling: float = 0.0


class Wire:
    """One life of a connection between two sockets."""

    def __init__(self, number: int, connection: "ConnectionLink", listener: "ListenerLink") -> None:
        self.routing_id = b"wire%d" % number
        self.connection = connection
        self.listener = listener
        self.is_cut = False
        # What was under way when it was cut still arrives.
        self.drains = False
        self.under_way: tuple[deque[Packet], deque[Packet]] = (deque(), deque())
        self.last_at = [0.0, 0.0]

    def __str__(self) -> str:
        return self.routing_id.decode()


class SimLink(Link):
    """A socket of a process."""

    # Sets of links must be walked in the same order in every run, so the address may not be the hash.
    def __init__(self, network: "Network", process: "Process", handle: Any, callback: Callable[[Any], Any] | None):
        super().__init__(handle, callback)
        self.network = network
        self.process = process
        self.number = network.next_number()

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other

    def flush(self, now: float) -> None:
        """Nothing is queued at a socket itself; that is the basic dialect."""


class ConnectionLink(SimLink):
    """A DEALER: it has a wire or none, and its session is told only when the process looks."""

    wire: Wire | None = None
    told_up = False

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        """Give a packet to the wire; it may be cut without anybody here knowing."""
        if self.wire is None:
            return False
        self.network.transmit(self.wire, TO_LISTENER, tuple(frames))
        return True


class ListenerLink(SimLink):
    """A ROUTER that is MANDATORY: what it cannot route is refused."""

    def __init__(self, network: "Network", process: "Process", handle: Any, callback: Callable[[Any], Any] | None):
        super().__init__(network, process, handle, callback)
        self.routes: dict[bytes, Wire] = {}

    def send_frames(self, routing_id: bytes, frames: Sequence[bytes]) -> bool:
        """Give a packet to a peer's wire."""
        wire = self.routes.get(routing_id)
        if wire is None:
            return False
        self.network.transmit(wire, TO_CONNECTION, tuple(frames))
        return True


class Network:
    """All wires, and what happens on them.

    Args:
        schedule: Called with an instant, a function and its arguments.
        clock: Returns now.
        watch: Sees every packet that is sent (True) or arrives (False), by a process.
    """

    def __init__(
        self,
        rng: Random,
        clock: Callable[[], float],
        schedule: Callable[..., None],
        note: Callable[..., None],
        watch: Callable[["Process", Packet, bool], None],
        weather: Weather,
    ) -> None:
        self.weather = weather
        self.wires: list[Wire] = []
        self.dial: Callable[[], ListenerLink | None]
        self._rng = rng
        self._clock = clock
        self._schedule = schedule
        self._note = note
        self._watch = watch
        self._number = 0
        # By a client's identity and direction: until when nothing passes.
        self._blocked: dict[tuple[str, int], float] = {}

    def next_number(self) -> int:
        """Return a number that no other wire or link has."""
        self._number += 1
        return self._number

    # Packets.

    def transmit(self, wire: Wire, direction: int, packet: Packet) -> None:
        """Take a packet off a process."""
        sender = wire.connection.process if direction == TO_LISTENER else wire.listener.process
        sender.simulator.note_step()
        if not sender.is_alive:
            return  # It was killed before it could send this.
        self._watch(sender, packet, True)
        if wire.is_cut:
            return
        weather, rng = self.weather, self._rng
        copies = 1
        if weather.mode is not Mode.FIFO:
            if weather.loss and rng.random() < weather.loss:
                return
            if weather.doubling and rng.random() < weather.doubling:
                copies = 2
        for _ in range(copies):
            arrives_at = self._clock() + rng.uniform(*weather.delay_s)
            if weather.late_share and rng.random() < weather.late_share:
                arrives_at += rng.uniform(0.2, 3.0)
            if weather.mode is Mode.HARSH:
                self._schedule(arrives_at, self._arrive, wire, direction, packet)
            else:
                arrives_at = max(arrives_at, wire.last_at[direction])
                wire.last_at[direction] = arrives_at
                wire.under_way[direction].append(packet)
                self._schedule(arrives_at, self._arrive_next, wire, direction)

    def _blocked_until(self, wire: Wire, direction: int) -> float:
        return self._blocked.get((wire.connection.process.site.name, direction), 0.0)

    def _arrive_next(self, wire: Wire, direction: int) -> None:
        """The oldest packet under way arrives, unless a partition holds it up as TCP would."""
        blocked_until = self._blocked_until(wire, direction)
        if blocked_until > self._clock() and not wire.is_cut:
            if self.weather.mode is Mode.LOSSY:
                wire.under_way[direction].popleft()
            else:
                self._schedule(blocked_until, self._arrive_next, wire, direction)
            return
        if wire.under_way[direction]:
            self._arrive(wire, direction, wire.under_way[direction].popleft())

    def _arrive(self, wire: Wire, direction: int, packet: Packet) -> None:
        if (wire.is_cut and not wire.drains) or self._blocked_until(wire, direction) > self._clock():
            return
        link = wire.listener if direction == TO_LISTENER else wire.connection
        process = link.process
        if process.is_alive:
            process.take_packet(link, wire.routing_id if direction == TO_LISTENER else b"", packet)

    # Wires.

    def connect(self, link: ConnectionLink, wait_s: float = 0.05) -> None:
        """Try to reach the listener, and again later if nobody is there."""
        if not link.process.is_alive or link.wire is not None:
            return
        site, now = link.process.site.name, self._clock()
        listener = self.dial()
        if listener is None or any(self._blocked.get((site, direction), 0.0) > now for direction in (0, 1)):
            wait_s = min(wait_s * (1 + self._rng.random()), 0.5)
            self._schedule(now + wait_s, self.connect, link, wait_s)
            return
        wire = Wire(self.next_number(), link, listener)
        self.wires.append(wire)
        listener.routes[wire.routing_id] = wire
        link.wire = wire
        self._note("connect", link.process, wire)
        link.process.wake_soon()

    def cut(self, wire: Wire, noticed_s: tuple[float, float], again_s: float, *, drains: bool = False) -> None:
        """End a wire; the connection notices first or the listener does, and the connection makes another."""
        if wire.is_cut:
            return
        wire.is_cut = True
        wire.drains = drains or (self.weather.mode is Mode.HARSH and self._rng.random() < 0.5)
        self.wires.remove(wire)
        now = self._clock()
        self._note("cut", wire)
        self._schedule(now + noticed_s[0], self._notice_at_connection, wire, again_s)
        self._schedule(now + noticed_s[1], self._notice_at_listener, wire)

    def _notice_at_connection(self, wire: Wire, again_s: float) -> None:
        link = wire.connection
        if link.wire is wire:
            link.wire = None
            self._schedule(self._clock() + again_s, self.connect, link)
            link.process.wake_soon()

    def _notice_at_listener(self, wire: Wire) -> None:
        wire.listener.routes.pop(wire.routing_id, None)

    def partition(self, site: str, directions: Sequence[int], until: float) -> None:
        """Let nothing pass between a client's site and the server; what TCP would have cut by then is cut."""
        now = self._clock()
        self._note("partition", site, *directions, until)
        for direction in directions:
            self._blocked[site, direction] = until
        if until - now > 1.5 and self.weather.mode is not Mode.HARSH:
            for wire in [wire for wire in self.wires if wire.connection.process.site.name == site]:
                noticed_s = (self._rng.uniform(1.0, 3.5), self._rng.uniform(1.0, 3.5))
                self._schedule(now + min(noticed_s), self.cut, wire, (0.0, abs(noticed_s[0] - noticed_s[1])), 0.1)

    def end_process(self, process: "Process", *, drains: bool) -> None:
        """All wires of a process end with it; what it sent may still arrive."""
        quick = self._rng.random() < 0.8
        for wire in [w for w in self.wires if process in (w.connection.process, w.listener.process)]:
            noticed_s = self._rng.uniform(0.0005, 0.01) if quick else self._rng.uniform(0.5, 3.5)
            self.cut(wire, (noticed_s, noticed_s), self._rng.uniform(0.05, 0.5), drains=drains)

    def heal(self, weather: Weather) -> None:
        """End all faults."""
        self._note("heal")
        self._blocked.clear()
        self.weather = weather
