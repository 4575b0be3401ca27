"""LoRA (Hu et al., arXiv 2106.09685): y = W x + b + s B A dropout(x), W and b frozen.

DoRA (Liu et al., arXiv 2402.09353): y = m / ||W + s B A|| (W x + s B A dropout(x)) + b, the norms
being those of rows, without gradient, and the magnitude m trained.

s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732). Adapter parameters are fp32;
they compute in the dtype of x.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.layers.context import ForwardContext, Sequences, Span, put_together, rows_of
from mixlora.layers.quantized import QuantizedWeight, quantized_linear
from mixlora.ops import dropout, few_rows_lora, linear
from mixlora.ops.linear import is_few
from mixlora.ops.philox import seed_tensor


class Linear(nn.Module):
    """A frozen projection of the base model and the updates around it, by adapter name.

    Of a quantised one `weight` tells shape, dtype and device alone: it is one NaN, expanded.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        bias_O = torch.empty(out_features) if bias else None
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.quantized: QuantizedWeight | None = None
        self.adapters = nn.ModuleDict()

    def quantize(self, kind: str, device: str | torch.device) -> None:
        weight = self.weight.to(device)
        self.quantized = QuantizedWeight(weight, kind)
        shape_alone = weight.new_full((), torch.nan).expand(weight.shape)
        self.weight = nn.Parameter(shape_alone, requires_grad=False)

    def matrix(self) -> Tensor:
        """W as it computes; of a quantised one a new tensor."""
        return self.weight if self.quantized is None else self.quantized.matrix()

    def product(self, x: Tensor) -> Tensor:
        """W x + b"""
        if self.quantized is None:
            return linear(x, self.weight, self.bias)
        return quantized_linear(x, self.quantized, self.bias)

    def forward(self, x_BSI: Tensor, context: ForwardContext) -> Tensor:
        """The frozen product once over all rows; each adapter changes its own."""
        y_BSO = self.product(x_BSI)
        if len(context.spans) == 1 and context.spans[0].length is None:  # no view to be made
            return self.adapt(context.spans[0], x_BSI, y_BSO, context)
        xs, ys = rows_of(context.spans, x_BSI), rows_of(context.spans, y_BSO)
        parts = [
            self.adapt(span, x_BSI, y_BSO, context)
            for span, x_BSI, y_BSO in zip(context.spans, xs, ys, strict=True)
        ]
        return put_together(parts, x_BSI.shape[1])

    def adapt(self, span: Span, x_BSI: Tensor, y_BSO: Tensor, context: ForwardContext) -> Tensor:
        """What a span's adapters make of y = W x + b, which they may overwrite."""
        for name in context.adapters_of(span):
            if name in self.adapters:
                y_BSO = self.adapters[name](x_BSI, y_BSO, self, context, span)
        return y_BSO

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"


class LoraPair(nn.Module):
    """A and B of one projection, [R, I] and [O, R]; of `num_experts` experts [E, R, I], [E, O, R].

    With DoRA also their magnitudes [O] or [E, O].
    """

    def __init__(
        self,
        base: Linear,
        num_experts: int | None = None,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_init: str = "original",
    ) -> None:
        super().__init__()
        O, I = base.weight.shape
        E = () if num_experts is None else (num_experts,)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = lora_dropout
        self.lora_A = nn.Parameter(init_lora_a(torch.empty(*E, r, I), lora_init))
        self.lora_B = nn.Parameter(torch.zeros(*E, O, r))
        self.lora_magnitude_vector = None
        if use_dora:
            norm_O = root(row_square(base.matrix(), self.lora_A.dtype))
            self.lora_magnitude_vector = nn.Parameter(torch.empty(*E, O).copy_(norm_O))

    def dora_scale(self, base: Linear) -> Tensor | None:
        """m / ||W + s B A|| [O] or [E, O], the gradient going to m alone; None without DoRA."""
        if self.lora_magnitude_vector is None:
            return None
        # computed again only where a parameter has changed: decoding asks at every token
        parameters = base.weight, self.lora_A, self.lora_B
        is_tracked = not any(x.is_inference() for x in parameters)
        state = [(x.data_ptr(), x._version) for x in parameters] if is_tracked else None
        if state is None or getattr(self, "_norm_state", None) != state:
            self._norm_state, self._norm = state, self.row_norm(base)
        return self.lora_magnitude_vector / self._norm

    def merged(self, base: Linear, expert: int | None = None) -> Tensor:
        """m / ||W + s B A|| (W + s B A), or W + s B A without DoRA, of the one pair or of an
        expert's: computed in fp32, [O, I] in the dtype of W."""
        lora_a, lora_b, scale = self.lora_A, self.lora_B, self.dora_scale(base)
        if expert is not None:
            lora_a, lora_b = lora_a[expert], lora_b[expert]
            scale = None if scale is None else scale[expert]
        weight = base.weight.to(lora_a.dtype) + self.scaling * lora_b @ lora_a
        weight = weight if scale is None else scale[:, None] * weight
        return weight.to(base.weight.dtype)

    def row_norm(self, base: Linear) -> Tensor:
        """||W + s B A|| of every row, expanded so that the sum is never formed:

        ||W_j||^2 + 2 s (W A^T)_j B_j + s^2 B_j (A A^T) B_j^T              [O] or [E, O], fp32
        """
        with torch.inference_mode(False), torch.no_grad():  # the result may meet autograd later
            lora_a, lora_b, s = self.lora_A, self.lora_B, self.scaling
            weight = base.matrix()
            crossed = (weight.to(lora_a.dtype) @ lora_a.mT * lora_b).sum(-1)
            quadratic = (lora_b @ (lora_a @ lora_a.mT) * lora_b).sum(-1)
            square = row_square(weight, lora_a.dtype) + 2 * s * crossed + s * s * quadratic
            return root(square)


