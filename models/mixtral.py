"""MixLoRA as Mixtral (arXiv 2401.04088), which other programs serve: softmax, top-k and
renormalisation are the same, and the W + s B A of each expert is a matrix of its own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mixlora.errors import InputError
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear, Lora
from mixlora.layers.mixlora_ffn import MixLora
from mixlora.layers.router import TopKRouter

EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings"
).split()
DESCRIPTIVE = ("bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling", "rope_parameters")


def check(model: AdaptedModel, name: str, kind: str) -> None:
    """Whether there is a Mixtral that computes what the model does with this adapter."""
    blocks = model.model.layers
    mixtures = [block.mlp.mixtures[name] for block in blocks if name in block.mlp.mixtures]
    adapters = [x.adapters[name] for x in _projections(model) if name in x.adapters]
    reasons = {
        f"its base is of model_type {kind!r}, not llama or mistral": kind
        not in ("llama", "mistral"),
        f"{name!r} is no mixture in each of its layers": len(mixtures) != len(blocks),
        "its router is not mixlora's, the top K renormalised": not all(
            isinstance(x, MixLora) and type(x.moe_gate) is TopKRouter for x in mixtures
        ),
        "its attention has experts too": not all(isinstance(x, Lora) for x in adapters),
        "its activation is not silu": any(x.act != "silu" for x in mixtures),
        "its projections have biases": any(x.bias is not None for x in _projections(model)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"save_mixtral: no Mixtral computes what this model does: {reason}")


def config_of(model: AdaptedModel, name: str, base: dict[str, Any]) -> dict[str, Any]:
    """config.json; `base` is that of the base model."""
    router = model.model.layers[0].mlp.mixtures[name].moe_gate
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        **{key: base[key] for key in DESCRIPTIVE if key in base},
        **{key: getattr(model.config, key) for key in SIZES},
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "rope_theta": model.config.rope_parameters.rope_theta,
        "sliding_window": getattr(model.config, "sliding_window", None),
        "num_local_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "router_jitter_noise": 0.0,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


@torch.no_grad()
def shards(model: AdaptedModel, name: str) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors, a layer at a time: each has all of its experts' matrices."""
    for i, block in enumerate(model.model.layers):
        mixture = block.mlp.mixtures[name]
        dtype = block.input_layernorm.weight.dtype
        layer = {
            "input_layernorm": block.input_layernorm.weight,
            "post_attention_layernorm": block.post_attention_layernorm.weight,
            "block_sparse_moe.gate": mixture.moe_gate.weight.to(dtype),
        }
        for key, base in block.self_attn.named_children():
            lora = base.adapters[name] if name in base.adapters else None
            layer[f"self_attn.{key}"] = base.weight if lora is None else lora.merged(base)
        for key, projection in EXPERT_NAMES.items():
            base, experts = getattr(block.mlp, projection), getattr(mixture, projection)
            for e in range(mixture.num_experts):
                weight = base.weight.clone() if experts is None else experts.merged(base, e)
                layer[f"block_sparse_moe.experts.{e}.{key}"] = weight
        yield {f"model.layers.{i}.{key}.weight": x for key, x in layer.items()}
    rest = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "model.norm.weight": model.model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        rest["lm_head.weight"] = model.lm_head.weight
    yield rest


def _projections(model: AdaptedModel) -> list[Linear]:
    return [x for x in model.modules() if isinstance(x, Linear)]
