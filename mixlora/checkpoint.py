"""What a training run needs to go on exactly where it stopped, in a format without pickle.

    <run>/checkpoints/step-000123/adapter_config.json  adapter_model.safetensors   the adapter
                                  optimizer.safetensors    AdamW's state, its random generator's
                                  state.json               the number of steps done

A checkpoint is written into a temporary folder that is then renamed: it is there whole or not.
"""

import re
import shutil
from pathlib import Path

import torch

from mixlora.adapter_files import read_tensors, save_adapter
from mixlora.adapters import trained_parameters
from mixlora.errors import InputError
from mixlora.files import (
    TensorFile,
    check_shapes,
    fsync_folder,
    read_json,
    write_json,
    write_tensors,
)
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.optim import fresh_state, restore_state, state_tensors

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
GENERATOR = "random_generator"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"step-\d{6,}", path.name))


def save_checkpoint(
    folder: Path,
    step: int,
    model: AdaptedModel,
    name: str,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    keep_last: int,
) -> None:
    """`step` optimizer steps are done. All but the `keep_last` newest checkpoints are deleted."""
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.tmp"
    for leftover in (temporary, final):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_adapter(model, temporary, name, pickled=False)
    tensors = {
        f"{key}.{moment}": x
        for key, parameter in trained_parameters(model, name).items()
        for moment, x in state_tensors(optimizer, parameter).items()
    }
    tensors[GENERATOR] = generator.get_state()
    write_tensors(temporary / OPTIMIZER_FILE, tensors)
    write_json(temporary / STATE_FILE, {"step": step})
    temporary.rename(final)
    fsync_folder(folder)
    for old in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)


def load_checkpoint(
    path: Path,
    model: AdaptedModel,
    name: str,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Restore adapter, optimizer and random generator; returns the number of steps done."""
    file = TensorFile(path / OPTIMIZER_FILE)
    parameters = {
        key: parameter
        for key, parameter in trained_parameters(model, name).items()
        if f"{key}.step" in file.shapes
    }
    wanted: dict[str, tuple] = {GENERATOR: generator.get_state().shape}
    moments: dict[str, list[str]] = {}
    for key, parameter in parameters.items():
        state = fresh_state(optimizer, parameter)
        moments[key] = [moment for moment in state if not moment.startswith("qmap")]
        wanted |= {
            f"{key}.{moment}": getattr(state[moment], "shape", ()) for moment in moments[key]
        }
    check_shapes(file.shapes, wanted, file.path)
    read_tensors(model, path, name)
    for key, parameter in parameters.items():
        tensors = {moment: file[f"{key}.{moment}"] for moment in moments[key]}
        restore_state(optimizer, parameter, tensors)
    generator.set_state(file[GENERATOR])
    step = read_json(path / STATE_FILE).get("step")
    if type(step) is not int or step < 1:
        raise InputError(f"{path / STATE_FILE}: step must be a whole number >= 1, got {step!r}")
    return step
