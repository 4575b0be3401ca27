"""The model families, and how a checkpoint becomes a model.

model = models.load("path/to/checkpoint")       Hugging Face layout: config.json, *.safetensors
model = models.new({"model_type": "llama", ...})       the same architecture, random weights
"""

import dataclasses
import typing
from pathlib import Path

import torch
from torch import Tensor, nn

from mixlora.errors import InputError, did_you_mean
from mixlora.files import TensorFile, check_shapes, read_json
from mixlora.layers.adapted_model import AdaptedModel
from models.llama import Llama, LlamaConfig

FAMILIES: dict[str, tuple[type[AdaptedModel], type]] = {"llama": (Llama, LlamaConfig)}

# Keys of config.json that change nothing in a forward pass.
DESCRIPTIVE = set(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache "
    "initializer_range bos_token_id eos_token_id pad_token_id tokenizer_class "
    "attention_dropout pretraining_tp".split()
)
HEADER_OF_OLD_CHECKPOINTS = "rotary_emb.inv_freq"  # a buffer that older checkpoints carry along


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AdaptedModel:
    """The model of a local checkpoint folder, frozen, its weights cast to `dtype`.

    Reads `model.safetensors`, or the shards of `model.safetensors.index.json`; all missing,
    unexpected and misshaped tensors are one InputError. A name that is no folder is looked up on
    the hub where `huggingface_hub` is installed.
    """
    path = _local_folder(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    family, config = _read_config(read_json(path / "config.json"), path / "config.json")
    with torch.device("meta"):
        model = family(config)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    source, files = _weight_files(path)
    found = {name: shape for file in files for name, shape in file.shapes.items()}
    ignored = {name for name in found if name.endswith(HEADER_OF_OLD_CHECKPOINTS)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # some tied checkpoints store the shared matrix twice
    found = {name: shape for name, shape in found.items() if name not in ignored}
    check_shapes(found, wanted, source, _likely_cause)
    state: dict[str, Tensor] = {
        name: file[name].to(device=device, dtype=dtype)
        for file in files
        for name in file.shapes
        if name in wanted
    }
    model.load_state_dict(state, assign=True, strict=False)
    model.name_or_path = str(path)
    model.tie_weights()
    return model.eval()


def new(config: dict, seed: int = 0) -> AdaptedModel:
    """A model with random weights (normal, standard deviation 0.02) from config.json's keys."""
    family, config = _read_config(config, "config")
    model = family(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.eval()


def _local_folder(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise InputError(f"model {path}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"model {path}: no such folder (a hub id needs the package huggingface_hub)"
        ) from None
    try:
        wanted = ["*.json", "*.safetensors", "*.model"]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # the hub's own errors are many; each ends here, with its text
        raise InputError(f"model {path}: no such folder, nor on the hub: {error}") from None


def _read_config(values: dict, source: str | Path) -> tuple[type[AdaptedModel], typing.Any]:
    """The family and its config; unknown types, ill-typed and unsupported keys are errors."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES)
        raise InputError(f"{source}: model_type {kind!r} is not supported{hint}")
    family, config_class = FAMILIES[kind]
    values = {**values, **_rope(values, source)}
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key in fields:
            allowed = typing.get_args(hints[key]) or (hints[key],)
            if not isinstance(value, (*allowed, int) if float in allowed else allowed) or (
                isinstance(value, bool) and bool not in allowed
            ):
                names = " or ".join(kind.__name__ for kind in allowed)
                raise InputError(f"{source}: {key} must be {names}, got {value!r}")
            if type(value) is int and int in allowed and value < 1:
                raise InputError(f"{source}: {key} must be positive, got {value}")
        elif key not in DESCRIPTIVE and value not in (None, False):
            raise InputError(f"{source}: {key} = {value!r} is not supported for {kind}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise InputError(f"{source}: missing {', '.join(missing)}")
    try:
        return family, config_class(**{k: v for k, v in values.items() if k in fields})
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def _rope(values: dict, source: str | Path) -> dict:
    """rope_theta, wherever it is written; every kind but the default is refused by name."""
    rope: dict[str, typing.Any] = {"rope_scaling": None, "rope_parameters": None}
    for key in ("rope_scaling", "rope_parameters"):
        written = values.get(key) or {}
        if not isinstance(written, dict):
            raise InputError(f"{source}: {key} must be a mapping, got {written!r}")
        kind = written.get("rope_type", written.get("type", "default"))
        if kind != "default":
            raise InputError(f"{source}: {key} of type {kind!r} is not supported (known: default)")
        if surplus := sorted(written.keys() - {"rope_type", "type", "rope_theta"}):
            raise InputError(f"{source}: {key}.{surplus[0]} is not supported")
        if "rope_theta" in written:
            rope["rope_theta"] = written["rope_theta"]
    return rope


def _weight_files(path: Path) -> tuple[Path, list[TensorFile]]:
    """The checkpoint's files; an index and its shards must tell the same, both ways."""
    index_path = path / "model.safetensors.index.json"
    if not index_path.exists():
        return path / "model.safetensors", [TensorFile(path / "model.safetensors")]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index_path}: weight_map must map tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index_path}: {name!r} is no safetensors file of this folder")
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise InputError(f"{index_path}: names shards that are not there: {', '.join(absent)}")
    files = [TensorFile(path / name) for name in names]
    for file in files:
        indexed = {tensor for tensor, name in weight_map.items() if name == file.path.name}
        check_shapes(file.shapes, {name: file.shapes.get(name, ()) for name in indexed}, file.path)
    return index_path, files


def _likely_cause(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return "likely cause: config.json lacks tie_word_embeddings: true"
    if any(name.endswith("bias") for name in missing + unexpected):
        return "likely cause: attention_bias or mlp_bias of config.json"
    if misshaped:
        return "likely cause: config.json belongs to another checkpoint"
    return ""
