"""Softmax, top-K and renormalised weights of a router, with the sums its losses need.

    prob_TE = softmax(logits_TE)                                     fp32 (fp64 stays fp64)
    expert_TK = the K largest of logits_TE[t], ties to the lowest index, then sorted by expert
    weight_TK = prob[expert] / sum of the K prob[expert]

MixLoRA (arXiv 2404.15159) eq. 7 with Algorithm 1's renormalisation. Every router ends in
`routing_sums`, over the real tokens (`mask_T` False is padding: routed, counted nowhere):

    count_E = how many slots chose e;   prob_E = sum of prob
    entropy = sum of -sum_e prob log prob   (no gradient);   z = sum of logsumexp(logits)^2

The gradient flows through weight_TK, prob_E and z; real_t is 0 for padding, else 1:

    dlogits_TE[t, e] = real_t prob_e (dprob_e - sum_i prob_i dprob_i + 2 logsumexp(logits_t) dz)
                       + weight_k (dweight_k - sum_j weight_j dweight_j)       where expert_k is e

Backward reads the logits again and saves no probabilities. A given `expert_TK` (int32) is taken as
chosen: activation checkpointing recomputes weights only. Logits of NaN count as the largest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixlora.ops._once import no_second_derivative
from mixlora.ops._switch import use_reference


class Routing(NamedTuple):
    """A layer's tokens y = sum_k weight_k FFN_k(x) + skip x; -1 in expert_TK is an empty slot."""

    expert_TK: Tensor
    weight_TK: Tensor  # 0 in an empty slot
    count_E: Tensor
    prob_E: Tensor
    entropy: Tensor
    z: Tensor
    num_tokens: Tensor
    skip_T: Tensor | None = None  # None: 0 for every token
    num_dropped: Tensor | None = None  # tokens for which their expert had no room; None: 0


def topk_router(
    logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None, expert_TK: Tensor | None = None
) -> Routing:
    E = logits_TE.shape[-1]
    if not 1 <= top_k <= E:
        raise ValueError(f"topk_router: top_k must be in [1, {E}], got {top_k}")
    if use_reference():
        return topk_router_ref(logits_TE, top_k, mask_T, expert_TK)
    outputs = torch.ops.mixlora.topk_router(logits_TE, top_k, mask_T, expert_TK)
    weight_TK, prob_E, z, expert_TK, count_E, entropy, num_tokens = outputs
    return Routing(expert_TK, weight_TK, count_E, prob_E, entropy, z, num_tokens)


def topk_router_ref(
    logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None, expert_TK: Tensor | None = None
) -> Routing:
    prob_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)
    if expert_TK is None:
        order_TE = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        expert_TK = order_TE[:, :top_k].sort(dim=-1).values.int()
    chosen_TK = prob_TE.gather(1, expert_TK.long())
    weight_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    return Routing(expert_TK, weight_TK, *routing_sums(logits_TE, prob_TE, expert_TK, mask_T))


def routing_sums(
    logits_TE: Tensor, prob_TE: Tensor, expert_TK: Tensor, mask_T: Tensor | None
) -> tuple[Tensor, ...]:
    """(count_E, prob_E, entropy, z, num_tokens) of a Routing."""
    T, E = prob_TE.shape
    real_T = prob_TE.new_ones(T) if mask_T is None else mask_T.to(prob_TE.dtype)
    chosen_TE = prob_TE.new_zeros(T, E + 1)
    chosen_TE.scatter_(1, expert_TK.long().where(expert_TK >= 0, E), 1.0)
    entropy_T = torch.special.entr(prob_TE.detach()).sum(-1)
    z_T = logits_TE.to(prob_TE.dtype).logsumexp(-1).square()
    return (
        real_T @ chosen_TE[:, :E],
        real_T @ prob_TE,
        real_T @ entropy_T,
        real_T @ z_T,
        real_T.sum(),
    )


@torch.library.register_fake("mixlora::topk_router")
def _(
    logits_TE: Tensor, top_k: int, mask_T: Tensor | None, expert_TK: Tensor | None
) -> tuple[Tensor, ...]:
    T, E = logits_TE.shape
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    sizes = (T, top_k), (E,), (), (T, top_k), (E,), (), ()
    dtypes = wide, wide, wide, torch.int32, wide, wide, wide
    return tuple(
        logits_TE.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)
    )


@torch.library.register_fake("mixlora::topk_router_backward")
def _(
    dweight_TK: Tensor,
    dprob_E: Tensor,
    dz: Tensor,
    logits_TE: Tensor,
    expert_TK: Tensor,
    mask_T: Tensor | None,
) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    logits_TE, _, mask_T, _ = inputs
    _, _, _, expert_TK, *sums = output
    ctx.mark_non_differentiable(expert_TK, *sums)
    ctx.save_for_backward(logits_TE, expert_TK, mask_T)


def _backward(ctx, dweight_TK: Tensor, dprob_E: Tensor, dz: Tensor, *_) -> tuple:
    grads = dweight_TK, dprob_E, dz
    dlogits_TE = torch.ops.mixlora.topk_router_backward(*grads, *ctx.saved_tensors)
    return dlogits_TE, None, None, None


torch.library.register_autograd("mixlora::topk_router", _backward, setup_context=_setup_context)
no_second_derivative("topk_router_backward")
