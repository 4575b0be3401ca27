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
    slow_cuda,
)
from tests.numerics import assert_close
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_tokens(T: int, K: int, E: int, load: str, dtype: torch.dtype) -> None:
    plan, x_TD = some_plan(T, K, E, load), normal(T, 7, dtype=dtype)
    with poisoned():
        x_ND = ops.moe_gather(x_TD, plan)
    assert x_ND.shape == (T * K, 7)
    assert x_ND.dtype == dtype
    rows = [t for e in range(E) for t in range(T) for k in range(K) if plan.expert_TK[t, k] == e]
    assert plan.expert_start_E1[-1] == len(rows)
    assert torch.equal(x_ND[: len(rows)], x_TD[rows])
    assert not x_ND[len(rows) :].any()


@slow_cuda
@cases
def test_gradient(T: int, K: int, E: int, load: str) -> None:
    plan = some_plan(T, K, E, load)
    x_TD = normal(T, 3).requires_grad_()
    dx_ND = normal(T * K, 3, seed=1)
    with poisoned():
        (dx_TD,) = torch.autograd.grad(ops.moe_gather(x_TD, plan), x_TD, dx_ND)
    wanted_TD = torch.zeros(T, 3, dtype=torch.float64)
    for row, slot in enumerate(plan.row_slot_N.tolist()):
        if slot >= 0:
            wanted_TD[slot // K] += dx_ND[row]
    assert_close(dx_TD, wanted_TD)
    if 0 < T <= 30:
        assert torch.autograd.gradcheck(lambda x_TD: ops.moe_gather(x_TD, plan), x_TD)
        assert torch.autograd.gradgradcheck(lambda x_TD: ops.moe_gather(x_TD, plan), x_TD)


def test_example_of_the_docstring() -> None:
    plan = ops.moe_sort(torch.tensor([[0, 2], [1, 2], [0, 1]], dtype=torch.int32), 3)
    x_TD = torch.tensor([[0.0], [1.0], [2.0]])
    assert ops.moe_gather(x_TD, plan).flatten().tolist() == [0, 2, 1, 2, 0, 1]


def test_non_contiguous_and_other_rows_do_not_matter() -> None:
    plan, x_TD = some_plan(*ROUTINGS["empty slots"]), normal(24, 7)
    wanted_ND = ops.moe_gather(x_TD, plan)
    assert torch.equal(ops.moe_gather(scattered(x_TD), plan), wanted_ND)
    idle_T = (plan.expert_TK < 0).all(1)
    assert idle_T.any()
    x_TD[idle_T] = torch.nan
    assert torch.equal(ops.moe_gather(x_TD, plan), wanted_ND)


def test_reference_switch() -> None:
    plan, x_TD = some_plan(*ROUTINGS["zipf"]), normal(24, 7)
    with ops.reference():
        assert torch.equal(ops.moe_gather(x_TD, plan), ops.moe_gather_ref(x_TD, plan))
    assert torch.equal(ops.moe_gather(x_TD, plan), ops.moe_gather_ref(x_TD, plan))


@pytest.mark.parametrize("D", [0, 1, 8, 1030])
def test_any_width(D: int) -> None:
    plan, x_TD = some_plan(200, 3, 8, "empty slots"), normal(200, D, dtype=torch.float32)
    x_ND, dx_ND = ops.moe_gather(x_TD.requires_grad_(), plan), normal(600, D).float()
    assert torch.equal(x_ND, ops.moe_gather_ref(x_TD, plan))
    (dx_TD,) = torch.autograd.grad(x_ND, x_TD, dx_ND)
    (wanted_TD,) = torch.autograd.grad(ops.moe_gather_ref(x_TD, plan), x_TD, dx_ND)
    assert_close(dx_TD, wanted_TD)


@only_cpu
def test_compile() -> None:
    plan = some_plan(*ROUTINGS["empty slots"])

    def loss(x_TD: Tensor) -> Tensor:
        return (ops.moe_gather(x_TD * 2, plan) ** 2).sum()

    assert_compiles(loss, normal(24, 7).requires_grad_())


@only_cpu
@pytest.mark.parametrize("name", ["empty slots", "no token", "one slot", "one expert"])
def test_opcheck(name: str) -> None:
    plan, x_TD = some_plan(*ROUTINGS[name]), normal(ROUTINGS[name][0], 7).requires_grad_()
    arguments = x_TD, plan.row_slot_N, plan.slot_row_TK
    torch.library.opcheck(torch.ops.mixlora.moe_gather.default, arguments)


@only_cpu
def test_any_number_of_threads() -> None:
    plan = some_plan(3000, 2, 8, "empty slots")
    x_TD, dx_ND = normal(3000, 40).requires_grad_(), normal(6000, 40, seed=1)

    def run() -> tuple[Tensor, ...]:
        x_ND = ops.moe_gather(x_TD, plan)
        return x_ND, *torch.autograd.grad(x_ND, x_TD, dx_ND)

    assert_any_number_of_threads(run)


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "plan = ops.moe_sort(torch.randint(-1, 8, (500, 3), dtype=torch.int32), 8)\n"
        "x = torch.randn(500, 37)\n"
        "print(torch.equal(ops.moe_gather(x, plan), ops.moe_gather_ref(x, plan)))"
    )
    assert said_with(isa, program).split() == [isa, "True"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_TD": torch.zeros(3, 2).long()}, "x_TD must be float64, float32, bfloat16 or float16"),
        ({"x_TD": torch.zeros(4, 2)}, "x_TD must be [T, D] = [3, 2], got [4, 2]"),
        ({"x_TD": torch.zeros(3)}, "x_TD must be [T, D], got [3]"),
        ({"row_slot_N": torch.zeros(5).int()}, "row_slot_N must be [N] = [6], got [5]"),
        ({"row_slot_N": torch.zeros(6)}, "row_slot_N must be int32, got float32"),
        ({"row_slot_N": torch.full((6,), 6).int()}, "row_slot_N must be in [-1, 6), got 6 at 0"),
        ({"slot_row_TK": torch.full((3, 2), -2).int()}, "slot_row_TK must be in [-1, 6), got -2"),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    plan = ops.moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32), 3)
    right = {"row_slot_N": plan.row_slot_N, "slot_row_TK": plan.slot_row_TK}
    with pytest.raises(RuntimeError) as error:
        torch.ops.mixlora.moe_gather(**{"x_TD": torch.zeros(3, 2), **right, **changes})
    assert str(error.value).startswith(f"moe_gather: {message}")
