import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.kernels import (
    assert_any_number_of_threads,
    assert_compiles,
    every_instruction_set,
    only_cpu,
    poisoned,
    said_with,
)
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)
weighted = pytest.mark.parametrize("weighted", [True, False])


def inputs(T: int, K: int, E: int, load: str, weighted: bool) -> tuple:
    """Rows behind the plan's last and weights of empty slots are NaN: nothing may read them."""
    plan = some_plan(T, K, E, load)
    y_ND, weight_TK = normal(T * K, 7), normal(T, K, seed=1).abs()
    y_ND[plan.expert_start_E1[-1] :] = torch.nan
    weight_TK[plan.expert_TK < 0] = torch.nan
    return y_ND, plan, weight_TK if weighted else None


def by_hand(y_ND: Tensor, plan: ops.Plan, weight_TK: Tensor | None) -> Tensor:
    T, K = plan.expert_TK.shape
    y_TD = y_ND.new_zeros(T, y_ND.shape[1])
    for row, slot in enumerate(plan.row_slot_N.tolist()):
        if slot >= 0:
            g = 1 if weight_TK is None else weight_TK[slot // K, slot % K]
            y_TD[slot // K] += g * y_ND[row]
    return y_TD


@cases
@weighted
def test_sum_of_rows(T: int, K: int, E: int, load: str, weighted: bool) -> None:
    y_ND, plan, weight_TK = inputs(T, K, E, load, weighted)
    with poisoned():
        y_TD = ops.moe_scatter(y_ND, plan, weight_TK)
    assert y_TD.shape == (T, 7)
    assert_close(y_TD, by_hand(y_ND, plan, weight_TK))


@cases
def test_gather_then_scatter_counts_the_slots(T: int, K: int, E: int, load: str) -> None:
    plan, x_TD = some_plan(T, K, E, load), normal(T, 7)
    y_TD = ops.moe_scatter(ops.moe_gather(x_TD, plan), plan)
    assert_close(y_TD, x_TD * (plan.expert_TK >= 0).sum(1, keepdim=True))


@cases
def test_gradients(T: int, K: int, E: int, load: str) -> None:
    y_ND, plan, weight_TK = inputs(T, K, E, load, True)
    y_ND, weight_TK = y_ND.requires_grad_(), weight_TK.requires_grad_()
    dy_TD = normal(T, 7, seed=2)
    with poisoned():
        y_TD = ops.moe_scatter(y_ND, plan, weight_TK)
        dy_ND, dweight_TK = torch.autograd.grad(y_TD, (y_ND, weight_TK), dy_TD)
    wanted_ND, wanted_TK = torch.zeros_like(y_ND), torch.zeros_like(weight_TK)
    for row, slot in enumerate(plan.row_slot_N.tolist()):
        if slot >= 0:
            t, k = divmod(slot, K)
            wanted_ND[row] = weight_TK[t, k].detach() * dy_TD[t]
            wanted_TK[t, k] = dy_TD[t] @ y_ND[row].detach()
    assert_close(dy_ND, wanted_ND)
    assert_close(dweight_TK, wanted_TK)


@cases
@weighted
def test_gradcheck(T: int, K: int, E: int, load: str, weighted: bool) -> None:
    T = min(T, 6)
    plan = some_plan(T, K, E, load)
    y_ND, weight_TK = normal(T * K, 5).requires_grad_(), normal(T, K, seed=1).requires_grad_()

    def scatter(y_ND: Tensor, weight_TK: Tensor) -> Tensor:
        return ops.moe_scatter(y_ND, plan, weight_TK if weighted else None)

    assert T == 0 or torch.autograd.gradcheck(scatter, (y_ND, weight_TK))


@weighted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(weighted: bool, dtype: torch.dtype) -> None:
    y_ND, plan, weight_TK = inputs(*ROUTINGS["every expert"], weighted)
    y_ND, weight_TK = y_ND.to(dtype), weight_TK if weight_TK is None else weight_TK.float()
    wide_TK = weight_TK if weight_TK is None else weight_TK.double()
    y_TD = ops.moe_scatter(y_ND, plan, weight_TK)
    assert y_TD.dtype == dtype
    y64_TD = ops.moe_scatter_ref(y_ND.double(), plan, wide_TK)
    assert_close_to_ref64(y_TD, ops.moe_scatter_ref(y_ND, plan, weight_TK), y64_TD)
    assert_close(y_TD.double(), y64_TD, rel=torch.finfo(dtype).eps)  # one rounding: fp32 inside


@weighted
@pytest.mark.parametrize("D", [0, 1, 1030])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_reference(weighted: bool, D: int, dtype: torch.dtype) -> None:
    """Values, and gradients of rows and of weights, which may be of either dtype."""
    plan = some_plan(120, 3, 8, "empty slots")

    def results(op, *leaves: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        y_TD = op(leaves[0], plan, *leaves[1:])
        dy_TD = normal(120, D, seed=2, dtype=dtype).to(y_TD.dtype)
        return [y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)]

    for weight_dtype in {dtype, torch.float32}:
        y_ND, weight_TK = normal(360, D, dtype=dtype), normal(120, 3, seed=1, dtype=weight_dtype)
        arguments = (y_ND, weight_TK) if weighted else (y_ND,)
        found = results(ops.moe_scatter, *arguments)
        ref = results(ops.moe_scatter_ref, *arguments)
        ref64 = results(ops.moe_scatter_ref, *(x.double() for x in arguments))
        for a, b, b64 in zip(found, ref, ref64, strict=True):
            if b.dtype == torch.float64:
                assert_close(a, b)
            else:
                assert_close_to_ref64(a, b, b64)


@only_cpu  # of a GPU's they are the processor's
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_and_what_rounds_to_it(dtype: torch.dtype) -> None:
    """Read as y and written as weight * 1, halfway cases and their neighbours among them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 64)
    plan = ops.moe_sort(torch.zeros(len(every), 1, dtype=torch.int32), 1)
    assert torch.equal(ops.moe_scatter(every, plan).nan_to_num(7.0), every.nan_to_num(7.0))

    number = every.float().flatten()
    above = (every.view(torch.int16) + 1).view(dtype).float().flatten()
    half = torch.where((number + above).isfinite(), number / 2 + above / 2, number)
    far = torch.tensor([65519.0, 65520.0, 65536.0, 1e5, 3e38, torch.inf, torch.nan])
    weight_T = torch.cat([number, half, half.nextafter(above), half.nextafter(number), far, -far])
    plan = ops.moe_sort(torch.zeros(len(weight_T), 1, dtype=torch.int32), 1)
    ones = torch.ones(len(weight_T), 17, dtype=dtype)
    found, wanted_T = ops.moe_scatter(ones, plan, weight_T[:, None]), weight_T.to(dtype)
    assert torch.equal(found.isnan(), wanted_T.isnan()[:, None].expand(-1, 17))
    assert torch.equal(found.nan_to_num(7.0), wanted_T.nan_to_num(7.0)[:, None].expand(-1, 17))


def test_second_derivative_is_an_error() -> None:
    y_ND, plan, weight_TK = inputs(*ROUTINGS["uniform"], True)
    y_TD = ops.moe_scatter(y_ND.requires_grad_(), plan, weight_TK.requires_grad_())
    (dy_ND,) = torch.autograd.grad((y_TD**2).sum(), y_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="^moe_scatter_backward has no derivative of its own"):
        dy_ND.sum().backward()


def test_terms_are_added_in_slot_order() -> None:
    """(1e8 + 1) - 1e8 is 0 in fp32, and 1e8 - 1e8 + 1 is 1."""
    plan = ops.moe_sort(torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.int32), 3)
    weight_TK = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])
    y_TD = ops.moe_scatter(torch.ones(6, 20), plan, weight_TK)
    assert y_TD[:, 0].tolist() == [0, 1]
    assert torch.equal(y_TD, y_TD[:, :1].expand(2, 20))


@pytest.mark.parametrize("dtype, large", [(torch.bfloat16, 256.0), (torch.float16, 2048.0)])
def test_a_sum_is_rounded_once(dtype: torch.dtype, large: float) -> None:
    """large + 1 is no number of the dtype, and would become large; large + 2 is one."""
    plan = ops.moe_sort(torch.tensor([[0, 1, 2]], dtype=torch.int32), 3)
    y_ND = torch.tensor([[large], [1.0], [1.0]], dtype=dtype).expand(3, 17)
    assert (ops.moe_scatter(y_ND, plan) == large + 2).all()


@weighted
def test_non_contiguous(weighted: bool) -> None:
    y_ND, plan, weight_TK = inputs(*ROUTINGS["empty slots"], weighted)
    dy_TD = normal(24, 7, seed=2)
    far_TK = scattered(weight_TK) if weighted else None

    def results(y_ND: Tensor, weight_TK: Tensor | None, dy_TD: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in (y_ND, weight_TK) if x is not None]
        y_TD = ops.moe_scatter(y_ND, plan, weight_TK)
        return y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)

    far = results(scattered(y_ND), far_TK, scattered(dy_TD))
    for a, b in zip(far, results(y_ND, weight_TK, dy_TD), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_begin_at_any_address(dtype: torch.dtype) -> None:
    """Of a size that would fit long loads."""
    plan, weight_TK = some_plan(*ROUTINGS["empty slots"]), normal(24, 3, seed=1, dtype=dtype)
    y_ND, dy_TD = normal(72, 16, dtype=dtype), normal(24, 16, seed=2, dtype=dtype)
    backward = torch.ops.mixlora.moe_scatter_backward
    rows = plan.row_slot_N, plan.slot_row_TK
    wanted = ops.moe_scatter(y_ND, plan), *backward(dy_TD, y_ND, *rows, weight_TK)
    y_ND, dy_TD = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (y_ND, dy_TD))
    found = ops.moe_scatter(y_ND, plan), *backward(dy_TD, y_ND, *rows, weight_TK)
    assert found[0].equal(wanted[0]) and found[1].equal(wanted[1])
    assert_close(found[2], wanted[2])  # the sum of a row has another order


@only_cpu
def test_compile() -> None:
    plan = some_plan(*ROUTINGS["empty slots"])

    def loss(y_ND: Tensor, weight_TK: Tensor) -> Tensor:
        return (ops.moe_scatter(y_ND, plan, weight_TK) * ops.moe_scatter(y_ND, plan)).sum()

    assert_compiles(loss, normal(72, 7).requires_grad_(), normal(24, 3, seed=1).requires_grad_())


@only_cpu
@pytest.mark.parametrize("name", ["empty slots", "no token", "one slot", "one expert"])
def test_opcheck(name: str) -> None:
    T, K, _, _ = ROUTINGS[name]
    plan = some_plan(*ROUTINGS[name])
    rows = plan.row_slot_N, plan.slot_row_TK
    y_ND, weight_TK = normal(T * K, 7), normal(T, K, seed=1)
    arguments = normal(T, 7), y_ND, *rows, weight_TK
    torch.library.opcheck(torch.ops.mixlora.moe_scatter_backward.default, arguments)
    y_ND.requires_grad_(), weight_TK.requires_grad_()
    for weight in (weight_TK, None):
        torch.library.opcheck(torch.ops.mixlora.moe_scatter.default, (y_ND, *rows, weight))


@only_cpu
def test_any_number_of_threads() -> None:
    plan = some_plan(3000, 2, 8, "empty slots")
    y_ND, weight_TK = normal(6000, 40).requires_grad_(), normal(3000, 2, seed=1).requires_grad_()
    dy_TD = normal(3000, 40, seed=2)

    def run() -> tuple[Tensor, ...]:
        y_TD = ops.moe_scatter(y_ND, plan, weight_TK)
        return y_TD, *torch.autograd.grad(y_TD, (y_ND, weight_TK), dy_TD)

    assert_any_number_of_threads(run)


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "plan = ops.moe_sort(torch.randint(-1, 8, (500, 3), dtype=torch.int32), 8)\n"
        "y, g, dy = torch.randn(1500, 37), torch.randn(500, 3), torch.randn(500, 37)\n"
        "def grads(op, dtype):\n"
        "    leaves = y.to(dtype).requires_grad_(), g.double().to(dtype).requires_grad_()\n"
        "    out = op(leaves[0], plan, leaves[1])\n"
        "    return out, *torch.autograd.grad(out, leaves, dy.to(dtype))\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    for a, b in zip(grads(ops.moe_scatter, dtype), grads(ops.moe_scatter_ref, dtype)):\n"
        "        print((a - b).abs().max() <= b.abs().max() * 4 * torch.finfo(dtype).eps)"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y_ND": torch.zeros(6, 2).int()}, "y_ND must be float64, float32, bfloat16 or float16"),
        ({"y_ND": torch.zeros(5, 2)}, "y_ND must be [N, D] = [6, 2], got [5, 2]"),
        ({"slot_row_TK": torch.full((3, 2), 6).int()}, "slot_row_TK must be in [-1, 6), got 6"),
        ({"weight_TK": torch.zeros(2, 3)}, "weight_TK must be [T, K] = [3, 2], got [2, 3]"),
        (
            {"weight_TK": torch.zeros(3, 2).double()},
            "weight_TK must be float32 or, as y_ND, float32, got float64",
        ),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    plan = ops.moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32), 3)
    right = {
        "y_ND": torch.zeros(6, 2),
        "row_slot_N": plan.row_slot_N,
        "slot_row_TK": plan.slot_row_TK,
        "weight_TK": None,
    }
    with pytest.raises(RuntimeError) as error:
        torch.ops.mixlora.moe_scatter(**{**right, **changes})
    assert str(error.value).startswith(f"moe_scatter: {message}")


def test_reference_switch_and_repetition() -> None:
    arguments = inputs(*ROUTINGS["zipf"], True)
    y_TD = ops.moe_scatter(*arguments)
    assert torch.equal(ops.moe_scatter(*arguments), y_TD)
    with ops.reference():
        assert_close(ops.moe_scatter(*arguments), y_TD)
