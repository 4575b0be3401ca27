"""The folder of a training run: whose it is, and under which settings it goes on."""

import hashlib
import re
import shutil
from array import array
from pathlib import Path

from mixlora import config as configs
from mixlora.data import DataConfig, Dataset
from mixlora.errors import InputError
from mixlora.files import read_json, write_bytes, write_json
from mixlora.train_config import TrainConfig

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


def open_run_folder(
    config: TrainConfig, data: dict[str, dict[str, str]], resume: bool, allow_changes: bool
) -> Path:
    """run.dir with the settings written into it, and the `digests` of each adapter's data; another
    run in it is never touched unasked."""
    folder = Path(config.run.dir)
    settings, data_file = folder / "config.yaml", folder / "data.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir {folder} is a file")
    if resume and not settings.is_file():
        raise InputError(f"--resume: there is no run in run.dir {folder}")
    if resume:
        changes = configs.differences(configs.load(TrainConfig, settings), config)
        check_changes(changes | changed_data(read_json(data_file), data), settings, allow_changes)
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
    write_json(data_file, data)
    write_bytes(settings, configs.to_yaml(config).encode())
    return folder


def check_changes(changes: dict[str, str], settings: Path, allow_changes: bool) -> None:
    """All that has changed since the run began is told; what must not have is an error."""
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
    for key, change in changes.items():
        print(f"--resume: {key} {change}")


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
