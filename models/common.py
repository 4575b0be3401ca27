"""Mathematics that the model families share to the bit. A family's differences live in its file."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.layers.kv_cache import KvCache

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in fp32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), the division in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        wide = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x_BSD.dtype)


def rotary(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """[2, B, 1, S, C]: cosine and sine of the rotary embedding (arXiv 2104.09864), half-split."""
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device).float() / head_dim
    angle_BSC = positions_BS[..., None].float() * (1.0 / theta**exponent)
    angle_BSC = torch.cat([angle_BSC, angle_BSC], dim=-1)
    return torch.stack([angle_BSC.cos(), angle_BSC.sin()])[:, :, None].to(dtype)


def apply_rotary(x_BHSC: Tensor, rope: Tensor) -> Tensor:
    first, second = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * rope[0] + torch.cat([-second, first], dim=-1) * rope[1]


def positions_of(tokens_BS: Tensor, mask_BS: Tensor | None, segments_BS: Tensor | None) -> Tensor:
    """Each token's place in its document: from 0 in every row, after padding, in every segment."""
    if mask_BS is not None and segments_BS is None:
        return (mask_BS.long().cumsum(1) - 1).clamp_min(0)
    place_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    if segments_BS is None:
        return place_BS
    starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    return place_BS - (place_BS * starts_BS).cummax(1).values


def attention_mask(
    mask_BS: Tensor | None, segments_BS: Tensor | None, cache: KvCache | None, num_queries: int
) -> Tensor | None:
    """bool [B, 1, S, L], True = may attend; None stands for the plain causal triangle.

    A token sees the real tokens at or before it, of its own segment, and always itself: so no
    row of padding is empty, which would make its softmax NaN.
    """
    real_BL = mask_BS if cache is None else cache.real_BL[:, : cache.length]
    if real_BL is None and segments_BS is None:
        return None
    num_keys = real_BL.shape[1] if real_BL is not None else segments_BS.shape[1]
    device = real_BL.device if real_BL is not None else segments_BS.device
    key_L = torch.arange(num_keys, device=device)
    query_S1 = key_L[num_keys - num_queries :, None]
    allowed = (key_L <= query_S1)[None]
    if real_BL is not None:
        allowed = allowed & real_BL[:, None]
    if segments_BS is not None:
        allowed = allowed & (segments_BS[:, :, None] == segments_BS[:, None])
    return (allowed | (key_L == query_S1))[:, None]


def next_token_loss(
    hidden_BSD: Tensor, labels_BS: Tensor, segments_BS: Tensor | None, lm_head: nn.Linear
) -> tuple[Tensor, Tensor]:
    """(sum of cross-entropies in fp32, number of labels); the label at s is predicted from s - 1.

    Only positions with a label (not -100, not the first of a segment) reach the vocabulary, a
    chunk at a time, computed again in backward: the logits are never held whole.
    """
    target_BS = labels_BS[:, 1:]
    wanted_BS = target_BS != -100
    if segments_BS is not None:
        wanted_BS = wanted_BS & (segments_BS[:, 1:] == segments_BS[:, :-1])
    hidden_TD, target_T = hidden_BSD[:, :-1][wanted_BS], target_BS[wanted_BS]

    def chunk_loss(hidden_TD: Tensor, target_T: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(hidden_TD).float(), target_T, reduction="sum")

    step = max(1, LOGITS_PER_CHUNK // lm_head.out_features)
    chunks = zip(hidden_TD.split(step), target_T.split(step), strict=True)
    losses = [checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks]
    return torch.stack(losses).sum(), wanted_BS.sum()
