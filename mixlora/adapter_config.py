"""An adapter's settings, under the keys of upstream's adapter_config.json (PEFT, MoE-PEFT).

What a router reads, and its defaults, its constructor in layers/router.py or milora.py says.
"""

import dataclasses
import inspect
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixlora import config as configs
from mixlora.errors import InputError, did_you_mean
from mixlora.layers.milora import POOLERS, ROUTER_ACTS, ROUTER_WEIGHTS
from mixlora.layers.router import ROUTERS, Router
from mixlora.ops import ACTIVATIONS

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
ALL_LINEAR = "all-linear"

# Keys of PEFT and MoE-PEFT that must have a value that changes nothing, or that tell nothing.
INERT = (None, False, {}, [])
FOREIGN_KEYS = set(
    "alpha_pattern alora_invocation_tokens arrow_config corda_config ensure_weight_tying "
    "eva_config exclude_modules kasa_config fan_in_fan_out layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_bias lora_ga_config megatron_config modules_to_save "
    "monteclora_config rank_pattern target_parameters trainable_token_indices "
    "use_bdlora use_qalora velora_config".split()
)
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
DESCRIPTIVE_KEYS = set(
    "auto_mapping inference_mode megatron_core peft_version revision "
    "qalora_group_size name task_name".split()
)
# Spellings of MoE-PEFT's ancestor, mLoRA up to 0.4.
LEGACY_STRATEGIES = {"mixtral": "mixlora", "switch": "mixlora-switch"}
LEGACY_TARGETS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}

MOST_REPEATS = 8  # in a regular expression of a file: each may multiply the time that it takes

DROPOUT_FOR_ZERO = 1e-9  # written for no dropout: pip `mixlora` refuses 0


@dataclass
class LoraSettings:
    """What may differ between the experts and the other projections; None: it does not."""

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_init: Literal["original", "gaussian"] | None = None
    bias: Literal["none"] = "none"

    def __post_init__(self) -> None:
        _check(self, _lora_checks(self))


