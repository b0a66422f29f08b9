"""What users hold: a `Connection` that they made, a `Listener` that they opened; and all of those of one messenger."""

import logging
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from .destination import Destination
from .errors import DestinationInvalid, LimitReached, MessengerClosed, SecurityError
from .exchange import Exchange
from .limits import Limits
from .link import GoneOutlet, Outlet
from .message import Callback, Message
from .ordering import KeyOrder
from .security import KeyPair, Security, ServerKey
from .transports.connection import ConnectionLink
from .transports.curve import CurveListenerLink
from .transports.listener import ListenerLink
from .transports.local import best_endpoint
from .transports.zap import Gate
from .transports.zeromq import SocketLink
from .wire import decode_identity, encode_identity

logger = logging.getLogger("messenger")


class Driver(Protocol):
    """What the endpoints need of the loop that serves them.

    Attributes:
        uses_threads: Whether a listener may have worker threads.
    """

    uses_threads: bool

    def add(self, link: SocketLink) -> None:
        """Receive from a link from now on."""

    def remove(self, link: SocketLink, why: str) -> None:
        """Forget a link, before it is closed."""

    def run_in_worker(self, callback: Any, message: Message) -> None:
        """Run a callback in the calling thread, survive it, and note that the message is processed."""

    def count_drop(self, kind: str) -> None:
        """Count a message that goes no further."""


