"""Models on disk: `folder/NAME/VERSION/` with `manifest.json` and `model.txt` (LightGBM) or `model.onnx`.

A version is written whole beside the others and then renamed, so it is there or it is not; it never changes after that.
`folder/NAME/current` names the version that is served. Several servers may share a folder.

What must never happen here: a file that is parsed before its manifest, its size, its SHA-256 and its first bytes were
checked; a path that leads out of the folder, by a name or by a link; a format that can execute code.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import ModelFileInvalid
from .limits import MANIFEST_BYTES_MAX, MODEL_BYTES_MAX, NAME_PATTERN

logger = logging.getLogger("messenger.models")
Format = Literal["lightgbm", "onnx"]
Task = Literal["classification", "regression"]
FILE_NAMES: dict[Format, str] = {"lightgbm": "model.txt", "onnx": "model.onnx"}
MANIFEST, CURRENT = "manifest.json", "current"
PICKLE_START = b"\x80"  # Of protocols 2 to 5, which are what libraries write.
LIGHTGBM_START = b"tree\n"
TEMPORARY = re.compile(r"\.(\d+)-[0-9a-f]+\.tmp")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is; `manifest.json`.

    Attributes:
        name, version: As the folders are called.
        method, task, target: How it was made, of what and for what.
        features: Names, in the order of the columns.
        classes: Of a classification, in the order of the model's own numbers.
        metrics: On the rows that were held back.
        rows: Of the data.
        format: Of the file, which fixes the file's name.
        bytes, sha256: Of the file.
        versions: Of the libraries that made it.
        made_at: In UTC.
        job: The id of the training.
    """

    name: str
    version: int
    method: str
    task: Task
    target: str
    features: list[str]
    classes: list[str | int | float | bool] = msgspec.field(default_factory=list)
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    rows: int = 0
    format: Format
    bytes: int
    sha256: str
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    made_at: str = ""
    job: str = ""


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a list.

    Attributes:
        name: Of the model.
        version: The one that is served, 0 if none is.
        versions: All that there are.
    """

    name: str
    version: int
    versions: list[int]


def default_folder() -> Path:
    """Return the folder of this user's models."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local/share") / "messenger/models"


