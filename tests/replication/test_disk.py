"""Disks that fail at any call, are full, or have written something else than they were told (FACTS F21)."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from messenger import Messenger
from messenger.replication import DiskFailed, NotConfirmed, Primary, Replica, ReplicationError
from tests.conftest import TIMEOUT_S, free_port, wait_until
from tests.replication import checks
from tests.replication.faults import Fault, FaultyDisk
from tests.replication.pairs import INSERT, Cluster, assert_equal
from tests.replication.programs import create_tables, insert

TRANSACTION_COUNT = 3
CALLS_MAX = 1_000


class Scene:
    """A primary and its replica in this process, on files of which one may fail."""

    def __init__(self, folder: Path) -> None:
        self.primary_path, self.replica_path = folder / "primary.db", folder / "replica.db"
        self.confirmed = folder / "confirmed"
        self.destination = free_port()

    @contextlib.contextmanager
    def open(self, timeout: float) -> Iterator[tuple[Primary, Replica]]:
        """Give both."""
        with (
            Messenger("primary") as here,
            Messenger("replica1") as there,
            Primary(self.primary_path, here, self.destination, commit="applied", timeout=timeout) as primary,
            Replica(self.replica_path, there, self.destination) as replica,
        ):
            yield primary, replica

    def commit(self, primary: Primary) -> None:
        """Do one transaction and write down that it was confirmed."""
        with primary.transaction() as tx:
            number = insert(tx)
        with self.confirmed.open("a") as file:
            file.write(f"{number}\n")

    def commit_many(self, primary: Primary, count: int) -> None:
        """Do so many transactions."""
        for _ in range(count):
            self.commit(primary)

    def check(self) -> tuple[int, int]:
        """Check both files and what was confirmed."""
        return checks.check_pair(self.primary_path, self.replica_path, self.confirmed)

    def check_recovery(self) -> None:
        """Open both again on a sound disk; they go on, and are alike in the end."""
        with self.open(timeout=TIMEOUT_S) as (primary, _):
            create_tables(primary)
            self.commit(primary)
        primary_count, replica_count = self.check()
        assert primary_count == replica_count >= 1


def run_on_failing_disk(scene: Scene, fault: Fault, timeout: float = 0.1) -> list[BaseException]:
    """Commit a few transactions while one disk fails; return what was said of it."""
    told: list[BaseException] = []
    disk = FaultyDisk(fault)
    try:
        fault.is_armed = True
        with scene.open(timeout) as (primary, _):
            create_tables(primary)
            for _ in range(TRANSACTION_COUNT):
                try:
                    scene.commit(primary)
                except (apsw.Error, ReplicationError) as error:
                    told.append(error)
    except (apsw.Error, ReplicationError) as error:
        told.append(error)
    finally:
        fault.is_armed = False
        # A close does not wait for a thread that fed a replica which joined anew, and that still has its file open.
        wait_until(lambda: not any(thread.name.startswith("replication-feed") for thread in threading.enumerate()))
        disk.remove()
    return told


@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ["primary", "replica"])
@pytest.mark.parametrize(("action", "kinds"), [("fail", "write,sync,truncate,open,delete"), ("full", "write")])
def test_disk_fails_at_each_call(tmp_path: Path, role: str, action: str, kinds: str) -> None:
    """Whichever call fails: both files stay whole, nothing confirmed is lost, and on a sound disk it goes on.

    It is every other call, which takes long enough.
    """
    for number in range(1, CALLS_MAX, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        scene = Scene(folder)
        fault = Fault(action, kinds, number, only=f"{role}.db")
        told = run_on_failing_disk(scene, fault)
        scene.check()
        scene.check_recovery()
        if not fault.acted_count:
            if told:
                # The machine may have paused, so that nobody confirmed in time; there is time enough now.
                told = run_on_failing_disk(scene, Fault(action, kinds, CALLS_MAX, only=fault.only), TIMEOUT_S)
            assert not told, f"nothing failed, but it said {told}"
            break
        shutil.rmtree(folder)
    assert 10 < number < CALLS_MAX - 1, f"{number - 1} calls were made to fail"


# A disk of 1 MiB.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB, which `grow` makes larger."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a disk of 1 MiB")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


def test_primary_on_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """The transaction that does not fit is refused and leaves nothing; with room again, the same primary goes on."""
    scene = Scene(tmp_path)
    scene.primary_path = small_disk / "primary.db"
    with scene.open(timeout=TIMEOUT_S) as (primary, _):
        create_tables(primary)
        with pytest.raises((apsw.FullError, DiskFailed)):
            scene.commit_many(primary, 100_000)
        before = scene.check()
        assert before[0] > 10
        with pytest.raises((apsw.FullError, DiskFailed)):
            scene.commit_many(primary, 1_000)
        grow(small_disk)
        scene.commit_many(primary, 20)
    counts = scene.check()
    assert counts[0] == counts[1] >= before[0] + 20


def test_replica_on_full_disk(tmp_path: Path, small_disk: Path) -> None:
    """The primary says that nobody confirms, the replica says why; with room again it catches up by itself."""
    scene = Scene(tmp_path)
    scene.replica_path = small_disk / "replica.db"
    with scene.open(timeout=1.0) as (primary, replica):
        create_tables(primary)
        with pytest.raises(NotConfirmed):
            scene.commit_many(primary, 100_000)
        wait_until(lambda: "FullError" in replica.status().trouble or "No space" in replica.status().trouble)
        before = scene.check()
        assert before[0] > before[1] > 10
        grow(small_disk)
        replica.wait_for(primary.position, timeout=2 * TIMEOUT_S)
        scene.commit(primary)
    counts = scene.check()
    assert counts[0] == counts[1] > before[0]


# Files that hold something else than what was written.


def spoil(path: Path, offset: int, size: int = 4096) -> None:
    """Overwrite a part of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * size)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("role", ["primary", "replica"])
