"""A of each token's experts, native against reference (a dense product over all experts, from which
the reference picks), forward alone and with backward; experts drawn uniformly, R = 16."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, x_TI, lora_a_ERI, plan, da_TKR) -> None:
    torch.autograd.grad(op(x_TI, lora_a_ERI, plan), (x_TI, lora_a_ERI), da_TKR)


if __name__ == "__main__":
    print_header()
    K, E, R = 2, 8, 16
    for dtype in (torch.float32, torch.bfloat16):
        for T, I in [(1, 1024), (1024, 1024), (1024, 2816)]:
            plan = ops.moe_sort(torch.rand(T, E).topk(K).indices.sort().values.int(), E)
            x_TI, lora_a_ERI = torch.randn(T, I).to(dtype), torch.randn(E, R, I).to(dtype)
            da_TKR = torch.randn(T, K, R).to(dtype)
            name = f"T={T} I={I} {str(dtype)[6:]}"
            compare(
                f"grouped_shrink {name}",
                reference=lambda: ops.grouped_shrink_ref(x_TI, lora_a_ERI, plan),  # noqa: B023
                native=lambda: ops.grouped_shrink(x_TI, lora_a_ERI, plan),  # noqa: B023
            )
            inputs = x_TI.requires_grad_(), lora_a_ERI.requires_grad_(), plan, da_TKR
            compare(
                f"with backward {name}",
                reference=lambda: step(ops.grouped_shrink_ref, *inputs),  # noqa: B023
                native=lambda: step(ops.grouped_shrink, *inputs),  # noqa: B023
            )
