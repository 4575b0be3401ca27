"""LoRA of rows sorted by group, native against reference (two products per group), forward alone
and with backward; groups of equal size, R = 16. One row per group is decoding of many adapters."""

import torch

from benchmarks.harness import compare, print_header
from mixlora import ops


def step(op, tensors, start_G1, dy_NO) -> None:
    torch.autograd.grad(op(*tensors, start_G1, 2.0), tensors, dy_NO)


if __name__ == "__main__":
    print_header()
    R, I, O = 16, 1024, 2816
    for dtype in (torch.float32, torch.bfloat16):
        for N, G in [(8, 8), (64, 64), (2048, 8)]:
            start_G1 = torch.arange(0, N + 1, N // G, dtype=torch.int32)
            shapes = (N, I), (G, R, I), (G, O, R)
            tensors = [torch.randn(shape).to(dtype) for shape in shapes]
            dy_NO = torch.randn(N, O).to(dtype)
            name = f"N={N} G={G} {str(dtype)[6:]}"
            compare(
                f"grouped_lora {name}",
                reference=lambda: ops.grouped_lora_ref(*tensors, start_G1, 2.0),  # noqa: B023
                native=lambda: ops.grouped_lora(*tensors, start_G1, 2.0),  # noqa: B023
            )
            for tensor in tensors:
                tensor.requires_grad_()
            compare(
                f"with backward {name}",
                reference=lambda: step(ops.grouped_lora_ref, tensors, start_G1, dy_NO),  # noqa: B023
                native=lambda: step(ops.grouped_lora, tensors, start_G1, dy_NO),  # noqa: B023
            )
