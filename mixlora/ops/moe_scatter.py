"""Sum the rows of a token's experts, weighted: the way back from `moe_gather`.

    y_TD[t]          = sum_k weight_TK[t, k] * y_ND[slot_row_TK[t, k]]     in slot order, in fp32
    dy_ND[n]         = weight_TK[slot] * dy_TD[slot div K],  slot = row_slot_N[n]
    dweight_TK[t, k] = <dy_TD[t], y_ND[slot_row_TK[t, k]]>

Empty slots (-1) add nothing. No atomics: a token knows its K rows. Without weights they are 1.
"""

import torch
from torch import Tensor

from mixlora.ops.moe_sort import Plan


def moe_scatter(y_ND: Tensor, plan: Plan, weight_TK: Tensor | None = None) -> Tensor:
    return moe_scatter_ref(y_ND, plan, weight_TK)


def moe_scatter_ref(y_ND: Tensor, plan: Plan, weight_TK: Tensor | None = None) -> Tensor:
    row_TK = plan.slot_row_TK.long()
    T, K = row_TK.shape
    y_TKD = y_ND.index_select(0, row_TK.clamp_min(0).flatten()).unflatten(0, (T, K))
    y_TKD = y_TKD.to(torch.promote_types(y_ND.dtype, torch.float32))
    y_TKD = y_TKD.masked_fill((row_TK < 0)[..., None], 0)
    if weight_TK is not None:
        y_TKD = y_TKD * weight_TK.masked_fill(row_TK < 0, 0)[..., None]
    return y_TKD.sum(1).to(y_ND.dtype)
