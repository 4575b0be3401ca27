"""LoRA (Hu et al., arXiv 2106.09685): y = W x + b + s B A dropout(x), W and b frozen.

s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732). Adapter parameters are fp32;
they compute in the dtype of x.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.layers.context import ForwardContext


class Linear(nn.Module):
    """A frozen projection of the base model and the LoRA updates around it, by adapter name."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        bias_O = torch.empty(out_features) if bias else None
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.adapters = nn.ModuleDict()

    def forward(self, x_BSI: Tensor, context: ForwardContext) -> Tensor:
        """The frozen product once over all rows; each adapter adds its own to its rows."""
        y_BSO = F.linear(x_BSI, self.weight, self.bias)
        for span in context.spans:
            if span.name in self.adapters:
                span.rows(y_BSO).add_(self.adapters[span.name](span.rows(x_BSI)))
        return y_BSO

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"


class Lora(nn.Module):
    """x -> s B A dropout(x) for one projection."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_init: str = "original",
    ) -> None:
        super().__init__()
        self.scaling = lora_scaling(r, lora_alpha, use_rslora)
        self.dropout = lora_dropout
        self.lora_A = nn.Parameter(init_lora_a(torch.empty(r, in_features), lora_init))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))

    def forward(self, x_BSI: Tensor) -> Tensor:
        x_BSI = F.dropout(x_BSI, self.dropout, self.training)
        a_BSR = x_BSI @ self.lora_A.to(x_BSI.dtype).T
        return a_BSR * self.scaling @ self.lora_B.to(x_BSI.dtype).T


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def init_lora_a(lora_a: Tensor, lora_init: str) -> Tensor:
    """In place, the last dimension being the input: U(-1/sqrt(in), 1/sqrt(in)), or N(0, 1/r)."""
    if lora_init == "gaussian":
        return nn.init.normal_(lora_a, std=1 / lora_a.shape[-2])
    bound = 1 / math.sqrt(lora_a.shape[-1])  # kaiming uniform with a = sqrt(5), as upstream
    return nn.init.uniform_(lora_a, -bound, bound)
