"""Copy every token's row to the places its experts will read.

    x_ND[n]  = x_TD[row_slot_N[n] div K]          (0 in the tail, where row_slot_N[n] = -1)
    dx_TD[t] = sum_k dx_ND[slot_row_TK[t, k]]     (empty slots add nothing)

T=3, K=2, experts (0,2) (1,2) (0,1): row_slot_N = [0, 4, 2, 5, 1, 3], so x_ND holds the tokens
0, 2, 1, 2, 0, 1. Any dtype. T may be 0.
"""

from torch import Tensor

from mixlora.ops.moe_sort import Plan


def moe_gather(x_TD: Tensor, plan: Plan) -> Tensor:
    return moe_gather_ref(x_TD, plan)


def moe_gather_ref(x_TD: Tensor, plan: Plan) -> Tensor:
    slot_N, K = plan.row_slot_N.long(), plan.expert_TK.shape[1]
    x_ND = x_TD.index_select(0, slot_N.clamp_min(0).div(K, rounding_mode="floor"))
    return x_ND.masked_fill((slot_N < 0)[:, None], 0)
