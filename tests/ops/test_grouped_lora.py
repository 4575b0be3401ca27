import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.kernels import (
    assert_any_number_of_threads,
    assert_compiles,
    assert_same_bits,
    every_instruction_set,
    only_cpu,
    poisoned,
    said_with,
    slow_cuda,
)
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import normal, scattered

I, R, O = 9, 3, 5
SCALING = 1.7

# Rows of each group, and rows that belong to none.
GROUPS = {
    "ragged": ([3, 1, 4], 0),
    "empty groups": ([0, 3, 0, 0, 2, 0], 0),
    "rows of no group": ([2, 3], 4),
    "no row": ([0, 0], 0),
    "no row of a group": ([0, 0], 3),
    "one group": ([6], 0),
}
groups = pytest.mark.parametrize("sizes, tail", GROUPS.values(), ids=GROUPS)


def inputs(
    sizes: list[int], tail: int, R: int = R, I: int = I, O: int = O, dtype=torch.float64
) -> tuple[list[Tensor], Tensor, Tensor]:
    """([x, A, B], group_start, dy)."""
    N, G = sum(sizes) + tail, len(sizes)
    shapes = (N, I), (G, R, I), (G, O, R), (N, O)
    *tensors, dy_NO = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return tensors, torch.tensor([0, *sizes]).cumsum(0).int(), dy_NO