class _Endpoint:
    # Only a listener has others, see there.
    worker_count = 0
    order_by: "KeyFunction | None" = None

    def __init__(self, messenger: Any, destination: Destination) -> None:
        self.messenger = messenger
        self.destination = destination
        self.closed = False

    @property
    def links(self) -> Sequence[ConnectionLink | ListenerLink]:
        """The sockets, for the messenger."""
        raise NotImplementedError

    def close(self) -> Any:
        """Send what ZeroMQ already has, for up to a second, then close. Twice is fine.

        Messages that wait for a response here end with an error: `NotDelivered`, or `OutcomeUnknown` if they have left.

        Returns:
            Of an `AsyncMessenger`: an awaitable that waits until its endpoints are free; it is closing even so.

        Thread: any.
        """
        return self.messenger._close_endpoint(self)

    def close_links(self, linger_s: float) -> None:
        """Close the sockets, once nobody uses them any more."""
        for link in self.links:
            link.close(linger_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Connection(_Endpoint):
    """A link to one destination, made by `make_connection` or by the first message to a destination.

    Attributes:
        destination: Where it leads.
        routing_id: In the basic dialect, what a plain ROUTER knows it by: the messenger's identity, with `#2`, `#3`…
            for further connections of one messenger to one destination.
        closed: Whether `close` was called.
    """

    link: ConnectionLink
    outlet: Outlet
    routing_id: str

    @property
    def endpoint(self) -> str:
        """The ZeroMQ endpoint that was chosen for the destination."""
        return self.link.endpoint

    @property
    def links(self) -> Sequence[ConnectionLink]:
        """The socket, for the messenger."""
        return (self.link,)

    def __str__(self) -> str:
        return str(self.destination)

    def __repr__(self) -> str:
        return f"<Connection to {self.destination} by {self.endpoint}>"


class Listener(_Endpoint):
    """An open destination with its server-loop callback, made by `listen_for_connection`.

    Attributes:
        destination: What was opened; a port of 0 has become the port that was free.
        identity: What plain peers see as the sender of its messages.
        closed: Whether `close` was called.
        worker_count: How many of its messages may be in its callback at one time; 0 without workers.
        order_by: Names the key of a message; those of one key are in the callback one after the other (`KeyOrder`).
    """

    identity: str
    workers: "Workers | None" = None

    def __init__(self, messenger: Any, destination: Destination) -> None:
        super().__init__(messenger, destination)
        self._links: list[ListenerLink] = []

    @property
    def port(self) -> int:
        """The port, 0 if the destination has none."""
        return self.destination.port

    @property
    def endpoints(self) -> list[str]:
        """The ZeroMQ endpoints that are bound, best first."""
        return [link.endpoint for link in self._links]

    @property
    def links(self) -> Sequence[ListenerLink]:
        """The sockets, best first, for the messenger."""
        return self._links

    def add_link(self, link: ListenerLink) -> None:
        """Note a socket that was bound, in front of those that are there."""
        self._links.insert(0, link)

    def close_links(self, linger_s: float) -> None:
        """Close the sockets, and let the workers end."""
        if self.workers is not None:
            self.workers.stop()
        super().close_links(linger_s)

    def __str__(self) -> str:
        return f"a peer of {self.destination}"

    def __repr__(self) -> str:
        return f"<Listener on {', '.join(self.endpoints)}>"


# Names what messages have in common that are to run one after the other.
KeyFunction = Callable[[Message], Hashable]
To = Connection | Message | tuple[Listener, str] | Destination | str | int


class Workers:
    """Threads that run a listener's callback, so that one slow message does not hold up the messenger's loop.

    Messages start in the order in which they arrived; which of them ends first is open. With `order_by`, a message
    starts only when those of the same key that arrived before it are done.
    """

    def __init__(
        self, count: int, backlog_max: int, driver: Driver, callback: Callback, order_by: KeyFunction | None
    ) -> None:
        self._backlog_max = backlog_max
        self._driver = driver
        self._callback = callback
        self._order_by = order_by
        self._order: KeyOrder[Message] = KeyOrder()
        # With their keys; without an order that is None.
        self._queue: queue.SimpleQueue[tuple[Hashable, Message] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending_count = 0
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"messenger-worker-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending_count(self) -> int:
        """Messages that wait or run."""
        return self._pending_count

    def submit(self, message: Any) -> None:
        """Queue a message for the next free thread."""
        # A session's window bounds what it sends; a plain peer cannot be told to slow down.
        if not message.number and self._queue.qsize() + self._order.waiting_count >= self._backlog_max:
            self._driver.count_drop("workers_full")
            return
        try:
            key = None if self._order_by is None else self._order_by(message)
            with self._lock:
                may_start = self._order_by is None or self._order.admit(key, message)
                self._pending_count += 1
                if may_start:
                    self._queue.put((key, message))
        except BaseException as error:  # Of the key, which may not even be comparable.
            self._driver.run_in_worker(partial(_fail, error), message)

    def stop(self) -> None:
        """Let each thread end once nothing waits; does not wait."""
        with self._lock:
            self._is_stopping = True
            for _ in self._threads:
                self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            key, message = item
            while (following := self._finish(key, message)) is not None:
                message = following

    def _finish(self, key: Hashable, message: Message) -> Message | None:
        """Run a message; return the one of its key that this thread is to go on with, if there is one."""
        self._driver.run_in_worker(self._callback, message)
        with self._lock:
            self._pending_count -= 1
            following = None if self._order_by is None else self._order.release(key)
            if following is None or self._is_stopping:
                return following  # Behind the end of the queue it would never start.
            self._queue.put((key, following))  # Behind those of other keys that came meanwhile.
        return None


def _fail(error: BaseException, _: Message) -> None:
    """Stand in for a callback whose message has no key: its sender is told as if it had raised."""
    raise error


class Endpoints:
    """The connections and listeners of one messenger. Called with its lock held, unless a method says otherwise."""

    def __init__(self, messenger: Any, limits: Limits, security: Security, exchange: Exchange) -> None:
        self._messenger = messenger
        self.limits = limits
        self._security = security
        self._exchange = exchange
        self._gate = Gate(security, security.key, messenger.identity) if security.key is not None else None
        self._counted_refusals = 0
        self._open: set[Connection | Listener] = set()
        self._by_destination: dict[Any, Connection] = {}

    def count(self, kind: type) -> int:
        """Return how many are open, of connections or of listeners."""
        return sum(isinstance(endpoint, kind) for endpoint in self._open)

    def listen(
        self,
        destination: Destination,
        callback: Callback | None,
        identity: str,
        worker_count: int,
        driver: Driver,
        order_by: KeyFunction | None,
    ) -> Listener:
        """Open a listener; see `Messenger.listen_for_connection`."""
        self._check_exposed(destination)
        self._check_count(Listener, "listeners_max", self.limits.listeners_max)
        listener = Listener(self._messenger, destination)
        listener.identity = identity
        listener.worker_count = worker_count
        listener.order_by = order_by
        if callback is not None and worker_count and driver.uses_threads:
            listener.workers = Workers(worker_count, self.limits.worker_backlog_max, driver, callback, order_by)
            callback = listener.workers.submit
        try:
            self._bind(listener, callback)
        except BaseException:
            listener.close_links(0)
            raise
        self._adopt(listener, driver)
        if self._gate is None and not destination.is_loopback():
            logger.warning("! %s can be reached by anybody, without security", destination)
        return listener

    def _bind(self, listener: Listener, callback: Callback | None) -> None:
        """Bind all endpoints of a listener's destination, or raise; what is bound stands in `listener.links`."""

        def bind(endpoint: str) -> None:
            identity = encode_identity(listener.identity)
            others = (endpoint, identity, listener, callback, self._exchange, self.limits)
            if self._gate is not None and endpoint.startswith("tcp:"):
                self._gate.open()
                link: ListenerLink = CurveListenerLink(self._gate, *others)
            else:
                link = ListenerLink(*others)
            link.has_workers = listener.workers is not None
            listener.add_link(link)

        # The tcp port comes first: it may be any free one, and then names the others.
        *local_endpoints, last_endpoint = listener.destination.endpoints()
        bind(last_endpoint)
        if last_endpoint.startswith("tcp:") and listener.destination.port == 0:
            port = int(listener.endpoints[0].rpartition(":")[2])
            listener.destination = msgspec.structs.replace(listener.destination, port=port)
            local_endpoints = listener.destination.endpoints()[:-1]
        for endpoint in reversed(local_endpoints):
            bind(endpoint)

    def connect(self, destination: Destination, callback: Callback | None, dialect: str, driver: Driver) -> Connection:
        """Open a connection; see `Messenger.make_connection`."""
        if destination.port == 0 and destination.transport in (None, "tcp"):
            raise DestinationInvalid(f"{destination}: port 0 is only for listeners")
        self._check_count(Connection, "connections_max", self.limits.connections_max)
        connection = Connection(self._messenger, destination)
        is_basic = dialect == "basic"
        connection.routing_id = self._make_routing_id(destination) if is_basic else ""
        routing_id = encode_identity(connection.routing_id)
        keys = self._keys_for(destination)
        endpoint = best_endpoint(self._endpoints_of(destination))
        link = ConnectionLink(routing_id, connection, callback, self._exchange, self.limits, keys)
        connection.link = link
        connection.outlet = link if is_basic else self._exchange.handshake.open(link)
        self._adopt(connection, driver)
        try:
            link.attach(endpoint)
        except DestinationInvalid:
            self.discard(connection)
            driver.remove(link, "it cannot be connected")
            link.close(0)
            raise
        return connection

    def _keys_for(self, destination: Destination) -> tuple[KeyPair, ServerKey] | None:
        """Return the keys for a connection, None if it does without; refuse one that would have to and must not."""
        own, server = self._security.key, self._security.server_key(destination)
        if own is not None and server is None and destination.transport == "tcp":
            raise SecurityError(f"{destination}: the key of the server there is not known; give Security(servers=…) it")
        return None if own is None or server is None else (own, server)

    def _endpoints_of(self, destination: Destination) -> list[str]:
        """Return the endpoints that may be used: who has a key uses no tcp without the key of the server."""
        endpoints = destination.endpoints()
        is_local = self._gate is not None and self._security.server_key(destination) is None
        return [endpoint for endpoint in endpoints if not (is_local and endpoint.startswith("tcp:"))]

    def _make_routing_id(self, destination: Destination) -> str:
        """Return the identity, with a number if another connection may already show it to the same socket."""
        places = set(destination.endpoints())
        taken = {
            other.routing_id
            for other in self._open
            if isinstance(other, Connection) and not places.isdisjoint(other.destination.endpoints())
        }
        identity: str = self._messenger.identity
        routing_id, number = identity, 2
        while routing_id in taken:
            routing_id, number = f"{identity}#{number}", number + 1
        return routing_id

    def _adopt(self, endpoint: Connection | Listener, driver: Driver) -> None:
        self._open.add(endpoint)
        for link in endpoint.links:
            driver.add(link)

    def route(self, to: Any, driver: Driver) -> tuple[Any, bytes, bool]:
        """Return the outlet to send by, the routing id there, and whether the peer may be at another of its links."""
        route: tuple[Any, bytes, bool]
        kind = type(to)  # Nobody derives from these, and isinstance costs more.
        if kind is Message:
            outlet = to.link
            endpoint: Any = outlet.handle
            if to.incarnation != outlet.peer_incarnation:
                outlet = GoneOutlet(endpoint)
            route = (outlet, to.peer if outlet.is_shared else b"", False)
        elif kind is Connection:
            endpoint = to
            route = (to.outlet, b"", False)
        elif isinstance(to, tuple):
            if len(to) != 2 or not isinstance(to[0], Listener) or not isinstance(to[1], str):
                raise TypeError(f"a pair to send to is (listener, identity), not {to!r}")
            endpoint = to[0]
            identity = encode_identity(to[1])
            session = self._exchange.handshake.find(endpoint, identity)
            # Whom no session knows may be a plain peer, at any of the sockets.
            route = (endpoint.links[0], identity, True) if session is None else (session, b"", False)
        else:
            try:
                endpoint = self._by_destination.get(to)
            except TypeError as error:
                raise TypeError(
                    f"{to!r} is nothing to send to; give a connection, a message, or a destination"
                ) from error
            if endpoint is None:
                destination = Destination.parse(to)
                endpoint = self._by_destination.get(destination) or self.connect(destination, None, "session", driver)
                self._by_destination[to] = self._by_destination[destination] = endpoint
            route = (endpoint.outlet, b"", False)
        if endpoint.closed:
            raise MessengerClosed(f"{endpoint!r} is closed")
        if endpoint.messenger is not self._messenger:
            raise ValueError(f"{to!r} belongs to {endpoint.messenger!r}, not to {self._messenger!r}")
        return route

    def attach_connections(self) -> Iterable[ConnectionLink]:
        """Choose anew for connections that lead nowhere; return their links."""
        for endpoint in self._open:
            if isinstance(endpoint, Connection) and endpoint.link.must_attach():
                best = best_endpoint(self._endpoints_of(endpoint.destination))
                if best.startswith("inproc:") or best != endpoint.endpoint:
                    endpoint.link.attach(best)
                yield endpoint.link

    def discard(self, endpoint: Any) -> None:
        """Forget an endpoint that is being closed."""
        endpoint.closed = True
        self._open.discard(endpoint)
        self._by_destination = {key: kept for key, kept in self._by_destination.items() if kept is not endpoint}

    def are_idle(self) -> bool:
        """Return whether no worker has anything to do."""
        return not any(
            endpoint.workers is not None and endpoint.workers.pending_count
            for endpoint in self._open
            if isinstance(endpoint, Listener)
        )

    def count_refusals(self) -> None:
        """Add up what the gate has refused; it takes no lock, so it does not count among the rest itself."""
        if self._gate is not None and self._gate.refused_count > self._counted_refusals:
            refused_count = self._gate.refused_count
            self._exchange.dropped["refused_key"] += refused_count - self._counted_refusals
            self._counted_refusals = refused_count

    def cut_revoked(self) -> None:
        """End the sessions of those whose keys are not on the allow-list any more, or under another identity."""
        handshake = self._exchange.handshake
        for link in [link for endpoint in self._open for link in endpoint.links if isinstance(link, CurveListenerLink)]:
            link.forget_revoked()
            for session in [session for session in handshake.sessions if link.is_revoked(session)]:
                handshake.expel(session, "its key was taken off the allow-list")
                name = decode_identity(session.peer)
                logger.warning("! the session with %r was ended, its key is not allowed any more", name)

    def detach_all(self) -> list[Connection | Listener]:
        """Forget all endpoints, once nobody uses the sockets, and return them. Called without the lock."""
        self._security.off_reload(self._messenger._cut_revoked)
        if self._gate is not None:
            self._gate.close()
        endpoints = list(self._open)
        for endpoint in endpoints:
            self.discard(endpoint)
        return endpoints

    def close_all(self, linger_s: float) -> None:
        """Close everything, once nobody uses the sockets. Called without the lock."""
        for endpoint in self.detach_all():
            endpoint.close_links(linger_s)

    def _check_count(self, kind: type, name: str, limit: int) -> None:
        if self.count(kind) >= limit:
            raise LimitReached(f"{limit} {kind.__name__.lower()}s are open, that is {name}")

    def _check_exposed(self, destination: Destination) -> None:
        security = self._security
        if not destination.is_loopback() and security.key is None and not security.insecure:
            raise DestinationInvalid(
                f"{destination} can be reached from other machines, and nothing would check who connects; give "
                "Messenger(security=Security(key=…, allow=…)) (`messenger keygen` makes keys), listen on a loopback "
                "address, or say Security(insecure=True) if the network is trusted"
            )
        if destination.transport in (None, "tcp") and security.key is not None and not security.allowed:
            raise SecurityError(f"{destination}: nobody could connect; say Security(allow=…) who may")
