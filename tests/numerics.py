"""The only tolerances of the tests."""

import torch
from torch import Tensor

# By dtype, the largest difference relative to the largest value; 0 for integers.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_close(a: Tensor, b: Tensor, rel: float | None = None) -> None:
    """max |a - b| <= rel * max |b|."""
    assert a.shape == b.shape, f"shapes {list(a.shape)} and {list(b.shape)}"
    if rel is None:
        rel = RELATIVE.get(a.dtype, 0)
    _assert_within(a, b, rel * _largest(b))


def assert_close_to_ref64(native: Tensor, ref: Tensor, ref64: Tensor, factor: float = 2) -> None:
    """max |native - ref64| <= factor * max |ref - ref64| + tiny: the kernel may err like the
    reference in the same dtype, whose error the float64 reference shows. tiny is one rounding of
    the largest value, for where the reference happens to be exact."""
    assert native.shape == ref64.shape, f"shapes {list(native.shape)} and {list(ref64.shape)}"
    assert native.dtype == ref.dtype, f"dtypes {native.dtype} and {ref.dtype}"
    tiny = torch.finfo(native.dtype).eps * _largest(ref64)
    _assert_within(native, ref64, factor * _largest(ref.double() - ref64) + tiny)


def _largest(x: Tensor) -> float:
    return x.detach().double().abs().max().item() if x.numel() else 0.0


def _assert_within(a: Tensor, b: Tensor, bound: float) -> None:
    difference = (a.detach().double() - b.detach().double()).abs().nan_to_num(nan=torch.inf)
    if _largest(difference) <= bound:
        return
    index = torch.unravel_index(difference.argmax(), difference.shape)
    where = [int(i) for i in index]
    raise AssertionError(
        f"at {where}: {a[index].item():.9g} and {b[index].item():.9g} differ by "
        f"{difference[index].item():.3g}, allowed are {bound:.3g} "
        f"({int((difference > bound).sum())} of {difference.numel()} elements are further apart)"
    )
