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

import re
from pathlib import Path

import torch
from torch import Tensor

from mixlora.adapter_config import LEGACY_TARGETS, AdapterConfig
from mixlora.adapters import add_adapter, config_of, remove_adapter
from mixlora.errors import InputError
from mixlora.files import (
    PickledTensorFile,
    TensorFile,
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
    before = model.active_adapter
    add_adapter(model, config, name)
    try:
        read_tensors(model, directory, name)
    except BaseException:
        remove_adapter(model, name)
        model.active_adapter = before
        raise


def read_tensors(model: AdaptedModel, directory: str | Path, name: str = "default") -> None:
    """Copy a directory's adapter_model.safetensors, else its .bin, into an adapter of the model."""
    path, pickled = Path(directory) / TENSOR_FILE, Path(directory) / PICKLED_FILE
    is_pickled = pickled.is_file() and not path.is_file()
    file = PickledTensorFile(pickled) if is_pickled else TensorFile(path)
    tensors = adapter_tensors(model, name)
    config = config_of(model, name)
    written = {_canonical(key): key for key in file.shapes}
    if len(written) < len(file.shapes):
        raise InputError(f"{file.path}: holds tensors twice, under their new and their old names")
    found = {key: file.shapes[original] for key, original in written.items()}

    def likely_cause(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
        return _likely_cause(missing, unexpected, misshaped, config, model)

    check_shapes(found, _shapes(tensors), file.path, likely_cause)
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(file[written[key]])


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