def test_file_is_corrupt(tmp_path: Path, role: str, part: float) -> None:
    """It is told, or found by SQLite's own check; in no case it reaches the other file."""
    scene = Scene(tmp_path)
    with scene.open(timeout=TIMEOUT_S) as (primary, _):
        create_tables(primary)
        scene.commit_many(primary, 100)
    path = scene.primary_path if role == "primary" else scene.replica_path
    pages = path.stat().st_size // 4096
    spoil(path, int(pages * part) * 4096)
    told: list[BaseException] = []
    other = scene.replica_path if role == "primary" else scene.primary_path
    try:
        with scene.open(timeout=1.0) as (primary, replica):
            try:
                scene.commit_many(primary, 200)
            except (apsw.Error, ReplicationError) as error:
                told.append(error)
            trouble = replica.status().trouble or replica.status().diverged
            if trouble:
                told.append(RuntimeError(trouble))
    except (apsw.Error, ReplicationError) as error:
        told.append(error)
    # A page that nobody reads shows only when the file is checked; the sound file is sound in any case.
    checks.check_whole(other)
    if not told:
        with pytest.raises((AssertionError, apsw.CorruptError)):
            checks.check_whole(path)


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_what_goes_into_a_file_without_a_name_is_not_durable(cluster: Cluster, what: str) -> None:
    """It would end with the process."""
    primary, replica = cluster.pair()

    def lose(path: str) -> None:
        if what == "removed":
            for suffix in ("", "-wal", "-shm"):
                Path(path + suffix).unlink()
        else:
            Path(path).rename(path + ".old")
            Path(path).touch()

    lose(replica.path)
    with pytest.raises(NotConfirmed):
        primary.execute(INSERT, ("Dune",), commit="durable", timeout=1)
    wait_until(lambda: "DiskFailed" in replica.status().trouble and replica.path in replica.status().trouble)
    replica.close()
    if what == "replaced":
        Path(replica.path).unlink()
    replica = cluster.replica()
    assert_equal(primary, replica)
    lose(primary.path)
    with pytest.raises(DiskFailed, match=re.escape(primary.path)):
        primary.execute(INSERT, ("Emma",))
