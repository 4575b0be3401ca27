"""Dropout by a seed against torch's own, which keeps its mask, forward and with backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, x_ND: Tensor, dy_ND: Tensor) -> None:
    torch.autograd.grad(op(x_ND), x_ND, dy_ND)


if __name__ == "__main__":
    print_header()
    p, seed = 0.05, torch.tensor(5)
    for N, D in [(1, 4096), (1024, 1024), (4096, 4096)]:
        for dtype in (torch.float32, torch.bfloat16):
            x_ND, dy_ND = torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype)
            shape = f"N={N} D={D} {str(dtype).removeprefix('torch.')}"
            compare(
                f"dropout {shape}",
                torch=lambda: F.dropout(x_ND, p),  # noqa: B023  called in this turn
                native=lambda: ops.dropout(x_ND, p, seed),  # noqa: B023
            )
            x_ND.requires_grad_()
            compare(
                f"  with backward {shape}",
                torch=lambda: step(lambda x: F.dropout(x, p), x_ND, dy_ND),  # noqa: B023
                native=lambda: step(lambda x: ops.dropout(x, p, seed), x_ND, dy_ND),  # noqa: B023
            )
