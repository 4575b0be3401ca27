"""Dropout whose mask is a function of a seed, drawn again in backward: nothing else is kept.

    y_ND[n, d]  = keep[n, d] x_ND[n, d] / (1 - p)          keep by ops/philox.py, true in 1 - p
    dx_ND[n, d] = keep[n, d] dy_ND[n, d] / (1 - p)         the same op

The seed is an int64 scalar tensor. Rows in fp64, fp32, bf16 or fp16, rounded once; N may be 0.
"""

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference
from mixlora.ops.philox import keep_mask


def dropout(x_ND: Tensor, p: float, seed: Tensor) -> Tensor:
    run = dropout_ref if use_reference() else torch.ops.mixlora.dropout
    return run(x_ND, p, seed)


def dropout_ref(x_ND: Tensor, p: float, seed: Tensor) -> Tensor:
    row_N = torch.arange(len(x_ND), device=x_ND.device)
    return x_ND * keep_mask(seed, row_N, x_ND.shape[1], p) * (1 / (1 - p))


@torch.library.register_fake("mixlora::dropout")
def _(x_ND: Tensor, p: float, seed: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, dy_ND: Tensor) -> tuple:
    return torch.ops.mixlora.dropout(dy_ND, ctx.p, *ctx.saved_tensors), None, None


torch.library.register_autograd("mixlora::dropout", _backward, setup_context=_setup_context)
