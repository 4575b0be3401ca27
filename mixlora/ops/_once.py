"""Backward ops are not differentiated: asked to, torch would warn and go on with zeros."""

import torch


def no_second_derivative(op: str) -> None:
    def backward(ctx, *_) -> None:
        raise RuntimeError(f"{op} has no derivative of its own, only under ops.reference()")

    torch.library.register_autograd(f"mixlora::{op}", backward)
