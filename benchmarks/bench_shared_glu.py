"""The fused mixture, native against reference, forward and backward; experts drawn uniformly.

GFLOP/s counts the rank-R products alone: 6 T K F R forward, 18 T K F R backward.
"""

import time

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def make(T: int, F: int, R: int, E: int, K: int, dtype: torch.dtype):
    torch.manual_seed(0)
    plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
    gate, up = (torch.randn(T, F, dtype=dtype).requires_grad_() for _ in range(2))
    a_gate, a_up = (torch.randn(T, K, R, dtype=dtype).requires_grad_() for _ in range(2))
    b_gate, b_up = (torch.randn(E, F, R).mul(0.1).requires_grad_() for _ in range(2))
    a_down = torch.randn(E, R, F).mul(0.1).requires_grad_()
    weight = torch.rand(T, K).requires_grad_()
    return (gate, up, a_gate, a_up, b_gate, b_up, a_down), plan, weight


def gemm_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a library product, for the scale."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 2816, dtype=dtype)
    rates = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 1024 * 1024 * 2816 / (time.perf_counter() - start) / 1e9)
    return sorted(rates)[10]


def best_rate(function, flops: float) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return flops / sorted(times)[5] / 1e9


if __name__ == "__main__":
    print_header()
    for dtype in (torch.float32, torch.bfloat16):
        for T, F, R, E, K in [(1024, 2816, 16, 8, 2), (1024, 2816, 8, 8, 2), (64, 2816, 16, 8, 2)]:
            tensors, plan, weight = make(T, F, R, E, K, dtype)
            inputs = [*tensors, weight]

            def forward(op):
                return op(*tensors, plan, weight, 1.0)  # noqa: B023  called in this turn

            def both(op):
                outputs = forward(op)
                dys = [torch.ones_like(x) for x in outputs]
                torch.autograd.grad(outputs, inputs, dys)  # noqa: B023

            shape = f"T={T} F={F} R={R} E={E} K={K} {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                compare(
                    f"shared_glu {shape} forward",
                    reference=lambda: forward(ops.shared_glu_ref),
                    native=lambda: forward(ops.shared_glu),
                )
                rate = best_rate(lambda: forward(ops.shared_glu), 6 * T * K * F * R)
            compare(
                f"shared_glu {shape} forward and backward",
                reference=lambda: both(ops.shared_glu_ref),
                native=lambda: both(ops.shared_glu),
            )
            rate_both = best_rate(lambda: both(ops.shared_glu), 24 * T * K * F * R)
            library = gemm_rate(dtype)
            print(
                f"  GFLOP/s: forward {rate:.0f}, both {rate_both:.0f}, library GEMM {library:.0f}"
            )
