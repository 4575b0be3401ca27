"""The folder of a training run: whose it is, under which settings it goes on, and who is in it."""

import fcntl
import hashlib
import os
import re
import shutil
import socket
from array import array
from pathlib import Path

from mixlora import config as configs
from mixlora.data import DataConfig, Dataset
from mixlora.errors import InputError
from mixlora.files import make_folder, read_json, write_bytes, write_json
from mixlora.metrics import tell
from mixlora.train_config import TrainConfig

SETTINGS, DATA, BASE, LOCK = "config.yaml", "data.json", "base.json", ".lock"
# what a crash leaves of no run: the settings come last
NOTHING = re.compile(r"\.lock|(data|base)\.json|\.(config\.yaml|(data|base)\.json)\.\d+\.tmp")

# Whether a run goes on when a setting has changed; the longest beginning of its key holds.
MAY_CHANGE = {
    "": "if allowed",
    "adapter": "never",
    "adapters": "never",  # their number
    "name": "never",
    "train.parts": "never",
    "eval": "freely",
    "run": "freely",
    "run.seed": "if allowed",
    "train.gradient_checkpointing": "freely",
    "train.activation": "freely",
    "train.on_non_finite": "freely",
    "train.max_skips": "freely",
}

_locked: dict[Path, int] = {}  # descriptors, which are to live as long as the process


def open_run_folder(
    config: TrainConfig,
    data: dict[str, dict[str, str]],
    base: dict[str, str],
    resume: bool,
    allow_changes: bool,
) -> Path:
    """run.dir with the settings written into it, the `digests` of each adapter's data and those of
    the base model; another run in it is never touched unasked. Until the process ends, no other one
    may open the folder."""
    folder = Path(config.run.dir)
    _check(folder, config, data, base, resume, allow_changes)
    make_folder(folder)
    _lock(folder)
    # again, for what another one did in the meantime
    for key, change in _check(folder, config, data, base, resume, allow_changes).items():
        print(f"--resume: {key} {change}")
    if not resume:
        others = (path for path in folder.iterdir() if path.name not in (SETTINGS, LOCK))
        for path in others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / SETTINGS).unlink(missing_ok=True)  # last: until then it is a run
    write_json(folder / DATA, data)
    write_json(folder / BASE, base)
    write_bytes(folder / SETTINGS, configs.to_yaml(config).encode())
    return folder


def _check(
    folder: Path,
    config: TrainConfig,
    data: dict[str, dict[str, str]],
    base: dict[str, str],
    resume: bool,
    allow_changes: bool,
) -> dict[str, str]:
    """What has changed since the run began; what must not have is an error."""
    settings = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir {folder} is a file")
    if resume and not settings.is_file():
        raise InputError(f"--resume: there is no run in run.dir {folder}")
    if resume:
        changes = configs.differences(configs.load(TrainConfig, settings), config)
        changes |= changed_data(read_json(folder / DATA), data)
        if (folder / BASE).exists():  # runs of earlier versions have none
            changes |= changed_base(read_json(folder / BASE), base)
        check_changes(changes, settings, allow_changes)
        return changes
    if folder.is_dir() and any(not NOTHING.fullmatch(x.name) for x in folder.iterdir()):
        if not settings.is_file():
            raise InputError(f"run.dir {folder} is not empty, and what it holds is no run")
        if not config.run.overwrite:
            raise InputError(
                f"run.dir {folder} holds a run: --resume goes on with it, run.overwrite=true "
                "deletes it"
            )
    return {}


def check_changes(changes: dict[str, str], settings: Path, allow_changes: bool) -> None:
    refused, needs_leave = [], []
    for key, change in changes.items():
        may = may_change(key)
        if may == "never":
            refused.append(f"{key} {change}, which never goes on")
        elif may == "if allowed":
            needs_leave.append(f"{key} {change}")
    if refused or (needs_leave and not allow_changes):
        leave = ["--allow-changes goes on all the same"] if not refused else []
        told = "; ".join(refused + needs_leave + leave)
        raise InputError(f"--resume: {settings} was begun otherwise: {told}")


def may_change(key: str) -> str:
    own = re.sub(r"^adapters\.\d+\.", "", key)  # an adapter's key is what it is at the top level
    known = (name for name in MAY_CHANGE if not name or f"{own}.".startswith(f"{name}."))
    return MAY_CHANGE[max(known, key=len)]


def digests(dataset: Dataset, config: DataConfig) -> dict[str, str]:
    """SHA-256 of the samples, tokens and labels, that come of each task and file."""
    names = [*config.tasks, *(file.path for file in config.files)]
    found = {name: hashlib.sha256() for name in names}
    start = 0
    for name, part in zip(names, dataset.parts, strict=True):
        for sample in dataset.samples[start : start + part.num_samples]:
            for values in sample:
                found[name].update(array("q", [len(values), *values]).tobytes())
        start += part.num_samples
    return {name: digest.hexdigest() for name, digest in found.items()}


def changed_data(before: dict, after: dict) -> dict[str, str]:
    """Tasks and files that are named as before, and give other samples."""
    return {
        f"data of {adapter}, {name}": f"was {old[:12]}, is {after[adapter][name][:12]} (SHA-256 of "
        "its samples)"
        for adapter, by_name in before.items()
        for name, old in by_name.items()
        if after.get(adapter, {}).get(name, old) != old
    }


def changed_base(before: dict, after: dict) -> dict[str, str]:
    return {
        f"model.base, {part}": f"was {old[:12]}, is {after[part][:12]} (SHA-256)"
        for part, old in before.items()
        if after[part] != old
    }


def _lock(folder: Path) -> None:
    """The kernel lets go of it when the process ends, however it does."""
    key = folder.resolve()
    if key in _locked:  # an earlier run of this process
        os.close(_locked.pop(key))
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise InputError(f"run.dir {folder} is in use by {holder}") from None
    except OSError as error:  # some file systems have no locks
        tell(f"warning: run.dir {folder} cannot be locked against other runs: {error}")
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _locked[key] = descriptor