def check_name(name: object) -> str:
    """Return a model's name.

    Raises:
        ModelFileInvalid: It cannot be one.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ModelFileInvalid(
            f"{name!r} is no name of a model: 1 to 64 of A-Z a-z 0-9 . _ -, and a letter or digit first"
        )
    return name


class Store:
    """The models of one folder. Thread: any."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        # By name: the file that names the served version, its stamp, and that version.
        self._current: dict[str, tuple[str, tuple[int, int], int]] = {}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def list_all(self) -> list[Listed]:
        """Return all models that have a version. What else lies in the folder, or cannot be read, hides no other."""
        names = sorted(
            entry.name
            for entry in os.scandir(self.folder)
            if re.fullmatch(NAME_PATTERN, entry.name) and entry.is_dir(follow_symlinks=False)
        )
        listed: list[Listed] = []
        for name in names:
            version, versions = 0, []
            try:
                versions = self.versions(name)
                version = self.current(name)
            except (OSError, ModelFileInvalid) as error:
                logger.warning("! of model %s it is not known which version is served: %s", name, error)
            if versions:
                listed.append(Listed(name=name, version=version, versions=versions))
        return listed

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model, the oldest first; none if there is no such model."""
        folder = self.folder / check_name(name)
        if not folder.is_dir() or folder.is_symlink():
            return []
        return sorted(int(entry.name) for entry in os.scandir(folder) if re.fullmatch(r"[1-9]\d{0,8}", entry.name))

    def current(self, name: str) -> int:
        """Return the version that is served, 0 if none is. What was read is kept until the file is another."""
        known = self._current.get(name)
        path = f"{self.folder}/{check_name(name)}/{CURRENT}" if known is None else known[0]
        try:
            status = os.stat(path, follow_symlinks=False)
            stamp = (status.st_ino, status.st_mtime_ns)
            if known is not None and known[1] == stamp:
                return known[2]
            text = _read(Path(path), 20).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return 0
        if not re.fullmatch(r"[1-9]\d{0,8}", text):
            raise ModelFileInvalid(f"{path} names no version")
        self._current[name] = (path, stamp, int(text))
        return int(text)

    def activate(self, name: str, version: int) -> None:
        """Have a version served from now on."""
        if version not in self.versions(name):
            raise ModelFileInvalid(f"model {name!r} has no version {version}, only {self.versions(name)}")
        folder = self.folder / name
        temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            _write(temporary, b"%d\n" % version)
            temporary.rename(folder / CURRENT)
        except OSError:  # Such as a full disk.
            temporary.unlink(missing_ok=True)
            raise
        _sync(folder)

    def make_temporary(self) -> Path:
        """Return a new folder in which a version can be made."""
        path = self.folder / f".{os.getpid()}-{secrets.token_hex(8)}.tmp"
        path.mkdir(mode=0o700)
        return path

    def remove_stale(self) -> None:
        """Remove what was being made by processes that are gone."""
        for entry in os.scandir(self.folder):
            match = TEMPORARY.fullmatch(entry.name)
            if match and not Path(f"/proc/{match[1]}").exists():
                shutil.rmtree(entry.path, ignore_errors=True)

    def publish(self, made: Path, manifest: Manifest) -> Manifest:
        """Turn a folder from `make_temporary`, which holds the model's file, into the next version of the model.

        Args:
            made: The folder.
            manifest: Its version, bytes and sha256 are filled in here.
        """
        folder = self.folder / check_name(manifest.name)
        folder.mkdir(mode=0o700, exist_ok=True)
        data = _read(made / FILE_NAMES[manifest.format], MODEL_BYTES_MAX)
        _check_start(manifest.format, data, made)
        sha256 = hashlib.sha256(data).hexdigest()
        version = max(self.versions(manifest.name), default=0)
        while True:
            version += 1
            manifest = msgspec.structs.replace(manifest, version=version, bytes=len(data), sha256=sha256)
            _write(made / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
            _sync(made / FILE_NAMES[manifest.format])
            _sync(made)
            try:
                made.rename(folder / str(version))
            except OSError:
                if not (folder / str(version)).exists():
                    raise
                continue  # Another server took the number meanwhile.
            _sync(folder)
            return manifest

    def read(self, name: str, version: int) -> tuple[Manifest, bytes]:
        """Return a version's manifest and file, checked.

        Raises:
            ModelFileInvalid: There is none, or it is not what it should be; nothing of it was parsed.
        """
        folder = self.folder / check_name(name) / str(version)
        if version not in self.versions(name):
            known = self.versions(name)
            raise ModelFileInvalid(
                f"model {name!r} has no version {version}, only {known}" if known else f"there is no model {name!r}"
            )
        real = folder.resolve()
        if real != self.folder.resolve() / name / str(version):
            raise ModelFileInvalid(f"{folder} leads to {real}, out of the model folder")
        manifest = self._read_manifest(folder / MANIFEST, name, version)
        path = folder / FILE_NAMES[manifest.format]
        data = _read(path, MODEL_BYTES_MAX)
        if len(data) != manifest.bytes:
            raise ModelFileInvalid(f"{path} is {len(data)} bytes, its manifest says {manifest.bytes}")
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != manifest.sha256:
            raise ModelFileInvalid(f"{path} has the SHA-256 {sha256}, its manifest says {manifest.sha256}")
        _check_start(manifest.format, data, path)
        return manifest, data

    def _read_manifest(self, path: Path, name: str, version: int) -> Manifest:
        try:
            manifest = msgspec.json.decode(_read(path, MANIFEST_BYTES_MAX), type=Manifest)
        except FileNotFoundError as error:
            raise ModelFileInvalid(f"{path} is missing") from error
        except (ValueError, RecursionError) as error:
            raise ModelFileInvalid(f"{path} is no manifest: {error}") from error
        if (manifest.name, manifest.version) != (name, version):
            raise ModelFileInvalid(f"{path} is of model {manifest.name!r}, version {manifest.version}")
        if not manifest.features or (manifest.task == "classification") != bool(manifest.classes):
            raise ModelFileInvalid(f"{path} has no features, or its classes do not fit its task")
        return manifest


def as_dict(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest as plain values."""
    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return plain


def _check_start(file_format: Format, data: bytes, path: Path) -> None:
    if data.startswith(PICKLE_START):
        raise ModelFileInvalid(f"{path} is a pickle, which could execute code: it is not loaded")
    if file_format == "lightgbm" and not data.startswith(LIGHTGBM_START):
        raise ModelFileInvalid(f"{path} is no LightGBM text model")


def _read(path: Path, bytes_max: int) -> bytes:
    """Read a file whole, but no link, no device and nothing endless."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelFileInvalid(f"{path} is not read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileInvalid(f"{path} is no file")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise ModelFileInvalid(f"{path} is larger than {bytes_max} bytes")
    return data


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
