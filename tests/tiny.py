"""Tiny models whose random weights give logits of ordinary size."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixlora
import models
from mixlora import ops

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


# What the kinds of model_type have besides; windows and caps that matter for 40 tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 10},
    "gemma2": {
        "head_dim": 10,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
}


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], seed: int = 0, norm: float = 1) -> None:
    """Random values: products keep the size of their input, and no bias or norm can be left out.

    `norm` is the weight with which a norm does nothing more.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            size = 2.0 if "lm_head" in name or "embed_tokens" in name else 1.0
            parameter.copy_(noise * size / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise / 2 if name.endswith("bias") else norm + noise / 5)


def norm_of(kind: str) -> float:
    return 0 if kind.startswith("gemma") else 1


def tiny_checkpoint(
    kind: str,
    folder: Path,
    *,
    stored: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **config: Any,
) -> tuple[Path, nn.Module]:
    """A checkpoint that `transformers` wrote, and its model."""
    import transformers  # slow

    values = {"attn_implementation": "eager"} if kind == "gemma2" else {}  # others skip the cap
    hf_config = transformers.AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **config})
    hf_model = transformers.AutoModelForCausalLM.from_config(hf_config)
    fill(dict(hf_model.named_parameters()), norm=norm_of(kind))
    hf_model.to(stored).save_pretrained(folder, max_shard_size=shard_size)
    hf_model = type(hf_model).from_pretrained(folder, dtype=torch.float32, **values)
    hf_model.generation_config.eos_token_id = None
    return folder, hf_model.eval()


def tiny_llama(folder: Path, **config: Any) -> tuple[Path, nn.Module]:
    return tiny_checkpoint("llama", folder, **config)


def tiny_model(kind: str = "llama", **config: Any) -> nn.Module:
    """A model without a checkpoint."""
    model = models.new({"model_type": kind, **SIZES, **FAMILIES[kind], **config})
    fill(dict(model.named_parameters()), norm=norm_of(kind))
    return model


def add_filled(model: nn.Module, name: str = "default", *, seed: int = 1, **config: Any) -> None:
    """Add an adapter whose every tensor matters."""
    config = {"r": 4, "lora_alpha": 2, **config}
    mixlora.add_adapter(model, mixlora.AdapterConfig(**config), name)
    fill(mixlora.adapters.adapter_parameters(model, name), seed)


MIXLORA = {"routing_strategy": "mixlora", "num_experts": 4, "top_k": 2}


def some_tokens(B: int, S: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (B, S), generator=generator)


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """(tokens_BS, mask_BS); what stands in the padding is random too."""
    S = max(lengths)
    tokens_BS, place_S = some_tokens(len(lengths), S), torch.arange(S)
    length_B1 = torch.tensor(lengths)[:, None]
    mask_BS = place_S < length_B1 if side == "right" else place_S >= S - length_B1
    return tokens_BS, mask_BS


# name: (T, K, E, load)
ROUTINGS = {
    "uniform": (24, 2, 5, "uniform"),
    "zipf": (24, 2, 5, "zipf"),
    "one pair takes all": (24, 2, 5, "one pair"),
    "some experts empty": (24, 2, 5, "some empty"),
    "empty slots": (24, 3, 5, "empty slots"),
    "all slots empty": (6, 2, 5, "all empty"),
    "no token": (0, 2, 5, "uniform"),
    "one token": (1, 2, 5, "uniform"),
    "one slot": (24, 1, 5, "uniform"),
    "every expert": (12, 5, 5, "uniform"),
    "one expert": (7, 1, 1, "uniform"),
}


def some_plan(T: int, K: int, E: int, load: str) -> ops.Plan:
    """K different experts for every token, ascending, as routers choose them."""
    generator = torch.Generator().manual_seed(0)
    weight_E = 1 / torch.arange(1, E + 1) if load == "zipf" else torch.ones(E)
    if load == "some empty":
        weight_E[::2] = 1e-9
    expert_TK = torch.zeros(T, K, dtype=torch.int32)
    if T:
        expert_TK[:] = torch.multinomial(weight_E.expand(T, E), K, generator=generator)
    if load == "one pair":
        expert_TK[:] = torch.tensor([1, 3])
    if load == "all empty":
        expert_TK[:] = -1
    if load == "empty slots":
        expert_TK[torch.rand(T, K, generator=generator) < 0.4] = -1
    return ops.moe_sort(expert_TK.sort(dim=1).values, E)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def scattered(x: Tensor) -> Tensor:
    """The same values in another memory order, with NaN between them."""
    wide = x.new_full((*x.shape[::-1], 2), torch.nan)
    view = wide[..., 1].permute(*reversed(range(x.dim())))
    return view.copy_(x)
