"""Low-rank updates of rows that belong to different groups (experts, or adapters).

grouped_lora, rows sorted by group, group g owning rows [group_start_G1[g], group_start_G1[g + 1]):

    y_NO[n] = scaling * B_g A_g x_NI[n]           lora_a_GRI, lora_b_GOR; rows past the last are 0

grouped_shrink, its first half in slot form (slot k of token t, the tokens' rows read in place):

    a_TKR[t, k] = A_e x_TI[t],  e = expert_TK[t, k]                    0 in an empty slot
    dx_TI[t]    = sum_k A_e^T da_TKR[t, k]
    dlora_a_e   = sum over the slots of e of da_TKR[t, k] x_TI[t]^T    0 for an expert without rows

x, A and B share one dtype; sums inside a row follow the library's GEMM. T and N may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference
from mixlora.ops.moe_sort import Plan


def grouped_lora(
    x_NI: Tensor, lora_a_GRI: Tensor, lora_b_GOR: Tensor, group_start_G1: Tensor, scaling: float
) -> Tensor:
    return grouped_lora_ref(x_NI, lora_a_GRI, lora_b_GOR, group_start_G1, scaling)


def grouped_lora_ref(
    x_NI: Tensor, lora_a_GRI: Tensor, lora_b_GOR: Tensor, group_start_G1: Tensor, scaling: float
) -> Tensor:
    start = group_start_G1.tolist()
    parts = [
        (x_NI[start[g] : start[g + 1]] @ lora_a_GRI[g].T * scaling) @ lora_b_GOR[g].T
        for g in range(len(start) - 1)
    ]
    tail = x_NI.new_zeros(x_NI.shape[0] - start[-1], lora_b_GOR.shape[1])
    return torch.cat([*parts, tail])


def grouped_shrink(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    run = grouped_shrink_ref if use_reference() else _GroupedShrink.apply
    return run(x_TI, lora_a_ERI, plan)


def grouped_shrink_ref(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    expert_TK = plan.expert_TK.long()
    a_TER = torch.einsum("ti,eri->ter", x_TI, lora_a_ERI)
    index_TKR = expert_TK.clamp_min(0)[..., None].expand(-1, -1, lora_a_ERI.shape[1])
    return a_TER.gather(1, index_TKR).masked_fill((expert_TK < 0)[..., None], 0)


def expert_rows(plan: Plan) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, its flat slots) of every expert that has rows, in expert order."""
    start, slot_N, K = (
        plan.expert_start_E1.tolist(),
        plan.row_slot_N.long(),
        plan.expert_TK.shape[1],
    )
    slots = [slot_N[start[e] : start[e + 1]] for e in range(len(start) - 1)]
    return [(e, slot // K, slot) for e, slot in enumerate(slots) if len(slot)]


class _GroupedShrink(torch.autograd.Function):
    """Saves x, A and the plan, never a gathered copy of x; N counts slots, t * K + k."""

    @staticmethod
    def forward(ctx, x_TI, lora_a_ERI, plan):
        ctx.save_for_backward(x_TI, lora_a_ERI)
        ctx.plan = plan
        (T, K), R = plan.expert_TK.shape, lora_a_ERI.shape[1]
        a_NR = x_TI.new_zeros(T * K, R)
        for e, token, slot in expert_rows(plan):
            a_NR[slot] = x_TI[token] @ lora_a_ERI[e].T
        return a_NR.unflatten(0, (T, K))

    @staticmethod
    def backward(ctx, da_TKR):
        x_TI, lora_a_ERI = ctx.saved_tensors
        da_NR = da_TKR.flatten(0, 1)
        dx_TI, dlora_a_ERI = torch.zeros_like(x_TI), torch.zeros_like(lora_a_ERI)
        for e, token, slot in expert_rows(ctx.plan):
            dx_TI.index_add_(0, token, da_NR[slot] @ lora_a_ERI[e])
            dlora_a_ERI[e] = da_NR[slot].T @ x_TI[token]
        return dx_TI, dlora_a_ERI, None
