"""A8 and A6: key files that others can read, secrets in texts, allow-lists that let anybody in."""

import errno
import gc
import logging
import os
import pickle
import stat
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zmq.auth import load_certificate

from messenger import KeyPair, Messenger, Security, SecurityError
from messenger.limits import ALLOW_FILE_BYTES_MAX, ALLOWED_KEYS_MAX, KEY_FILE_BYTES_MAX
from tests.canary import CANARY, canary
from tests.conftest import MessengerFactory

# Fixed, since it stands in the names of tests.
PUBLIC = "a1B2." * 8
OTHER = "b1B2." * 8
# Python takes all of these for the end of a line, and no editor or terminal shows it.
LINE_ENDS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Files.


@pytest.fixture
def open_umask() -> Any:
    before = os.umask(0)
    yield
    os.umask(before)


def test_both_files_are_ours_alone_from_their_first_moment(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    really_open = os.open

    def note_mode(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        descriptor = really_open(path, flags, mode, **options)
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", note_mode)
    secret, public = KeyPair.generate("alice").save(tmp_path)
    assert modes == [0o600, 0o600]
    assert (mode_of(secret), mode_of(public)) == (0o600, 0o600)


def test_a_saved_pair_comes_back(tmp_path: Path) -> None:
    pair = KeyPair.generate("alice smith")
    secret, public = pair.save(tmp_path)
    loaded = KeyPair.load(secret)
    assert (loaded.public, loaded.reveal(), loaded.name) == (pair.public, pair.reveal(), "alice smith")
    assert public.read_text() == f"{pair.public} alice smith\n"
    # Programs with plain pyzmq read it too.
    assert load_certificate(secret) == (pair.public.encode(), pair.reveal())


@pytest.mark.parametrize("kind", ["secret", "public", "dangling link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    pair = KeyPair.generate("alice")
    if kind == "dangling link":
        (tmp_path / "alice.key").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / ("alice.key" if kind == "secret" else "alice.pub")).write_text("precious")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SecurityError, match="there already"):
        pair.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert all(path.read_text() == "precious" for path in tmp_path.iterdir() if path.exists())


def test_a_pair_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(descriptor: int, *_: Any, **__: Any) -> Any:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open", fill)
    with pytest.raises(SecurityError, match=r"alice.key cannot be written: No space left on device"):
        KeyPair.generate("alice").save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_secret_in_place_of_a_path_is_not_shown() -> None:
    """Public keys can be given so, and a secret one looks the same."""
    for make in (
        lambda: KeyPair.load(CANARY),
        lambda: Security(key=CANARY, servers=PUBLIC),
        lambda: Security(key=canary("x"), allow=CANARY),
    ):
        with pytest.raises(SecurityError, match="looks like a key itself, so it is not shown") as caught:
            make()
        assert CANARY not in str(caught.value)
    with pytest.raises(TypeError, match="a secret key is of type bytes, it must be a str") as caught_type:
        KeyPair(CANARY.encode())  # type: ignore[arg-type]
    assert CANARY not in str(caught_type.value)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "../alice"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(SecurityError, match="no name for a file"):
        KeyPair.generate(name).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o602, 0o610, 0o644, 0o666])
