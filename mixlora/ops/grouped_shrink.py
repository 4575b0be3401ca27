"""The two halves of a LoRA in slot form: A, or B, of the expert that slot k of token t holds.

All is of one form that is linear in x [T, I], w [E, R, I] and a [T, K, R],

    f(x, w, a) = sum_tk <a_TKR[t, k], w_e x_TI[t]>,  e = expert_TK[t, k]     without empty slots

and the operators are its derivatives, so that the gradients of each are the other two:

    grouped_shrink  a_TKR[t, k] = w_e x_TI[t]                    0 in an empty slot
    grouped_expand  x_TI[t]     = sum_k w_e^T a_TKR[t, k]        in the order of experts
    grouped_outer   w_ERI[e]    = sum a_TKR[t, k] x_TI[t]^T      0 for an expert without rows

x, w and a share one dtype, fp64, fp32, bf16 or fp16; sums are fp32 (fp64 in fp64) and rounded once.
Rows are read in place, never copied together, and only the experts asked for are computed. The
functions choose between that and the reference, which the library computes. T may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference
from mixlora.ops.linear import linear
from mixlora.ops.moe_sort import Plan

# A library product with all experts does E / K times the arithmetic, at a better rate: measured by
# benchmarks/bench_grouped_shrink.py, see docs/performance.md.
DENSE_BELOW = 2  # experts per slot


def is_dense(E: int, K: int) -> bool:
    return E < DENSE_BELOW * K


def grouped_shrink(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    """A_e x of each slot's expert e."""
    if use_reference() or is_dense(len(lora_a_ERI), plan.expert_TK.shape[1]):
        return grouped_shrink_ref(x_TI, lora_a_ERI, plan)
    return torch.ops.mixlora.grouped_shrink(x_TI, lora_a_ERI, False, *_rows(plan))


def grouped_expand(z_TKR: Tensor, lora_b_EOR: Tensor, plan: Plan) -> Tensor:
    """sum_k B_e z_k [T, O]."""
    if use_reference() or is_dense(len(lora_b_EOR), plan.expert_TK.shape[1]):
        return grouped_expand_ref(z_TKR, lora_b_EOR, plan)
    return torch.ops.mixlora.grouped_expand(z_TKR, lora_b_EOR, True, *_rows(plan))


def grouped_shrink_ref(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    """A dense product, from which every slot picks its expert's columns."""
    E, R, _ = lora_a_ERI.shape
    a_TER = linear(x_TI, lora_a_ERI.flatten(0, 1)).unflatten(1, (E, R))
    index_TKR = plan.expert_TK.long().clamp_min(0)[..., None].expand(-1, -1, R)
    return a_TER.gather(1, index_TKR).masked_fill((plan.expert_TK < 0)[..., None], 0)


def grouped_expand_ref(z_TKR: Tensor, lora_b_EOR: Tensor, plan: Plan) -> Tensor:
    """A dense product, of z in its expert's columns and zeros elsewhere."""
    T, _, R = z_TKR.shape
    E = len(lora_b_EOR)
    expert_TK = torch.where(plan.expert_TK < 0, E, plan.expert_TK.long())
    index_TKR = expert_TK[..., None].expand(-1, -1, R)
    z_TER = z_TKR.new_zeros(T, E + 1, R).scatter_add(1, index_TKR, z_TKR)[:, :E]
    return linear(z_TER.flatten(1), lora_b_EOR.transpose(0, 1).flatten(1))


def _rows(plan: Plan) -> tuple[Tensor, ...]:
    return plan.expert_TK, plan.expert_start_E1, plan.row_slot_N


# The operators' w is A [E, R, I], or with `transposed` B [E, O, R].


@torch.library.register_fake("mixlora::grouped_shrink")
def _(x_TI: Tensor, w: Tensor, transposed: bool, expert_TK: Tensor, *plan: Tensor) -> Tensor:
    return x_TI.new_empty(*expert_TK.shape, w.shape[2 if transposed else 1])


@torch.library.register_fake("mixlora::grouped_expand")
def _(a_TKR: Tensor, w: Tensor, transposed: bool, *plan: Tensor) -> Tensor:
    return a_TKR.new_empty(a_TKR.shape[0], w.shape[1 if transposed else 2])


@torch.library.register_fake("mixlora::grouped_outer")
def _(
    a_TKR: Tensor,
    x_TI: Tensor,
    transposed: bool,
    expert_TK: Tensor,
    expert_start_E1: Tensor,
    row_slot_N: Tensor,
) -> Tensor:
    E, R, I = expert_start_E1.shape[0] - 1, a_TKR.shape[2], x_TI.shape[1]
    return a_TKR.new_empty(E, I, R) if transposed else a_TKR.new_empty(E, R, I)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    first, second, ctx.transposed, *plan = inputs
    ctx.save_for_backward(first, second, *plan)


def _shrink_backward(ctx, da_TKR: Tensor) -> tuple:
    x_TI, w, *plan = ctx.saved_tensors
    return _gradients(ctx, plan, ("grouped_expand", da_TKR, w), ("grouped_outer", da_TKR, x_TI))


def _expand_backward(ctx, dx_TI: Tensor) -> tuple:
    a_TKR, w, *plan = ctx.saved_tensors
    return _gradients(ctx, plan, ("grouped_shrink", dx_TI, w), ("grouped_outer", a_TKR, dx_TI))


def _outer_backward(ctx, dw: Tensor) -> tuple:
    a_TKR, x_TI, *plan = ctx.saved_tensors
    return _gradients(ctx, plan, ("grouped_shrink", x_TI, dw), ("grouped_expand", a_TKR, dw))


def _gradients(ctx, plan: list[Tensor], *calls: tuple[str, Tensor, Tensor]) -> tuple:
    gradients = (
        getattr(torch.ops.mixlora, op)(first, second, ctx.transposed, *plan) if wanted else None
        for (op, first, second), wanted in zip(calls, ctx.needs_input_grad, strict=False)
    )
    return *gradients, None, None, None, None


for _op, _backward in (
    ("grouped_shrink", _shrink_backward),
    ("grouped_expand", _expand_backward),
    ("grouped_outer", _outer_backward),
):
    torch.library.register_autograd(f"mixlora::{_op}", _backward, setup_context=_setup_context)
