"""MixLoRA's feed-forward alone, forward and backward, against the published ways to compute it.

    python -m benchmarks.bench_ffn [--dtype float32] [--tokens 1024] [--seconds 20]

D 1024, F 2816, R 16, E 8, K 2. Bounds by FLOPs of the frozen products, 3 per token against 2 + K
and 3 K: 0.75 and 0.50 for K = 2.
"""

import sys

import torch
from torch import Tensor

from benchmarks.harness import compare, print_header
from benchmarks.modes import MODES
from mixlora.errors import ArgumentParser, command
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward, MixLora
from mixlora.layers.router import ROUTERS

D, F, R, E, K = 1024, 2816, 16, 8, 2


def make_ffn(
    kind: type[FeedForward] = FeedForward,
    dtype: torch.dtype = torch.float32,
    E: int = E,
    K: int = K,
    R: int = R,
) -> FeedForward:
    """With one mixture, "m", of filled experts."""
    torch.manual_seed(0)
    ffn = kind(D, F, "silu").requires_grad_(False)
    for name in PROJECTIONS:
        getattr(ffn, name).weight.data = torch.randn_like(getattr(ffn, name).weight).mul(0.03)
    ffn.to(dtype)
    router = ROUTERS["mixlora"](D, num_experts=E, top_k=K)
    ffn.mixtures["m"] = MixLora(ffn, router, projections=PROJECTIONS, r=R, lora_alpha=2 * R)
    for parameter in ffn.mixtures.parameters():
        parameter.data.normal_(std=0.02)
    return ffn


def step(ffn: FeedForward, x_BSD: Tensor, dy_BSD: Tensor) -> Tensor:
    y_BSD = ffn(x_BSD, ForwardContext((Span("m", 0, 1),)))
    trained = [p for p in ffn.parameters() if p.requires_grad]
    torch.autograd.grad(y_BSD, [x_BSD, *trained], dy_BSD)
    return y_BSD


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="The feed-forward of MixLoRA against published ways.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    print_header()
    x_BSD = torch.randn(1, options.tokens, D, dtype=dtype).requires_grad_()
    dy_BSD = torch.randn(1, options.tokens, D, dtype=dtype)
    ours = make_ffn(dtype=dtype)
    for name, kind in MODES.items():
        other = make_ffn(kind, dtype)
        error = (step(ours, x_BSD, dy_BSD) - step(other, x_BSD, dy_BSD)).abs().max().item()
        compare(
            f"FFN T={options.tokens} {options.dtype}",
            options.seconds,
            **{name: lambda: step(other, x_BSD, dy_BSD)},  # noqa: B023  called in this turn
            ours=lambda: step(ours, x_BSD, dy_BSD),
        )
        print(f"  largest difference of the outputs {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
