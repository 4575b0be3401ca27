"""The weighted sum of experts' rows, native against reference, forward and with backward."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, y_ND: torch.Tensor, plan: ops.Plan, weight_TK: torch.Tensor, dy_TD) -> None:
    torch.autograd.grad(op(y_ND, plan, weight_TK), (y_ND, weight_TK), dy_TD)


if __name__ == "__main__":
    print_header()
    for T, K, E, D in [(1, 2, 8, 4096), (1024, 2, 8, 1024), (4096, 2, 8, 4096)]:
        plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
        for dtype in (torch.float32, torch.bfloat16):
            y_ND, dy_TD = torch.randn(T * K, D, dtype=dtype), torch.randn(T, D, dtype=dtype)
            weight_TK = torch.rand(T, K)
            shape = f"T={T} K={K} D={D} {str(dtype).removeprefix('torch.')}"
            arguments = y_ND, plan, weight_TK
            compare(
                f"moe_scatter {shape}",
                reference=lambda: ops.moe_scatter_ref(*arguments),  # noqa: B023  called in this turn
                native=lambda: ops.moe_scatter(*arguments),  # noqa: B023
            )
            y_ND.requires_grad_(), weight_TK.requires_grad_()
            compare(
                f"  with backward {shape}",
                reference=lambda: step(ops.moe_scatter_ref, *arguments, dy_TD),  # noqa: B023
                native=lambda: step(ops.moe_scatter, *arguments, dy_TD),  # noqa: B023
            )
