"""What the families share: norms."""

import pytest
import torch
from torch import Tensor

from models import gemma
from models.common import RMSNorm
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import normal

KINDS = {"llama": RMSNorm, "gemma": gemma.RMSNorm}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(kind: type[RMSNorm], dtype: torch.dtype, has_zero: bool) -> RMSNorm:
    norm = kind(12, 1e-6).to(dtype).requires_grad_()
    with torch.no_grad():
        norm.weight.add_(normal(12, seed=3).to(dtype))
        norm.weight[5] += (0.5 if not has_zero else 0) - norm.scale()[5]
    assert bool((norm.scale() == 0).any()) == has_zero
    return norm


def plain(norm: RMSNorm, x_BSD: Tensor) -> Tensor:
    wide = x_BSD if x_BSD.dtype == torch.float64 else x_BSD.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return (norm.scale() * wide.to(norm.scale().dtype)).to(x_BSD.dtype)


def with_gradients(function, norm: RMSNorm, x_BSD: Tensor) -> list[Tensor]:
    x_BSD = x_BSD.detach().requires_grad_()
    y_BSD = function(x_BSD)
    dy_BSD = normal(*x_BSD.shape, seed=7).to(x_BSD.dtype)
    return [y_BSD, *torch.autograd.grad(y_BSD, [x_BSD, norm.weight], dy_BSD)]


@kinds
@pytest.mark.parametrize("has_zero", [False, True], ids=["no zero", "a zero"])
def test_norm(kind: type[RMSNorm], has_zero: bool) -> None:
    x_BSD = 3 * normal(2, 9, 12)
    norm = make(kind, torch.float64, has_zero)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x_BSD.requires_grad_(), norm.weight))
    exact = with_gradients(lambda x: plain(norm, x), norm, x_BSD)
    for a, b in zip(with_gradients(norm, norm, x_BSD), exact, strict=True):
        assert_close(a, b)
    low = make(kind, torch.bfloat16, has_zero)
    wide = make(kind, torch.float64, has_zero)
    wide.load_state_dict(low.state_dict())
    x_BSD = x_BSD.bfloat16()
    found = with_gradients(low, low, x_BSD)
    same = with_gradients(lambda x: plain(low, x), low, x_BSD)
    exact = with_gradients(lambda x: plain(wide, x), wide, x_BSD.double())
    assert torch.equal(found[0], same[0])
    for a, b, c in zip(found, same, exact, strict=True):
        assert_close_to_ref64(a, b, c, factor=3)


def test_a_zero_that_comes_later_is_seen() -> None:
    norm = make(RMSNorm, torch.float64, has_zero=False)
    x_BSD = normal(1, 3, 12).requires_grad_()
    norm(x_BSD)
    with torch.no_grad():
        norm.weight[2] = 0
    assert torch.autograd.gradcheck(norm, x_BSD)


def test_the_output_is_what_is_kept() -> None:
    norm, kept = make(RMSNorm, torch.float64, has_zero=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y_BSD = norm(normal(1, 3, 12).requires_grad_())
    assert [x.data_ptr() for x in kept if x.shape == y_BSD.shape] == [y_BSD.data_ptr()]
