"""The model families, and how a checkpoint becomes a model.

model = models.load("path/to/checkpoint")       Hugging Face layout: config.json, *.safetensors
model = models.new({"model_type": "llama", ...})       the same architecture, random weights
models.save(model, "another/checkpoint")               its base, with what was merged into it
models.save_mixtral(model, "a/mixtral")                with its mixture, as a Mixtral checkpoint
"""

import dataclasses
import hashlib
import math
import shutil
import typing
from pathlib import Path

import torch
from torch import Tensor, nn

from mixlora.errors import InputError, did_you_mean
from mixlora.files import (
    TensorFile,
    check_floats,
    check_shapes,
    read_json,
    write_json,
    write_tensors,
)
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear
from mixlora.layers.quantized import require_bitsandbytes
from mixlora.memory import memory_for_loading
from models import mixtral
from models.gemma import Gemma, Gemma2, Gemma2Config, GemmaConfig
from models.llama import Llama, LlamaConfig
from models.mistral import Mistral, MistralConfig
from models.rotary import ROPES, Rope

FAMILIES: dict[str, tuple[type[AdaptedModel], type]] = {
    "llama": (Llama, LlamaConfig),
    "mistral": (Mistral, MistralConfig),
    "gemma": (Gemma, GemmaConfig),
    "gemma2": (Gemma2, Gemma2Config),
}

