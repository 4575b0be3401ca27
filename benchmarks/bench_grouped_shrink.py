"""A, and B, of each token's experts: the kernels against the library's product with all experts,
forward alone and with backward, and what the choice between them (`is_dense`) loses.

    python -m benchmarks.bench_grouped_shrink [--tokens 1 64 1024] [--ranks 16] [--features 1024]
        [--dtypes float32 bfloat16] [--seconds 0.3]

Experts are drawn uniformly. Below 1, kernel / library is for the kernel.
"""

import sys

import torch
from torch import Tensor

from benchmarks.harness import compare, print_header
from mixlora import ops
from mixlora.errors import ArgumentParser, command
from mixlora.ops.grouped_shrink import DENSE_BELOW, is_dense

SIZES = [(2, 2), (8, 8), (4, 2), (8, 4), (8, 2), (16, 2), (8, 1), (64, 8), (64, 2)]  # E, K


def kernel(op: str, first: Tensor, w: Tensor, plan: ops.Plan) -> Tensor:
    rows = plan.expert_TK, plan.expert_start_E1, plan.row_slot_N
    return getattr(torch.ops.mixlora, op)(first, w, op == "grouped_expand", *rows)


def library(op: str, first: Tensor, w: Tensor, plan: ops.Plan) -> Tensor:
    return getattr(ops, f"{op}_ref")(first, w, plan)


def ratios(op: str, E: int, K: int, T: int, R: int, I: int, dtype: torch.dtype, seconds: float):
    """kernel / library: forward, with backward."""
    plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
    shapes = (T, I), (E, R, I), (T, K, R)
    if op == "grouped_expand":
        shapes = (T, K, R), (E, I, R), (T, I)
    first, w, gradient = (torch.randn(shape).to(dtype) for shape in shapes)
    leaves = first.requires_grad_(), w.requires_grad_()

    def forward(run) -> None:
        with torch.no_grad():
            run(op, first, w, plan)

    def step(run) -> None:
        torch.autograd.grad(run(op, first, w, plan), leaves, gradient)

    for what in (forward, step):
        yield compare(
            f"{op[8:]} {what.__name__} E={E} K={K} T={T} R={R} I={I} {str(dtype)[6:]}",
            seconds,
            library=lambda: what(library),  # noqa: B023  called in this turn
            kernel=lambda: what(kernel),  # noqa: B023
        )


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="The crossover of grouped and dense rank products.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--features", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args(argv)
    print_header()
    lost = {True: [], False: []}  # by is_dense: what was chosen / the other
    for dtype in options.dtypes:
        for E, K in SIZES:
            dense = is_dense(E, K)
            for sizes in [
                (T, R, I) for T in options.tokens for R in options.ranks for I in options.features
            ]:
                for op in ("grouped_shrink", "grouped_expand"):
                    found = ratios(op, E, K, *sizes, getattr(torch, dtype), options.seconds)
                    lost[dense] += [1 / ratio if dense else ratio for ratio in found]
    for dense, name in ((True, "the library"), (False, "the kernel")):
        worse = sum(ratio > 1 for ratio in lost[dense])
        print(
            f"{name} where E {'<' if dense else '>='} {DENSE_BELOW} K: slower than the other in "
            f"{worse} of {len(lost[dense])}, at worst {max(lost[dense]):.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
