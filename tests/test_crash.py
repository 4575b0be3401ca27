"""Kills, failing system calls, full disks and power losses while checkpoints are saved.

The counts of the default run are small; `-m slow` runs them in full: 1,000 kills, every system
call with every error, and 5,000 states after a power loss.
"""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from mixlora.errors import InputError
from mixlora.metrics import MetricsLog
from tests.runs import assert_same_weights, metrics, run, weights
from tests.trained import Trained

ROOT = Path(__file__).resolve().parents[1]
slow = pytest.mark.slow


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder on a file system without a disk, where fsync takes no time."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.mark.parametrize("count", [6, pytest.param(1000, marks=slow)])
def test_kill_9_at_random_moments(count: int, memory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash_server", str(memory), str(count), "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert seen["kills"] == count and seen["in_the_midst"] > count / 10, seen
    assert seen["lost"] == seen["unloadable"] == seen["damaged"] == 0, seen
    assert seen["most_left"] <= 1, seen


# -- system calls ----------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is no more: it cleans nothing up."""


@contextlib.contextmanager
def interposed(around: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """`around(name, function)` takes the place of each function of os that changes files."""
    real = {name: getattr(os, name) for name in CALLS}
    for name, function in real.items():
        setattr(os, name, around(name, function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


class Fault:
    """The k-th call, of those that are counted, does what `kind` says."""

    def __init__(self, k: int, kind: str) -> None:
        self.k, self.kind, self.count = k, kind, 0

    @property
    def has_come(self) -> bool:
        return self.count >= self.k

    def around(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            if self.kind == "killed" and self.has_come:
                raise Killed
            if self.kind == "short" and name != "write":
                return function(*arguments, **options)
            self.count += 1
            if self.count != self.k:
                return function(*arguments, **options)
            if self.kind == "short":
                descriptor, content = arguments
                return function(descriptor, content[: max(1, len(content) // 2)])
            if self.kind == "killed":
                raise Killed
            if name == "close":  # the descriptor is gone even so
                function(*arguments, **options)
            code = getattr(errno, self.kind)
            raise OSError(code, os.strerror(code), arguments[0] if name == "open" else None)

        return call


@pytest.mark.parametrize(
    "kind", ["ENOSPC", "short", "killed", *(pytest.param(x, marks=slow) for x in ("EIO", "EINTR"))]
)
def test_the_kth_call_fails(kind: str, memory: Path, capsys) -> None:
    """Every k, in a save that also prunes. The process that comes after it finds the checkpoint
    before, or the new one where the save was said to be done, and saves as ever."""
    k, trained = 0, Trained(memory / "before", keep_last=2, keep_best=1)
    for step, loss in enumerate([0.5, 3.0, 2.0], 1):
        trained.save(step, loss)
    while True:
        k += 1
        fault, folder, failed = Fault(k, kind), memory / f"{k}", ""
        shutil.copytree(memory / "before", folder)
        trained.moved(folder)
        with interposed(fault.around):
            try:
                trained.save(4, 1.0)
            except (InputError, Killed) as error:
                failed = str(error) or "killed"
        if not fault.has_come:
            assert not failed
            break
        if failed and kind != "killed":
            assert "step-000004 cannot be written: " in failed
            assert "bytes, " in failed and "\n" not in failed
        found = trained.moved(folder).resume()
        assert found == 4 or (failed and found == 3), (k, failed)
        assert trained.checkpoints.refused == set(), k
        trained.save(5)
        assert trained.moved(folder).resume() == 5
        assert trained.names() == [f"step-{step:06d}" for step in (1, found, 5)]
        shutil.rmtree(folder)
    assert k > (5 if kind == "short" else 60)


def test_the_kth_call_of_the_rehearsal_fails(memory: Path) -> None:
    k, trained = 0, Trained(memory)
    while True:
        k += 1
        fault, failed = Fault(k, "ENOSPC"), False
        trained.moved(memory / f"{k}").at(0)
        with interposed(fault.around):
            try:
                trained.checkpoints.rehearse()
            except InputError as error:
                failed = True
                assert "cannot be written: " in str(error)
        if not fault.has_come:
            assert not failed
            break
        assert trained.resume() == 0
        trained.checkpoints.rehearse()
        trained.save(1)
        assert trained.names() == ["step-000001"]
    assert k > 40


def test_files_may_not_grow(memory: Path) -> None:
    """A quota that the adapter fits in, and the optimizer's state does not."""
    trained = Trained(memory)
    trained.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="step-000002 cannot be written: File too large") as e:
            trained.save(2)
        with pytest.raises(InputError, match="cannot be written: File too large"):
            trained.checkpoints.rehearse()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "it needs about" in str(e.value) and "are free" in str(e.value)
    assert trained.names() == ["step-000001"]
    assert Trained(memory).resume() == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills(small_disk: Path) -> None:
    trained = Trained(small_disk, keep_last=100)
    with pytest.raises(InputError, match="101 checkpoints .* need .* bytes, .* are free"):
        trained.checkpoints.rehearse()
    saved = 0
    with pytest.raises(InputError, match="cannot be written: No space left on device; it needs"):
        for step in range(1, 100):
            trained.save(step)
            saved = step
    assert saved > 0
    assert Trained(small_disk).resume() == saved
    (small_disk / "checkpoints" / "step-000001" / "state.json").unlink()
    shutil.rmtree(small_disk / "checkpoints" / "step-000001")
    trained.save(saved + 1)
    assert Trained(small_disk).resume() == saved + 1


# -- power losses ----------------------------------------------------------------------------------


class Disk:
    """A record of what is done to the files below a folder, and what a power loss may leave of it.

    A write is on the disk once its file is synced, an entry once its folder is; until then it is
    there or not, whatever was done before or after it. Of a lost write the length may remain.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.entries: dict[str, int] = {self.root: 0}  # inode by path
        self.inodes = 1
        self.open: dict[int, int] = {}  # inode by descriptor
        self.log: list[tuple] = []

    @property
    def folders_by_name(self) -> dict[str, int]:
        return {entry[2]: entry[3] for entry in self.log if entry[0] == "link" and entry[4]}

    @property
    def folders(self) -> set[int]:
        return {0, *(entry[3] for entry in self.log if entry[0] == "link" and entry[4])}

    def around(self, name: str, function: Callable) -> Callable:
        def path_of(path, dir_fd: int | None) -> str:
            if dir_fd is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            return str(path)

        def call(*arguments, dir_fd: int | None = None, **options):
            given = {} if dir_fd is None else {"dir_fd": dir_fd}
            result = function(*arguments, **given, **options)
            self.note(name, result, arguments, lambda path: path_of(path, dir_fd))
            return result

        return call

    def note(self, name: str, result, arguments: tuple, path_of: Callable) -> None:
        if name in ("write", "fsync", "close"):
            inode = self.open.get(arguments[0])
            if name == "write":
                self.log.append(("write", inode, bytes(arguments[1][:result])))
            elif name == "fsync":
                self.log.append(("fsync", inode))
            else:
                self.open.pop(arguments[0], None)
            return
        path = path_of(arguments[0])
        if not path.startswith(self.root):
            return
        if name == "mkdir" or (name == "open" and path not in self.entries):
            self.entries[path] = self.inodes
            self.log.append(("link", *self.place(path), self.inodes, name == "mkdir"))
            self.inodes += 1
        if name == "open":
            self.open[result] = self.entries[path]
        if name in ("unlink", "rmdir"):
            self.log.append(("unlink", *self.place(path)))
            del self.entries[path]
        if name in ("rename", "replace"):
            new = str(arguments[1])
            self.log.append(("rename", *self.place(path), *self.place(new), self.entries[path]))
            moved = {x: i for x, i in self.entries.items() if (x + "/").startswith(path + "/")}
            for old in moved:
                del self.entries[old]
            self.entries |= {new + old[len(path) :]: inode for old, inode in moved.items()}

    def place(self, path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        return self.entries[folder], name

    def lose_power(self, at: int, choose: Callable[[], bool], into: Path) -> None:
        """Build what is left when `at` operations were done and of those that are not synced
        `choose` says which reached the disk."""
        synced = {entry[1]: i for i, entry in enumerate(self.log[:at]) if entry[0] == "fsync"}
        folders: dict[int, dict[str, int]] = {0: {}}
        contents: dict[int, bytes] = {}
        for i, (kind, inode, *rest) in enumerate(self.log[:at]):
            if kind in ("fsync", "told"):
                continue
            kept = synced.get(inode, -1) > i or choose()
            if kind == "write":
                lost = b"" if choose() else bytes(len(rest[0]))
                contents[inode] = contents.get(inode, b"") + (rest[0] if kept else lost)
            if kind == "link":
                name, new, is_folder = rest
                if is_folder:
                    folders[new] = {}
                if kept:
                    folders[inode][name] = new
            if kind == "unlink" and kept:
                folders[inode].pop(rest[0], None)
            if kind == "rename" and kept:
                name, new_folder, new_name, moved = rest
                folders[inode].pop(name, None)
                folders[new_folder][new_name] = moved
        self.build(0, into, folders, contents)

    def build(self, inode: int, path: Path, folders: dict, contents: dict) -> None:
        if inode not in folders:
            path.write_bytes(contents.get(inode, b""))
            return
        path.mkdir()
        for name, child in folders[inode].items():
            self.build(child, path / name, folders, contents)


def power_losses(
    memory: Path, count: int, is_left_out: Callable[[Disk, int], bool] = lambda disk, inode: False
) -> tuple[int, list[str]]:
    """The operations of six saves that also prune, and what was wrong in so many states after
    them. Syncs may be left out by their inode."""
    disk = Disk(memory / "disk")
    (memory / "disk").mkdir()
    trained = Trained(memory / "disk", keep_last=2, keep_best=1)
    with interposed(disk.around):
        trained.checkpoints.rehearse()
        for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], 1):
            trained.save(step, loss)
            disk.log.append(("told", step))
    disk.log = [x for x in disk.log if x[0] != "fsync" or not is_left_out(disk, x[1])]
    rng, wrong = random.Random(0), []
    for state in range(count):
        at = state % (len(disk.log) + 1)
        told = max((x[1] for x in disk.log[:at] if x[0] == "told"), default=0)
        chance = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        into = memory / "after"
        disk.lose_power(at, lambda chance=chance: rng.random() < chance, into)
        try:
            found = trained.moved(into).resume()
            if found < told or trained.checkpoints.refused:
                wrong.append(f"state {state} at {at}: step {told} was safe, found {found}")
        except (AssertionError, InputError) as error:
            wrong.append(f"state {state} at {at}: step {told} was safe: {error}")
        shutil.rmtree(into)
    return len(disk.log), wrong


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=slow)])
def test_power_losses(count: int, memory: Path) -> None:
    operations, wrong = power_losses(memory, count)
    assert operations > 200
    assert wrong == []


LEFT_OUT = {
    "files": lambda disk, inode: inode not in disk.folders,
    "folders": lambda disk, inode: inode in disk.folders,
    "the checkpoints' folder": lambda disk, inode: inode == disk.folders_by_name["checkpoints"],
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_power_losses_without_a_sync(name: str, memory: Path) -> None:
    """The model sees it where one is left out."""
    assert power_losses(memory, 300, LEFT_OUT[name])[1] != []


# -- a run -----------------------------------------------------------------------------------------


def test_a_run_whose_disk_fills_goes_on_later(
    settings: dict, tmp_path: Path, capsys, monkeypatch
) -> None:
    settings["run"] |= {"save_every_steps": 2}
    whole = run(settings, tmp_path)
    expected, expected_weights = metrics(whole), weights(whole)
    settings["run"]["dir"] = str(tmp_path / "other")
    real = os.write

    def full(descriptor: int, content: bytes) -> int:
        if "step-000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    capsys.readouterr()
    assert train.main(["--config", str(tmp_path / "config.yaml"), f"run.dir={tmp_path}/other"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step-000004 cannot be written: No space left on device; it needs about" in said
    saved = tmp_path / "other/default/checkpoints"
    assert [path.name for path in saved.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    resumed = run(settings, tmp_path, "--resume")
    assert metrics(resumed) == expected
    assert_same_weights(weights(resumed), expected_weights)


@pytest.mark.parametrize(
    "end", ['{"step": 3, "lo', "\0\0\0\0\n", "[1]\n", "{}\n", "\n", '{"step": 3}\n\0\0']
)
def test_the_end_of_a_log_after_a_crash(end: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + end)
    MetricsLog(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