def results(op, tensors: list[Tensor], start_G1: Tensor, dy_NO: Tensor) -> list[Tensor]:
    """(y, dx, dA, dB)."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y_NO = op(*leaves, start_G1, SCALING)
    return [y_NO, *torch.autograd.grad(y_NO, leaves, dy_NO)]


@groups
def test_values_and_gradients(sizes: list[int], tail: int) -> None:
    (x_NI, lora_a_GRI, lora_b_GOR), start_G1, dy_NO = tensors, *_ = inputs(sizes, tail)
    rows = sum(sizes)
    x_NI[rows:], dy_NO[rows:] = torch.nan, torch.nan  # nobody's
    with poisoned():
        found = results(ops.grouped_lora, tensors, start_G1, dy_NO)
    wanted = [torch.zeros_like(x) for x in (dy_NO, *tensors)]
    for g, (start, end) in enumerate(zip(start_G1[:-1], start_G1[1:], strict=True)):
        x_I, dy_O, a_RI, b_OR = x_NI[start:end], dy_NO[start:end], lora_a_GRI[g], lora_b_GOR[g]
        wanted[0][start:end] = SCALING * x_I @ (b_OR @ a_RI).T
        wanted[1][start:end] = SCALING * dy_O @ b_OR @ a_RI
        wanted[2][g] = SCALING * b_OR.T @ dy_O.T @ x_I
        wanted[3][g] = SCALING * dy_O.T @ x_I @ a_RI.T
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert not found[0][rows:].any() and not found[1][rows:].any()
    for gradient in found[2:]:
        assert not gradient[start_G1.diff() == 0].any()


@only_cpu
@groups
@pytest.mark.parametrize("R, I, O", [(3, 9, 5), (1, 1, 1), (5, 2, 17), (17, 3, 1)])
def test_gradcheck(sizes: list[int], tail: int, R: int, I: int, O: int) -> None:
    tensors, start_G1, _ = inputs(sizes, tail, R, I, O)
    leaves = [x.requires_grad_() for x in tensors]
    if len(leaves[0]):
        assert torch.autograd.gradcheck(
            lambda *leaves: ops.grouped_lora(*leaves, start_G1, SCALING), leaves
        )


@pytest.mark.parametrize("dtype, large", [(torch.bfloat16, 256.0), (torch.float16, 2048.0)])
def test_between_the_products_is_fp32(dtype: torch.dtype, large: float) -> None:
    """large + 1 is no number of the dtype; it is z, and dz, whose other rank takes large away."""
    start_G1 = torch.tensor([0, 1], dtype=torch.int32)
    one = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=dtype)
    less = torch.tensor([[[1.0, -1.0]]], dtype=dtype)
    x_NI = torch.tensor([[large, 1.0]], dtype=dtype)
    assert ops.grouped_lora(x_NI, one, less, start_G1, 1.0) == 1
    tensors = [torch.ones(1, 1, dtype=dtype), less.mT.contiguous(), one]
    leaves = [x.requires_grad_() for x in tensors]
    y_NO = ops.grouped_lora(*leaves, start_G1, 1.0)
    assert torch.autograd.grad(y_NO, leaves[0], x_NI)[0] == 1


# Below, at and beyond each block and tile: 48 rows, 16 ranks, 256 columns; 64 terms, 96 columns.
SIZES = {
    "one of each": ([1], 0, 1, 1, 1),
    "one more than a block": ([97, 1], 1, 17, 257, 97),
    "whole blocks": ([96, 0, 48], 0, 32, 512, 192),
    "rank 128": ([50, 20], 3, 128, 40, 70),
    "rank 13": ([130, 70, 5], 2, 13, 311, 203),
    "few rows or not so few": ([7, 8, 9, 8], 1, 5, 33, 40),
    "many groups": ([0, 1, 2, 3, 0] * 12, 7, 8, 72, 24),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@slow_cuda
@pytest.mark.parametrize("sizes, tail, R, I, O", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(
    sizes: list[int], tail: int, R: int, I: int, O: int, dtype: torch.dtype
) -> None:
    tensors, start_G1, dy_NO = inputs(sizes, tail, R, I, O, dtype)
    with poisoned():
        found = results(ops.grouped_lora, tensors, start_G1, dy_NO)
    ref = results(ops.grouped_lora_ref, tensors, start_G1, dy_NO)
    wide = [x.double() for x in tensors]
    ref64 = results(ops.grouped_lora_ref, wide, start_G1, dy_NO.double())
    for values, factor in zip(zip(found, ref, ref64, strict=True), (2, 3, 3, 3), strict=True):
        assert values[0].dtype == dtype
        if dtype == torch.float64:
            assert_close(values[0], values[1])
        else:
            assert_close_to_ref64(*values, factor=factor)
        if dtype in (torch.bfloat16, torch.float16):  # one rounding: fp32 inside
            assert_close(values[0].double(), values[2], rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("R", [1, 4, 8, 16, 24, 64])
@pytest.mark.parametrize("N", [0, 1, 63, 64, 65, 257])
def test_edges(N: int, R: int) -> None:
    """One group with many of the rows, one with none, and a last row of no group."""
    rows, dtype = max(0, N - 1), DTYPES[1:][(N + R) % 3]
    I, O = (72, 40) if N % 2 else (67, 136)
    tensors, start_G1, dy_NO = inputs([rows // 8, rows - rows // 8, 0], N - rows, R, I, O, dtype)
    with poisoned():
        found = results(ops.grouped_lora, tensors, start_G1, dy_NO)
    ref = results(ops.grouped_lora_ref, tensors, start_G1, dy_NO)
    wide = [x.double() for x in tensors]
    ref64 = results(ops.grouped_lora_ref, wide, start_G1, dy_NO.double())
    for values, factor in zip(zip(found, ref, ref64, strict=True), (2, 3, 3, 3), strict=True):
        assert_close_to_ref64(*values, factor=factor)
        if dtype != torch.float32:  # one rounding: fp32 inside
            assert_close(values[0].double(), values[2], rel=torch.finfo(dtype).eps)


def test_non_contiguous() -> None:
    tensors, start_G1, dy_NO = inputs([3, 1, 4], 2)
    far_start_G1 = start_G1.repeat_interleave(2)[::2]
    far = [scattered(x) for x in tensors], far_start_G1, scattered(dy_NO)
    found = results(ops.grouped_lora, *far)
    assert_same_bits(found, results(ops.grouped_lora, tensors, start_G1, dy_NO))


def test_one_tensor_of_three_wants_a_gradient() -> None:
    tensors, start_G1, dy_NO = inputs([3, 0, 4], 2)
    _, *wanted = results(ops.grouped_lora, tensors, start_G1, dy_NO)
    for i, want in enumerate(wanted):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors)]
        ops.grouped_lora(*leaves, start_G1, SCALING).backward(dy_NO)
        assert torch.equal(leaves[i].grad, want)
        assert sum(leaf.grad is not None for leaf in leaves) == 1


@only_cpu
def test_any_number_of_threads() -> None:
    arguments = inputs([200, 10, 0, 300, 50], 9, 16, 200, 150, torch.float32)
    assert_any_number_of_threads(lambda: results(ops.grouped_lora, *arguments))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "start = torch.tensor([0, 60, 60, 61, 200], dtype=torch.int32)\n"
        "shapes = (210, 331), (4, 19, 331), (4, 107, 19), (210, 107)\n"
        "*tensors, dy = [torch.randn(shape) for shape in shapes]\n"
        "def grads(op, dtype):\n"
        "    leaves = [t.to(dtype).requires_grad_() for t in tensors]\n"
        "    out = op(*leaves, start, 1.7)\n"
        "    return out, *torch.autograd.grad(out, leaves, dy.to(dtype))\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    for a, b in zip(grads(ops.grouped_lora, dtype), grads(ops.grouped_lora_ref, dtype)):\n"
        "        print((a - b).abs().max() <= b.abs().max() * 8 * torch.finfo(dtype).eps)"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 16


@only_cpu
@groups
def test_opcheck(sizes: list[int], tail: int) -> None:
    tensors, start_G1, dy_NO = inputs(sizes, tail)
    arguments = dy_NO, *tensors, start_G1, SCALING
    torch.library.opcheck(torch.ops.mixlora.grouped_lora_backward.default, arguments)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.mixlora.grouped_lora.default, (*leaves, start_G1, SCALING))


def test_compile() -> None:
    tensors, start_G1, _ = inputs([3, 0, 4], 2)

    def loss(*tensors: Tensor) -> Tensor:
        return (ops.grouped_lora(*tensors, start_G1, SCALING) ** 2).sum()

    assert_compiles(loss, *(x.requires_grad_() for x in tensors))


def test_second_derivative_is_an_error() -> None:
    (x_NI, *rest), start_G1, _ = inputs([3, 0, 4], 2)
    y_NO = ops.grouped_lora(x_NI.requires_grad_(), *rest, start_G1, SCALING)
    (dx_NI,) = torch.autograd.grad((y_NO**2).sum(), x_NI, create_graph=True)
    with pytest.raises(RuntimeError, match="^grouped_lora_backward has no derivative"):
        dx_NI.sum().backward()


def test_reference_switch() -> None:
    (x_NI, *rest), start_G1, _ = inputs([3, 0, 4], 2)
    x_NI.requires_grad_()
    with ops.reference():
        y_NO = ops.grouped_lora(x_NI, *rest, start_G1, SCALING)
    ref_NO = ops.grouped_lora_ref(x_NI, *rest, start_G1, SCALING)
    assert y_NO.grad_fn.name() == ref_NO.grad_fn.name()
    assert torch.equal(y_NO, ref_NO)
    assert_close(ops.grouped_lora(x_NI, *rest, start_G1, SCALING), ref_NO)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_NI": torch.zeros(6, 4).int()}, "x_NI must be float64, float32, bfloat16 or float16"),
        ({"x_NI": torch.zeros(6)}, "x_NI must be [N, I], got [6]"),
        ({"x_NI": torch.zeros(6, 5)}, "lora_a_GRI must be [G, R, I] = [2, 3, 5], got [2, 3, 4]"),
        ({"lora_a_GRI": torch.zeros(2, 3, 4).double()}, "lora_a_GRI must be float32, got float64"),
        ({"lora_b_GOR": torch.zeros(2, 5, 3).double()}, "lora_b_GOR must be float32, got float64"),
        ({"lora_b_GOR": torch.zeros(2, 5, 2)}, "lora_b_GOR must be [G, O, R] = [2, 5, 3]"),
        ({"group_start_G1": torch.zeros(3)}, "group_start_G1 must be int32, got float32"),
        ({"group_start_G1": torch.zeros(2).int()}, "group_start_G1 must be [G1] = [3], got [2]"),
        ({"group_start_G1": torch.tensor([0, 2, 7]).int()}, "group_start_G1 must ascend from 0 to"),
        ({"group_start_G1": torch.tensor([0, 3, 2]).int()}, "group_start_G1 must ascend from 0 to"),
        ({"group_start_G1": torch.tensor([1, 2, 3]).int()}, "group_start_G1 must ascend from 0 to"),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    right = {
        "x_NI": torch.zeros(6, 4),
        "lora_a_GRI": torch.zeros(2, 3, 4),
        "lora_b_GOR": torch.zeros(2, 5, 3),
        "group_start_G1": torch.tensor([0, 2, 5], dtype=torch.int32),
        "scaling": 1.0,
    }
    for op in ("grouped_lora", "grouped_lora_backward"):
        gradient = {} if op == "grouped_lora" else {"dy_NO": torch.zeros(6, 5)}
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.mixlora, op)(**gradient, **{**right, **changes})
        assert str(error.value).startswith(f"{op}: {message}")
