"""Keys on the command line: the command `keygen`, and the options that other commands have in common.

`secure` gives a command its options; what they say holds for each messenger that the command makes by `new_messenger`.
A command with an allow-list reads it anew on SIGHUP.
"""

import signal
import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from messenger import KeyPair, Messenger, Security, SecurityError

from .terminal import complain, option, write

if TYPE_CHECKING:
    import click

_security: ContextVar[Security | None] = ContextVar("security", default=None)


def make_commands() -> "list[click.Command]":
    """Return the commands, whose help texts are the docstrings."""
    import click

    folder = option("--folder", type=click.Path(exists=True, file_okay=False), default=".", help="Where to write.")
    name = click.Argument(["name"])
    return [click.Command("keygen", callback=_keygen, params=[name, folder], help=_keygen.__doc__)]


def _keygen(name: str, folder: str) -> int:
    """Make a key pair for NAME: NAME.key, which is secret, and NAME.pub, a line for an allow-list.

    Both files are for their owner only; nothing is overwritten.
    """
    secret, public = KeyPair.generate(name).save(folder)
    complain(f"{secret} is secret: it stays where {name} runs; {public} goes to those who are to know {name}")
    write(public.read_text())
    return 0


def secure(command: "click.Command", *, listens: bool = False, connects: bool | None = None) -> "click.Command":
    """Add to a command the options that say who it is, whom it lets in, and which server it trusts.

    Unless it says so, a command that listens does not connect.
    """
    command.params.append(option("--key", metavar="FILE", help="Our secret key, of messenger keygen; for tcp."))
    if listens:
        command.params += [
            option(
                "--allow", metavar="FILE", help="Who may connect by tcp: a line KEY NAME for each. SIGHUP rereads it."
            ),
            option("--insecure", is_flag=True, help="Allow a DEST that other machines reach, without keys."),
        ]
    if connects if connects is not None else not listens:
        text = "The server's public key, or a file with it."
        command.params.append(option("--server-key", metavar="KEY", help=text))
    run: Callable[..., int] = command.callback  # type: ignore[assignment]
    names = {name for option in command.params for name in option.opts}
    partners: list[str] = [name for name in ("--allow", "--server-key") if name in names]

    def run_secured(
        key: str | None, allow: str | None = None, server_key: str | None = None, insecure: bool = False, **others: Any
    ) -> int:
        if key is None and allow is None and server_key is None and not insecure:
            return run(**others)
        wanted = [] if allow is not None or server_key is not None else partners
        security = Security(key=_load_key(key, insecure, wanted), allow=allow, servers=server_key, insecure=insecure)
        if allow is not None:
            _reload_on_hangup(security, Path(allow))
        token = _security.set(security)
        try:
            return run(**others)
        finally:
            _security.reset(token)

    command.callback = run_secured
    return command


def _load_key(path: str | None, insecure: bool, wanted: list[str]) -> KeyPair | None:
    """Return the key of a command; refuse options that do not go together, in the words of the command line.

    Args:
        wanted: The options of which one must be given beside a key, if none is.
    """
    if path is None:
        if not wanted:
            raise ValueError("--allow and --server-key need a key of our own: give --key FILE, which keygen makes")
        return None
    if insecure:
        raise ValueError("--insecure is for doing without keys, and --key is given: leave one of the two out")
    key = KeyPair.load(path)
    if wanted:
        raise ValueError(f"--key needs {' or '.join(wanted)} beside it, to say whom to trust")
    return key


def security() -> Security | None:
    """Return what the options of the command said, None if they said nothing."""
    return _security.get()


def new_messenger(identity: str | None = None) -> Messenger:
    """Return a messenger as the options of the command want it."""
    return Messenger(identity, security=_security.get())


def _reload_on_hangup(security: Security, path: Path) -> None:
    def reload() -> None:
        try:
            security.reload()
        except SecurityError as error:
            complain(f"the old allow-list stays in force: {error}")
        else:
            complain(f"{path} was read: {len(security.allowed)} may connect")

    def handle(number: int, frame: object) -> None:
        # In a thread of its own: the signal may have come while this one holds a messenger's lock.
        threading.Thread(target=reload, daemon=True).start()

    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)
