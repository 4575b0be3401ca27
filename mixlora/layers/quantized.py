"""A frozen W in 4 or 8 bits, through bitsandbytes: y = W' x + b, W' being W as it was rounded.

    nf4     4 bits of a normal distribution's quantiles, an fp32 scale for 64 of them (QLoRA, arXiv
            2305.14314, without its second quantisation): 4.5 bits a weight
    int8    8 bits, an fp32 scale for a row (as the weights of LLM.int8(), arXiv 2208.07339)

W' is formed anew, in the dtype of the model, for each product in forward and in backward, and let
go: one projection's W' is there at a time. The arithmetic is that of a W' that is held.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixlora.errors import InputError
from mixlora.ops import linear

KINDS = ("nf4", "int8")
BLOCK = 64  # weights that share a scale in nf4


def require_bitsandbytes(asked_by: str) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        message = f"{asked_by} needs bitsandbytes: pip install bitsandbytes"
        raise InputError(message) from None
    return bitsandbytes


class QuantizedWeight(nn.Module):
    """Made of W [O, I]. On the meta device shapes alone, for which bitsandbytes is not needed."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.shape, self.dtype = kind, tuple(weight.shape), weight.dtype
        packed, scale = shapes_of(weight, kind) if weight.is_meta else rounded(weight, kind)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def matrix(self) -> Tensor:
        """W', a new tensor."""
        if self.packed.is_meta:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.kind == "int8":
            scale_O1 = (self.scale / 127).to(self.dtype)[:, None]
            return self.packed.to(self.dtype).mul_(scale_O1)
        run = torch.ops.bitsandbytes.dequantize_4bit
        return run(self.packed, self.scale, BLOCK, "nf4", self.shape, self.dtype)


def rounded(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    require_bitsandbytes(f"model.quantize {kind}")
    ops = torch.ops.bitsandbytes
    if kind == "nf4":
        return ops.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
    packed, scale, _ = ops.int8_vectorwise_quant(weight.half(), 0.0)  # which reads fp16 alone
    return packed, scale


def shapes_of(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    size, num_rows = weight.numel(), len(weight)
    if kind == "int8":
        packed, num_scales = weight.new_empty(weight.shape, dtype=torch.int8), num_rows
    else:
        packed = weight.new_empty(math.ceil(size / 2), 1, dtype=torch.uint8)
        num_scales = math.ceil(size / BLOCK)
    return packed, weight.new_empty(num_scales, dtype=torch.float32)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuantizedLinear.apply(x, weight, bias)
    return linear(x, weight.matrix(), bias)


class _QuantizedLinear(torch.autograd.Function):
    """For backward W is kept as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = linear(x, weight.matrix(), bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view: it may be overwritten

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return linear(dy, ctx.weight.matrix().T), None, None
