"""How the cost of a mixture grows: with E, K, R and T, each alone, from E 8, K 2, R 16, T 1024.

    python -m benchmarks.bench_growth [--dtype float32] [--seconds 3] [--output FILE.json]

D 1024, F 2816. The cost is what a forward and backward of the feed-forward takes beyond those of
the frozen feed-forward, of which it is given as a share.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.bench_ffn import D, F, make_ffn
from benchmarks.harness import machine, print_header
from mixlora.errors import ArgumentParser, command
from mixlora.layers.context import ForwardContext, Span

START = {"E": 8, "K": 2, "R": 16, "T": 1024}
VALUES = {
    "E": [2, 4, 8, 16, 32, 64],
    "K": [1, 2, 4, 8],
    "R": [4, 8, 16, 32, 64, 128],
    "T": [1, 16, 128, 1024, 4096, 16384],
}


def times(sizes: dict[str, int], dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """Seconds of a step: frozen, with the mixture. Medians of steps in turns."""
    ffn = make_ffn(dtype=dtype, **{key: sizes[key] for key in "EKR"})
    x_BSD = torch.randn(1, sizes["T"], D, dtype=dtype).requires_grad_()
    trained = [x_BSD, *(p for p in ffn.parameters() if p.requires_grad)]

    def step(name: str | None, leaves: list[torch.Tensor]) -> float:
        start = time.perf_counter()
        y_BSD = ffn(x_BSD, ForwardContext((Span(name, 0, 1),)))
        torch.autograd.grad(y_BSD, leaves, torch.ones_like(y_BSD))
        return time.perf_counter() - start

    pairs = []
    end = time.perf_counter() + seconds
    step("m", trained)
    while len(pairs) < 3 or time.perf_counter() < end:
        pairs.append((step(None, [x_BSD]), step("m", trained)))
    frozen = median(pair[0] for pair in pairs)
    return frozen, frozen * median(b / a for a, b in pairs)


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="The cost of a mixture by E, K, R and T.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--output", help="write the table here, as JSON")
    options = parser.parse_args(argv)
    print_header()
    print(f"{options.dtype}, D {D}, F {F}; where nothing else is said {START}")
    rows = []
    for letter, values in VALUES.items():
        for value in values:
            sizes = {**START, letter: value}
            frozen, mixed = times(sizes, getattr(torch, options.dtype), options.seconds)
            row = {"varied": letter, "value": value, "frozen_ms": 1e3 * frozen}
            row |= {"mixture_ms": 1e3 * mixed, "share": mixed / frozen - 1}
            rows.append(row)
            print(
                f"{letter} {value:6}   frozen {1e3 * frozen:9.2f} ms   "
                f"with mixture {1e3 * mixed:9.2f} ms   beyond {row['share']:6.1%}",
                flush=True,
            )
    if options.output:
        settings = {**vars(options), "machine": machine()}
        Path(options.output).write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
