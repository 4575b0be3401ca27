"""y = x W^T + b, the library's product, but for two cases on a CPU.

Few rows without gradients, as in decoding, go to few_rows_linear.

bf16 on a processor that has no bf16 products: torch emulates them there, at a fifth of
fp32's speed in forward and at a fiftieth in backward. The factors are then widened to fp32, a block
of W at a time, and the sums rounded to bf16, which is what a bf16 product does anyway.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlora.ops._switch import use_reference
from mixlora.ops.few_rows_linear import few_rows_linear

WIDENED = 1 << 24  # elements of W at once: 64 MiB
FEW_ROWS = 32  # at 64 the library is as fast: benchmarks/bench_few_rows_linear.py


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    if use_reference():
        return linear_ref(x, weight, bias)
    if is_few(x):
        return few_rows_linear(x, weight, bias)
    return _WideLinear.apply(x, weight, bias) if is_emulated(x) else linear_ref(x, weight, bias)


def is_few(x: Tensor) -> bool:
    """Whether the kernels for few rows are for x [..., I]."""
    if torch.is_grad_enabled() or not x.is_cpu:
        return False
    return x.numel() <= FEW_ROWS * x.shape[-1]


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def is_emulated(x: Tensor) -> bool:
    on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        wide_TI = x.flatten(0, -2).float()
        y = x.new_empty(*x.shape[:-1], len(weight))  # no view: it may be overwritten
        y_TO = y.view(-1, len(weight))
        for rows in blocks(weight):
            product_TO = wide_TI @ weight[rows].float().T
            y_TO[:, rows] = product_TO if bias is None else product_TO.add_(bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        dy_TO = dy.flatten(0, -2).float()
        if ctx.needs_input_grad[0]:
            wide_TI = dy_TO.new_zeros(len(dy_TO), weight.shape[1])
            for rows in blocks(weight):
                wide_TI.addmm_(dy_TO[:, rows], weight[rows].float())
            dx = wide_TI.to(weight.dtype).view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dweight = (dy_TO.T @ x.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy_TO.sum(0).to(weight.dtype)
        return dx, dweight, dbias


def blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, WIDENED // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))