@dataclass
class AdapterConfig:
    """One adapter. Without `routing_strategy` it is LoRA, or DoRA; with one, a mixture:

    mixlora, mixlora-dynamic, mixlora-switch    experts of the targeted feed-forward projections,
                                                LoRA on the targeted attention projections
    loramoe                                     the same, but a router for each projection
    mola                                        experts of every targeted projection
    milora                                      a LoRA on every targeted projection, of which the
                                                prompt chooses top_k in each layer

    None is the router's own default (layers/router.py, milora.py), which `__post_init__` fills in.
    """

    peft_type: str | None = None  # LORA, MIXLORA, LORAMOE, MOLA, MILORA by routing_strategy
    task_type: Literal["CAUSAL_LM", "QUESTION_ANS"] | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    r: int = 16
    lora_alpha: float | None = None  # None: 32; of milora 8 r, since probabilities shrink updates
    lora_dropout: float = 0.0
    bias: Literal["none"] = "none"
    # ends of projections' paths, or a regular expression for whole paths, or "all-linear"
    target_modules: list[str] | str = field(default_factory=lambda: list(TARGETS))
    use_rslora: bool = False  # scale lora_alpha / sqrt(r) instead of lora_alpha / r
    use_dora: bool = False
    lora_init: Literal["original", "gaussian"] = "original"
    loraplus_lr_ratio: float = 1.0  # learning rate of B over that of A (LoRA+)
    expert_lora: LoraSettings | None = None  # of the experts, where they differ
    routing_strategy: str | None = None
    num_experts: int | None = None
    act_fn: str | None = None  # of the experts; None: the model's
    dropout_masks: Literal["shared", "independent"] = "shared"  # by a token's experts
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    expert_capacity: int | None = None
    capacity_factor: float | None = None  # expert_capacity = capacity_seq_len / num_experts * this
    capacity_seq_len: int | None = None  # train.py fills in train.max_seq_len
    ffn_dropout: float | None = None
    sparse_step: int | None = None
    router_init_range: float | None = None
    jitter_noise: float | None = None
    router_loss: bool | None = None
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    router_loss_scope: Literal["global", "per_layer"] | None = None
    router_weight: Literal[ROUTER_WEIGHTS] | None = None
    route_prompt: bool | None = None
    pooler: Literal[tuple(POOLERS)] | None = None
    router_act: Literal[ROUTER_ACTS] | None = None

    def __post_init__(self) -> None:
        if self.routing_strategy not in (None, *ROUTERS):
            hint = did_you_mean(str(self.routing_strategy), ROUTERS)
            raise InputError(f"routing_strategy {self.routing_strategy!r} is not known{hint}")
        kind = self.router.kind if self.router else "LORA"
        if self.peft_type not in (None, kind):
            raise InputError(
                f"peft_type must be {kind} with routing_strategy {self.routing_strategy!r}, "
                f"got {self.peft_type!r}"
            )
        self.peft_type = kind
        if self.lora_alpha is None:
            self.lora_alpha = 8 * self.r if self.routes_prompts else 32
        self._fill_in_router()
        _check(self, _lora_checks(self) | self._checks())

    @property
    def router(self) -> type[Router] | None:
        return ROUTERS.get(self.routing_strategy)

    @property
    def routes_prompts(self) -> bool:
        """Whether one decision holds for all tokens of a sequence, which its whole prompt makes."""
        return self.peft_type == "MILORA"

    def router_arguments(self) -> dict[str, Any]:
        """The settings that the router's constructor reads."""
        return {key: getattr(self, key) for key in _router_keys(self.router)}

    def lora_arguments(self, of_experts: bool = False) -> dict[str, Any]:
        """The settings of layers.LoraPair, of experts or of a plain projection."""
        keys = "r lora_alpha lora_dropout use_rslora use_dora lora_init".split()
        values = {key: getattr(self, key) for key in keys}
        if of_experts and self.expert_lora is not None:
            own = {key: getattr(self.expert_lora, key) for key in keys}
            values |= {key: value for key, value in own.items() if value is not None}
        return values

    def _fill_in_router(self) -> None:
        """A setting takes its router's default; one that nothing would read is refused."""
        read = _router_keys(self.router) if self.router else {}
        for key in sorted(_router_keys()):
            if key in read:
                is_computed = key == "expert_capacity" and self.capacity_factor is not None
                if getattr(self, key) is None and not is_computed:
                    setattr(self, key, read[key])
            elif getattr(self, key) is not None:
                self._refuse(key)
        for key in ("router_loss", "router_z_loss_coef"):
            if self.router and getattr(self, key) is None:
                setattr(self, key, getattr(self.router, key))
            elif not self.router and getattr(self, key) is not None:
                self._refuse(key)
        for key in ("router_aux_loss_coef", "router_loss_scope"):
            if getattr(self, key) is None:
                setattr(self, key, getattr(self.router or Router, key))
        for key in ("capacity_factor", "capacity_seq_len"):
            if "expert_capacity" not in read and getattr(self, key) is not None:
                self._refuse(key)
        if self.capacity_factor is not None and self.capacity_seq_len is not None:
            share = self.capacity_seq_len / max(1, self.num_experts)
            capacity = max(1, math.ceil(share * self.capacity_factor))
            if self.expert_capacity not in (None, capacity):
                raise InputError(
                    f"expert_capacity = {self.expert_capacity}: capacity_factor makes it {capacity}"
                )
            self.expert_capacity = capacity

    def _refuse(self, key: str) -> None:
        strategy = f"routing_strategy {self.routing_strategy}" if self.router else "plain LoRA"
        raise InputError(f"{key} = {getattr(self, key)!r}: {strategy} has no such setting")

    def _checks(self) -> dict[str, tuple[bool, str]]:
        def between(key: str, holds) -> bool:
            return getattr(self, key) is None or holds(getattr(self, key))

        num_experts = len(TARGETS) if self.routes_prompts else self.num_experts or 0
        fused = self.router is not None and self.router.kind == "MIXLORA"
        targets = self.target_modules
        return {
            "target_modules": (
                bool(targets) and (isinstance(targets, list) or _is_regex(targets)),
                f"a list of at least one projection, all-linear or a regular expression of at most "
                f"{MOST_REPEATS} repetitions, none within another",
            ),
            "loraplus_lr_ratio": (self.loraplus_lr_ratio > 0, "> 0"),
            "num_experts": (between("num_experts", lambda x: x > 0), "> 0"),
            "top_k": (between("top_k", lambda x: 1 <= x <= num_experts), f"in [1, {num_experts}]"),
            "top_p": (between("top_p", lambda x: 0 < x <= 1), "in (0, 1]"),
            "temperature": (between("temperature", lambda x: x >= 0), ">= 0"),
            "expert_capacity": (between("expert_capacity", lambda x: x > 0), "> 0"),
            "capacity_factor": (between("capacity_factor", lambda x: x > 0), "> 0"),
            "capacity_seq_len": (
                between("capacity_seq_len", lambda x: x > 0 and self.capacity_factor is not None),
                "> 0, and beside capacity_factor",
            ),
            "ffn_dropout": (between("ffn_dropout", lambda x: 0 <= x < 1), "in [0, 1)"),
            "sparse_step": (self.sparse_step in (None, 1), "1: every feed-forward is a mixture"),
            "router_init_range": (between("router_init_range", lambda x: x >= 0), ">= 0"),
            "router_loss": (
                not (self.router_loss and self.router and self.router.kind == "LORAMOE"),
                "false for loramoe, whose loads are always equal",
            ),
            "router_aux_loss_coef": (self.router_aux_loss_coef >= 0, ">= 0"),
            "router_z_loss_coef": (between("router_z_loss_coef", lambda x: x >= 0), ">= 0"),
            "jitter_noise": (between("jitter_noise", lambda x: 0 <= x < 1), "in [0, 1)"),
            "act_fn": (
                self.act_fn is None or (fused and self.act_fn in ACTIVATIONS),
                f"one of {', '.join(ACTIVATIONS)}, and only with experts of a feed-forward",
            ),
            "dropout_masks": (
                self.dropout_masks == "shared" or fused,
                "shared, but with experts of a feed-forward",
            ),
            "use_dora": (
                self.router is None
                or fused
                or self.routes_prompts
                or not self.lora_arguments(True)["use_dora"],
                f"false for the experts of {self.routing_strategy}",
            ),
            "expert_lora": (
                self.expert_lora is None or (self.router is not None and not self.routes_prompts),
                "absent without experts",
            ),
            "router_loss_scope": (
                not self.routes_prompts or self.router_loss_scope == "per_layer",
                "per_layer for milora, whose layers choose among their own projections",
            ),
        }

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
        kept.pop("sparse_step", None)  # written by MoE-PEFT, read by nothing there
        if "routing_strategy" in kept:
            kept["routing_strategy"] = modern(kept["routing_strategy"], LEGACY_STRATEGIES)
        if isinstance(kept.get("target_modules"), dict):  # mLoRA's form: {"q_proj": true, ...}
            kept["target_modules"] = [
                key for key, on in kept["target_modules"].items() if on is True
            ]
        if isinstance(kept.get("target_modules"), list):
            kept["target_modules"] = [modern(x, LEGACY_TARGETS) for x in kept["target_modules"]]
        for part in (kept, kept.get("expert_lora")):
            if isinstance(part, dict) and part.get("lora_dropout") == DROPOUT_FOR_ZERO:
                part["lora_dropout"] = 0.0
        return configs.build(cls, configs.locate(kept, str(source)))

    def to_dict(self) -> dict[str, Any]:
        """Upstream's JSON keys; those that other programs do not know only where they matter."""
        values = dataclasses.asdict(self)
        plain = dataclasses.asdict(AdapterConfig(routing_strategy=self.routing_strategy))
        always = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha"}
        always |= {"lora_dropout", "bias", "target_modules"}
        if self.router is not None:
            always |= {"routing_strategy", "num_experts", "top_k", "top_p", "temperature"}
            always |= {"expert_capacity", "act_fn"}
            always |= {"router_weight", "route_prompt", "pooler", "router_act"}
        if self.expert_lora is not None:
            own = dataclasses.asdict(self.expert_lora)
            values["expert_lora"] = {k: _integer(v) for k, v in own.items() if v is not None}
        values["lora_alpha"] = _integer(self.lora_alpha)
        for part in (values, values["expert_lora"] or {}):
            if part.get("lora_dropout") == 0:
                part["lora_dropout"] = DROPOUT_FOR_ZERO if self.router is not None else 0.0
        written = {k: v for k, v in values.items() if k in always or v != plain[k]}
        return {k: v for k, v in written.items() if v is not None or k not in _router_keys()}


