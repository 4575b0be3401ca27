"""Softmax, top-K and the sums of the losses, native against reference, forward and with
backward."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, logits_TE: torch.Tensor, K: int, dweight_TK: torch.Tensor) -> None:
    routing = op(logits_TE, K)
    loss = (routing.weight_TK * dweight_TK).sum() + (routing.prob_E * routing.count_E).sum()
    torch.autograd.grad(loss + routing.z, logits_TE)


if __name__ == "__main__":
    print_header()
    for T, K, E in [(1, 2, 8), (1024, 2, 8), (16384, 2, 8), (16384, 6, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            logits_TE, dweight_TK = torch.randn(T, E).to(dtype), torch.randn(T, K)
            shape = f"T={T} K={K} E={E} {str(dtype).removeprefix('torch.')}"
            compare(
                f"topk_router {shape}",
                reference=lambda: ops.topk_router_ref(logits_TE, K),  # noqa: B023  in this turn
                native=lambda: ops.topk_router(logits_TE, K),  # noqa: B023
            )
            logits_TE.requires_grad_()
            compare(
                f"  with backward {shape}",
                reference=lambda: step(ops.topk_router_ref, logits_TE, K, dweight_TK),  # noqa: B023
                native=lambda: step(ops.topk_router, logits_TE, K, dweight_TK),  # noqa: B023
            )
