"""Softmax, top-K and renormalised weights of a router, with the sums its losses need.

    prob_TE = softmax(logits_TE)                                     fp32 (fp64 stays fp64)
    expert_TK = the K largest of prob_TE[t], ties to the lowest index, then sorted by expert
    weight_TK = prob[expert] / sum of the K prob[expert]
    count_E = how many slots of real tokens chose e;   prob_E = sum of prob over real tokens
    entropy = sum over real tokens of -sum_e prob log prob            (no gradient)

MixLoRA (arXiv 2404.15159) eq. 7 with Algorithm 1's renormalisation. The gradient flows through
weight_TK and prob_E. `mask_T` is False on padding: routed like the rest, counted nowhere.
A given `expert_TK` (int32) is taken as chosen: activation checkpointing recomputes weights only.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    expert_TK: Tensor
    weight_TK: Tensor
    count_E: Tensor
    prob_E: Tensor
    entropy: Tensor
    num_tokens: Tensor


def topk_router(
    logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None, expert_TK: Tensor | None = None
) -> Routing:
    E = logits_TE.shape[-1]
    if not 1 <= top_k <= E:
        raise ValueError(f"topk_router: top_k must be in [1, {E}], got {top_k}")
    return topk_router_ref(logits_TE, top_k, mask_T, expert_TK)


def topk_router_ref(
    logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None, expert_TK: Tensor | None = None
) -> Routing:
    prob_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)
    if expert_TK is None:
        order_TE = prob_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        expert_TK = order_TE[:, :top_k].sort(dim=-1).values.int()
    chosen_TK = prob_TE.gather(1, expert_TK.long())
    weight_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    real_T = prob_TE.new_ones(len(prob_TE)) if mask_T is None else mask_T.to(prob_TE.dtype)
    one_hot_TE = torch.zeros_like(prob_TE, requires_grad=False).scatter_(1, expert_TK.long(), 1.0)
    entropy_T = torch.special.entr(prob_TE.detach()).sum(-1)
    return Routing(
        expert_TK,
        weight_TK,
        real_T @ one_hot_TE,
        real_T @ prob_TE,
        real_T @ entropy_T,
        real_T.sum(),
    )
