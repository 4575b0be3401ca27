"""Products with few rows, native against the library's, W from memory."""

import itertools

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops

MATRICES = 8  # in turn: together more than a cache holds

if __name__ == "__main__":
    print_header()
    for O, I in [(1024, 1024), (2816, 1024), (1024, 2816)]:
        for dtype in (torch.float32, torch.bfloat16):
            w = itertools.cycle([torch.randn(O, I, dtype=dtype) for _ in range(MATRICES)])
            for T in (1, 2, 4, 8, 16, 32, 64):
                x_TI = torch.randn(T, I, dtype=dtype)
                compare(
                    f"few_rows_linear T={T} I={I} O={O} {str(dtype).removeprefix('torch.')}",
                    library=lambda: ops.few_rows_linear_ref(x_TI, next(w)),  # noqa: B023
                    native=lambda: ops.few_rows_linear(x_TI, next(w)),  # noqa: B023
                )
