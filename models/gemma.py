"""Gemma 1 (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118).

From config to logits in reading order: first what both share with Gemma 1, then what Gemma 2
does otherwise. Dimensions: B batch, S sequence, D hidden, F ffn, V vocabulary, H query heads,
G kv heads, C channels per head, L keys. Module names are those of the Hugging Face checkpoint, so
that weights load with no renaming.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.errors import InputError, did_you_mean
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.kv_cache import KvCache
from mixlora.layers.lora import Linear
from mixlora.layers.milora import PromptRouting
from mixlora.layers.mixlora_ffn import FeedForward
from models import common
from models.common import (
    Head,
    Mask,
    attend,
    attention_mask,
    check_sizes,
    masked_attention,
    next_token_loss,
    positions_of,
    widened,
)
from models.rotary import Rope, apply_rotary, rotary


@dataclass(frozen=True)
class GemmaConfig:
    """The fields of config.json that the mathematics reads, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = 256
    hidden_act: str | None = None
    hidden_activation: str | None = None  # the same; None: gelu_pytorch_tanh
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_parameters: Rope = Rope()  # from rope_theta, rope_scaling and rope_parameters
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:
        # The first checkpoints say hidden_act = gelu, and were trained with its tanh form.
        act = "gelu_pytorch_tanh" if self.hidden_act in (None, "gelu") else self.hidden_act
        if self.hidden_act and self.hidden_activation not in (None, act):
            raise InputError(
                f"hidden_act {self.hidden_act!r} and hidden_activation "
                f"{self.hidden_activation!r} differ"
            )
        object.__setattr__(self, "hidden_act", self.hidden_activation or act)
        check_sizes(self)


class RMSNorm(common.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), all of it in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def scale(self) -> Tensor:
        return 1 + widened(self.weight)


class Attention(nn.Module):
    product = staticmethod(masked_attention)

    def __init__(self, config: GemmaConfig, layer: int) -> None:
        super().__init__()
        D, C, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, C
        self.q_proj = Linear(D, config.num_attention_heads * C, bias)
        self.k_proj = Linear(D, config.num_key_value_heads * C, bias)
        self.v_proj = Linear(D, config.num_key_value_heads * C, bias)
        self.o_proj = Linear(config.num_attention_heads * C, D, bias)

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
        y_BHSC = attend(q_BHSC, k_BGSC, v_BGSC, mask, self.product)
        return self.o_proj(y_BHSC.transpose(1, 2).flatten(2), context)

    def _heads(self, x_BSI: Tensor) -> Tensor:
        return x_BSI.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int) -> None:
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


class Gemma(AdaptedModel):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        blocks = (self.new_block(layer) for layer in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(V, D, _weight=torch.empty(V, D)),
                "layers": nn.ModuleList(blocks),
                "norm": RMSNorm(D, config.rms_norm_eps),
            }
        )
        self.lm_head = self.new_head()
        self.tie_weights()
        self.requires_grad_(False)

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.config, layer)

    def new_head(self) -> Head:
        return Head(self.config.hidden_size, self.config.vocab_size)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def masks(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor | None,
        segments_BS: Tensor | None,
        cache: KvCache | None,
    ) -> list[Mask]:
        """What the tokens of each layer may attend to."""
        mask = attention_mask(tokens_BS, mask_BS, segments_BS, cache)
        return [mask] * self.config.num_hidden_layers

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
        masks = self.masks(tokens_BS, mask_BS, segments_BS, cache)

        x_BSD = self.model.embed_tokens(tokens_BS)
        # The factor is rounded as the checkpoint's own training did: 55.5 for sqrt(3072) in bf16.
        x_BSD = x_BSD * torch.tensor(self.config.hidden_size**0.5, dtype=x_BSD.dtype).item()
        rope, C = self.config.rope_parameters, self.config.head_dim
        rope = rotary(rope, positions_BS, segments_BS, C, x_BSD.dtype)
        for block, mask in zip(self.model.layers, masks, strict=True):
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


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    sliding_window: int | None = 4096
    sliding_window_size: int | None = None  # the same; early checkpoints say it twice
    layer_types: list | tuple | None = None  # None: the first slides, then every other

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("sliding_attention", "full_attention")
        types = self.layer_types
        if types is None:
            types = [kinds[layer % 2] for layer in range(self.num_hidden_layers)]
        for name in types:
            if name not in kinds:
                hint = did_you_mean(str(name), kinds)
                raise InputError(f"layer_types: {name!r} is not supported{hint}")
        if len(types) != self.num_hidden_layers:
            raise InputError(
                f"layer_types must name {self.num_hidden_layers} layers, got {len(types)}"
            )
        if self.sliding_window_size not in (None, self.sliding_window):
            raise InputError(
                f"sliding_window {self.sliding_window} and sliding_window_size "
                f"{self.sliding_window_size} differ"
            )
        if self.sliding_window is None and kinds[0] in types:
            raise InputError("sliding_window must be int for the layers that slide, got None")
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            if not (getattr(self, name) is None or getattr(self, name) > 0):
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        object.__setattr__(self, "layer_types", tuple(types))


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Smoothly within (-cap, cap); None leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)


