"""The folder of a training run: whose it is, and under which settings it goes on."""

import dataclasses
import shutil
from pathlib import Path

from mixlora import config as configs
from mixlora.errors import InputError
from mixlora.files import write_bytes
from mixlora.train_config import TrainConfig


def open_run_folder(config: TrainConfig, resume: bool) -> Path:
    """run.dir with the settings written into it; another run in it is never touched unasked.

    A run goes on under the settings it began with: only `eval` and `run` but its seed may differ.
    """
    folder = Path(config.run.dir)
    settings = folder / "config.yaml"
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
    if not resume and folder.is_dir() and any(folder.iterdir()):
        if not settings.is_file():
            raise InputError(f"run.dir {folder} is not empty, and what it holds is no run")
        if not config.run.overwrite:
            raise InputError(
                f"run.dir {folder} holds a run: --resume goes on with it, run.overwrite=true "
                "deletes it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(settings, configs.to_yaml(config).encode())
    return folder
