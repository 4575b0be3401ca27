"""Adapters as files: adapter_config.json and adapter_model.safetensors (or .bin, read and written
without ever unpickling anything but tensors).

    LORA      base_model.model.{path}.{lora_A|lora_B}.weight   .lora_magnitude_vector      PEFT
    MIXLORA   mixlora.{path of the feed-forward}.moe_gate.weight                           MoE-PEFT
              mixlora.{path}.experts.{e}.{lora_A|lora_B}.weight   .lora_magnitude_vector
              mixlora.{path}.{lora_A|lora_B}.weight                  outside feed-forwards
    LORAMOE   loramoe.{path}.moe_gate.weight   .experts.{e}...   MOLA the same under mola.
    MILORA    milora.{path}.{lora_A|lora_B}.weight   .lora_magnitude_vector                 ours
              milora.layers.{L}.prompt_router.weight     a row for each targeted projection of the
                                                         layer, in the order q k v o gate up down
              milora.layers.{L}.prompt_router.query      pooler attention
              milora.layers.{L}.prompt_router.numerator   .denominator      router_act rational

{path} is the projection's in the checkpoint, for all but LORA without the leading "model.".
MoE-PEFT's ancestor (mLoRA up to 0.4) had other names, which are read too.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixlora.adapter_config import LEGACY_TARGETS, AdapterConfig
from mixlora.adapters import add_adapter, config_of, remove_adapter
from mixlora.errors import InputError
from mixlora.files import (
    PickledTensorFile,
    TensorFile,
    check_floats,
    check_shapes,
    read_json,
    write_json,
    write_pickled_tensors,
    write_tensors,
)
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear, LoraPair
from mixlora.layers.lora_mixture import LoraMixture
from mixlora.layers.milora import PromptRouting
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"


def save_adapter(
    model: AdaptedModel, directory: str | Path, name: str = "default", *, pickled: bool = True
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, and read the names back.

    Where pip `mixlora` can read the adapter (top-k, no DoRA, no expert_lora), `pickled` also
    writes adapter_model.bin, the one file it reads.
    """
    config = config_of(model, name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = config.to_dict()
    values["task_type"] = config.task_type or "CAUSAL_LM"
    values["base_model_name_or_path"] = config.base_model_name_or_path or model.name_or_path
    if config.peft_type == "MIXLORA":
        values["act_fn"] = config.act_fn or model.config.hidden_act
    tensors = adapter_tensors(model, name)
    write_tensors(directory / TENSOR_FILE, tensors)
    write_json(directory / CONFIG_FILE, values)
    written = TensorFile(directory / TENSOR_FILE).shapes
    check_shapes(written, _shapes(tensors), directory / TENSOR_FILE)
    is_plain = not config.use_dora and config.expert_lora is None
    is_readable = config.routing_strategy == "mixlora" and is_plain
    if pickled and is_readable and isinstance(config.target_modules, list):
        write_pickled_tensors(directory / PICKLED_FILE, tensors)
    else:  # that of an earlier adapter, which pip `mixlora` would take for this one
        (directory / PICKLED_FILE).unlink(missing_ok=True)


def load_adapter(model: AdaptedModel, directory: str | Path, name: str = "default") -> None:
    """Add the adapter of a directory and make it active; the model is as before on any error."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"adapter {directory}: no such folder")
    config = AdapterConfig.from_dict(read_json(directory / CONFIG_FILE), directory / CONFIG_FILE)
    file = _tensor_file(directory)
    _check_sizes(config, file)
    before, meta = model.active_adapter, torch.device("meta")
    try:
        with meta, _Undrawn():  # no memory, until the file is known to hold what the config says
            add_adapter(model, config, name, meta)
        _checked(model, file, name)
        remove_adapter(model, name)
        add_adapter(model, config, name)
        read_tensors(model, directory, name)
    except BaseException:
        if model.adapter_configs.get(name) is config:
            remove_adapter(model, name)
        model.active_adapter = before
        raise


class _Undrawn(TorchFunctionMode):
    """Without values there is nothing to draw, and for meta tensors torch would import its compiler
    to draw it, which takes seconds."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def read_tensors(model: AdaptedModel, directory: str | Path, name: str = "default") -> None:
    """Copy a directory's adapter_model.safetensors, else its .bin, into an adapter of the model."""
    file = _tensor_file(Path(directory))
    originals = _checked(model, file, name)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, name).items():
            tensor.copy_(file[originals[key]])


def _tensor_file(directory: Path) -> TensorFile | PickledTensorFile:
    path, pickled = directory / TENSOR_FILE, directory / PICKLED_FILE
    is_pickled = pickled.is_file() and not path.is_file()
    return PickledTensorFile(pickled) if is_pickled else TensorFile(path)


