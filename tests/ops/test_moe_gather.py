import pytest
import torch

from mixlora import ops
from tests.numerics import assert_close
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_tokens(T: int, K: int, E: int, load: str, dtype: torch.dtype) -> None:
    plan, x_TD = some_plan(T, K, E, load), normal(T, 7, dtype=dtype)
    x_ND = ops.moe_gather(x_TD, plan)
    assert x_ND.shape == (T * K, 7)
    assert x_ND.dtype == dtype
    rows = [t for e in range(E) for t in range(T) for k in range(K) if plan.expert_TK[t, k] == e]
    assert plan.expert_start_E1[-1] == len(rows)
    assert torch.equal(x_ND[: len(rows)], x_TD[rows])
    assert not x_ND[len(rows) :].any()


@cases
def test_gradient(T: int, K: int, E: int, load: str) -> None:
    plan = some_plan(T, K, E, load)
    x_TD = normal(T, 3).requires_grad_()
    dx_ND = normal(T * K, 3, seed=1)
    (dx_TD,) = torch.autograd.grad(ops.moe_gather(x_TD, plan), x_TD, dx_ND)
    wanted_TD = torch.zeros(T, 3, dtype=torch.float64)
    for row, slot in enumerate(plan.row_slot_N.tolist()):
        if slot >= 0:
            wanted_TD[slot // K] += dx_ND[row]
    assert_close(dx_TD, wanted_TD)
    if 0 < T <= 30:
        assert torch.autograd.gradcheck(lambda x_TD: ops.moe_gather(x_TD, plan), x_TD)


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
