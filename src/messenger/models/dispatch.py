"""Which server gets which command, and what becomes of it.

A command waits until a server is ready, goes to the one that has least to do, and has exactly one outcome: its answer,
or an error that says whether it may have run. An inference has no effect, so if its server is lost another one gets it;
nothing else is ever given to a second server.

One lock guards the tables. What must never happen here: a call to the messenger, or a job that ends and so runs a
user's callback, with that lock held.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from messenger import (
    ECHO,
    DeliveryError,
    HandlerError,
    Message,
    MessageTooLarge,
    Messenger,
    MessengerError,
    NotDelivered,
)

from .batching import Batch, Batcher, InferCall
from .errors import (
    BadAnswer,
    CommandFailed,
    ManagerStopped,
    ModelError,
    NoServer,
    Overloaded,
    ServerLost,
    TrainingCancelled,
    error_of,
)
from .jobs import Job, Progress
from .limits import ATTEMPTS_MAX, CALL_TIMEOUT_S, HUNG_S, QUEUED_CALLS_MAX
from .peers import Call, Server, as_timeout, count_open, find_taker
from .protocol import (
    CONNECTED,
    PROGRESS,
    Answer,
    Command,
    ReceivedCommand,
    ServerHello,
    decode_answer,
    decode_command,
    encode,
)
from .supervisor import Slot, Supervisor, is_over

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger("messenger.models")
RETRY_S = 1.0


class Dispatcher:
    """The servers of a manager, and the calls that wait for them or are open.

    Args:
        messenger: That servers are reached with.
        batcher: Holds the calls of `infer` that wait.
        on_progress: Told of each report of a training.
        on_command: Told of each command that a client sends.
    """

    supervisor: Supervisor

    def __init__(
        self,
        messenger: Messenger,
        batcher: Batcher,
        on_progress: Callable[[Progress], None],
        on_command: "Callable[[Message, ReceivedCommand, NDArray[Any] | None], None]",
    ) -> None:
        self.lock = threading.Lock()
        self.servers: dict[str, Server] = {}
        self.waiting: deque[Call] = deque()
        self.counts: Counter[str] = Counter()
        self.stopped = False
        self._messenger = messenger
        self._batcher = batcher
        self._on_progress = on_progress
        self._on_command = on_command

    # Calls. Any thread.

    def submit(self, call: Call, server: Server | None = None) -> None:
        """Have a command carried out, by one server if one is given; its job tells what became of it."""
        error: ModelError | None = None
        with self.lock:
            self.counts["commands"] += 1
            if call.is_given_up:
                error = TrainingCancelled("the training was cancelled before a server took it")
            elif self.stopped:
                error = ManagerStopped(f"{call.cmd} is not sent: the manager is stopped")
            elif server is not None:
                server.take(call)
            elif len(self.waiting) >= QUEUED_CALLS_MAX:
                error = Overloaded(f"{len(self.waiting)} commands wait, that is the limit", RETRY_S)
            else:
                error = self._find_hopeless(call.cmd)
                if error is None:
                    self.waiting.append(call)
        if error is not None:
            call.fail(error)
        elif server is not None:
            self._send(call, server)
        else:
            self.pump()

    def submit_infer(self, name: str, version: int, infer_call: InferCall) -> None:
        """Have rows predicted."""
        error: ModelError | None = None
        call, is_alone = None, False
        with self.lock:
            self.counts["infers"] += 1
            if self.stopped:
                error = ManagerStopped("INFER is not sent: the manager is stopped")
            elif not self._batcher.call_count and (server := find_taker(self.servers.values(), infer_call.queued_at)):
                # The usual case, made short: nothing waits.
                infer_call.attempts = 1
                call = self._give(server, Batch(name, version, [infer_call], infer_call.queued_at))
                is_alone = sum([each.batch_count for each in self.servers.values()]) == 1
            else:
                error = self._queue_infer(name, version, infer_call)
        if error is not None:
            infer_call.job.settle_error(error)
        elif call is not None:
            self._send(call, call.server)
            if is_alone:
                # Several that wait would hand the lead to each other; then the messenger's thread is faster.
                infer_call.job.may_fetch(self._messenger, call.message_id)
        else:
            self.pump()

    def _queue_infer(self, name: str, version: int, infer_call: InferCall) -> ModelError | None:
        error: ModelError | None = self._find_hopeless("INFER")
        if error is None:
            try:
                self._batcher.add(name, version, infer_call, len(self.servers))
            except Overloaded as overloaded:
                self.counts["overloaded"] += 1
                error = overloaded
        return error

    def give_up(self, call: Call) -> None:
        """End a training: at once if no server has it, else by the server.

        A server must not hear of the cancel before it hears of the training, or the cancel is lost. So while another
        thread is about to queue or send the training, it is that thread that cancels it, when that is done.
        """
        with self.lock:
            call.is_given_up = True
            is_waiting = call in self.waiting
            if is_waiting:
                self.waiting.remove(call)
            server = call.server if call.message_id else None
        if is_waiting:
            call.fail(TrainingCancelled("the training was cancelled before a server took it"))
        elif server is not None:
            self._cancel_at(server, call)

    def _cancel_at(self, server: Server, call: Call) -> None:
        if call.job is not None:
            self.submit(make_cancel(call.job.id), server)

    def pump(self) -> None:
        """Give servers what waits for them."""
        # Without the lock: whoever adds something that waits comes here after it.
        while self.waiting or self._batcher.call_count:
            with self.lock:
                call = self._take_next()
            if call is None:
                return
            self._send(call, call.server)

    def _take_next(self) -> Call | None:
        if not (self.waiting or self._batcher.call_count):
            return None
        now = time.monotonic()
        while self.waiting:
            ready = [server for server in self.servers.values() if server.is_ready(now)]
            if not ready:
                return None
            call = self.waiting.popleft()
            if call.job is None or not call.job.done():
                min(ready, key=count_open).take(call)
                return call
        server = find_taker(self.servers.values(), now)
        if server is None:
            return None
        batch = self._batcher.take(now, None if server.about.batches else 1)
        return None if batch is None else self._give(server, batch)

    def _give(self, server: Server, batch: Batch) -> Call:
        calls = batch.calls
        deadline_at = calls[0].deadline_at if len(calls) == 1 else max(call.deadline_at for call in calls)
        call = Call(cmd="INFER", deadline_at=deadline_at, batch=batch)
        server.take(call)
        return call

    def _find_hopeless(self, cmd: str) -> NoServer | None:
        """Return an error if no server is there and none will come."""
        if self.servers or not self.supervisor.slots or not self.supervisor.is_over():
            return None
        return NoServer(f"{cmd} is not sent: {self.supervisor.describe()}")

    def _send(self, call: Call, server: Server | None) -> None:
        if server is None:
            raise ValueError(f"{call.cmd} is sent to nobody")
        try:
            contents = call.contents if call.batch is None else call.batch.encode(server.about.npy)
            if call.cmd == "QUIT":
                self.tell_to_end(server)
                if server.slot is None:
                    self._lose(server, "it was told to end")
                return
            message_id = self._messenger.send_message(
                server.address,
                contents,
                partial(self._on_answer, call),
                on_error=partial(self._on_error, call),
                timeout=as_timeout(call.deadline_at - time.monotonic()),
            )
            with self.lock:
                call.message_id = message_id
                was_taken_away, is_given_up = id(call) not in server.open, call.is_given_up
            if was_taken_away:
                # The server was lost before there was an id to cancel. If it was answered, nothing happens.
                self._messenger.cancel(message_id)
            elif is_given_up:
                self._cancel_at(server, call)
        except Exception as error:
            # Of any kind: what rows are made of is the caller's, and a call that stays here would never end.
            with self.lock:
                server.let_go(call)
                if call.is_given_up:
                    error = TrainingCancelled(f"the training was cancelled, and could not be sent either: {error}")
            is_of_the_call = isinstance(error, MessageTooLarge) or not isinstance(error, MessengerError)
            if is_of_the_call and call.batch is not None and len(call.batch.calls) > 1:
                self._send_apart(call.batch, server)
            else:
                call.fail(error)

    def _send_apart(self, batch: Batch, server: Server) -> None:
        """Send calls each alone that cannot be sent together: what is wrong with one of them harms no other."""
        for each in batch.calls:
            with self.lock:
                call = self._give(server, Batch(batch.name, batch.version, [each], batch.sent_at))
            self._send(call, server)

    # Outcomes. On the messenger's thread, or on one that waits for a job.

    def _on_answer(self, call: Call, message: Message) -> None:
        if not self._let_go(call):
            return
        # The server works on while jobs end.
        self.pump()
        try:
            answer, array = decode_answer(message.contents)
            if not answer.success:
                raise error_of(answer.kind, answer.err, answer.retry_after_s)
            if call.batch is not None:
                call.batch.settle(answer, array)
            elif call.job is not None and call.convert is not None:
                call.job.settle(call.convert(answer))
        except MessengerError as error:
            if isinstance(error, BadAnswer):
                with self.lock:
                    self.counts["bad_answers"] += 1
            call.fail(error)

    def _on_error(self, call: Call, error: DeliveryError) -> None:
        if self._let_go(call):
            server = call.server
            if server is not None and not server.about.batches and isinstance(error, NotDelivered):
                # Nothing else tells that one in the basic dialect is gone. It gets nothing until it says hello again.
                if server.slot is not None:
                    self.supervisor.note_gone(server.slot)
                self._lose(server, str(error))
            self._end_lost(call, CommandFailed(str(error)) if isinstance(error, HandlerError) else error)
            self.pump()

    def _let_go(self, call: Call) -> bool:
        with self.lock:
            if call.server is None or not call.server.let_go(call):
                self.counts["late"] += 1
                return False
            if call.batch is not None:
                self._batcher.note_done(call.batch, time.monotonic(), call.server.about.batches)
        return True

    def _end_lost(self, call: Call, error: MessengerError) -> None:
        """End a call without an answer; inferences get another chance."""
        batch = call.batch
        if batch is None or isinstance(error, CommandFailed):
            call.fail(error)
            return
        now = time.monotonic()
        again = [
            each
            for each in batch.calls
            if each.attempts < ATTEMPTS_MAX and each.deadline_at > now and not each.job.done()
        ]
        with self.lock:
            if self.stopped or self._find_hopeless("INFER"):
                again = []
            self.counts["retried"] += len(again)
            self._batcher.put_back(Batch(batch.name, batch.version, again))
        kept = {id(each) for each in again}
        for each in batch.calls:
            if id(each) not in kept:
                each.job.settle_error(error)

    # Servers.

    def take(self, message: Message) -> None:
        """Take what arrives at the listener: hellos, progress, and the commands of clients. The SLC."""
        if message.dest_callback_id:
            return  # For a built-in callback.
        try:
            command, array = decode_command(message.contents)
        except (ValueError, RecursionError):
            self._take_answer(message)
        else:
            self._on_command(message, command, array)

    def _take_answer(self, message: Message) -> None:
        try:
            answer, _ = decode_answer(message.contents)
            if answer.action == CONNECTED:
                self._note_hello(message, answer.server or ServerHello())
            elif answer.action == PROGRESS:
                self._on_progress(msgspec.convert(answer.result, Progress))
            else:
                raise BadAnswer(f"nobody waits for an answer with the action {answer.action}")
        except (BadAnswer, msgspec.ValidationError) as error:
            with self.lock:
                self.counts["garbage"] += 1
            # Once for each power of two, so that one bad peer does not fill the log.
            if self.counts["garbage"].bit_count() == 1:
                logger.warning("! message %d of no use, from %r: %s", self.counts["garbage"], message.sender, error)

    def _note_hello(self, message: Message, about: ServerHello) -> None:
        identity = message.sender
        with self.lock:
            known = self.servers.get(identity)
            if message.source_callback_id or self.stopped or is_over(about):
                return  # With an id it waits for our end; its hello proper came before.
            if known is not None and known.about.life == about.life:
                known.address = message
                server = known
            else:
                server = Server(identity=identity, address=message, about=about, slot=self.supervisor.find_slot(about))
                self.servers[identity] = server
        if known is server:
            self._greet(server)
            return
        if known is not None:
            self._end_all(known, "another process took its place")
        if server.slot is not None:
            self.supervisor.note_ready(server.slot)
        logger.info("= model server %r is there", identity)
        self._greet(server)
        self.pump()

    def _greet(self, server: Server) -> None:
        """Tell a server of ours that we take arrays as binary. What it answers is of no interest."""
        if server.about.npy:
            greeting = encode(Command(cmd="STATUS", npy=True))
            self.submit(Call(cmd="STATUS", contents=greeting, deadline_at=time.monotonic() + HUNG_S), server)

    def note_slot_end(self, slot: Slot) -> None:
        """Note that the process of a slot has ended."""
        with self.lock:
            self.counts["server_ends"] += 1
            servers = [each for each in self.servers.values() if each.slot is slot]
        for server in servers:
            self._lose(server, slot.reason)
        with self.lock:
            hopeless = self._find_hopeless("the command")
            calls, infer_calls = self._take_waiting() if hopeless else ([], [])
        if hopeless:
            self._fail_all(calls, infer_calls, hopeless)
        self.pump()

    def _lose(self, server: Server, reason: str) -> None:
        with self.lock:
            if self.servers.get(server.identity) is server:
                del self.servers[server.identity]
        self._end_all(server, reason)

    def _end_all(self, server: Server, reason: str) -> None:
        with self.lock:
            calls = list(server.open.values())
            for call in calls:
                server.let_go(call)
        for call in calls:
            if call.message_id:
                self._messenger.cancel(call.message_id)
            if call.cmd == "QUIT" and call.job is not None and call.convert is not None:
                call.job.settle(call.convert(Answer(action=0, result="", success=True, err="")))
            else:
                self._end_lost(call, ServerLost(f"model server {server.identity!r} is lost: {reason}"))

    def tick(self) -> None:
        """Ping servers, end what has expired, give what waits to servers that are back."""
        now = time.monotonic()
        with self.lock:
            servers = list(self.servers.values())
            late = [call for call in self.waiting if call.deadline_at <= now]
            for call in late:
                self.waiting.remove(call)
            late_infers = self._batcher.expire(now)
            open_infers = [
                each
                for server in servers
                for call in server.open.values()
                if call.batch is not None
                for each in call.batch.calls
                if each.deadline_at <= now
            ]
            quits = [call for server in servers for call in server.open.values() if call.cmd == "QUIT"]
        error = NoServer(f"no server was ready to take the command before its deadline: {self.supervisor.describe()}")
        self._fail_all(late, late_infers, error)
        for each in open_infers:
            each.job.settle_error(ServerLost("no answer came before the deadline"))
        for quit_call in quits:
            if quit_call.deadline_at <= now and quit_call.server is not None and quit_call.server.slot is not None:
                self.supervisor.kill(quit_call.server.slot, "it did not end after QUIT")
        for server in servers:
            self._ping(server, now)
        self.supervisor.kill_mute(now)
        self.pump()

    def _ping(self, server: Server, now: float) -> None:
        if not server.about.batches:
            return
        if server.is_hung(now):
            reason = f"it has not answered a ping for {HUNG_S:.0f} s"
            if server.slot is not None:
                self.supervisor.kill(server.slot, reason)
            else:
                self._lose(server, reason)
        if server.pinged_at:
            return
        server.pinged_at = now

        def on_pong(message: Message) -> None:
            was_silent = not server.is_ready(time.monotonic())
            server.pinged_at = 0.0
            if was_silent:
                self.pump()

        try:
            self._messenger.send_message(
                server.address, b"", on_pong, on_error=lambda _: None, remote_callback=ECHO, timeout=2 * HUNG_S
            )
        except MessengerError as error:
            logger.warning("! no ping to %r: %s", server.identity, error)

    # The end.

    def stop(self) -> list[Server]:
        """Take no more calls, end those that no server has, and return the servers that are there."""
        with self.lock:
            self.stopped = True
            servers = list(self.servers.values())
            calls, infer_calls = self._take_waiting()
        self._fail_all(calls, infer_calls, ManagerStopped("the manager was stopped before a server took the command"))
        return servers

    def tell_to_end(self, server: Server) -> None:
        """Send `QUIT`, which has no answer; the process is not started again."""
        server.is_ending = True
        if server.slot is not None:
            server.slot.is_told_to_end = True
        try:
            self._messenger.send_message(server.address, encode(Command(cmd="QUIT")))
        except MessengerError as error:
            logger.warning("! %r is not told to end: %s", server.identity, error)

    def end(self) -> None:
        """End all that is still open."""
        for server in list(self.servers.values()):
            self._lose(server, "the manager was stopped")

    def _take_waiting(self) -> tuple[list[Call], list[InferCall]]:
        calls = list(self.waiting)
        self.waiting.clear()
        return calls, self._batcher.take_all()

    def _fail_all(self, calls: list[Call], infer_calls: list[InferCall], error: MessengerError) -> None:
        for call in calls:
            call.fail(error)
        for infer_call in infer_calls:
            infer_call.job.settle_error(error)


def make_cancel(job_id: str, asked: Job[Any] | None = None) -> Call:
    """Return the command that ends a training; `asked` gets the answer, for who needs more than the training's end."""
    return Call(
        cmd="CANCEL",
        contents=encode(Command(cmd="CANCEL", data={"job": job_id})),
        deadline_at=time.monotonic() + CALL_TIMEOUT_S,
        job=Job() if asked is None else asked,
        convert=lambda answer: answer,
    )
