"""AdamW over one adapter's parameters, and the learning rate of a step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixlora.errors import InputError
from mixlora.layers.quantized import require_bitsandbytes

SMALL = 4096  # elements; bitsandbytes keeps the state of smaller tensors in fp32


@dataclass
class OptimConfig:
    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after warm-up; down to 0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    kind: Literal["adamw", "adamw8bit"] = "adamw"  # state in fp32, or in 8 bits by bitsandbytes
    max_grad_norm: float = 1.0  # 0 = gradients are not clipped

    def __post_init__(self) -> None:
        for key in ("weight_decay", "warmup_steps", "max_grad_norm"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} must be >= 0, got {getattr(self, key)}")
        for key in ("lr", "eps"):
            if getattr(self, key) <= 0:
                raise InputError(f"{key} must be > 0, got {getattr(self, key)}")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise InputError(f"{key} must be in [0, 1), got {getattr(self, key)}")


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimConfig, loraplus_lr_ratio: float
) -> torch.optim.Optimizer:
    """LoRA+ (arXiv 2402.12354): B learns `loraplus_lr_ratio` times as fast as all else."""
    fast = [p for name, p in parameters.items() if name.endswith("lora_B")]
    other = [p for name, p in parameters.items() if not name.endswith("lora_B")]
    groups = [{"params": other, "ratio": 1.0}, {"params": fast, "ratio": loraplus_lr_ratio}]
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw8bit":
        return require_bitsandbytes("optim.kind adamw8bit").optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)


def state_bytes(parameters: Iterable[nn.Parameter], config: OptimConfig) -> int:
    """Of the optimizer's state: two moments in fp32, and a count of steps; or, in 8 bits, two bytes
    a weight and two scales for 256 of them, but fp32 for small tensors."""

    def size(n: int) -> int:
        if config.kind == "adamw":
            return 2 * 4 * n + 4
        return 2 * 4 * n if n < SMALL else 2 * n + 2 * 4 * math.ceil(n / 256)

    return sum(size(p.numel()) for p in parameters)


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer knows of a parameter, but for constants; none where it had no gradient."""
    return _tensors(optimizer.state.get(parameter, {}))


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        key: x if isinstance(x, Tensor) else torch.tensor(float(x))
        for key, x in state.items()
        if not key.startswith("qmap")
    }


def fresh_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """`state_tensors` as they will be with a first gradient, zeros."""
    return _tensors(fresh_state(optimizer, parameter))


def state_from(
    tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, Any]:
    """The reverse of `state_tensors`; shapes and dtypes must be those of a fresh state."""
    state = fresh_state(optimizer, parameter)
    wanted = {key: x for key, x in state.items() if not key.startswith("qmap")}
    if tensors.keys() != wanted.keys():
        got = ", ".join(sorted(tensors))
        raise InputError(f"optimizer: a state must hold {', '.join(sorted(wanted))}, got {got}")
    for key, x in wanted.items():
        if not isinstance(x, Tensor):
            state[key] = type(x)(tensors[key].item())
        elif (x.shape, x.dtype) != (tensors[key].shape, tensors[key].dtype):
            got = f"{tensors[key].dtype} {list(tensors[key].shape)}"
            raise InputError(f"optimizer: {key} must be {x.dtype} {list(x.shape)}, got {got}")
        else:
            state[key] = tensors[key].to(x.device)
    return state


def fresh_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's own state of the parameter, if it has one, stays."""
    if isinstance(optimizer, torch.optim.AdamW):  # which counts on the CPU
        moments = (torch.zeros_like(parameter, requires_grad=False) for _ in range(2))
        return dict(
            zip(("step", "exp_avg", "exp_avg_sq"), (torch.zeros(()), *moments), strict=True)
        )
    own = optimizer.state.pop(parameter, None)
    for g, group in enumerate(optimizer.param_groups):
        for i, other in enumerate(group["params"]):
            if other is parameter:
                optimizer.init_state(group, parameter, g, i)
    fresh = dict(optimizer.state.pop(parameter))
    if own is not None:
        optimizer.state[parameter] = own
    return fresh


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of the 0-based step: linear warm-up, then the schedule over what is left."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]
    return config.lr * factor


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
