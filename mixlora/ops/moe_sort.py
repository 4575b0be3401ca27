"""Turn the experts of every token into the routing plan that all other ops read.

    slot   = t*K + k                             one place for an expert of token t; N = T*K slots
    rows   = slots with an expert, sorted by (expert, slot)
    row_slot_N[row] = slot,  slot_row_TK[slot] = row            each other's inverse; -1 = no such
    rows of expert e = expert_start_E1[e] .. expert_start_E1[e + 1] - 1
    token_order_T = tokens sorted by (expert_TK[t, 0], .., expert_TK[t, K-1], t)

T=3, K=2, E=3, experts (0,2) (1,2) (0,-):

    expert_TK       = [[0, 2], [1, 2], [0, -1]]
    expert_start_E1 = [0, 2, 3, 5]               expert 0 has 2 rows, expert 1 has 1, expert 2 has 2
    row_slot_N      = [0, 4,  2,  1, 3,  -1]     5 of the 6 rows are valid
    slot_row_TK     = [[0, 3], [2, 4], [1, -1]]
    token_order_T   = [2, 0, 1]                  -1 comes before every expert

All tensors are int32. Any slot may be empty (-1); other values outside [0, E) are an error, which
on a GPU an assertion of the kernel reports. T may be 0, experts may own no rows, a token may repeat
an expert. The order is total: the plan is a function of expert_TK alone. No gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference


class Plan(NamedTuple):
    expert_TK: Tensor  # experts of a token; -1 = empty slot
    expert_start_E1: Tensor  # first row of each expert; [-1] = number of valid rows <= N
    row_slot_N: Tensor  # slot of each row; -1 behind the valid rows
    slot_row_TK: Tensor  # row of each slot; -1 = empty
    token_order_T: Tensor  # tokens with equal experts next to each other, for tiles


def moe_sort(expert_TK: Tensor, num_experts: int) -> Plan:
    if use_reference():
        return moe_sort_ref(expert_TK, num_experts)
    return Plan(expert_TK, *torch.ops.mixlora.moe_sort(expert_TK, num_experts))


def moe_sort_ref(expert_TK: Tensor, num_experts: int) -> Plan:
    T, K = expert_TK.shape
    expert_N = expert_TK.reshape(-1)
    key_N = torch.where(expert_N < 0, num_experts, expert_N)  # empty slots behind all experts
    sorted_N, slot_N = key_N.sort(stable=True)
    expert_start_E1 = torch.searchsorted(sorted_N, torch.arange(num_experts + 1).to(sorted_N))
    row_slot_N = slot_N.where(sorted_N < num_experts, -1)
    slot_row_TK = slot_N.argsort().where(expert_N >= 0, -1).view(T, K)
    token_order_T = torch.arange(T, device=expert_TK.device)
    for k in reversed(range(K)):
        token_order_T = token_order_T[expert_TK[token_order_T, k].argsort(stable=True)]
    outputs = expert_start_E1, row_slot_N, slot_row_TK, token_order_T
    return Plan(expert_TK, *(output.int() for output in outputs))


@torch.library.register_fake("mixlora::moe_sort")
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    T, K = expert_TK.shape
    sizes = (num_experts + 1,), (T * K,), (T, K), (T,)
    return tuple(expert_TK.new_empty(size) for size in sizes)
