import pytest
import torch
from torch import Tensor

from mixlora import ops
from mixlora.ops.philox import keep_mask
from tests.kernels import (
    assert_any_number_of_threads,
    assert_compiles,
    assert_same_bits,
    every_instruction_set,
    poisoned,
    said_with,
)
from tests.numerics import assert_close
from tests.tiny import normal, scattered

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
shapes = pytest.mark.parametrize(
    "N, D", [(0, 5), (3, 0), (1, 1), (3, 2), (4, 31), (5, 32), (3, 67), (2, 96), (700, 131)]
)


def with_gradient(op, x_ND: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = x_ND.detach().requires_grad_()
    y_ND = op(x_ND, p, seed)
    dy_ND = normal(*x_ND.shape, seed=1, dtype=x_ND.dtype)
    with poisoned():
        return y_ND, *torch.autograd.grad(y_ND, x_ND, dy_ND)


@shapes
@dtypes
@pytest.mark.parametrize("p", [0.0, 0.05, 0.7])
def test_same_bits_as_the_reference(N: int, D: int, dtype: torch.dtype, p: float) -> None:
    x_ND = normal(N, D, dtype=dtype)
    for seed in (SEED, torch.tensor(-5), torch.tensor(0)):
        found = with_gradient(ops.dropout, x_ND, p, seed)
        assert_same_bits(found, with_gradient(ops.dropout_ref, x_ND, p, seed))


def test_definition() -> None:
    x_ND = normal(9, 13)
    y_ND = ops.dropout(x_ND, 0.25, SEED)
    keep_ND = keep_mask(SEED, torch.arange(9), 13, 0.25)
    assert_close(y_ND, torch.where(keep_ND, x_ND / 0.75, 0))
    assert 60 < keep_ND.sum() < 110


def test_rows_far_down_have_their_own_numbers() -> None:
    """In whichever chunk of rows they are computed."""
    x_ND = torch.ones(70_000, 4)
    y_ND = ops.dropout(x_ND, 0.5, SEED)
    assert torch.equal(y_ND != 0, keep_mask(SEED, torch.arange(70_000), 4, 0.5))


def test_nothing_but_the_seed_is_kept() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.dropout(normal(5, 7).requires_grad_(), 0.3, SEED)
    (seed,) = kept
    assert torch.equal(seed, SEED)


def test_gradcheck() -> None:
    x_ND = normal(4, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x_ND: ops.dropout(x_ND, 0.4, SEED), x_ND)
    assert torch.autograd.gradgradcheck(lambda x_ND: ops.dropout(x_ND, 0.4, SEED), x_ND)


@dtypes
def test_non_contiguous(dtype: torch.dtype) -> None:
    x_ND = normal(6, 37, dtype=dtype)
    wanted_ND = ops.dropout(x_ND, 0.3, SEED)
    assert torch.equal(ops.dropout(scattered(x_ND), 0.3, SEED), wanted_ND)
    assert torch.equal(ops.dropout(x_ND.T.contiguous().T, 0.3, SEED), wanted_ND)


def test_reference_switch() -> None:
    x_ND = normal(6, 37, dtype=torch.float16)
    with ops.reference():
        assert torch.equal(ops.dropout(x_ND, 0.3, SEED), ops.dropout_ref(x_ND, 0.3, SEED))


def test_compile() -> None:
    def loss(x_ND: Tensor) -> Tensor:
        return (ops.dropout(x_ND * 2, 0.3, SEED) ** 2).sum()

    assert_compiles(loss, normal(24, 7).requires_grad_())


@pytest.mark.parametrize("N, D", [(5, 7), (0, 7)])
def test_opcheck(N: int, D: int) -> None:
    arguments = normal(N, D).requires_grad_(), 0.3, SEED
    torch.library.opcheck(torch.ops.mixlora.dropout.default, arguments)


def test_any_number_of_threads() -> None:
    x_ND = normal(3000, 67, dtype=torch.float32)
    assert_any_number_of_threads(lambda: with_gradient(ops.dropout, x_ND, 0.3, SEED))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "x, seed = torch.randn(50, 203).double(), torch.tensor(0x1234_5678_9ABC_DEF0)\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    y = ops.dropout(x.to(dtype), 0.3, seed)\n"
        "    print(torch.equal(y, ops.dropout_ref(x.to(dtype), 0.3, seed)))"
    )
    assert said_with(isa, program).split() == [isa] + ["True"] * 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_ND": torch.zeros(3, 2).long()}, "x_ND must be float64, float32, bfloat16 or float16"),
        ({"x_ND": torch.zeros(3)}, "x_ND must be [N, D], got [3]"),
        ({"p": 1.0}, "p must be in [0, 1), got 1"),
        ({"p": -0.1}, "p must be in [0, 1), got -0.1"),
        ({"p": torch.nan}, "p must be in [0, 1), got nan"),
        ({"seed": torch.zeros(())}, "seed must be int64, got float32"),
        ({"seed": torch.zeros(2).long()}, "seed must be one number, got [2]"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    right = {"x_ND": torch.zeros(3, 2), "p": 0.5, "seed": SEED}
    with pytest.raises(RuntimeError) as error:
        torch.ops.mixlora.dropout(**{**right, **changes})
    assert str(error.value).startswith(f"dropout: {message}")
