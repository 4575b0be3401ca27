"""Sum the rows of a token's experts, weighted: the way back from `moe_gather`.

    y_TD[t]          = sum_k weight_TK[t, k] * y_ND[slot_row_TK[t, k]]     in slot order, in fp32
    dy_ND[n]         = weight_TK[slot] * dy_TD[slot div K],  slot = row_slot_N[n]
    dweight_TK[t, k] = <dy_TD[t], y_ND[slot_row_TK[t, k]]>

Rows in fp64 (summed in fp64), fp32, bf16 or fp16; weights in the rows' dtype or fp32. Empty slots
(-1) add nothing, whatever their weight; rows in the tail (row_slot_N[n] = -1) get no gradient. No
atomics: a token knows its K rows. Without weights they are 1, and dy_ND is moe_gather of dy_TD.
"""

import torch
from torch import Tensor

from mixlora.ops._once import no_second_derivative
from mixlora.ops._switch import use_reference
from mixlora.ops.moe_sort import Plan


def moe_scatter(y_ND: Tensor, plan: Plan, weight_TK: Tensor | None = None) -> Tensor:
    if use_reference():
        return moe_scatter_ref(y_ND, plan, weight_TK)
    return torch.ops.mixlora.moe_scatter(y_ND, plan.row_slot_N, plan.slot_row_TK, weight_TK)


def moe_scatter_ref(y_ND: Tensor, plan: Plan, weight_TK: Tensor | None = None) -> Tensor:
    row_TK = plan.slot_row_TK.long()
    T, K = row_TK.shape
    y_TKD = y_ND.index_select(0, row_TK.clamp_min(0).flatten()).unflatten(0, (T, K))
    y_TKD = y_TKD.to(torch.promote_types(y_ND.dtype, torch.float32))
    y_TKD = y_TKD.masked_fill((row_TK < 0)[..., None], 0)
    if weight_TK is not None:
        y_TKD = y_TKD * weight_TK.masked_fill(row_TK < 0, 0)[..., None]
    return y_TKD.sum(1).to(y_ND.dtype)


@torch.library.register_fake("mixlora::moe_scatter")
def _(y_ND: Tensor, row_slot_N: Tensor, slot_row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    return y_ND.new_empty(slot_row_TK.shape[0], y_ND.shape[1])


@torch.library.register_fake("mixlora::moe_scatter_backward")
def _(
    dy_TD: Tensor, y_ND: Tensor, row_slot_N: Tensor, slot_row_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return y_ND.new_empty(y_ND.shape), weight_TK.new_empty(weight_TK.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    y_ND, *plan, weight_TK = inputs
    ctx.save_for_backward(None if weight_TK is None else y_ND, *plan, weight_TK)


def _backward(ctx, dy_TD: Tensor) -> tuple:
    y_ND, *plan, weight_TK = ctx.saved_tensors
    if weight_TK is None:
        return torch.ops.mixlora.moe_gather(dy_TD, *plan), None, None, None
    dy_ND, dweight_TK = torch.ops.mixlora.moe_scatter_backward(dy_TD, y_ND, *plan, weight_TK)
    return dy_ND, None, None, dweight_TK


torch.library.register_autograd("mixlora::moe_scatter", _backward, setup_context=_setup_context)
no_second_derivative("moe_scatter_backward")
