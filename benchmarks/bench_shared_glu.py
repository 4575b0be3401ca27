"""The fused mixture, native against reference, forward and backward; experts drawn uniformly.

GFLOP/s counts the rank-R products and what is between them, T K F (6 R + 20) operations forward and
T K F (16 R + 45) backward, as a share of a library product's in the same dtype, which takes turns
with them.
"""

import argparse
import time

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops

SHAPES = [(1024, 2816, 16, 8, 2), (1024, 2816, 8, 8, 2), (64, 2816, 16, 8, 2)]
ROUNDS = 20


def make(T: int, F: int, R: int, E: int, K: int, dtype: torch.dtype):
    torch.manual_seed(0)
    plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
    gate, up = (torch.randn(T, F, dtype=dtype).requires_grad_() for _ in range(2))
    a_gate, a_up = (torch.randn(T, K, R, dtype=dtype).requires_grad_() for _ in range(2))
    b_gate, b_up = (torch.randn(E, F, R).mul(0.1).requires_grad_() for _ in range(2))
    a_down = torch.randn(E, R, F).mul(0.1).requires_grad_()
    weight = torch.rand(T, K).requires_grad_()
    return (gate, up, a_gate, a_up, b_gate, b_up, a_down), plan, weight


def rates(*sides) -> list[float]:
    """GFLOP/s of every (function, FLOPs); the functions take turns, and the best of each counts:
    what else runs on a machine only ever slows one down."""
    seconds = [[] for _ in sides]
    for _ in range(ROUNDS):
        for (function, _), times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [flops / min(times) / 1e9 for (_, flops), times in zip(sides, seconds, strict=True)]


def print_rates(tensors, plan: ops.Plan, weight, T: int, F: int, R: int, K: int) -> None:
    inputs = [*tensors, weight]
    outputs = ops.shared_glu(*tensors, plan, weight, 1.0)
    dys = [torch.randn_like(x) for x in outputs]
    a_TD, b_DF = (torch.randn(shape).to(tensors[0].dtype) for shape in ((1024, 1024), (1024, 2816)))

    def forward() -> None:
        with torch.no_grad():
            ops.shared_glu(*tensors, plan, weight, 1.0)

    library, forward_rate, backward_rate = rates(
        (lambda: a_TD @ b_DF, 2 * a_TD.shape[0] * b_DF.numel()),
        (forward, T * K * F * (6 * R + 20)),
        (
            lambda: torch.autograd.grad(outputs, inputs, dys, retain_graph=True),
            T * K * F * (16 * R + 45),
        ),
    )
    print(
        f"  GFLOP/s: library product {library:.1f}, "
        f"forward {forward_rate:.1f} ({forward_rate / library:.2f}), "
        f"backward {backward_rate:.1f} ({backward_rate / library:.2f})"
    )


def bench(T: int, F: int, R: int, E: int, K: int, dtype: torch.dtype) -> None:
    tensors, plan, weight = make(T, F, R, E, K, dtype)

    def forward(op):
        return op(*tensors, plan, weight, 1.0)

    def both(op) -> None:
        outputs = forward(op)
        torch.autograd.grad(outputs, [*tensors, weight], [torch.ones_like(x) for x in outputs])

    shape = f"T={T} F={F} R={R} E={E} K={K} {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        compare(
            f"shared_glu {shape} forward",
            reference=lambda: forward(ops.shared_glu_ref),
            native=lambda: forward(ops.shared_glu),
        )
    compare(
        f"shared_glu {shape} forward and backward",
        reference=lambda: both(ops.shared_glu_ref),
        native=lambda: both(ops.shared_glu),
    )
    print_rates(tensors, plan, weight, T, F, R, K)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print_header()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            bench(*shape, dtype)