def _check_sizes(config: AdapterConfig, file: TensorFile | PickledTensorFile) -> None:
    """Those that no tensor of the file can have; the exact ones are compared later, by name."""
    largest = max(map(math.prod, file.shapes.values()), default=0)
    ranks = config.lora_arguments()["r"], config.lora_arguments(of_experts=True)["r"]
    for key, size, most in (
        ("r", max(ranks), largest),
        ("num_experts", config.num_experts or 0, len(file.shapes)),
    ):
        if size > most:
            raise InputError(
                f"{file.path}: {key} {size} of {CONFIG_FILE} is more than its {len(file.shapes)} "
                f"tensors, of at most {largest} numbers, can hold"
            )


def _checked(
    model: AdaptedModel, file: TensorFile | PickledTensorFile, name: str
) -> dict[str, str]:
    """The file's own name of each of the adapter's tensors, which are all there and fit."""
    config = config_of(model, name)
    written = {_canonical(key): key for key in file.shapes}
    if len(written) < len(file.shapes):
        raise InputError(f"{file.path}: holds tensors twice, under their new and their old names")
    found = {key: file.shapes[original] for key, original in written.items()}

    def likely_cause(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
        return _likely_cause(missing, unexpected, misshaped, config, model)

    check_shapes(found, _shapes(adapter_tensors(model, name)), file.path, likely_cause)
    check_floats(file, file.shapes)
    return written


def adapter_tensors(model: AdaptedModel, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under their names in the file: views of the parameters."""
    kind = config_of(model, name).peft_type
    tensors: dict[str, Tensor] = {}

    def add(path: str, pair: LoraPair) -> None:
        is_plain = pair.lora_A.dim() == 2
        for e, prefix in (
            [(..., path)]
            if is_plain
            else [(e, f"{path}.experts.{e}") for e in range(len(pair.lora_A))]
        ):
            tensors[f"{prefix}.lora_A.weight"] = pair.lora_A[e]
            tensors[f"{prefix}.lora_B.weight"] = pair.lora_B[e]
            if pair.lora_magnitude_vector is not None:
                tensors[f"{prefix}.lora_magnitude_vector"] = pair.lora_magnitude_vector[e]

    for path, module in model.named_modules():
        if kind == "LORA":
            path = f"base_model.model.{path}"
        else:
            path = f"{kind.lower()}.{path.removeprefix('model.')}"
        if isinstance(module, Linear) and name in module.adapters:
            adapter = module.adapters[name]
            if isinstance(adapter, LoraMixture):
                tensors[f"{path}.moe_gate.weight"] = adapter.moe_gate.weight
            add(path, adapter)
        if isinstance(module, PromptRouting) and name in module.adapters:
            for key, parameter in module.adapters[name].named_parameters():
                tensors[f"{path}.{key}"] = parameter
        if isinstance(module, FeedForward) and name in module.mixtures:
            mixture = module.mixtures[name]
            tensors[f"{path}.moe_gate.weight"] = mixture.moe_gate.weight
            for projection in PROJECTIONS:
                if getattr(mixture, projection) is not None:
                    add(f"{path}.{projection}", getattr(mixture, projection))
    return tensors


def _canonical(key: str) -> str:
    """The name that a tensor of an older file has here."""
    key = re.sub(r"^(mixlora\.layers\.\d+)\.gate\.weight$", r"\1.mlp.moe_gate.weight", key)
    old = re.fullmatch(r"(mixlora\.layers\.\d+)\.experts\.(\d+)\.(\w+)\.(lora_[AB]\.weight)", key)
    if old:
        layer, expert, projection, end = old.groups()
        projection = LEGACY_TARGETS.get(projection, projection)
        key = f"{layer}.mlp.{projection}.experts.{expert}.{end}"
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _likely_cause(
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
    config: AdapterConfig,
    model: AdaptedModel,
) -> str:
    bases = f"another base model (made for {config.base_model_name_or_path}, "
    bases += f"this is {model.name_or_path})"
    if any("classifier" in key for key in unexpected):
        return "likely cause: an adapter with a classifier, for a task that is not generation"
    if any("magnitude" in key for key in missing + unexpected):
        return "likely cause: use_dora of adapter_config.json; MoE-PEFT never saved magnitudes"
    if any(".experts." in key for key in missing) != any(".experts." in key for key in unexpected):
        return "likely cause: num_experts or target_modules of adapter_config.json"
    setting = "r of adapter_config.json" if misshaped else "target_modules of adapter_config.json"
    return f"likely cause: {bases}, or {setting}"
