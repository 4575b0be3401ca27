"""Sorting by expert, native against reference; experts drawn uniformly."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops

if __name__ == "__main__":
    print_header()
    for T, K, E in [(1, 2, 8), (512, 2, 8), (4096, 2, 8), (16384, 2, 8), (16384, 8, 64)]:
        expert_TK = torch.rand(T, E).topk(K).indices.sort().values.int()
        compare(
            f"moe_sort T={T} K={K} E={E} int32",
            reference=lambda: ops.moe_sort_ref(expert_TK, E),  # noqa: B023  called in this turn
            native=lambda: ops.moe_sort(expert_TK, E),  # noqa: B023
        )
