"""The folder of a training run: whose it is, under which settings it goes on, and who is in it."""

import dataclasses
import fcntl
import os
import re
import shutil
import socket
from pathlib import Path

from mixlora import config as configs
from mixlora.errors import InputError
from mixlora.files import make_folder, write_bytes
from mixlora.metrics import tell
from mixlora.train_config import TrainConfig

SETTINGS, LOCK = "config.yaml", ".lock"
NOTHING = re.compile(r"\.lock|\.config\.yaml\.\d+\.tmp")  # what a crash leaves of no run

_locked: dict[Path, int] = {}  # descriptors, which are to live as long as the process


def open_run_folder(config: TrainConfig, resume: bool) -> Path:
    """run.dir with the settings written into it; another run in it is never touched unasked.

    A run goes on under the settings it began with: only `eval` and `run` but its seed may differ.
    Until the process ends, no other one may open the folder.
    """
    folder = Path(config.run.dir)
    _check(folder, config, resume)
    make_folder(folder)
    _lock(folder)
    _check(folder, config, resume)  # what another one did in the meantime
    if not resume:
        others = (path for path in folder.iterdir() if path.name not in (SETTINGS, LOCK))
        for path in others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / SETTINGS).unlink(missing_ok=True)  # last: until then it is a run
    write_bytes(folder / SETTINGS, configs.to_yaml(config).encode())
    return folder


def _check(folder: Path, config: TrainConfig, resume: bool) -> None:
    settings = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir {folder} is a file")
    if resume and not settings.is_file():
        raise InputError(f"--resume: there is no run in run.dir {folder}")
    if resume:
        before = configs.load(TrainConfig, settings)
        free = {"eval": before.eval, "run": dataclasses.replace(before.run, seed=config.run.seed)}
        changed = configs.differences(before, dataclasses.replace(config, **free))
        if changed:
            raise InputError(f"--resume: {settings} was begun otherwise: {'; '.join(changed)}")
    elif folder.is_dir() and any(not NOTHING.fullmatch(x.name) for x in folder.iterdir()):
        if not settings.is_file():
            raise InputError(f"run.dir {folder} is not empty, and what it holds is no run")
        if not config.run.overwrite:
            raise InputError(
                f"run.dir {folder} holds a run: --resume goes on with it, run.overwrite=true "
                "deletes it"
            )


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
