"""Copying tokens to their experts' rows, native against reference, forward and with backward."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, x_TD: torch.Tensor, plan: ops.Plan, dx_ND: torch.Tensor) -> None:
    torch.autograd.grad(op(x_TD, plan), x_TD, dx_ND)


if __name__ == "__main__":
    print_header()
    for T, K, E, D in [(1, 2, 8, 4096), (1024, 2, 8, 1024), (4096, 2, 8, 4096)]:
        plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
        for dtype in (torch.float32, torch.bfloat16):
            x_TD, dx_ND = torch.randn(T, D, dtype=dtype), torch.randn(T * K, D, dtype=dtype)
            shape = f"T={T} K={K} D={D} {str(dtype).removeprefix('torch.')}"
            compare(
                f"moe_gather {shape}",
                reference=lambda: ops.moe_gather_ref(x_TD, plan),  # noqa: B023  called in this turn
                native=lambda: ops.moe_gather(x_TD, plan),  # noqa: B023
            )
            x_TD.requires_grad_()
            compare(
                f"  with backward {shape}",
                reference=lambda: step(ops.moe_gather_ref, x_TD, plan, dx_ND),  # noqa: B023
                native=lambda: step(ops.moe_gather, x_TD, plan, dx_ND),  # noqa: B023
            )
