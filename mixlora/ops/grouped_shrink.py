"""The first half of a LoRA in slot form: A of the expert that slot k of token t holds.

    a_TKR[t, k] = A_e x_TI[t],  e = expert_TK[t, k]                    0 in an empty slot
    dx_TI[t]    = sum_k A_e^T da_TKR[t, k]                             in slot order
    dlora_a_e   = sum over the slots of e of da_TKR[t, k] x_TI[t]^T    0 for an expert without rows

A is lora_a_ERI. x, A, a and the gradients share one dtype, fp64, fp32, bf16 or fp16; sums are fp32
(fp64 in fp64) and rounded once. The tokens' rows are read in place, K times, never copied together,
and only the experts asked for are computed: of all E, a dense product would use K/E. T may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._once import no_second_derivative
from mixlora.ops._switch import use_reference
from mixlora.ops.moe_sort import Plan


def grouped_shrink(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    if use_reference():
        return grouped_shrink_ref(x_TI, lora_a_ERI, plan)
    return torch.ops.mixlora.grouped_shrink(
        x_TI,
        lora_a_ERI,
        plan.expert_TK,
        plan.expert_start_E1,
        plan.row_slot_N,
        plan.token_order_T,
    )


def grouped_shrink_ref(x_TI: Tensor, lora_a_ERI: Tensor, plan: Plan) -> Tensor:
    expert_TK = plan.expert_TK.long()
    a_TER = torch.einsum("ti,eri->ter", x_TI, lora_a_ERI)
    index_TKR = expert_TK.clamp_min(0)[..., None].expand(-1, -1, lora_a_ERI.shape[1])
    return a_TER.gather(1, index_TKR).masked_fill((expert_TK < 0)[..., None], 0)


@torch.library.register_fake("mixlora::grouped_shrink")
def _(
    x_TI: Tensor,
    lora_a_ERI: Tensor,
    expert_TK: Tensor,
    expert_start_E1: Tensor,
    row_slot_N: Tensor,
    token_order_T: Tensor,
) -> Tensor:
    return x_TI.new_empty(*expert_TK.shape, lora_a_ERI.shape[1])


@torch.library.register_fake("mixlora::grouped_shrink_backward")
def _(
    da_TKR: Tensor,
    x_TI: Tensor,
    lora_a_ERI: Tensor,
    expert_TK: Tensor,
    expert_start_E1: Tensor,
    row_slot_N: Tensor,
    token_order_T: Tensor,
) -> tuple[Tensor, Tensor]:
    return x_TI.new_empty(x_TI.shape), lora_a_ERI.new_empty(lora_a_ERI.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, da_TKR: Tensor) -> tuple:
    gradients = torch.ops.mixlora.grouped_shrink_backward(da_TKR, *ctx.saved_tensors)
    return *gradients, None, None, None, None


torch.library.register_autograd("mixlora::grouped_shrink", _backward, setup_context=_setup_context)
no_second_derivative("grouped_shrink_backward")
