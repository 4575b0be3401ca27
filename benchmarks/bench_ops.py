"""Every operator, forward and backward: what it moves and computes, and its share of what the
machine can.

    python -m benchmarks.bench_ops [--device cuda] [--dtypes bfloat16 float32] [--tiny]

R 16, E 8, K 2; on a GPU T 4096 and LLaMA-2-7B's D 4096, F 11008, else T 1024, D 1024, F 2816. Bytes
are the least that can be: every tensor read or written once. The shares are of a copy, read and
written, and of a library product of square matrices, both measured here. "reference" is the PyTorch
reference on the same device.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Rows, alone, print_header, table
from mixlora import ops
from mixlora.errors import ArgumentParser, command


class Sizes(NamedTuple):
    T: int
    D: int
    F: int
    R: int
    E: int
    K: int


class Shapes(NamedTuple):
    of_ops: Sizes
    copied: int  # bytes
    side: int  # of the matrices
    seconds: float  # for each time


SHAPES = {
    "cuda": Shapes(Sizes(T=4096, D=4096, F=11008, R=16, E=8, K=2), 1 << 29, 8192, 0.2),
    "cpu": Shapes(Sizes(T=1024, D=1024, F=2816, R=16, E=8, K=2), 1 << 27, 1024, 0.2),
    "tiny": Shapes(Sizes(T=24, D=32, F=48, R=4, E=8, K=2), 1 << 20, 128, 0.0),
}


class Op(NamedTuple):
    run: Callable[..., tuple[Tensor, ...]]  # (plan, *tensors); of its outputs the floats count
    shapes: Callable[..., list[tuple[int, ...]]] = lambda T, D, F, R, E, K: []
    num_rows: int = 8  # so many of the tensors are of the rows' dtype, the others fp32
    reads_again: bool = True  # in backward, its inputs
    flops: Callable[..., tuple[int, int]] = lambda T, D, F, R, E, K: (0, 0)  # forward, backward


@cache
def seed(device: torch.device) -> Tensor:
    return torch.tensor(5, device=device)


def moe_sort(plan: ops.Plan) -> tuple[Tensor, ...]:
    return ops.moe_sort(plan.expert_TK, len(plan.expert_start_E1) - 1)[1:]


def topk_router(plan: ops.Plan, logits_TE: Tensor) -> tuple[Tensor, ...]:
    routing = ops.topk_router(logits_TE, plan.expert_TK.shape[1])
    return routing.weight_TK, routing.prob_E, routing.z


def grouped_mm(plan: ops.Plan, x_NI: Tensor, a_GRI: Tensor, b_GOR: Tensor) -> tuple[Tensor, ...]:
    """grouped_lora by torch's own products."""
    ends = plan.expert_start_E1[1:]
    return (F.grouped_mm(F.grouped_mm(x_NI, a_GRI.mT, offs=ends), b_GOR.mT, offs=ends),)


OPS = {
    "moe_sort": Op(moe_sort),
    "topk_router": Op(topk_router, lambda T, D, F, R, E, K: [(T, E)]),
    "moe_gather": Op(
        lambda plan, x: (ops.moe_gather(x, plan),),
        lambda T, D, F, R, E, K: [(T, D)],
        reads_again=False,
    ),
    "moe_scatter": Op(
        lambda plan, y, weight: (ops.moe_scatter(y, plan, weight),),
        lambda T, D, F, R, E, K: [(T * K, D), (T, K)],
        num_rows=1,
    ),
    "dropout": Op(
        lambda plan, x: (ops.dropout(x, 0.05, seed(x.device)),),
        lambda T, D, F, R, E, K: [(T, D)],
        reads_again=False,
    ),
    "grouped_shrink": Op(
        lambda plan, x, a: (ops.grouped_shrink(x, a, plan),),
        lambda T, D, F, R, E, K: [(T, D), (E, R, D)],
        flops=lambda T, D, F, R, E, K: (2 * T * K * R * D, 4 * T * K * R * D),
    ),
    "grouped_expand": Op(
        lambda plan, z, b: (ops.grouped_expand(z, b, plan),),
        lambda T, D, F, R, E, K: [(T, K, R), (E, D, R)],
        flops=lambda T, D, F, R, E, K: (2 * T * K * R * D, 4 * T * K * R * D),
    ),
    "grouped_lora": Op(
        lambda plan, x, a, b: (ops.grouped_lora(x, a, b, plan.expert_start_E1, 1.0),),
        lambda T, D, F, R, E, K: [(T * K, D), (E, R, D), (E, F, R)],
        flops=lambda T, D, F, R, E, K: (2 * T * K * R * (D + F), 2 * T * K * R * (3 * D + 2 * F)),
    ),
    "shared_glu": Op(
        lambda plan, *tensors: ops.shared_glu(*tensors[:-1], plan, tensors[-1], 1.0),
        lambda T, D, F, R, E, K: [
            *((T, F), (T, F), (T, K, R), (T, K, R)),
            *((E, F, R), (E, F, R), (E, R, F), (T, K)),
        ],
        num_rows=4,
        flops=lambda T, D, F, R, E, K: (T * K * F * (6 * R + 20), T * K * F * (16 * R + 45)),
    ),
}
PEERS = {"grouped_lora": {"torch's grouped_mm": grouped_mm}}


