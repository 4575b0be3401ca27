import pytest
import torch
from torch import Tensor

from mixlora import ops
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


@pytest.mark.parametrize("load", ["uniform", "empty slots"])
def test_gradcheck(load: str) -> None:
    plan = some_plan(6, 2, 4, load)
    y_ND, weight_TK = normal(12, 3).requires_grad_(), normal(6, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y_ND, weight_TK: ops.moe_scatter(y_ND, plan, weight_TK), (y_ND, weight_TK)
    )


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


def test_non_contiguous() -> None:
    y_ND, plan, weight_TK = inputs(*ROUTINGS["empty slots"], True)
    wanted_TD = ops.moe_scatter(y_ND, plan, weight_TK)
    assert_close(ops.moe_scatter(scattered(y_ND), plan, scattered(weight_TK)), wanted_TD)


def test_reference_switch_and_repetition() -> None:
    arguments = inputs(*ROUTINGS["zipf"], True)
    y_TD = ops.moe_scatter(*arguments)
    assert torch.equal(ops.moe_scatter(*arguments), y_TD)
    with ops.reference():
        assert_close(ops.moe_scatter(*arguments), y_TD)
