"""Copy every token's row to the places its experts will read.

    x_ND[n]  = x_TD[row_slot_N[n] div K]          (0 in the tail, where row_slot_N[n] = -1)
    dx_TD[t] = sum_k dx_ND[slot_row_TK[t, k]]     (empty slots add nothing): moe_scatter

T=3, K=2, experts (0,2) (1,2) (0,1): row_slot_N = [0, 4, 2, 5, 1, 3], so x_ND holds the tokens
0, 2, 1, 2, 0, 1. Rows in fp64, fp32, bf16 or fp16. T may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference
from mixlora.ops.moe_sort import Plan


def moe_gather(x_TD: Tensor, plan: Plan) -> Tensor:
    if use_reference():
        return moe_gather_ref(x_TD, plan)
    return torch.ops.mixlora.moe_gather(x_TD, plan.row_slot_N, plan.slot_row_TK)


def moe_gather_ref(x_TD: Tensor, plan: Plan) -> Tensor:
    slot_N, K = plan.row_slot_N.long(), plan.expert_TK.shape[1]
    x_ND = x_TD.index_select(0, slot_N.clamp_min(0).div(K, rounding_mode="floor"))
    return x_ND.masked_fill((slot_N < 0)[:, None], 0)


@torch.library.register_fake("mixlora::moe_gather")
def _(x_TD: Tensor, row_slot_N: Tensor, slot_row_TK: Tensor) -> Tensor:
    return x_TD.new_empty(row_slot_N.shape[0], x_TD.shape[1])


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    _, *plan = inputs
    ctx.save_for_backward(*plan)


def _backward(ctx, dx_ND: Tensor) -> tuple:
    return torch.ops.mixlora.moe_scatter(dx_ND, *ctx.saved_tensors, None), None, None


torch.library.register_autograd("mixlora::moe_gather", _backward, setup_context=_setup_context)