def test_a_secret_file_that_others_can_use_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(SecurityError, match=f"mode is {mode:04o}; chmod 600 it"):
        KeyPair.load(key_file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(key_file: Path, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(f"{PUBLIC} alice\n")
    for path in (key_file, allowed):
        os.chown(path, 12_345, 12_345)
    with pytest.raises(SecurityError, match="is of user 12345"):
        KeyPair.load(key_file)
    with pytest.raises(SecurityError, match="is of user 12345"):
        Security(key=canary("x"), allow=allowed)


def test_a_link_to_a_secret_file_is_refused(key_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.key"
    link.symlink_to(key_file)
    with pytest.raises(SecurityError, match="is a symbolic link"):
        KeyPair.load(link)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    for name in ("pipe", "folder"):
        with pytest.raises(SecurityError, match="no ordinary file"):
            KeyPair.load(tmp_path / name)
    with pytest.raises(SecurityError, match="No such file"):
        KeyPair.load(tmp_path / "nothing")


def test_a_list_that_others_can_change_is_refused(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(f"{PUBLIC} alice\n")
    for mode in (0o664, 0o646):
        allowed.chmod(mode)
        with pytest.raises(SecurityError, match=f"others can change {allowed}, .*look whether all its lines are yours"):
            Security(key=canary("x"), allow=allowed)
    allowed.chmod(0o644)  # Public keys may be read.
    assert Security(key=canary("x"), allow=allowed).allowed == {PUBLIC: "alice"}


def test_files_of_any_size_are_read_to_their_limit(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch(0o600)
    os.truncate(large, ALLOW_FILE_BYTES_MAX + 1)
    with pytest.raises(SecurityError, match=f"larger than {KEY_FILE_BYTES_MAX} bytes"):
        KeyPair.load(large)
    with pytest.raises(SecurityError, match=f"larger than {ALLOW_FILE_BYTES_MAX} bytes"):
        Security(key=canary("x"), allow=large)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "holds no secret key"),
        (b"\xff\xfe", "is not UTF-8"),
        (f'secret-key = "{CANARY[:-1]}"'.encode(), "holds no secret key"),
        (f'secret-key = "{CANARY}"'.encode(), "not that of its secret key"),
        (f'public-key = "{PUBLIC}"\nsecret-key = "{CANARY}"'.encode(), "not that of its secret key"),
        (f'name = "a#b"\npublic-key = "{canary("").public}"\nsecret-key = "{CANARY}"'.encode(), "no identity"),
    ],
    ids=["empty", "no text", "cut off", "half", "two halves", "a name that is none"],
)  # fmt: skip
def test_a_file_that_holds_no_pair_is_refused_without_showing_it(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "x.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(SecurityError, match=why) as caught:
        KeyPair.load(path)
    assert CANARY[:-1] not in "".join(traceback.format_exception(caught.value))


# Secrets in texts.


def test_no_secret_in_any_text(messenger: MessengerFactory) -> None:
    pair = canary("server")
    security = Security(key=pair, allow={PUBLIC: "alice"}, servers=PUBLIC)
    server = messenger(security=security)
    listener = server.listen_for_connection("tcp://127.0.0.1:0", None)
    things: list[object] = [pair, security, security.allowed, server, server.statistics(), listener]
    texts = [form(thing) for thing in things for form in (repr, str, "{!r:>1}".format)]
    assert not [text for text in texts if CANARY in text]
    assert pair.public in repr(pair)


def test_a_pair_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="is not pickled"):
        pickle.dumps(canary("x"))


@pytest.mark.parametrize("secret", ["", "x", CANARY + "x", CANARY[:-1] + "ä", CANARY[:-1] + " "])
def test_what_is_no_secret_key_is_not_shown(secret: str) -> None:
    with pytest.raises(SecurityError, match="not shown") as caught:
        KeyPair(secret)
    assert secret in ("", "x") or secret not in "".join(traceback.format_exception(caught.value))


def test_the_canary_is_found(tmp_path: Path) -> None:
    """A test that shows a secret fails, wherever it shows it; else the search above could be one that sees nothing."""
    shows = {
        "printed": "print(secret)",
        "to stderr": "os.write(2, secret.encode())",
        "logged": "logging.getLogger('messenger').debug('the key is %s', secret)",
        "raised": "raise ValueError(secret)",
        "of another key": "print(KeyPair.generate().reveal().decode())",
        "nothing": "print(canary('x'))",
    }
    head = "import logging, os\nfrom messenger import KeyPair\nfrom tests.canary import CANARY as secret, canary\n"
    functions = [f"def test_{name.replace(' ', '_')}():\n    {code}\n" for name, code in shows.items()]
    (tmp_path / "test_shows.py").write_text(head + "\n".join(functions))
    (tmp_path / "conftest.py").write_text("from tests.canary import pytest_runtest_makereport\n")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "5 failed, 1 passed" in result.stdout, result.stdout
    assert CANARY not in result.stdout + result.stderr


# Allow-lists, and what a `Security` must have.

NONE_OF_THESE: list[tuple[Callable[[], Security], str]] = [
    (lambda: Security(key=canary("x"), allow={}), "the allow-list is empty"),
    (lambda: Security(key=canary("x"), allow={"": "alice"}), "'' is no public key"),
    (lambda: Security(key=canary("x"), allow={"*": "alice"}), r"'\*' is no public key"),
    (lambda: Security(key=canary("x"), allow={PUBLIC: ""}), "0 bytes"),
    (lambda: Security(key=canary("x"), allow={PUBLIC: "a" * 241}), "241 bytes"),
    (lambda: Security(key=canary("x"), allow={PUBLIC: "a#2"}), "no identity for a key"),
    (lambda: Security(key=canary("x"), allow={PUBLIC: "a\nb"}), "no identity for a key"),
    (lambda: Security(key=canary("x"), allow="/nothing/there"), "/nothing/there cannot be read"),
    (lambda: Security(key=canary("x")), "a key alone"),
    (lambda: Security(key=canary("x"), servers={}), "servers is empty"),
    (lambda: Security(key=canary("x"), servers="/nothing/there"), "/nothing/there cannot be read"),
    (lambda: Security(allow={PUBLIC: "alice"}), "need a key of our own"),
    (lambda: Security(servers=PUBLIC), "need a key of our own"),
    (lambda: Security(key=canary("x"), allow={PUBLIC: "alice"}, insecure=True), "leave one of the two out"),
    (lambda: Security(key="", allow={PUBLIC: "alice"}), "cannot be read"),
    (lambda: Security(key=canary("x"), allow={PUBLIC.encode(): "alice"}), "b'.*' is no public key"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("make", "why"), NONE_OF_THESE, ids=[why for _, why in NONE_OF_THESE])
def test_what_lets_nobody_or_anybody_in_is_refused(make: Callable[[], Security], why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        make()


def test_more_keys_than_the_limit_are_refused() -> None:
    allow = {f"{number:040}": "alice" for number in range(ALLOWED_KEYS_MAX + 1)}
    with pytest.raises(SecurityError, match=f"holds {ALLOWED_KEYS_MAX + 1} keys, the limit is {ALLOWED_KEYS_MAX}"):
        Security(key=canary("x"), allow=allow)


def test_a_listener_on_tcp_needs_an_allow_list(messenger: MessengerFactory) -> None:
    client = messenger(security=Security(key=canary("x"), servers=PUBLIC))
    for destination in ("tcp://127.0.0.1:0", 0):
        with pytest.raises(SecurityError, match=r"say Security\(allow=…\) who may"):
            client.listen_for_connection(destination, None)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("# nobody yet\n#\n\n", "is empty"),
        ("alice\n", "line 1: does not start with a public key"),
        (f"{PUBLIC} alice\n{PUBLIC} bob\n", "line 2: the key .* is there twice"),
        (f"{PUBLIC}\n", "0 bytes"),
        (f"{PUBLIC[:-1]} alice\n", "line 1: does not start"),
        (f"{PUBLIC} alice\n{OTHER} bob\n{PUBLIC[:20]}", "line 3: does not start"),
        *((f"{PUBLIC} alice{end}{OTHER} root\n", "line 1: 'alice.* is no identity") for end in LINE_ENDS),
    ],
)
def test_a_list_that_is_not_understood_is_refused(tmp_path: Path, lines: str, why: str) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(lines)
    allowed.chmod(0o600)
    with pytest.raises(SecurityError, match=why):
        Security(key=canary("x"), allow=allowed)


def test_a_list_may_have_the_line_ends_of_windows(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_bytes(f"{PUBLIC} alice\r\n\r\n{OTHER} bob\r\n".encode())
    allowed.chmod(0o600)
    assert Security(key=canary("x"), allow=allowed).allowed == {PUBLIC: "alice", OTHER: "bob"}


@pytest.mark.parametrize("insecure", ["no", 1, None])
def test_insecure_must_be_said_clearly(insecure: Any) -> None:
    with pytest.raises(TypeError, match=r"insecure is .*, it must be True or False"):
        Security(insecure=insecure)


def test_a_list_has_comments_and_keys_that_look_like_some(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    strange = "#" + PUBLIC[1:]
    allowed.write_text(f"# who may\n\n{PUBLIC}   alice smith  \n{strange} bob\n")
    allowed.chmod(0o600)
    assert Security(key=canary("x"), allow=allowed).allowed == {PUBLIC: "alice smith", strange: "bob"}


def test_a_messenger_is_called_as_its_key(messenger: MessengerFactory) -> None:
    security = Security(key=canary("alice"), servers=PUBLIC)
    assert messenger(security=security).identity == "alice"
    assert messenger("bob", security=security).identity == "bob"
    assert messenger(security=Security(key=canary(""), servers=PUBLIC)).identity not in ("", "alice")


def test_what_several_share_holds_none_of_them_that_never_started() -> None:
    security = Security()
    messenger = Messenger(security=security)
    messenger.close()
    held = weakref.ref(messenger)
    del messenger
    gc.collect()
    assert held() is None


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(f"{PUBLIC} alice\n")
    allowed.chmod(0o600)
    security = Security(key=canary("x"), allow=allowed)
    allowed.write_text("")
    with pytest.raises(SecurityError, match="is empty"):
        security.reload()
    assert security.allowed == {PUBLIC: "alice"}
    allowed.write_text(f"{PUBLIC} bob\n")
    security.reload()
    assert security.allowed == {PUBLIC: "bob"}
    with pytest.raises(SecurityError, match="no allow-list to reload"):
        Security(insecure=True).reload()


def test_insecure_is_warned_of_at_every_start(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        with Messenger(security=Security(insecure=True)) as messenger:
            messenger.listen_for_connection("tcp://0.0.0.0:0", None)
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [text for text in warned if "can be reached by anybody, without security" in text] == warned != []
