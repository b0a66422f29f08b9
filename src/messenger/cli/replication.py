"""The commands on replicated databases: primary, replica, status, promote, verify.

A primary and a replica read SQL on standard input, a statement at a time, and go on when it ends, until a signal comes.
Rows go to stdout; what becomes of the replica goes to stderr as lines, and on a terminal as progress bars.

What must never happen here: an exit status that says more than is known. How the SQL is run is in `shell.py`.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import apsw
import msgspec

from messenger import MessengerError
from messenger.replication import (
    Primary,
    Replica,
    ReplicaSelfStatus,
    ReplicaState,
    query_status,
    request_promotion,
    verify,
)

from .keys import new_messenger, secure
from .shell import Load, Shell, is_terminal
from .sql import Failed
from .terminal import (
    INTERRUPTED,
    NOT_DELIVERED,
    complain,
    end_in_time,
    end_on,
    option,
    parse_place,
    printable,
    seconds,
    show_amount,
    told_once,
    wait,
    write,
)

if TYPE_CHECKING:
    import click

DIFFERENT = 1  # The exit status of `verify`.
PORT = 15_445
POLL_S = 0.1
# A replica that hears of no primary for so long lets its user read what it has.
PATIENCE_S = 2.0


def make_commands() -> "list[click.Command]":
    """Return the commands, whose help texts are the docstrings."""
    import click

    file = click.Argument(["path"], metavar="FILE", type=click.Path(dir_okay=False))
    place = click.Argument(["destination"], metavar="DEST", default=str(PORT))
    identity = option("--identity", metavar="NAME", help="Under which name others know it; by default a unique one.")
    as_json = option("--json", "as_json", is_flag=True, help="Print JSON, a value a line.")
    once = option("--once", is_flag=True, help="End when standard input ends.")
    timeout = option("--timeout", type=seconds(), default=5.0, help="Seconds to wait for an answer.")
    levels = click.Choice(["local", "received", "durable", "applied"])
    primary = [
        *(file, identity, as_json, once),
        option("--at", "destination", metavar="DEST", default=str(PORT), help="Where replicas find it."),
        option("--commit", type=levels, default="local", help="Where a transaction must be to be confirmed."),
        option("--acknowledgements", type=click.IntRange(1), default=1, help="At how many replicas."),
        option("--timeout", type=seconds(), default=5.0, help="Seconds to wait for that."),
        option("--load", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="Run this SQL first."),
    ]
    replica = [
        *(file, identity, as_json, once),
        option(
            *("--from", "destination"),
            metavar="DEST",
            multiple=True,
            default=[str(PORT)],
            help="Where its primary is, or may be; can be given several times.",
        ),
        option("--listen", metavar="DEST", help="Where it tells its status and lets itself be promoted."),
        option("--resync", is_flag=True, help="Throw FILE's content away for a snapshot, as after a divergence."),
    ]
    verified = [click.Argument([name], metavar=name.upper(), type=click.Path(dir_okay=False)) for name in ("a", "b")]
    return [
        secure(click.Command("primary", callback=_primary, params=primary, help=_primary.__doc__), listens=True),
        secure(
            click.Command("replica", callback=_replica, params=replica, help=_replica.__doc__),
            listens=True,
            connects=True,
        ),
        *(
            secure(
                click.Command(word, callback=work, params=[place, as_json, timeout], help=work.__doc__), connects=True
            )
            for word, work in (("status", _status), ("promote", _promote))
        ),
        click.Command("verify", callback=_verify, params=[*verified, as_json], help=_verify.__doc__),
    ]


def _primary(
    path: str,
    identity: str | None,
    as_json: bool,
    once: bool,
    destination: str,
    commit: str,
    acknowledgements: int,
    timeout: float,
    load: str | None,
) -> int:
    """Be the primary of FILE, and run the SQL that comes on standard input.

    FILE is made if there is none. When standard input ends, replicas are still served until Ctrl-C or SIGTERM; with
    --once, and after Ctrl-D on a terminal, it ends.
    """
    place = parse_place(destination)
    end_on(signal.SIGTERM)
    with (
        contextlib.suppress(KeyboardInterrupt),
        end_in_time(),
        _told(path),
        new_messenger(identity) as messenger,
        Primary(path, messenger, place, commit=commit, acknowledgements=acknowledgements, timeout=timeout) as primary,
    ):
        complain(f"{messenger.identity!r} is the primary of {path} at {primary.destination}, {primary.position}")
        if load is not None:
            try:
                count = Load(primary, load).run()
            except KeyboardInterrupt:
                return INTERRUPTED
            complain(f"{load}: {count} statements were run, {primary.position}")
        return _serve(lambda: primary, as_json, once)
    return INTERRUPTED if once else 0


def _replica(
    path: str,
    identity: str | None,
    as_json: bool,
    once: bool,
    destination: tuple[str, ...],
    listen: str | None,
    resync: bool,
) -> int:
    """Be a replica of the primary at DEST in FILE, and run SQL that only reads from standard input.

    FILE is made if there is none. It catches up first, or reads what it has if no primary answers. When standard input
    ends it goes on until Ctrl-C or SIGTERM; with --once, and after Ctrl-D on a terminal, it ends.
    """
    places = [parse_place(text) for text in destination]
    end_on(signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt), end_in_time(), _told(path), new_messenger(identity) as messenger:
        node = _Node()
        replica = Replica(
            path,
            messenger,
            places,
            listen=None if listen is None else parse_place(listen),
            on_promote=node.promote,
            resync=resync,
        )
        node.database = replica
        with contextlib.closing(node):
            watch = _Watch(node)
            watch.wait_ready(replica)
            threading.Thread(target=watch.run, daemon=True).start()
            status = _serve(lambda: node.database, as_json, once)
            if once and not status and _has_nothing(node.database):
                complain(f"no primary answered at {', '.join(map(str, places))}, so {path} holds nothing yet")
                return NOT_DELIVERED
            return status
    return INTERRUPTED if once else 0


def _has_nothing(database: Primary | Replica) -> bool:
    """Return whether a replica has never had anything of a primary."""
    if isinstance(database, Primary):
        return False
    now = database.status()
    return now.state is ReplicaState.CONNECTING and not now.lsn


def _serve(database: Callable[[], Primary | Replica], as_json: bool, once: bool) -> int:
    """Run what comes on standard input, then serve until a signal comes."""
    status = Shell(database, as_json).run()
    if not (status or once or is_terminal()):
        wait(SimpleQueue[None]())
    return status


class _Node:
    """A replica, which becomes a primary if somebody asks for it."""

    database: Primary | Replica

    def promote(self) -> None:
        """Promote it. Called on a thread of its own."""
        if isinstance(self.database, Primary):
            return
        try:
            self.database = self.database.promote()
        except (apsw.Error, MessengerError) as error:
            complain(f"it was not promoted: {error}")
        else:
            complain(f"promoted: this is the primary at {self.database.destination}, {self.database.position}")

    def close(self) -> None:
        """Close the file."""
        self.database.close()


def _status(destination: str, as_json: bool, timeout: float) -> int:
    """Print what the primary, or the replica, at DEST says of itself; a primary tells of each replica that it knows.

    Exit status: 0 if it answered, 1, 3 and 4 as for send.
    """
    with told_once(), new_messenger() as messenger:
        told = query_status(messenger, parse_place(destination), timeout=timeout)
    if as_json:
        write(msgspec.json.encode(told) + b"\n")
        return 0
    values = msgspec.to_builtins(told)
    replicas = values.pop("replicas", [])
    for name, value in values.items():
        write(f"{name:<20} {_show(value)}\n")
    if replicas:
        write("\n" + _table(replicas))
    return 0


def _promote(destination: str, as_json: bool, timeout: float) -> int:
    """Make the replica at DEST the primary, under a higher term; the one before it is fenced when it hears of it.

    What the old primary committed and this replica has not is lost to the database; the old primary saves it to a file
    when it joins as a replica.
    """
    with told_once(), new_messenger() as messenger:
        told = request_promotion(messenger, parse_place(destination), timeout=timeout)
    if as_json:
        write(msgspec.json.encode(told) + b"\n")
    else:
        write(f"{told.path} is the primary at ({told.term}, {told.lsn})\n")
    return 0


def _verify(a: str, b: str, as_json: bool) -> int:
    """Compare the content of two files, both of which may be in use.

    Exit status: 0 if they are equal, 1 if not, 4 if one cannot be read.
    """
    for path in (a, b):
        with _told(path), contextlib.closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)) as file:
            file.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    with _told():
        verdict = verify(a, b)
    if as_json:
        write(msgspec.json.encode(verdict) + b"\n")
    else:
        write("equal" if verdict.is_equal else "different")
        write(f": {verdict.table_count} tables, {verdict.row_count} equal rows; {a} {_show(verdict.position_a)}, ")
        write(f"{b} {_show(verdict.position_b)}\n")
        for difference in verdict.differences:
            write(f"{printable(str(difference))}\n")
    return 0 if verdict.is_equal else DIFFERENT


def _table(rows: list[dict[str, Any]]) -> str:
    """Return rows of the same columns, aligned."""
    columns = list(rows[0])
    lines = [columns, *([_show(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value in (None, "") else printable(str(value))


class _Watch:
    """Tells what a replica does: a line for each change, and bars while it fetches what it lacks."""

    def __init__(self, node: _Node) -> None:
        self._node = node
        self._told = ""

    def wait_ready(self, replica: Replica) -> None:
        """Return once it has what the primary has, or it cannot get it now."""
        started_at = time.monotonic()
        start_lsn = replica.status().lsn
        with show_amount() as show:
            while True:
                now = replica.status()
                self._tell(now)
                if show and now.state is ReplicaState.SNAPSHOT and now.snapshot_bytes_total:
                    show("snapshot", now.snapshot_bytes, now.snapshot_bytes_total)
                elif show and now.state is ReplicaState.CATCHING_UP:
                    show("catching up", now.lsn - start_lsn, now.primary_lsn - start_lsn)
                if now.state not in (ReplicaState.CONNECTING, ReplicaState.SNAPSHOT, ReplicaState.CATCHING_UP):
                    return
                if now.state is ReplicaState.CONNECTING and time.monotonic() - started_at > PATIENCE_S:
                    return
                time.sleep(POLL_S)

    def run(self) -> None:
        """Tell of changes for as long as it is a replica."""
        while isinstance(replica := self._node.database, Replica):
            self._tell(replica.status())
            time.sleep(POLL_S)

    def _tell(self, now: ReplicaSelfStatus) -> None:
        trouble = now.diverged or now.trouble
        told = f"{now.state}{f': {trouble}' if trouble else ''}"
        if told != self._told:
            self._told = told
            complain(f"{told} (LSN {now.lsn} of {now.primary_lsn})")


class _Told(logging.Handler):
    """Tells what the library logs as the command tells its own, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it."""
        complain(record.getMessage().lstrip("=!<> "))


@contextlib.contextmanager
def _told(path: str = "") -> Iterator[None]:
    """Tell warnings, and make errors of SQLite, about a file, errors that the command line tells in one line."""
    logger, handler = logging.getLogger("messenger"), _Told(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    except apsw.Error as error:
        raise Failed(f"{path}: {error}" if path else str(error)) from error
    finally:
        logger.removeHandler(handler)
