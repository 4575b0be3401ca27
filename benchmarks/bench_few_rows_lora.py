"""A LoRA's update of few rows, native against the library's products, A and B from memory."""

import itertools

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops

PAIRS = 256  # in turn: together more than a cache holds

if __name__ == "__main__":
    print_header()
    for O, I in [(1024, 1024), (2816, 1024), (1024, 2816)]:
        for dtype in (torch.float32, torch.bfloat16):
            pairs = itertools.cycle(
                [
                    (torch.randn(16, I, dtype=dtype), torch.randn(O, 16, dtype=dtype))
                    for _ in range(PAIRS)
                ]
            )
            for T in (1, 2, 4, 8, 16, 32):
                y_TO, x_TI = torch.randn(T, O, dtype=dtype), torch.randn(T, I, dtype=dtype)
                compare(
                    f"few_rows_lora T={T} I={I} O={O} R=16 {str(dtype).removeprefix('torch.')}",
                    library=lambda: ops.few_rows_lora_ref(y_TO, x_TI, *next(pairs), 2.0),  # noqa: B023
                    native=lambda: ops.few_rows_lora(y_TO, x_TI, *next(pairs), 2.0),  # noqa: B023
                )
