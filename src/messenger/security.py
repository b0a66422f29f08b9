"""Who may connect: key pairs, the files that hold them, the allow-list, and the keys of servers.

A key pair is one of CURVE (Curve25519); its public half is written as 40 characters of Z85. A **secret** file holds a
pair and is read only if nobody else can read it; a **public** file holds one line, `KEY NAME`, and an allow-list is
any number of such lines. So `cat alice.pub >> allowed` lets alice in.

What must never happen here: a secret in a text, a log, an error or a `repr`; a secret in a file that others could read,
be it for a moment; a list that lets everybody in because it is empty or was not understood.

Source: docs/security.md.
"""

import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import zmq

from .destination import Destination
from .errors import SecurityError
from .limits import ALLOW_FILE_BYTES_MAX, ALLOWED_KEYS_MAX, IDENTITY_BYTES_MAX, KEY_FILE_BYTES_MAX
from .wire import encode_identity

_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_ENTRY = re.compile(r"(public-key|secret-key|name) = \"([^\"]*)\"")
Place = str | os.PathLike[str]


def is_key(text: object) -> bool:
    """Return whether something is a public key, as far as its form tells; a secret one has the same."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


class KeyPair:
    """A public and a secret key; the secret one is shown by nothing.

    Attributes:
        public: The public key, 40 characters of Z85.
        name: Whose it is, empty if it does not say. A messenger without an identity of its own takes this one.
    """

    __slots__ = ("_secret", "name", "public")

    def __init__(self, secret: str, name: str = "") -> None:
        """Make a pair of a secret key, 40 characters of Z85.

        Raises:
            SecurityError: It is none.
        """
        if not isinstance(secret, str):
            raise TypeError(f"a secret key is of type {type(secret).__name__}, it must be a str (it is not shown)")
        if not is_key(secret):
            raise SecurityError("a secret key is 40 characters of Z85, and this is none (it is not shown)")
        try:
            self.public = zmq.curve_public(secret.encode()).decode()
        except (zmq.ZMQError, ValueError):
            raise SecurityError("a secret key is 40 characters of Z85, and this is none (it is not shown)") from None
        self._secret = secret
        self.name = name

    @classmethod
    def generate(cls, name: str = "") -> Self:
        """Return a new pair, drawn from the system's random numbers."""
        if name:
            _check_name(name, "the name of a key pair")
        return cls(zmq.curve_keypair()[1].decode(), name)

    @classmethod
    def load(cls, path: Place) -> Self:
        """Read a secret file.

        Raises:
            SecurityError: It is a link, is another user's, can be read by others, or holds no key pair.
        """
        entries = dict(_ENTRY.findall(_read(path, KEY_FILE_BYTES_MAX, is_secret=True)))
        try:
            pair = cls(entries.get("secret-key", ""), entries.get("name", ""))
        except SecurityError:
            raise SecurityError(f"{path} holds no secret key; `messenger keygen NAME` makes one") from None
        if pair.name:
            _check_name(pair.name, str(path))
        if entries.get("public-key") != pair.public:
            raise SecurityError(f"{path}: its public key is not that of its secret key")
        return pair

    def save(self, folder: Place = ".") -> tuple[Path, Path]:
        """Write `NAME.key`, which is secret, and `NAME.pub`, a line for an allow-list; return both paths.

        Both have mode 0600 from their first moment.

        Raises:
            SecurityError: The pair has no name, or one of the files is there already. Nothing was overwritten.
        """
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise SecurityError(f"the name {self.name!r} is no name for a file: without /, not starting with a dot")
        secret, public = Path(folder) / f"{self.name}.key", Path(folder) / f"{self.name}.pub"
        if public.exists() or public.is_symlink():
            raise SecurityError(f"{public} is there already; nothing was written")
        text = (
            f"# The secret key of {self.name}. Whoever has it can be {self.name}: give it to nobody.\n"
            f'name = "{self.name}"\ncurve\n    public-key = "{self.public}"\n    secret-key = "{self._secret}"\n'
        )
        _write_new(secret, text)
        try:
            _write_new(public, f"{self.public} {self.name}\n")
        except SecurityError:
            secret.unlink()
            raise
        return secret, public

    def reveal(self) -> bytes:
        """Return the secret key, for a socket. Show it to nobody."""
        return self._secret.encode()

    def __repr__(self) -> str:
        return f"<KeyPair {self.name!r} {self.public}>"

    def __reduce__(self) -> str:
        raise TypeError("a KeyPair is not pickled, so that its secret gets nowhere by mistake; load it again")