# Keys of config.json that change nothing in a forward pass.
DESCRIPTIVE = set(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache "
    "initializer_range bos_token_id eos_token_id pad_token_id tokenizer_class "
    "attention_dropout pretraining_tp max_sequence_length cache_implementation is_llama_config "
    "transformers.js_config".split()
)
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "generation_c")
PAGE = 2048  # numbers of a tensor in the fingerprint
LARGEST_SIZE = 1 << 31  # of config.json: no dimension or length is near it
HEADER_OF_OLD_CHECKPOINTS = "rotary_emb.inv_freq"  # a buffer that older checkpoints carry along


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str = "none",
) -> AdaptedModel:
    """The model of a local checkpoint folder, frozen, its weights cast to `dtype`.

    Reads `model.safetensors`, or the shards of `model.safetensors.index.json`; all missing,
    unexpected and misshaped tensors are one InputError. A name that is no folder is looked up on
    the hub where `huggingface_hub` is installed. `quantize` nf4 or int8: the blocks' projections
    are rounded one by one on their way to the device (layers/quantized.py).
    """
    if quantize != "none":
        require_bitsandbytes(f"quantize {quantize}")
    name, path = str(path), _local_folder(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    _, config = _read_config(read_json(path / "config.json"), path / "config.json")
    source, files = _weight_files(path)
    found = {name: shape for file in files for name, shape in file.shapes.items()}
    if config.num_hidden_layers > len(found):
        raise InputError(
            f"{path / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, but the "
            f"checkpoint holds {len(found)} tensors"
        )
    model = without_data(path)
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    ignored = {name for name in found if name.endswith(HEADER_OF_OLD_CHECKPOINTS)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # some tied checkpoints store the shared matrix twice
    found = {name: shape for name, shape in found.items() if name not in ignored}
    check_shapes(found, wanted, source, _likely_cause)
    for file in files:
        check_floats(file, file.shapes.keys() & wanted.keys())
    weights_bytes = sum(math.prod(shape) * dtype.itemsize for shape in wanted.values())
    with memory_for_loading(path, weights_bytes):
        state: dict[str, Tensor] = {
            name: file[name].to(device=device if quantize == "none" else "cpu", dtype=dtype)
            for file in files
            for name in file.shapes
            if name in wanted
        }
        model.load_state_dict(state, assign=True, strict=False)
        model.name_or_path, model.folder = name, path
        model.tie_weights()
        quantize_projections(model, quantize, device)
    return model.eval()


def quantize_projections(model: AdaptedModel, kind: str, device: str | torch.device) -> None:
    """Embeddings, norms and the head stay as they are."""
    if kind == "none":
        return
    for module in model.modules():
        if isinstance(module, Linear):
            module.quantize(kind, device)
    model.to(device)


def without_data(
    path: str | Path, dtype: torch.dtype = torch.float32, quantize: str = "none"
) -> AdaptedModel:
    """The model of a checkpoint's config.json on the meta device: shapes alone, nothing is read."""
    path = Path(path) / "config.json"
    family, config = _read_config(read_json(path), path)
    try:
        with torch.device("meta"):
            model = family(config).to(dtype)
    except (RuntimeError, OverflowError) as error:  # a product of sizes that no memory holds
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: no model has these sizes: {reason}") from None
    quantize_projections(model, quantize, "meta")
    return model.eval()


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's config.json, weights and tokenizer. Of a tensor it is name, dtype,
    shape and a page from the middle, so that the largest checkpoint costs well under a second."""
    _, files = _weight_files(folder)
    file_of = {name: file for file in files for name in file.shapes}
    weights, tokenizer = hashlib.sha256(), hashlib.sha256()
    for name in sorted(file_of):
        x_N = file_of[name][name].flatten()
        weights.update(f"{name} {x_N.dtype} {file_of[name].shapes[name]}".encode())
        weights.update(x_N[len(x_N) // 2 :][:PAGE].view(torch.uint8).numpy())
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.startswith(TOKENIZER_FILES):
            tokenizer.update(path.name.encode() + path.read_bytes())
    return {
        "config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights": weights.hexdigest(),
        "tokenizer": tokenizer.hexdigest(),
    }


def save(model: AdaptedModel, directory: str | Path) -> None:
    """Write a loaded model's base as a checkpoint, with what `mixlora.merge` folded into it.

    config.json, model.safetensors and the files of the tokenizer; adapters are not in it.
    """
    directory = Path(directory)
    _check_save("save", model, directory)
    with torch.device("meta"):
        names = type(model)(model.config).state_dict().keys()
    if model.config.tie_word_embeddings:
        names = names - {"lm_head.weight"}
    state = model.state_dict()
    _copy_tokenizer(model, directory)
    write_tensors(directory / "model.safetensors", {name: state[name] for name in names})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = read_json(model.folder / "config.json")
    write_json(directory / "config.json", {**config, "torch_dtype": dtype, "dtype": dtype})
    model.name_or_path, model.folder = str(directory), directory


def save_mixtral(model: AdaptedModel, directory: str | Path, name: str = "default") -> None:
    """Write base and mixture as a Mixtral checkpoint, which programs that know of no adapters load.

    For MixLoRA and MixDoRA on LLaMA and Mistral; what no Mixtral computes is an error. Every expert
    has its own copy of the feed-forward: LLaMA-2-7B with 8 experts takes 74 GB in bf16.
    """
    directory = Path(directory)
    if name not in model.adapter_configs:
        hint = did_you_mean(name, model.adapter_configs)
        raise InputError(f"save_mixtral: the model has no adapter named {name!r}{hint}")
    _check_save("save_mixtral", model, directory)
    base = read_json(model.folder / "config.json")
    mixtral.check(model, name, base["model_type"])
    _copy_tokenizer(model, directory)
    count, weight_map, size = model.config.num_hidden_layers + 1, {}, 0
    for i, tensors in enumerate(mixtral.shards(model, name), 1):
        file = f"model-{i:05}-of-{count:05}.safetensors"
        write_tensors(directory / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", mixtral.config_of(model, name, base))


def _check_save(what: str, model: AdaptedModel, directory: Path) -> None:
    if model.folder is None:
        raise InputError(
            f"{what}: the model was not loaded from a checkpoint: it has no config.json"
        )
    if any(isinstance(x, Linear) and x.quantized is not None for x in model.modules()):
        raise InputError(f"{what}: the base is quantised: load it without quantize")
    if directory.resolve() == model.folder.resolve():
        raise InputError(f"{what}: {directory} is where the model's own weights are read from")


def _copy_tokenizer(model: AdaptedModel, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in model.folder.iterdir():
        if path.is_file() and path.name.startswith(TOKENIZER_FILES):
            shutil.copyfile(path, directory / path.name)


def new(config: dict, seed: int = 0) -> AdaptedModel:
    """A model with random weights (normal, standard deviation 0.02) from config.json's keys, on
    torch's default device and in its default dtype."""
    family, config = _read_config(config, "config")
    model = family(config)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
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
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
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
    rope = _read_rope(values, source)
    values = {key: value for key, value in values.items() if key not in ROPE_KEYS}
    fields = [field.name for field in dataclasses.fields(config_class)]
    for key, value in values.items():
        inert = key in DESCRIPTIVE or value in (None, False)
        if key not in fields and not inert:
            hint = did_you_mean(key, fields)
            raise InputError(f"{source}: {key} = {value!r} is not supported for {kind}{hint}")
    return family, _build(config_class, {**values, "rope_parameters": rope}, str(source))


def _read_rope(values: dict, source: str | Path) -> Rope:
    """The rotary embedding of config.json, in its old spelling and its new one."""
    if values.get("partial_rotary_factor", 1) not in (1, None):
        rotated = values["partial_rotary_factor"]
        raise InputError(f"{source}: partial_rotary_factor must be 1, got {rotated!r}")
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    for key, mapping in given.items():
        if not isinstance(mapping, dict):
            raise InputError(f"{source}: {key} must be a mapping, got {mapping!r}")
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise InputError(f"{source}: rope_scaling and rope_parameters differ, one must go")
    key, mapping = next(iter(given.items()), ("rope_parameters", {}))
    kind = mapping.get("rope_type", mapping.get("type", "default"))
    where = f"{source}: {key} of type {kind!r}" if mapping else str(source)
    if not isinstance(kind, str) or kind not in ROPES:
        raise InputError(f"{where} is not supported{did_you_mean(str(kind), ROPES)}")
    outer = {key: values.get(key) for key in ("rope_theta", "max_position_embeddings")}
    outer = {key: value for key, value in outer.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(ROPES[kind])} - {"max_position_embeddings"}
    for name in sorted(mapping.keys() - fields - {"rope_type", "type", "finetuned"}):
        if name != "partial_rotary_factor" or mapping[name] != 1:
            raise InputError(f"{where}: {name} is not supported{did_you_mean(name, fields)}")
    return _build(ROPES[kind], {**outer, **mapping}, where)


def _build(kind: type, values: dict, where: str) -> typing.Any:
    """A dataclass from those of the values that are its fields; `where` opens the errors."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    values = {field.name: values[field.name] for field in fields if field.name in values}
    for key, value in values.items():
        allowed = typing.get_args(hints[key]) or (hints[key],)
        if not isinstance(value, (*allowed, int) if float in allowed else allowed) or (
            isinstance(value, bool) and bool not in allowed
        ):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise InputError(f"{where}: {key} must be {names}, got {value!r}")
        if type(value) is int and int in allowed and value < 1:
            raise InputError(f"{where}: {key} must be positive, got {value}")
        if type(value) is int and value >= LARGEST_SIZE:
            raise InputError(f"{where}: {key} must be less than {LARGEST_SIZE}")
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