def modern(name: Any, names: dict[str, str]) -> Any:
    """Today's spelling of a legacy name; anything else is left as it is, for the checks."""
    return names.get(name, name) if isinstance(name, str) else name


def _router_keys(router: type[Router] | None = None) -> dict[str, Any]:
    """The settings that a router's constructor reads, and its defaults; None: those of all."""
    if router is None:
        return {key: None for router in ROUTERS.values() for key in _router_keys(router)}
    parameters = inspect.signature(router.__init__).parameters.values()
    of_the_model = ("self", "in_features", "num_modules")
    return {p.name: p.default for p in parameters if p.name not in of_the_model}


def _lora_checks(settings: LoraSettings | AdapterConfig) -> dict[str, tuple[bool, str]]:
    r, alpha, dropout = settings.r, settings.lora_alpha, settings.lora_dropout
    return {
        "r": (r is None or r > 0, "> 0"),
        "lora_alpha": (alpha is None or alpha > 0, "> 0"),
        "lora_dropout": (dropout is None or 0 <= dropout < 1, "in [0, 1)"),
    }


def _check(settings: object, checks: dict[str, tuple[bool, str]]) -> None:
    for key, (holds, wanted) in checks.items():
        if not holds:
            raise InputError(f"{key} must be {wanted}, got {getattr(settings, key)!r}")


def _is_regex(pattern: str) -> bool:
    """Whether it is one, and one that cannot take for ever: no repetition of a repetition."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]])*\]", "x", pattern)  # neither escapes nor sets
    groups, repeats = [False], 0  # whether each open group holds a repetition
    for i, letter in enumerate(bare):
        if letter == "(":
            groups.append(False)
        holds = groups.pop() if letter == ")" else False
        if bare[i + 1 : i + 2] in ("*", "+", "{"):
            if holds:
                return False
            holds, repeats = True, repeats + 1
        groups[-1] |= holds
    return repeats <= MOST_REPEATS


def _integer(alpha: Any) -> Any:
    """32.0 as 32: upstream wants a whole number."""
    return int(alpha) if type(alpha) is float and alpha >= 1 and alpha.is_integer() else alpha
