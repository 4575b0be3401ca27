"""Mathematics that the model families share to the bit. A family's differences live in its file."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixlora.errors import InputError, did_you_mean
from mixlora.layers.context import split, starts
from mixlora.layers.kv_cache import KvCache
from mixlora.ops import ACTIVATIONS, linear

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in fp32


def check_sizes(config: Any) -> None:
    """Fill in the sizes that config.json may leave out, and refuse those that cannot be."""
    H, G = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if config.head_dim is None and config.hidden_size % H:
        raise InputError(
            f"hidden_size {config.hidden_size} must be a multiple of num_attention_heads {H}, "
            "or head_dim must be given"
        )
    if config.hidden_act not in ACTIVATIONS:
        hint = did_you_mean(config.hidden_act, ACTIVATIONS)
        raise InputError(f"hidden_act {config.hidden_act!r} is not supported{hint}")
    if H % G:
        raise InputError(f"num_attention_heads {H} must be a multiple of num_key_value_heads {G}")
    object.__setattr__(config, "num_key_value_heads", G)
    object.__setattr__(config, "head_dim", config.head_dim or config.hidden_size // H)
    if config.head_dim % 2:
        raise InputError(f"head_dim must be even for rotary embeddings, got {config.head_dim}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), the division in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

        self._zero_state: tuple[int, int] | None = None
        self._has_zero = False

    def scale(self) -> Tensor:
        return self.weight

    def forward(self, x_BSD: Tensor) -> Tensor:
        scale_D = self.scale()
        if not torch.is_grad_enabled():  # an autograd function takes its time even so
            return rms_norm(x_BSD, scale_D, self.eps)[0]
        keeps_y = x_BSD.requires_grad and not self.has_zero(scale_D)
        return _RmsNorm.apply(x_BSD, scale_D, self.eps, keeps_y)

    def has_zero(self, scale_D: Tensor) -> bool:
        """Looked up again only where the weight has changed: a GPU would be waited for."""
        state = self.weight.data_ptr(), self.weight._version
        if state != self._zero_state:
            self._zero_state, self._has_zero = state, bool((scale_D == 0).any())
        return self._has_zero


def rms_norm(x_BSD: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y_BSD, 1 / root_BS1): the quotient in fp32, rounded to the scale's dtype and multiplied by
    it."""
    wide_BSD = widened(x_BSD)
    rate_BS1 = torch.rsqrt(wide_BSD.square().mean(-1, keepdim=True) + eps)
    return (scale_D * (wide_BSD * rate_BS1).to(scale_D.dtype)).to(x_BSD.dtype), rate_BS1


class _RmsNorm(torch.autograd.Function):
    """Keeps y and a number per token for backward, no copy in fp32. Unlike x, y is kept by the LoRA
    behind it anyway, and it gives x back, unless there are zeros in the scale.
    """

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, scale_D: Tensor, eps: float, keeps_y: bool) -> Tensor:
        y_BSD, rate_BS1 = rms_norm(x_BSD, scale_D, eps)
        ctx.keeps_y = keeps_y
        ctx.save_for_backward(y_BSD if keeps_y else x_BSD, scale_D, rate_BS1)
        return y_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
        kept_BSD, scale_D, rate_BS1 = ctx.saved_tensors
        dy_BSD = widened(dy_BSD)
        unit_BSD = widened(kept_BSD) / scale_D if ctx.keeps_y else widened(kept_BSD) * rate_BS1
        dunit_BSD = dy_BSD * scale_D
        along_BS1 = (dunit_BSD * unit_BSD).mean(-1, keepdim=True)
        dx_BSD = (dunit_BSD - unit_BSD * along_BS1) * rate_BS1
        dscale_D = None
        if ctx.needs_input_grad[1]:
            dscale_D = (dy_BSD * unit_BSD).flatten(0, -2).sum(0).to(scale_D.dtype)
        return dx_BSD.to(kept_BSD.dtype), dscale_D, None, None


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Head(nn.Linear):
    """From hidden states to logits."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return linear(x_BSD, self.weight)


def positions_of(tokens_BS: Tensor, mask_BS: Tensor | None, segments_BS: Tensor | None) -> Tensor:
    """Each token's place in its document: from 0 in every row, after padding, in every segment."""
    if mask_BS is not None and segments_BS is None:
        return (mask_BS.long().cumsum(1) - 1).clamp_min(0)
    place_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    if segments_BS is None:
        return place_BS
    return place_BS - (place_BS * starts(segments_BS)).cummax(1).values


class Documents(NamedTuple):
    """What may attend in packed rows: each document to itself alone, causally."""

    lengths: list[int]  # of all documents and runs of padding, row by row


Mask = Tensor | Documents | None  # bool [B, 1, S, L], True = may attend; None = causal


def attention_mask(
    tokens_BS: Tensor,
    mask_BS: Tensor | None,
    segments_BS: Tensor | None,
    cache: KvCache | None,
    window: int | None = None,
) -> Mask:
    """A token sees the real tokens at or before it, of its own segment; padding, which must see
    something so that its softmax is not NaN, itself, or with a cache its row's first token. With a
    window a token sees the nearest `window` of them, itself among them; padding does not count,
    wherever it stands.
    """
    S, device = tokens_BS.shape[1], tokens_BS.device
    if cache is not None:
        if cache.is_first and (window is None or window >= S):
            return None
        key_L = torch.arange(cache.length, device=device)
        age_BSL = cache.place_BS[..., None] - key_L
        allowed = age_BSL >= 0
        return (allowed if window is None else allowed & (age_BSL < window))[:, None]
    if window is not None and window >= S:
        window = None
    if mask_BS is None and segments_BS is None and window is None:
        return None
    if segments_BS is not None:
        documents = documents_of(mask_BS, segments_BS)
        if documents and (window is None or window >= max(documents.lengths)):
            return documents
    key_S = torch.arange(S, device=device)
    allowed = (key_S <= key_S[:, None])[None]
    if mask_BS is not None:
        allowed = allowed & mask_BS[:, None]
    if segments_BS is not None:
        allowed = allowed & (segments_BS[:, :, None] == segments_BS[:, None])
    if window is not None:
        place_BS = key_S[None] if mask_BS is None else mask_BS.cumsum(1)
        allowed = allowed & (place_BS[:, :, None] - place_BS[:, None] < window)
    return (allowed | (key_S == key_S[:, None]))[:, None]