class ServerKey:
    """The key that a server must have.

    Attributes:
        public: The key, 40 characters of Z85.
        name: The identity that goes with it; empty if any does.
    """

    __slots__ = ("name", "public")

    def __init__(self, key: Place) -> None:
        """Take a public key, or a path to a file with one line `KEY NAME`."""
        self.name = ""
        if isinstance(key, str) and is_key(key):
            self.public = key
            return
        keys = _parse_list(_read(key, KEY_FILE_BYTES_MAX), str(key))
        if len(keys) != 1:
            raise SecurityError(f"{key} holds {len(keys)} keys; a server has one")
        [(self.public, self.name)] = keys.items()

    def __repr__(self) -> str:
        return f"<ServerKey {self.name!r} {self.public}>"


class Security:
    """Who may connect to a messenger, and as whom it connects.

    On tcp, a messenger with a key speaks CURVE and nothing else: its listeners let in whose key is allowed, and its
    connections go to servers whose key they know. ipc reaches only processes of this user, inproc only this process, so
    there are no keys there.

    Args:
        key: Of this messenger: a `KeyPair`, or the path of its secret file.
        allow: Whom listeners let in: public keys and the identity of each, or the path of a file with such lines.
        servers: The key of the server at each destination (`"*"`: at all others), or one for all: a public key, or
            the path of a file with one.
        insecure: Allow listeners that other machines can reach, with neither encryption nor a check of who connects.

    Raises:
        SecurityError: Something is missing, empty, or not safe; the text says what to do.

    May be given to several messengers. Thread: any.
    """

    def __init__(
        self,
        *,
        key: KeyPair | Place | None = None,
        allow: Mapping[str, str] | Place | None = None,
        servers: Mapping[str, Place] | Place | None = None,
        insecure: bool = False,
    ) -> None:
        if key is None and (allow is not None or servers is not None):
            raise SecurityError("an allow-list and the keys of servers need a key of our own: Security(key=…)")
        if key is not None and insecure:
            raise SecurityError("insecure=True is for messengers without a key; leave one of the two out")
        if key is not None and allow is None and servers is None:
            raise SecurityError("a key alone lets nobody in and knows no server: give allow=…, servers=… or both")
        self.insecure = insecure
        if not isinstance(insecure, bool):  # "no" would count as True.
            raise TypeError(f"insecure is {insecure!r}, it must be True or False")
        if key is not None and not isinstance(key, (KeyPair, str, os.PathLike)):
            raise TypeError(f"key is of type {type(key).__name__}, it must be a KeyPair or the path of a secret file")
        self.key = KeyPair.load(key) if isinstance(key, (str, os.PathLike)) else key
        self._allow = allow
        # A signal handler may reload while this thread does.
        self._lock = threading.RLock()
        self._reload_count = 0
        self._on_reload: list[Callable[[], None]] = []
        self._allowed: Mapping[str, str] = {} if allow is None else _load_allowed(allow)
        self._servers = _load_servers(servers)

    @property
    def allowed(self) -> Mapping[str, str]:
        """The identity of each public key that is let in; replaced, never changed, by a reload."""
        return self._allowed

    def server_key(self, destination: Destination) -> ServerKey | None:
        """Return the key that the server at a destination must have, None if none is known."""
        return self._servers.get(destination) or self._servers.get(None)

    def reload(self, allow: Mapping[str, str] | Place | None = None) -> None:
        """Read the allow-list anew, or take another one. Who is not on it any more is cut off at once.

        Raises:
            SecurityError: The new list is empty or not safe, and the old one stays in force.

        Thread: any, also in a signal handler (of `asyncio`: `loop.add_signal_handler`).
        """
        if self.key is None or self._allow is None:
            raise SecurityError("there is no allow-list to reload")
        with self._lock:
            while True:
                self._reload_count = count = self._reload_count + 1
                self._allowed = _load_allowed(self._allow if allow is None else allow)
                if self._reload_count == count:
                    break  # Else a signal handler has read a newer one in between.
            self._allow = self._allow if allow is None else allow
            told = list(self._on_reload)
        for tell in told:
            tell()

    def on_reload(self, tell: Callable[[], None]) -> None:
        """Call something after each reload."""
        with self._lock:
            self._on_reload.append(tell)

    def off_reload(self, tell: Callable[[], None]) -> None:
        """Call it no more."""
        with self._lock:
            if tell in self._on_reload:
                self._on_reload.remove(tell)

    def __repr__(self) -> str:
        if self.key is None:
            return f"<Security insecure={self.insecure}>"
        return f"<Security {self.key!r}, {len(self._allowed)} allowed, {len(self._servers)} servers>"