def dtypes_of(op: Op, sizes: Sizes, dtype: torch.dtype) -> list[torch.dtype]:
    wide, count = torch.promote_types(dtype, torch.float32), len(op.shapes(*sizes))
    return [dtype if i < op.num_rows else wide for i in range(count)]


def floats(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in outputs if x.is_floating_point()]


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def ceilings(dtype: torch.dtype, device: str, shapes: Shapes) -> tuple[float, float]:
    """Bytes and operations per second."""
    source, target = torch.ones(2, shapes.copied // 4, device=device)
    a, b = torch.randn(2, shapes.side, shapes.side, device=device).to(dtype)
    copy_time = alone(lambda: target.copy_(source), device, shapes.seconds)
    product_time = alone(lambda: a @ b, device, shapes.seconds)
    return 2 * shapes.copied / copy_time, 2 * shapes.side**3 / product_time


def measure(name: str, sizes: Sizes, dtype: torch.dtype, device: str, best, seconds: float) -> Rows:
    op = OPS[name]
    with torch.device(device):
        torch.manual_seed(0)
        chosen_TK = torch.rand(sizes.T, sizes.E).topk(sizes.K).indices
        plan = ops.moe_sort(chosen_TK.sort().values.int(), sizes.E)
        tensors = [torch.randn(shape).mul_(0.1) for shape in op.shapes(*sizes)]
    dtypes = dtypes_of(op, sizes, dtype)
    leaves = [x.to(to).requires_grad_() for x, to in zip(tensors, dtypes, strict=True)]
    del tensors
    index_bytes = num_bytes([plan.expert_TK])

    def row(run, what: str, function, bytes_: int, flops: int) -> dict[str, Any]:
        time = alone(function, device, seconds)
        return {
            "operator": run,
            "": what,
            "dtype": str(dtype).removeprefix("torch."),
            "us": 1e6 * time,
            "GB/s": bytes_ / time / 1e9,
            "of a copy": bytes_ / time / best[0],
            "TFLOP/s": flops / time / 1e12 if flops else None,
            "of a product": flops / time / best[1] if flops else None,
        }

    def passes(label: str, run: Callable[..., Any]) -> Rows:
        def forward() -> None:
            with torch.no_grad():
                run(plan, *leaves)

        outputs = run(plan, *leaves)
        flops = op.flops(*sizes)
        moved = index_bytes + num_bytes([*leaves, *outputs])
        found = [row(label, "forward", forward, moved, flops[0])]
        if leaves:
            outputs = floats(outputs)
            dys = [torch.ones_like(x) for x in outputs]
            again = leaves if op.reads_again else []
            moved = index_bytes + num_bytes([*dys, *again, *leaves])  # a gradient is as its tensor

            def backward() -> None:
                torch.autograd.grad(outputs, leaves, dys, retain_graph=True)

            found.append(row(label, "backward", backward, moved, flops[1]))
        return found

    rows = passes(name, op.run)
    with ops.reference():
        for row_, ref in zip(rows, passes(name, op.run), strict=True):
            row_["reference, us"] = ref["us"]
    for peer, run in PEERS.get(name, {}).items():
        try:
            rows += passes(f"{peer} for {name}", run)
        except (AttributeError, RuntimeError) as error:
            print(f"{peer} in {dtype}: left out ({str(error).splitlines()[0]})")
    return rows


def run(device: str, dtypes: list[torch.dtype], is_tiny: bool) -> Rows:
    rows, shapes = [], SHAPES["tiny" if is_tiny else device]
    for dtype in dtypes:
        best = ceilings(dtype, device, shapes)
        print(f"{dtype}: copy {best[0] / 1e9:.0f} GB/s, product {best[1] / 1e12:.2f} TFLOP/s")
        for name in OPS:
            rows += measure(name, shapes.of_ops, dtype, device, best, shapes.seconds)
    return rows


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Every operator against what the machine can.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tiny", action="store_true", help="sizes that prove nothing")
    options = parser.parse_args(argv)
    print_header()
    dtypes = [getattr(torch, dtype) for dtype in options.dtypes]
    print(table(run(options.device, dtypes, options.tiny)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