def documents_of(mask_BS: Tensor | None, segments_BS: Tensor) -> Documents | None:
    """None where padding stands within a segment: it ends none, but must be left out."""
    starts_BS = starts(segments_BS)
    if not starts_BS.numel() or (mask_BS is not None and (starts(mask_BS) & ~starts_BS).any()):
        return None
    start_Q = starts_BS.flatten().nonzero().flatten().tolist()
    return Documents([b - a for a, b in itertools.pairwise([*start_Q, segments_BS.numel()])])


def masked_attention(
    q_BHSC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor, mask_B1SL: Tensor | None
) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BHSC, k_BGLC, v_BGLC, mask_B1SL, is_causal=mask_B1SL is None, enable_gqa=True
    )


def attend(
    q_BHSC: Tensor,
    k_BGLC: Tensor,
    v_BGLC: Tensor,
    mask: Mask,
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = masked_attention,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v, or what `product` makes of q, k, v and mask.

    Packed rows are cut into their documents: a mask would cost S^2 a row, and most of it nothing
    but zeros. So a document's result is that of the document alone.
    """
    if not isinstance(mask, Documents):
        return product(q_BHSC, k_BGLC, v_BGLC, mask)
    B, _, S, _ = q_BHSC.shape
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSC, k_BGLC, v_BGLC))
    documents = zip(*(split(x_THC, mask.lengths) for x_THC in rows), strict=True)
    y_THC = torch.cat(
        [product(*(x.transpose(0, 1)[None] for x in d), None)[0].transpose(0, 1) for d in documents]
    )
    return y_THC.unflatten(0, (B, S)).transpose(1, 2)


def next_token_loss(
    hidden_BSD: Tensor,
    labels_BS: Tensor,
    segments_BS: Tensor | None,
    norm: nn.Module,
    lm_head: nn.Linear,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropies in fp32, number of labels), or both of each row [B]; the label at s
    is predicted from s - 1.

    Only positions with a label (not -100, not the first of a segment) reach the last norm and the
    vocabulary, a chunk at a time: the logits are never held whole.
    """
    target_BS = labels_BS[:, 1:]
    wanted_BS = target_BS != -100
    if segments_BS is not None:
        wanted_BS = wanted_BS & (segments_BS[:, 1:] == segments_BS[:, :-1])
    hidden_TD, target_T = hidden_BSD[:, :-1][wanted_BS], target_BS[wanted_BS]
    weights = (norm.weight, lm_head.weight) if torch.is_grad_enabled() else ()
    trained = [weight for weight in weights if weight.requires_grad]
    if by_row and trained:
        raise InputError(
            "by_row needs a frozen norm and lm_head: their gradients are of the sum of all rows"
        )
    loss_T = _ChunkedLoss.apply(hidden_TD, target_T, norm, lm_head, *trained)
    if not by_row:
        return loss_T.sum(), wanted_BS.sum()
    loss_BS = loss_T.new_zeros(wanted_BS.shape).masked_scatter(wanted_BS, loss_T)
    return loss_BS.sum(1), wanted_BS.sum(1)


class _ChunkedLoss(torch.autograd.Function):
    """A chunk's gradients are taken while its logits are there: these are computed once, and what
    is kept for backward is the gradients alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        target_T: Tensor,
        norm: nn.Module,
        lm_head: nn.Linear,
        *trained: Tensor,
    ) -> Tensor:
        T, needs_hidden = len(target_T), ctx.needs_input_grad[0]
        dhidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        dtrained = [torch.zeros_like(weight) for weight in trained]
        loss_T = widened(hidden_TD.new_empty(T))
        step = max(1, LOGITS_PER_CHUNK // lm_head.out_features)
        for start in range(0, T, step):
            chunk = slice(start, start + step)
            x_TD = hidden_TD[chunk].detach().requires_grad_(needs_hidden)
            inputs = [x_TD, *trained] if needs_hidden else trained
            with torch.set_grad_enabled(bool(inputs)):
                logits_TV = widened(lm_head(norm(x_TD)))
                chunk_T = F.cross_entropy(logits_TV, target_T[chunk], reduction="none")
                loss_T[chunk] = chunk_T.detach()
                gradients = torch.autograd.grad(chunk_T.sum(), inputs) if inputs else []
            if needs_hidden:
                dhidden_TD[chunk], *gradients = gradients
            for total, gradient in zip(dtrained, gradients, strict=True):
                total += gradient
        ctx.save_for_backward(dhidden_TD, *dtrained)
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, *dtrained = ctx.saved_tensors
        if dhidden_TD is not None:
            dhidden_TD = dhidden_TD * dloss_T[:, None].to(dhidden_TD.dtype)
        # all labels count alike, or there is none
        dtrained = [x * dloss_T[:1].sum().to(x.dtype) for x in dtrained]
        return dhidden_TD, None, None, None, *dtrained
