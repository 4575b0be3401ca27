"""AdamW over one adapter's parameters, and the learning rate of a step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mixlora.errors import InputError


@dataclass
class OptimConfig:
    lr: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after warm-up; down to 0
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
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
) -> torch.optim.AdamW:
    """LoRA+ (arXiv 2402.12354): B learns `loraplus_lr_ratio` times as fast as all else."""
    fast = [p for name, p in parameters.items() if name.endswith("lora_B")]
    other = [p for name, p in parameters.items() if not name.endswith("lora_B")]
    groups = [{"params": other, "ratio": 1.0}, {"params": fast, "ratio": loraplus_lr_ratio}]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def state_bytes(parameters: Iterable[nn.Parameter], config: OptimConfig) -> int:
    """Of the optimizer's state: two moments in fp32, and a count of steps."""
    return sum(2 * 4 * p.numel() + 4 for p in parameters)


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
