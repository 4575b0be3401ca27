"""Mistral (arXiv 2310.06825): LLaMA whose tokens attend to a window of the nearest ones.

From config to logits in reading order. Dimensions: B batch, S sequence, D hidden, F ffn,
V vocabulary, H query heads, G kv heads, C channels per head, L keys. Module names are those of
the Hugging Face checkpoint, so that weights load with no renaming.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.kv_cache import KvCache
from mixlora.layers.lora import Linear
from mixlora.layers.milora import PromptRouting
from mixlora.layers.mixlora_ffn import FeedForward
from models.common import (
    Head,
    Mask,
    RMSNorm,
    attend,
    attention_mask,
    check_sizes,
    next_token_loss,
    positions_of,
)
from models.rotary import Rope, apply_rotary, rotary


@dataclass(frozen=True)
class MistralConfig:
    """The fields of config.json that the mathematics reads, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # None: every token sees all before it
    rms_norm_eps: float = 1e-6
    rope_parameters: Rope = Rope()  # from rope_theta, rope_scaling and rope_parameters
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)


class Attention(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, C
        self.q_proj = Linear(D, config.num_attention_heads * C)
        self.k_proj = Linear(D, config.num_key_value_heads * C)
        self.v_proj = Linear(D, config.num_key_value_heads * C)
        self.o_proj = Linear(config.num_attention_heads * C, D)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: Mask,
        cache: KvCache | None,
        context: ForwardContext,
    ) -> Tensor:
        q_BHSC = apply_rotary(self._heads(self.q_proj(x_BSD, context)), rope)
        k_BGSC = apply_rotary(self._heads(self.k_proj(x_BSD, context)), rope)
        v_BGSC = self._heads(self.v_proj(x_BSD, context))
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(self.layer, k_BGSC, v_BGSC)
        y_BHSC = attend(q_BHSC, k_BGSC, v_BGSC, mask)
        return self.o_proj(y_BHSC.transpose(1, 2).flatten(2), context)

    def _heads(self, x_BSI: Tensor) -> Tensor:
        return x_BSI.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.prompt_router = PromptRouting(D, layer)
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = FeedForward(D, config.intermediate_size, config.hidden_act)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: Mask,
        cache: KvCache | None,
        context: ForwardContext,
    ) -> Tensor:
        self.prompt_router(x_BSD, context)
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache, context)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD), context)


class Mistral(AdaptedModel):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(V, D, _weight=torch.empty(V, D)),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(D, config.rms_norm_eps),
            }
        )
        self.lm_head = Head(D, V)
        self.tie_weights()
        self.requires_grad_(False)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        mask_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        prompt_BS: Tensor | None = None,
        cache: KvCache | None = None,
        adapters: Sequence[str | None] | Sequence[Span] | None = None,
        labels_BS: Tensor | None = None,
        by_row: bool = False,
        select_BS: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or losses: as `Llama.forward`, where the arguments are explained."""
        context = self.begin(
            tokens_BS,
            adapters,
            cache,
            mask_BS=mask_BS,
            segments_BS=segments_BS,
            prompt_BS=prompt_BS,
            positions_BS=positions_BS,
            labels_BS=labels_BS,
            select_BS=select_BS,
        )
        B, S = tokens_BS.shape
        if cache is not None:
            cached_positions_BS = cache.advance(B, S, mask_BS)
            positions_BS = cached_positions_BS if positions_BS is None else positions_BS
        elif positions_BS is None:
            positions_BS = positions_of(tokens_BS, mask_BS, segments_BS)
        mask = attention_mask(tokens_BS, mask_BS, segments_BS, cache, self.config.sliding_window)

        x_BSD = self.model.embed_tokens(tokens_BS)
        rope, C = self.config.rope_parameters, self.config.head_dim
        rope = rotary(rope, positions_BS, segments_BS, C, x_BSD.dtype)
        for block in self.model.layers:
            if self.gradient_checkpointing and self.training:
                x_BSD = checkpoint(block, x_BSD, rope, mask, cache, context, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, rope, mask, cache, context)

        norm, lm_head = self.model.norm, self.lm_head
        if labels_BS is not None:
            return next_token_loss(x_BSD, labels_BS, segments_BS, norm, lm_head, by_row)
        return lm_head(norm(x_BSD if select_BS is None else x_BSD[select_BS]))

    def new_cache(self, batch_size: int, max_len: int) -> KvCache:
        weight = self.model.embed_tokens.weight
        config = self.config
        return KvCache(
            *(config.num_hidden_layers, batch_size, max_len),
            *(config.num_key_value_heads, config.head_dim, weight.dtype, weight.device),
        )
