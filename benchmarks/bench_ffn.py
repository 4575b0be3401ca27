"""MixLoRA's feed-forward alone, forward and backward, against the published ways to compute it,
this code's LoRA of rank 80, and the frozen feed-forward.

    python -m benchmarks.bench_ffn [--dtype float32] [--tokens 1024] [--seconds 20]
    python -m benchmarks.bench_ffn --device cuda --dtype bfloat16 --tokens 4096 --sizes 4096 11008

D 1024, F 2816, R 16, E 8, K 2. Bounds by FLOPs of the frozen products, 3 per token against 2 + K
and 3 K: 0.75 and 0.50 for K = 2.
"""

import sys

import torch
from torch import Tensor

from benchmarks.harness import Rows, compared, print_header, table
from benchmarks.modes import MODES
from mixlora.errors import ArgumentParser, command
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Lora
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward, MixLora
from mixlora.layers.router import ROUTERS

D, F, R, E, K = 1024, 2816, 16, 8, 2
LORA_RANK = 80  # benchmarks/bench_train_step.py: as many parameters, over a whole model


def make_frozen(kind: type[FeedForward], dtype: torch.dtype, D: int, F: int) -> FeedForward:
    torch.manual_seed(0)
    ffn = kind(D, F, "silu").requires_grad_(False)
    for name in PROJECTIONS:
        getattr(ffn, name).weight.data = torch.randn_like(getattr(ffn, name).weight).mul(0.03)
    return ffn.to(dtype)


def make_ffn(
    kind: type[FeedForward] = FeedForward,
    dtype: torch.dtype = torch.float32,
    E: int = E,
    K: int = K,
    R: int = R,
    D: int = D,
    F: int = F,
) -> FeedForward:
    """With one mixture, "m", of filled experts."""
    ffn = make_frozen(kind, dtype, D, F)
    router = ROUTERS["mixlora"](D, num_experts=E, top_k=K)
    ffn.mixtures["m"] = MixLora(ffn, router, projections=PROJECTIONS, r=R, lora_alpha=2 * R)
    for parameter in ffn.mixtures.parameters():
        parameter.data.normal_(std=0.02)
    return ffn


def make_lora(dtype: torch.dtype, R: int, D: int, F: int) -> FeedForward:
    ffn = make_frozen(FeedForward, dtype, D, F)
    for name in PROJECTIONS:
        base = getattr(ffn, name)
        base.adapters["m"] = Lora(base, r=R, lora_alpha=2 * R)
        base.adapters["m"].lora_B.data.normal_(std=0.02)
    return ffn


def step(ffn: FeedForward, x_BSD: Tensor, dy_BSD: Tensor) -> Tensor:
    y_BSD = ffn(x_BSD, ForwardContext((Span("m", 0, 1),)))
    trained = [p for p in ffn.parameters() if p.requires_grad]
    torch.autograd.grad(y_BSD, [x_BSD, *trained], dy_BSD)
    return y_BSD


def run(device: str, dtype: torch.dtype, T: int, D: int, F: int, seconds: float) -> Rows:
    with torch.device(device):
        x_BSD = torch.randn(1, T, D, dtype=dtype).requires_grad_()
        dy_BSD = torch.randn(1, T, D, dtype=dtype)
        sizes = {"D": D, "F": F}
        ours = make_ffn(dtype=dtype, **sizes)
        others = {name: make_ffn(kind, dtype, **sizes) for name, kind in MODES.items()}
        others["LoRA"] = make_lora(dtype, LORA_RANK, **sizes)
        others["frozen"] = make_frozen(FeedForward, dtype, **sizes)
    rows = []
    for name, other in others.items():
        error = None
        if name in MODES:
            error = (step(ours, x_BSD, dy_BSD) - step(other, x_BSD, dy_BSD)).abs().max().item()
        other_us, ours_us, ratio, num_pairs = compared(
            lambda: step(other, x_BSD, dy_BSD),  # noqa: B023  called in this turn
            lambda: step(ours, x_BSD, dy_BSD),
            seconds,
            device,
        )
        rows.append(
            {
                "feed-forward": name,
                "its ms": other_us / 1e3,
                "MixLoRA's ms": ours_us / 1e3,
                "MixLoRA / it": ratio,
                "pairs": num_pairs,
                "largest difference": None if error is None else f"{error:.1e}",
            }
        )
    return rows


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="The feed-forward of MixLoRA against published ways.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs=2, default=[D, F], metavar=("D", "F"))
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    print_header()
    print(f"T {options.tokens}, {options.dtype}")
    print(table(run(options.device, dtype, options.tokens, *options.sizes, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