class Gemma2Attention(Attention):
    def __init__(self, config: Gemma2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.scale, self.cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping

    def product(
        self, q_BHSC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor, mask_B1SL: Tensor | None
    ) -> Tensor:
        """Written out: scaled_dot_product_attention has no place for the cap."""
        H, G, S, L = q_BHSC.shape[1], k_BGLC.shape[1], q_BHSC.shape[2], k_BGLC.shape[2]
        k_BHLC, v_BHLC = (x.repeat_interleave(H // G, dim=1) for x in (k_BGLC, v_BGLC))
        score_BHSL = softcap(q_BHSC @ k_BHLC.mT * self.scale, self.cap)
        if mask_B1SL is None:
            mask_B1SL = torch.ones(S, L, dtype=torch.bool, device=q_BHSC.device).tril()
        score_BHSL = score_BHSL.masked_fill(~mask_B1SL, -torch.inf)
        wide = torch.promote_types(q_BHSC.dtype, torch.float32)
        return score_BHSL.softmax(-1, dtype=wide).to(q_BHSC.dtype) @ v_BHLC


class Gemma2Block(nn.Module):
    """Norms before and after both halves."""

    def __init__(self, config: Gemma2Config, layer: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.prompt_router = PromptRouting(D, layer)
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Gemma2Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.mlp = FeedForward(D, config.intermediate_size, config.hidden_act)
        self.post_feedforward_layernorm = RMSNorm(D, eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: Mask,
        cache: KvCache | None,
        context: ForwardContext,
    ) -> Tensor:
        self.prompt_router(x_BSD, context)
        y_BSD = self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache, context)
        x_BSD = x_BSD + self.post_attention_layernorm(y_BSD)
        y_BSD = self.mlp(self.pre_feedforward_layernorm(x_BSD), context)
        return x_BSD + self.post_feedforward_layernorm(y_BSD)


class CappedHead(Head):
    def __init__(self, hidden_size: int, vocab_size: int, cap: float | None) -> None:
        super().__init__(hidden_size, vocab_size)
        self.cap = cap

    def forward(self, x_BSD: Tensor) -> Tensor:
        return softcap(super().forward(x_BSD), self.cap)


class Gemma2(Gemma):
    config: Gemma2Config

    def new_block(self, layer: int) -> nn.Module:
        return Gemma2Block(self.config, layer)

    def new_head(self) -> Head:
        config = self.config
        return CappedHead(config.hidden_size, config.vocab_size, config.final_logit_softcapping)

    def masks(
        self,
        tokens_BS: Tensor,
        mask_BS: Tensor | None,
        segments_BS: Tensor | None,
        cache: KvCache | None,
    ) -> list[Mask]:
        inputs = (tokens_BS, mask_BS, segments_BS, cache)
        masks = {
            "full_attention": attention_mask(*inputs),
            "sliding_attention": attention_mask(*inputs, self.config.sliding_window),
        }
        return [masks[name] for name in self.config.layer_types]