def _load_allowed(allow: Mapping[str, str] | Place) -> Mapping[str, str]:
    if not isinstance(allow, (Mapping, str, os.PathLike)):
        raise TypeError(
            f"allow is {allow!r}, it must be the path of one file with a line `KEY NAME` for each peer, as .pub files "
            "have it, or a mapping from public keys to identities"
        )
    if isinstance(allow, Mapping):
        source, allowed = "the allow-list", dict(allow)
    else:
        source = f"the allow-list {os.fspath(allow)}"
        allowed = _parse_list(_read(allow, ALLOW_FILE_BYTES_MAX), source)
    if not allowed:
        raise SecurityError(f"{source} is empty, so nobody could connect; give the public keys of those who may")
    if len(allowed) > ALLOWED_KEYS_MAX:
        raise SecurityError(f"{source} holds {len(allowed)} keys, the limit is {ALLOWED_KEYS_MAX}")
    for key, identity in allowed.items():
        if not is_key(key):
            raise SecurityError(f"{source}: {key!r} is no public key, which is 40 characters of Z85")
        _check_name(identity, source)
    return MappingProxyType(allowed)


def _load_servers(servers: Mapping[str, Place] | Place | None) -> dict[Destination | None, ServerKey]:
    if servers is None:
        return {}
    if isinstance(servers, (str, os.PathLike)):
        return {None: ServerKey(servers)}
    if not isinstance(servers, Mapping):
        raise TypeError(
            f"servers is {servers!r}, it must be a public key, the path of a file with one, or a mapping from "
            "destinations to such"
        )
    if not servers:
        raise SecurityError("servers is empty; give the key of each server, or leave it out")
    return {None if at == "*" else Destination.parse(at): ServerKey(key) for at, key in servers.items()}


def _check_name(name: object, source: str) -> None:
    """Refuse what cannot be the identity that goes with a key."""
    if not isinstance(name, str) or not name.isprintable() or '"' in name or "#" in name or name != name.strip():
        raise SecurityError(f'{source}: {name!r} is no identity for a key: printable text without " and #')
    length = len(encode_identity(name))
    if not 0 < length <= IDENTITY_BYTES_MAX:
        raise SecurityError(f"{source}: {name!r} is {length} bytes, an identity has 1 to {IDENTITY_BYTES_MAX}")


def _parse_list(text: str, source: str) -> dict[str, str]:
    """Return key and identity of each line."""
    found: dict[str, str] = {}
    # Not `splitlines`: what looks like one line to who adds it must not hold a second key behind a U+2028 or the like.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \r")
        # A key may itself start with #, but has no space in it.
        if not line or line == "#" or line.startswith("# "):
            continue
        key, _, name = line.partition(" ")
        if not is_key(key):
            raise SecurityError(f"{source}, line {number}: does not start with a public key (`KEY NAME`)")
        if key in found:
            raise SecurityError(f"{source}, line {number}: the key {key} is there twice")
        name = name.strip(" ")
        _check_name(name, f"{source}, line {number}")
        found[key] = name
    return found


def _read(path: Place, bytes_max: int, is_secret: bool = False) -> str:
    """Return the text of a file that nobody but us could have written, nor read if it is secret."""
    if is_key(path) and not os.path.lexists(path):
        raise SecurityError(
            "what was given in place of a file looks like a key itself, so it is not shown; give the path of a file, "
            "KeyPair(…) for a secret key, or for an allow-list a mapping"
        )
    # Neither waits for the other end of a pipe.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if is_secret else 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        why = "is a symbolic link" if is_secret and os.path.islink(path) else error.strerror
        raise SecurityError(f"{path} cannot be read: {why}") from None
    try:
        _check_file(path, os.fstat(descriptor), is_secret)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(bytes_max + 1)
    finally:
        os.close(descriptor)
    if len(data) > bytes_max:
        raise SecurityError(f"{path} is larger than {bytes_max} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SecurityError(f"{path} is not UTF-8") from None


def _check_file(path: Place, found: os.stat_result, is_secret: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SecurityError(f"{path} is no ordinary file")
    if found.st_uid not in ((os.geteuid(),) if is_secret else (os.geteuid(), 0)):
        raise SecurityError(f"{path} is of user {found.st_uid}, not of {os.geteuid()}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & (0o077 if is_secret else 0o022):
        can, to, then = (
            ("read or change", "600", "or make new keys if they may have done so")
            if is_secret
            else ("change", "go-w", "and look whether all its lines are yours")
        )
        raise SecurityError(f"others can {can} {path}, its mode is {mode:04o}; chmod {to} it, {then}")


def _write_new(path: Path, text: str) -> None:
    try:
        # With O_EXCL neither a file nor a link that is there is used.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SecurityError(f"{path} is there already; nothing was written") from None
    except OSError as error:
        raise SecurityError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)  # A half of a key is none.
        raise SecurityError(f"{path} cannot be written: {error.strerror}") from None
