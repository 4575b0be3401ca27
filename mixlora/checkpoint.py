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

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
GENERATOR = "random_generator"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
        f"{key}.{moment}": optimizer.state[parameter][moment]
        for key, parameter in trained_parameters(model, name).items()
        if parameter in optimizer.state  # one that never had a gradient has none: MiLoRA's may not
        for moment in MOMENTS
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
    wanted = {f"{key}.step": () for key in parameters} | {GENERATOR: generator.get_state().shape}
    for key, parameter in parameters.items():
        wanted |= {f"{key}.{moment}": parameter.shape for moment in MOMENTS[1:]}
    check_shapes(file.shapes, wanted, file.path)
    read_tensors(model, path, name)
    for key, parameter in parameters.items():
        device = {"step": "cpu"}  # AdamW counts on the CPU
        optimizer.state[parameter] = {
            moment: file[f"{key}.{moment}"].to(device.get(moment, parameter.device))
            for moment in MOMENTS
        }
    generator.set_state(file[GENERATOR])
    step = read_json(path / STATE_FILE).get("step")
    if type(step) is not int or step < 1:
        raise InputError(f"{path / STATE_FILE}: step must be a whole number >= 1, got {step!r}")
    return step
