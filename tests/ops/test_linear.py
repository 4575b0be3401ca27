"""bf16 products through fp32, as on a processor that has none of its own."""

import sys

import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.numerics import assert_close_to_ref64
from tests.tiny import normal, scattered

module = sys.modules["mixlora.ops.linear"]  # the package's attribute is the function


@pytest.fixture(params=[1, 100, 1 << 24], ids=lambda n: f"{n} elements at once")
def emulated(monkeypatch, request) -> None:
    monkeypatch.setattr(module, "is_emulated", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(module, "WIDENED", request.param)


def with_gradients(op, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = op(*leaves)
    dy = normal(*y.shape, seed=9).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", [(2, 9), (3, 4, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_widened_product(emulated, shape: tuple[int, ...], bias: bool) -> None:
    inputs = [normal(*shape), normal(11, 9, seed=1), normal(11, seed=2) if bias else None]
    low = [None if t is None else t.bfloat16() for t in inputs]
    exact = [None if t is None else t.double() for t in low]
    found = with_gradients(ops.linear, *low)
    plain, exact = with_gradients(ops.linear_ref, *low), with_gradients(ops.linear_ref, *exact)
    for native, ref, ref64 in zip(found, plain, exact, strict=True):
        assert_close_to_ref64(native, ref, ref64)
    noncontiguous = [None if t is None else scattered(t) for t in low]
    for native, again in zip(found, with_gradients(ops.linear, *noncontiguous), strict=True):
        assert torch.equal(native, again)


def test_the_result_may_be_overwritten(emulated) -> None:
    """As adapters do, which add to it."""
    x, weight = normal(2, 3, 9).bfloat16().requires_grad_(), normal(11, 9).bfloat16()
    (dx,) = torch.autograd.grad(ops.linear(x, weight).add_(1).sum(), x)
    assert_close_to_ref64(
        dx, *(weight.to(t).sum(0).expand_as(dx) for t in (dx.dtype, torch.double))
    )


def test_only_where_bf16_is_emulated(emulated, monkeypatch) -> None:
    widened = []
    monkeypatch.setattr(module._WideLinear, "apply", lambda *args: widened.append(args[0].dtype))
    weight = normal(11, 9)
    for rows, dtype in [(40, torch.float32), (40, torch.bfloat16), (2, torch.bfloat16)]:
        with torch.no_grad():  # few rows, as in decoding, have a kernel of their own
            ops.linear(normal(rows, 9).to(dtype), weight.to(dtype))
    assert widened == [torch.bfloat16]
    ops.linear(normal(2, 9).bfloat16(), weight.bfloat16().requires_grad_())
    assert len(widened) == 2


def test_emulation_is_what_the_library_says() -> None:
    has_products = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert module.is_emulated(torch.ones(1, dtype=torch.bfloat16)) == (not has_products)
    assert not module.is_emulated(torch.ones(1))
