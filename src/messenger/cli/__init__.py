"""The command `messenger`: the words that it takes, and how it ends.

click reads the words and one function per command does the work, on the public API alone: `messages.py` and `keys.py`
those that every installation has, and beside them a module for each component. `terminal.py` is what they share. click
is imported by `main` and rich by a long run, so that whoever installed without the extra `[cli]` is told what to
install.

What must never happen here: a traceback because of a signal, a closed pipe or a peer; an exit status that says more
than is known.

Source: docs/cli.md.
"""

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from messenger import (
    DestinationInUse,
    DestinationInvalid,
    MessengerError,
    NotDelivered,
    OutcomeUnknown,
    SecurityError,
)

from .terminal import BROKEN_PIPE, FAILED, INTERRUPTED, NOT_DELIVERED, UNKNOWN, USAGE, complain, end_on

if TYPE_CHECKING:
    import click

# What each extra brings that the command line may find missing.
EXTRAS = {"click": "cli", "rich": "cli", "apsw": "replication"}
# For each error the exit status and what to do; the first that fits counts.
OUTCOMES: tuple[tuple[type[Exception], int, str], ...] = (
    (OutcomeUnknown, UNKNOWN, "; it may have run there: --timeout waits longer, --no-wait wants no response"),
    (NotDelivered, NOT_DELIVERED, "; check that somebody listens there and lets us in, or wait longer with --timeout"),
    (DestinationInUse, FAILED, "; end that listener or take another destination"),
    (DestinationInvalid, USAGE, ""),
    (SecurityError, USAGE, ""),
    (MessengerError, FAILED, ""),
    (ValueError, USAGE, ""),
    (OSError, FAILED, ""),
)

# The modules beside this one that need an extra, and what they are for.
COMPONENTS = {
    "replication": "Replicate an SQLite database: be its primary or a replica, ask how they stand.",
    "models": "Train and serve models in supervised processes.",
}
HELP = "Send messages, answer them, see what arrives. DEST is a port, host:port, tcp://host:port or ipc://path."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with these words, by default those of the process, and return its exit status."""
    end_on(signal.SIGINT)
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        what = "the command line" if extra == "cli" else f"messenger {extra}"
        complain(f"{what} needs {error.name}, which is not installed: pip install 'messenger-zmq[{extra}]'")
        return FAILED
    except BrokenPipeError:
        return BROKEN_PIPE  # Whoever read our output has gone, as `head` does. That is no news to the user.
    except (MessengerError, ValueError, OSError) as error:
        status, hint = next((status, hint) for kind, status, hint in OUTCOMES if isinstance(error, kind))
        complain(f"{_text(error)}{hint}")
        return status


def _text(error: Exception) -> str:
    """Return what an error says, without the number of one of the system, but with the name of its file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _run(words: list[str]) -> int:
    import click

    from . import keys, messages

    components = [_make_group(name, text) for name, text in COMPONENTS.items()]
    commands = click.Group(
        "messenger", commands=[*messages.make_commands(), *keys.make_commands(), *components], help=HELP
    )
    try:
        # Not commands.main(), which has exit statuses of its own for a closed pipe and for Ctrl-C.
        with commands.make_context("messenger", words) as context:
            return int(commands.invoke(context))
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        complain(f"{error.format_message()} See {error.ctx.command_path if error.ctx else 'messenger'} --help.")
        return USAGE


def _make_group(component: str, text: str) -> "click.Group":
    """Return the commands of a component, whose module is imported when one of them is asked for."""
    import click

    class Component(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            self._load()
            return super().list_commands(ctx)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            self._load()
            return super().get_command(ctx, cmd_name)

        def _load(self) -> None:
            if not self.commands:
                module = importlib.import_module(f"{__name__}.{component}")
                self.commands = {command.name: command for command in module.make_commands()}

    return Component(component, help=text)
