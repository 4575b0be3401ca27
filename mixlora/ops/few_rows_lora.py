"""y_TO + s B_OR A_RI x_TI for few rows, as in decoding, on a CPU, without gradients.

One call for what a LoRA is at a token: A, B and the sum. A row's result is the same, to the bit,
whatever rows are beside it.

All share one dtype, fp64, fp32, bf16 or fp16; sums are fp32 (fp64 in fp64), A x among them, and
the result alone is rounded.
"""

import torch
from torch import Tensor

from mixlora.ops._switch import use_reference


def few_rows_lora(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """y [..., O], x [..., I], lora_a [R, I], lora_b [O, R] -> [..., O]."""
    run = few_rows_lora_ref if use_reference() else torch.ops.mixlora.few_rows_lora
    return run(y, x, lora_a, lora_b, scaling)


def few_rows_lora_ref(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    return y + scaling * (x @ lora_a.T) @ lora_b.T


@torch.library.register_fake("mixlora::few_rows_lora")
def _(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)
