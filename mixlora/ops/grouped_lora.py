"""Low-rank updates of rows that belong to different groups (experts, or adapters).

Rows are sorted by group, group g owning rows [group_start_G1[g], group_start_G1[g + 1]); with A =
lora_a_GRI[g] and B = lora_b_GOR[g] of a row's group:

    y_NO[n] = scaling * B A x_NI[n]               0 for rows past the last group
    dz_n    = scaling * B^T dy_NO[n]              z_n = scaling * A x_NI[n], computed again
    dx_NI[n] = A^T dz_n                           0 for rows past the last group
    dA = sum_n dz_n x_n^T     dB = sum_n dy_n z_n^T     over the group's rows; 0 where it has none

x, A, B, y and the gradients share one dtype, fp64, fp32, bf16 or fp16; sums, z and dz are fp32
(fp64 in fp64), results are rounded once. Rows past the last group are not read. N may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._once import no_second_derivative
from mixlora.ops._switch import use_reference


def grouped_lora(
    x_NI: Tensor, lora_a_GRI: Tensor, lora_b_GOR: Tensor, group_start_G1: Tensor, scaling: float
) -> Tensor:
    run = grouped_lora_ref if use_reference() else torch.ops.mixlora.grouped_lora
    return run(x_NI, lora_a_GRI, lora_b_GOR, group_start_G1, scaling)


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


@torch.library.register_fake("mixlora::grouped_lora")
def _(
    x_NI: Tensor, lora_a_GRI: Tensor, lora_b_GOR: Tensor, group_start_G1: Tensor, scaling: float
) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], lora_b_GOR.shape[1])


@torch.library.register_fake("mixlora::grouped_lora_backward")
def _(
    dy_NO: Tensor,
    x_NI: Tensor,
    lora_a_GRI: Tensor,
    lora_b_GOR: Tensor,
    group_start_G1: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (x_NI, lora_a_GRI, lora_b_GOR))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy_NO: Tensor) -> tuple:
    gradients = torch.ops.mixlora.grouped_lora_backward(dy_NO, *ctx.saved_tensors, ctx.scaling)
    return *gradients, None, None


torch.library.register_autograd("mixlora::grouped_lora", _backward, setup_context=_setup_context)
no_second_derivative("grouped_lora_backward")
