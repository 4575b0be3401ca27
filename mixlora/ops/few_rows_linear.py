"""y_TO = x_TI W_OI^T + b_O for few rows, as in decoding, on a CPU, without gradients.

W is read once, in place; the rows stay in the caches. (The library copies W first, which pays for
hundreds of rows.) A row's result is the same, to the bit, whatever rows are beside it.

x, W, b and y share one dtype, fp64, fp32, bf16 or fp16; sums are fp32 (fp64 in fp64) and rounded
once. Any T works; beyond 32 rows W is read again for each 32 of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.ops._switch import use_reference


def few_rows_linear(x: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I] -> [..., O]."""
    run = few_rows_linear_ref if use_reference() else torch.ops.mixlora.few_rows_linear
    return run(x, w_OI, bias_O)


def few_rows_linear_ref(x: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return F.linear(x, w_OI, bias_O)


@torch.library.register_fake("mixlora::few_rows_linear")
def _(x: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(w_OI))
