"""A LoRA's update of few rows against the library's products, and where it is used."""

import sys

import pytest
import torch

from mixlora import ops
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Linear, Lora
from mixlora.ops import few_rows_lora
from tests.kernels import assert_any_number_of_threads, every_instruction_set, said_with
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import normal, scattered

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (T, I, O, R): ranks of whole vectors and not, one and several chunks of outputs and of ranks
SHAPES = [
    *((1, 1024, 70, 16), (2, 520, 3000, 64), (3, 9, 11, 1), (5, 1, 1, 4), (7, 700, 29, 80)),
    *((8, 1024, 40, 70), (33, 130, 17, 8), (70, 33, 25, 9)),
    *((0, 8, 4, 2), (4, 8, 0, 2), (4, 0, 5, 2), (4, 8, 5, 0)),
]


def inputs_of(T: int, I: int, O: int, R: int) -> list[torch.Tensor]:
    return [
        normal(*shape, seed=n) * 0.3 for n, shape in enumerate([(T, O), (T, I), (R, I), (O, R)])
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_library(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    low = [x.to(dtype) for x in inputs_of(*shape)]
    exact = [x.double() for x in low]
    found = few_rows_lora(*low, 0.7)
    if dtype == torch.float64:
        assert_close(found, ops.few_rows_lora_ref(*exact, 0.7))
    else:
        wanted = ops.few_rows_lora_ref(*exact, 0.7)
        assert_close_to_ref64(found, ops.few_rows_lora_ref(*low, 0.7), wanted)
    assert torch.equal(few_rows_lora(*map(scattered, low), 0.7), found)
    y_TO, x_TI, *pair = low
    more = few_rows_lora(y_TO[None, :, None], x_TI[None, :, None], *pair, 0.7)
    assert torch.equal(more, found[None, :, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [5, 16])
def test_a_row_is_computed_as_if_alone(R: int, dtype: torch.dtype) -> None:
    y_TO, x_TI, *pair = (x.to(dtype) for x in inputs_of(40, 130, 90, R))
    alone = [few_rows_lora(y_TO[t : t + 1], x_TI[t : t + 1], *pair, 2.0) for t in range(40)]
    for T in (2, 8, 31, 40):
        assert torch.equal(few_rows_lora(y_TO[:T], x_TI[:T], *pair, 2.0), torch.cat(alone[:T]))


def test_any_number_of_threads() -> None:
    inputs = [x.float() for x in inputs_of(9, 640, 3000, 130)]
    assert_any_number_of_threads(lambda: (few_rows_lora(*inputs, 0.5),))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; import mixlora; torch.manual_seed(0)\n"
        "for T, I, O, R in ((1, 1024, 70, 16), (3, 9, 11, 3), (33, 513, 6, 64)):\n"
        "    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "        shapes = (T, O), (T, I), (R, I), (O, R)\n"
        "        y, x, a, b = (torch.randn(shape).to(dtype) for shape in shapes)\n"
        "        found = torch.ops.mixlora.few_rows_lora(y, x, a, b, 0.5)\n"
        "        exact = y.double() + 0.5 * x.double() @ a.double().T @ b.double().T\n"
        "        error = (found - exact).abs().max()\n"
        "        print(error <= exact.abs().max() * 8 * torch.finfo(dtype).eps)\n"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 12


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, no gradients, no dropout, no DoRA."""
    calls = []
    monkeypatch.setattr(
        sys.modules["mixlora.layers.lora"],
        "few_rows_lora",
        lambda *x: calls.append(x[0].shape[:-1].numel()) or few_rows_lora(*x),
    )
    base = Linear(12, 10)
    base.weight.data.copy_(normal(10, 12))
    for settings in ({}, {"use_dora": True}, {"lora_dropout": 0.5}):
        pair = Lora(base, r=4, lora_alpha=8, **settings)
        torch.nn.init.normal_(pair.lora_B)
        base.adapters["a"] = pair
        for B, S in ((1, 1), (4, 8), (3, 11)):
            x_BSI = normal(B, S, 12).float()
            context = ForwardContext((Span("a", 0, B),))
            with torch.no_grad():
                found = base(x_BSI, context)
                base.eval()
                wanted = base(x_BSI, context)
                with ops.reference():
                    assert_close(base(x_BSI, context), wanted)
                base.train()
            if not settings.get("lora_dropout"):
                assert_close(found, wanted)
                assert_close(base(x_BSI, context), wanted)  # with gradients
    # three times without gradients; with dropout those of evaluation
    assert calls == [1, 1, 1, 32, 32, 32] + [1, 1, 32, 32]


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.mixlora.few_rows_lora, (*(x.float() for x in inputs_of(3, 8, 5, 2)), 0.5)
    )


@pytest.mark.parametrize(
    "place, shape, message",
    [
        (0, (3, 5, 1), r"y must be \[..., O\] = \[3, 1\], got \[3, 5, 1\]"),
        (0, (4, 5), r"y must be \[..., O\] = \[3, 5\], got \[4, 5\]"),
        (1, (), r"x must be \[..., I\], got \[\]"),
        (2, (2, 9), r"lora_a must be \[R, I\] = \[2, 8\], got \[2, 9\]"),
        (3, (5, 3), r"lora_b must be \[O, R\] = \[5, 2\], got \[5, 3\]"),
    ],
)
def test_bad_shapes(place: int, shape: tuple[int, ...], message: str) -> None:
    inputs = [x.float() for x in inputs_of(3, 8, 5, 2)]
    inputs[place] = normal(*shape).float()
    with pytest.raises(RuntimeError, match=message):
        few_rows_lora(*inputs, 0.5)


@pytest.mark.parametrize("place, name", [(0, "y"), (2, "lora_a"), (3, "lora_b")])
def test_bad_dtypes(place: int, name: str) -> None:
    inputs = [x.float() for x in inputs_of(3, 8, 5, 2)]
    inputs[place] = inputs[place].double()
    with pytest.raises(RuntimeError, match=f"{name} must be float32, got float64"):
        few_rows_lora(*inputs, 0.5)
