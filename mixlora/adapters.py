"""Adapters: their config, and how they are put around a model, saved and loaded.

Files are `adapter_config.json` and `adapter_model.safetensors`; LoRA under PEFT's names, MixLoRA
under MoE-PEFT's, one tensor per expert.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixlora import config as configs
from mixlora.errors import InputError, did_you_mean
from mixlora.files import TensorFile, check_shapes, read_json, write_json, write_tensors
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear, Lora
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward, MixLora
from mixlora.ops import ACTIVATIONS

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")

# Keys of PEFT and MoE-PEFT that must have a value that changes nothing, or that tell nothing.
INERT = (None, False, {}, [])
FOREIGN_KEYS = set(
    "alpha_pattern alora_invocation_tokens arrow_config corda_config ensure_weight_tying "
    "eva_config exclude_modules kasa_config fan_in_fan_out layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_bias lora_ga_config megatron_config modules_to_save "
    "monteclora_config rank_pattern target_parameters trainable_token_indices "
    "use_bdlora use_dora use_qalora velora_config "
    "top_p temperature expert_capacity sparse_step ffn_dropout router_z_loss_coef "
    "expert_lora".split()
)
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
ADAPTED = re.compile(r"\.(adapters|mixtures)\.")  # in the names of adapters' parameters
DESCRIPTIVE_KEYS = set(
    "auto_mapping inference_mode megatron_core peft_version revision "
    "qalora_group_size name task_name".split()
)


@dataclass
class AdapterConfig:
    """One adapter, under the keys of upstream's adapter_config.json.

    `routing_strategy` absent is plain LoRA; "mixlora" makes experts of the targeted feed-forward
    projections and plain LoRA of the targeted attention projections.
    """

    peft_type: str | None = None  # LORA or MIXLORA, by routing_strategy
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    use_rslora: bool = False  # scale lora_alpha / sqrt(r) instead of lora_alpha / r
    lora_init: Literal["original", "gaussian"] = "original"
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A (LoRA+)
    routing_strategy: Literal["mixlora"] | None = None
    num_experts: int = 8
    top_k: int = 2
    act_fn: str | None = None  # of the experts; None: the model's
    router_init_range: float = 0.02
    router_loss: bool = True
    router_aux_loss_coef: float = 0.001
    router_loss_scope: Literal["global", "per_layer"] = "global"
    jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        kind = "MIXLORA" if self.routing_strategy else "LORA"
        if self.peft_type not in (None, kind):
            raise InputError(
                f"peft_type must be {kind} with routing_strategy {self.routing_strategy!r}, "
                f"got {self.peft_type!r}"
            )
        self.peft_type = kind
        checks = {
            "r": (self.r > 0, "> 0"),
            "lora_alpha": (self.lora_alpha > 0, "> 0"),
            "lora_dropout": (0 <= self.lora_dropout < 1, "in [0, 1)"),
            "target_modules": (bool(self.target_modules), "a list of at least one projection"),
            "loraplus_lr_ratio": (self.loraplus_lr_ratio > 0, "> 0"),
            "num_experts": (self.num_experts > 0, "> 0"),
            "top_k": (1 <= self.top_k <= self.num_experts, f"in [1, {self.num_experts}]"),
            "router_init_range": (self.router_init_range >= 0, ">= 0"),
            "router_aux_loss_coef": (self.router_aux_loss_coef >= 0, ">= 0"),
            "jitter_noise": (0 <= self.jitter_noise < 1, "in [0, 1)"),
            "act_fn": (self.act_fn in (None, *ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}"),
        }
        for key, (holds, wanted) in checks.items():
            if not holds:
                raise InputError(f"{key} must be {wanted}, got {getattr(self, key)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | Path = "adapter config") -> Any:
        """From upstream's JSON keys. Keys of methods that are not here must be inert."""
        fields = {f.name for f in dataclasses.fields(cls)}
        kept = {}
        for key, value in values.items():
            if key == "init_lora_weights":
                if value not in PLAIN_INITS:  # the others change the base model's weights too
                    raise InputError(f"{source}: {key} = {value!r} is not supported")
            elif key in fields:
                kept[key] = value
            elif key in FOREIGN_KEYS and not any(value == inert for inert in INERT):
                raise InputError(f"{source}: {key} = {value!r} is not supported (only {INERT[0]})")
            elif key not in FOREIGN_KEYS | DESCRIPTIVE_KEYS:
                raise InputError(f"{source}: unknown key {key!r}{did_you_mean(key, fields)}")
        return configs.build(cls, configs.locate(kept, str(source)))

    def to_dict(self) -> dict[str, Any]:
        """Upstream's JSON keys; those that other programs do not know only where they matter."""
        values = dataclasses.asdict(self)
        default = dataclasses.asdict(AdapterConfig())
        always = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha"}
        always |= {"lora_dropout", "bias", "target_modules"}
        if self.routing_strategy:
            always |= {"routing_strategy", "num_experts", "top_k", "act_fn"}
        alpha = self.lora_alpha
        values["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
        return {k: v for k, v in values.items() if k in always or v != default[k]}


def check_adapter(model: AdaptedModel, config: AdapterConfig, name: str = "default") -> None:
    """Whether `add_adapter` would take it: an error if not, no change in any case."""
    if name in model.adapter_configs:
        raise InputError(f"the model already has an adapter named {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter's name is letters, digits, _ and -, got {name!r}")
    known = {target for _, target, _ in _sites(model)}
    for target in config.target_modules:
        if target not in known:
            hint = did_you_mean(target, known)
            raise InputError(f"target_modules: the model has no projection {target!r}{hint}")


def add_adapter(model: AdaptedModel, config: AdapterConfig, name: str = "default") -> None:
    """Put a fresh adapter around the model and make it the active one.

    A is drawn from torch's generator, B is zero: the model computes what it did before.
    """
    check_adapter(model, config, name)
    device = next(model.parameters()).device
    lora = {
        key: getattr(config, key)
        for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_init")
    }
    experts = PROJECTIONS if config.routing_strategy else ()  # what becomes a mixture
    for _, target, module in _sites(model):
        if target in config.target_modules and target not in experts:
            out_features, in_features = module.weight.shape
            module.adapters[name] = Lora(in_features, out_features, **lora).to(device)
    if config.routing_strategy:
        for module in model.modules():
            if isinstance(module, FeedForward):
                module.mixtures[name] = MixLora(
                    module,
                    projections=tuple(p for p in PROJECTIONS if p in config.target_modules),
                    num_experts=config.num_experts,
                    top_k=config.top_k,
                    act_fn=config.act_fn,
                    router_init_range=config.router_init_range,
                    jitter_noise=config.jitter_noise,
                    **lora,
                ).to(device)
    model.adapter_configs[name] = config
    model.active_adapter = name
    model.train(model.training)


def remove_adapter(model: AdaptedModel, name: str = "default") -> None:
    _config_of(model, name)
    for module in model.modules():
        for holder in (getattr(module, "adapters", None), getattr(module, "mixtures", None)):
            if holder is not None and name in holder:
                del holder[name]
    del model.adapter_configs[name]
    if model.active_adapter == name:
        model.active_adapter = None


@contextlib.contextmanager
def disable_adapters(model: AdaptedModel) -> Iterator[None]:
    """Within it, the base model."""
    active, model.active_adapter = model.active_adapter, None
    try:
        yield
    finally:
        model.active_adapter = active


def adapter_parameters(model: AdaptedModel, name: str = "default") -> dict[str, nn.Parameter]:
    """The trainable parameters of one adapter, by their names in the model."""
    _config_of(model, name)
    owned = re.compile(rf"\.(adapters|mixtures)\.{re.escape(name)}\.")
    return {key: p for key, p in model.named_parameters() if owned.search(key)}


def print_trainable_parameters(model: AdaptedModel) -> None:
    base = sum(p.numel() for key, p in model.named_parameters() if not ADAPTED.search(key))
    for name in model.adapter_configs:
        parameters = adapter_parameters(model, name)
        groups = {"routers": 0, "experts": 0, "LoRA": 0}
        for key, parameter in parameters.items():
            group = "routers" if "moe_gate" in key else "experts" if ".mixtures." in key else "LoRA"
            groups[group] += parameter.numel()
        total = sum(groups.values())
        parts = ", ".join(f"{group} {count:,}" for group, count in groups.items() if count)
        share = 100 * total / (base + total)
        print(f"{name}: {total:,} of {base + total:,} parameters train ({share:.2f} %): {parts}")


def save_adapter(model: AdaptedModel, directory: str | Path, name: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors, and read the names back."""
    config = _config_of(model, name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = config.to_dict()
    values["task_type"] = config.task_type or "CAUSAL_LM"
    values["base_model_name_or_path"] = config.base_model_name_or_path or model.name_or_path
    if config.routing_strategy:
        values["act_fn"] = config.act_fn or model.config.hidden_act
    tensors = adapter_tensors(model, name)
    write_tensors(directory / TENSOR_FILE, tensors)
    write_json(directory / CONFIG_FILE, values)
    written = TensorFile(directory / TENSOR_FILE).shapes
    check_shapes(written, _shapes(tensors), directory / TENSOR_FILE)


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
    """Copy a directory's adapter_model.safetensors into an adapter of the model."""
    file, tensors = TensorFile(Path(directory) / TENSOR_FILE), adapter_tensors(model, name)
    check_shapes(file.shapes, _shapes(tensors), file.path, _likely_cause)
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(file[key])


def adapter_tensors(model: AdaptedModel, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under their names in the file: views of the parameters."""
    prefix = "mixlora." if _config_of(model, name).routing_strategy else "base_model.model.model."
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        path = prefix + path.removeprefix("model.")
        if isinstance(module, Linear) and name in module.adapters:
            lora = module.adapters[name]
            tensors[f"{path}.lora_A.weight"] = lora.lora_A
            tensors[f"{path}.lora_B.weight"] = lora.lora_B
        if isinstance(module, FeedForward) and name in module.mixtures:
            mixture = module.mixtures[name]
            tensors[f"{path}.moe_gate.weight"] = mixture.moe_gate.weight
            for projection in PROJECTIONS:
                experts = getattr(mixture, projection)
                for e in range(mixture.num_experts if experts is not None else 0):
                    key = f"{path}.{projection}.experts.{e}"
                    tensors[f"{key}.lora_A.weight"] = experts.lora_A[e]
                    tensors[f"{key}.lora_B.weight"] = experts.lora_B[e]
    return tensors


def _sites(model: AdaptedModel) -> list[tuple[str, str, Linear]]:
    """(path, last name of the path, module) of every projection an adapter may go around."""
    return [
        (path, path.rpartition(".")[2], module)
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    ]


def _config_of(model: AdaptedModel, name: str) -> AdapterConfig:
    if name not in model.adapter_configs:
        hint = did_you_mean(name, model.adapter_configs)
        raise InputError(f"the model has no adapter named {name!r}{hint}")
    return model.adapter_configs[name]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _likely_cause(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    if any(".experts." in key for key in missing) != any(".experts." in key for key in unexpected):
        return "likely cause: num_experts or target_modules of adapter_config.json"
    if misshaped:
        return "likely cause: another base model, or r of adapter_config.json"
    return "likely cause: another base model, or target_modules of adapter_config.json"
