"""A product with few rows against the library's, and that a row's result is its own."""

import sys

import pytest
import torch

from mixlora import ops
from mixlora.ops import few_rows_linear
from tests.kernels import assert_any_number_of_threads, every_instruction_set, said_with
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import normal, scattered

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (T, I, O): rows of a tile, of several, of more than are read at once; short and long, with tails
SHAPES = [
    *((1, 1024, 70), (2, 520, 13), (3, 9, 11), (5, 1, 1), (7, 700, 29)),
    *((8, 16, 130), (16, 40, 19), (17, 64, 12), (31, 72, 7), (33, 513, 6), (70, 33, 25)),
    *((0, 8, 4), (4, 8, 0), (4, 0, 5)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, I, O", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_against_the_library(T: int, I: int, O: int, bias: bool, dtype: torch.dtype) -> None:
    inputs = [normal(T, I), normal(O, I, seed=1), normal(O, seed=2) if bias else None]
    low = [None if x is None else x.to(dtype) for x in inputs]
    exact = [None if x is None else x.double() for x in low]
    found = few_rows_linear(*low)
    if dtype == torch.float64:
        assert_close(found, ops.linear_ref(*exact))
    else:
        assert_close_to_ref64(found, ops.linear_ref(*low), ops.linear_ref(*exact))
    noncontiguous = [None if x is None else scattered(x) for x in low]
    assert torch.equal(few_rows_linear(*noncontiguous), found)
    more = few_rows_linear(low[0][None, :, None], *low[1:])
    assert torch.equal(more, found[None, :, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I", [16, 64, 700, 1024])
def test_a_row_is_computed_as_if_alone(I: int, dtype: torch.dtype) -> None:
    x_TI, w_OI = normal(40, I).to(dtype), normal(90, I, seed=1).to(dtype)
    alone = torch.cat([few_rows_linear(x_TI[t : t + 1], w_OI, None) for t in range(40)])
    for T in (2, 3, 8, 31, 40):
        assert torch.equal(few_rows_linear(x_TI[:T], w_OI, None), alone[:T])


def test_any_number_of_threads() -> None:
    x_TI, w_OI = normal(9, 640).float(), normal(3000, 640, seed=1).float()
    assert_any_number_of_threads(lambda: (few_rows_linear(x_TI, w_OI, None),))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; import mixlora; torch.manual_seed(0)\n"
        "for T, I, O in ((1, 1024, 70), (3, 9, 11), (33, 513, 6), (8, 16, 130), (5, 64, 40)):\n"
        "    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "        x, w = torch.randn(T, I).to(dtype), torch.randn(O, I).to(dtype)\n"
        "        y = torch.ops.mixlora.few_rows_linear(x, w, None)\n"
        "        exact = x.double() @ w.double().T\n"
        "        print((y - exact).abs().max() <= exact.abs().max() * 8 * torch.finfo(dtype).eps)\n"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 20


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, no gradients, a CPU."""
    calls = []
    monkeypatch.setattr(
        sys.modules["mixlora.ops.linear"],
        "few_rows_linear",
        lambda *x: calls.append(x[0].shape[:-1].numel()) or few_rows_linear(*x),
    )
    weight = normal(6, 8).float()
    with torch.no_grad():
        for shape in [(1, 8), (32, 8), (33, 8), (2, 16, 8), (2, 17, 8), (0, 8)]:
            x = normal(*shape).float()
            assert ops.linear(x, weight).shape == (*shape[:-1], 6)
        with ops.reference():
            ops.linear(normal(1, 8).float(), weight)
    ops.linear(normal(1, 8).float().requires_grad_(), weight)
    assert calls == [1, 32, 32, 0]


def test_opcheck() -> None:
    for bias in (None, normal(5).float()):
        torch.library.opcheck(
            torch.ops.mixlora.few_rows_linear, (normal(3, 8).float(), normal(5, 8).float(), bias)
        )


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((3, 8), (5, 9)), r"w_OI must be \[O, I\] = \[5, 8\], got \[5, 9\]"),
        (((), (5, 8)), r"x must be \[..., I\], got \[\]"),
        (((3, 8), (5, 8), (4,)), r"bias_O must be \[O\] = \[5\], got \[4\]"),
    ],
)
def test_bad_shapes(shapes, message: str) -> None:
    x_TI, w_OI, *bias_O = (normal(*shape).float() for shape in shapes)
    with pytest.raises(RuntimeError, match=message):
        few_rows_linear(x_TI, w_OI, *(bias_O or [None]))


def test_bad_dtypes() -> None:
    with pytest.raises(RuntimeError, match="w_OI must be float32, got float64"):
        few_rows_linear(normal(3, 8).float(), normal(5, 8), None)