def row_square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if hasattr(weight, "full_tensor"):  # a sharded model's, outside of its forward
        weight = weight.full_tensor()
    return weight.detach().to(dtype).square().sum(-1)


def root(square: Tensor) -> Tensor:
    """Rounding may leave a row of zeros below zero; its norm is then tiny, and its scale finite."""
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


class Lora(LoraPair):
    """The update of one projection: y = W x + b -> y + s B A dropout(x), or DoRA's."""

    def forward(
        self, x_BSI: Tensor, y_BSO: Tensor, base: Linear, context: ForwardContext, span: Span
    ) -> Tensor:
        p = self.dropout if self.training else 0.0
        if not p and self.lora_magnitude_vector is None and is_few(x_BSI):
            lora_a, lora_b = self.lora_A.to(x_BSI.dtype), self.lora_B.to(x_BSI.dtype)
            return few_rows_lora(y_BSO, x_BSI, lora_a, lora_b, self.scaling)
        sequences = context.sequences(span, self)
        a_BSR = of_dropped(linear, p, sequences, x_BSI, self.lora_A.to(x_BSI.dtype))
        delta_BSO = linear(a_BSR * self.scaling, self.lora_B.to(x_BSI.dtype))
        scale_O = self.dora_scale(base)
        return (
            y_BSO.add_(delta_BSO) if scale_O is None else rescale(y_BSO, delta_BSO, scale_O, base)
        )


def of_dropped(
    function: Callable[..., Any], p: float, sequences: Sequences, x: Tensor, *arguments: Any
) -> Any:
    """function(dropout(x), ...). What is kept for backward is x, which others keep anyway: its
    dropout is drawn again."""
    if not p:
        return function(x, *arguments)
    seed = seed_tensor(sequences.seed(), x.device)

    def run(x: Tensor, *arguments: Any) -> Any:
        return function(dropout(x.flatten(0, -2), p, seed).view_as(x), *arguments)

    return checkpoint(run, x, *arguments, use_reentrant=False, preserve_rng_state=False)


def rescale(y_NO: Tensor, delta_NO: Tensor, scale_NO: Tensor, base: Linear) -> Tensor:
    """scale (W x + delta) + b of y = W x + b."""
    return y_NO + dora_change(y_NO, delta_NO, scale_NO, base)


def dora_change(y_NO: Tensor, delta_NO: Tensor, scale_NO: Tensor, base: Linear) -> Tensor:
    """scale (W x + delta) + b - y of y = W x + b. Written so that a scale of 1 changes no bit of
    y, and a scale near 1 keeps its digits in bf16."""
    adapted_NO = y_NO + delta_NO
    product_NO = adapted_NO if base.bias is None else adapted_NO - base.bias
    return delta_NO + (scale_NO - 1).to(y_NO.dtype) * product_NO


def init_lora_a(lora_a: Tensor, lora_init: str) -> Tensor:
    """In place, the last dimension being the input: U(-1/sqrt(in), 1/sqrt(in)), or N(0, 1/r)."""
    if lora_init == "gaussian":
        return nn.init.normal_(lora_a, std=1 / lora_a.shape[-2])
    bound = 1 / math.sqrt(lora_a.shape[-1])  # kaiming uniform with a = sqrt(5), as upstream
    return nn.init.uniform_(lora_a, -bound, bound)
