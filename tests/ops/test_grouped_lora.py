import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)
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


def lora_inputs(sizes: list[int], tail: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start_G1 = torch.tensor([0, *sizes]).cumsum(0).int()
    x_NI = normal(sum(sizes) + tail, I)
    return x_NI, normal(len(sizes), R, I, seed=1), normal(len(sizes), O, R, seed=2), start_G1


@groups
def test_grouped_lora(sizes: list[int], tail: int) -> None:
    x_NI, lora_a_GRI, lora_b_GOR, start_G1 = lora_inputs(sizes, tail)
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    x_NI[len(group) :] = torch.nan
    y_NO = ops.grouped_lora(x_NI, lora_a_GRI, lora_b_GOR, start_G1, SCALING)
    assert y_NO.shape == (len(x_NI), O)
    assert not y_NO[len(group) :].any()
    for row, g in enumerate(group):
        wanted_O = SCALING * (lora_b_GOR[g] @ lora_a_GRI[g]) @ x_NI[row]
        assert_close(y_NO[row], wanted_O)


@groups
def test_gradients_of_grouped_lora(sizes: list[int], tail: int) -> None:
    *tensors, start_G1 = lora_inputs(sizes, tail)
    tensors = [x.requires_grad_() for x in tensors]
    dy_NO = normal(len(tensors[0]), O, seed=3)
    y_NO = ops.grouped_lora(*tensors, start_G1, SCALING)
    found = torch.autograd.grad(y_NO, tensors, dy_NO)
    wanted = [torch.zeros_like(x) for x in tensors]
    x_NI, lora_a_GRI, lora_b_GOR = (x.detach() for x in tensors)
    for g, (start, end) in enumerate(zip(start_G1[:-1], start_G1[1:], strict=True)):
        x_I, dy_O, a_RI, b_OR = x_NI[start:end], dy_NO[start:end], lora_a_GRI[g], lora_b_GOR[g]
        wanted[0][start:end] = SCALING * dy_O @ b_OR @ a_RI
        wanted[1][g] = SCALING * b_OR.T @ dy_O.T @ x_I
        wanted[2][g] = SCALING * dy_O.T @ x_I @ a_RI.T
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.grouped_lora(*tensors, start_G1, SCALING), tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_of_grouped_lora(dtype: torch.dtype) -> None:
    *tensors, start_G1 = lora_inputs([40, 0, 60], 3)
    low = [x.to(dtype) for x in tensors]
    y_NO = ops.grouped_lora(*low, start_G1, SCALING)
    assert y_NO.dtype == dtype
    ref_NO = ops.grouped_lora_ref(*low, start_G1, SCALING)
    ref64_NO = ops.grouped_lora_ref(*(x.double() for x in low), start_G1, SCALING)
    assert_close_to_ref64(y_NO, ref_NO, ref64_NO)


def test_non_contiguous_grouped_lora() -> None:
    *tensors, start_G1 = lora_inputs([3, 1, 4], 2)
    y_NO = ops.grouped_lora(*tensors, start_G1, SCALING)
    assert_close(ops.grouped_lora(*map(scattered, tensors), start_G1, SCALING), y_NO)


def shrink_by_hand(x_TI: Tensor, lora_a_ERI: Tensor, plan: ops.Plan) -> Tensor:
    T, K = plan.expert_TK.shape
    a_TKR = x_TI.new_zeros(T, K, lora_a_ERI.shape[1])
    for t in range(T):
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e >= 0:
                a_TKR[t, k] = lora_a_ERI[e] @ x_TI[t]
    return a_TKR


@cases
def test_grouped_shrink(T: int, K: int, E: int, load: str) -> None:
    plan, x_TI, lora_a_ERI = some_plan(T, K, E, load), normal(T, I), normal(E, R, I, seed=1)
    a_TKR = ops.grouped_shrink(x_TI, lora_a_ERI, plan)
    assert a_TKR.shape == (T, K, R)
    assert_close(a_TKR, shrink_by_hand(x_TI, lora_a_ERI, plan))
    assert_close(ops.grouped_shrink_ref(x_TI, lora_a_ERI, plan), a_TKR)
    assert not a_TKR[plan.expert_TK < 0].any()


@cases
def test_gradients_of_grouped_shrink(T: int, K: int, E: int, load: str) -> None:
    plan = some_plan(T, K, E, load)
    tensors = normal(T, I).requires_grad_(), normal(E, R, I, seed=1).requires_grad_()
    da_TKR = normal(T, K, R, seed=2)
    da_TKR[plan.expert_TK < 0] = torch.nan  # nobody's
    found = torch.autograd.grad(ops.grouped_shrink(*tensors, plan), tensors, da_TKR)
    wanted = [torch.zeros_like(x) for x in tensors]
    for t in range(T):
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e >= 0:
                wanted[0][t] += da_TKR[t, k] @ tensors[1][e].detach()
                wanted[1][e] += torch.outer(da_TKR[t, k], tensors[0][t].detach())
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("load", ["uniform", "empty slots", "some empty"])
def test_gradcheck_of_grouped_shrink(load: str) -> None:
    plan = some_plan(5, 2, 4, load)
    tensors = normal(5, 4).requires_grad_(), normal(4, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: ops.grouped_shrink(*tensors, plan), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_of_grouped_shrink(dtype: torch.dtype) -> None:
    plan = some_plan(100, 2, 8, "zipf")
    tensors = normal(100, 72, dtype=dtype), normal(8, 6, 72, seed=1, dtype=dtype)
    da_TKR = normal(100, 2, 6, seed=2, dtype=dtype)

    def run(op, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        a_TKR = op(*inputs, plan)
        return [a_TKR, *torch.autograd.grad(a_TKR, inputs, da_TKR.to(dtype))]

    native, ref = run(ops.grouped_shrink, dtype), run(ops.grouped_shrink_ref, dtype)
    ref64 = run(ops.grouped_shrink_ref, torch.float64)
    for values, factor in zip(zip(native, ref, ref64, strict=True), (2, 3, 3), strict=True):
        assert values[0].dtype == dtype
        assert_close_to_ref64(*values, factor=factor)


def test_non_contiguous_grouped_shrink() -> None:
    plan = some_plan(60, 3, 5, "empty slots")
    plain = [normal(60, I), normal(5, R, I, seed=1)]
    da_TKR = normal(60, 3, R, seed=2)
    results = []
    for tensors, da in ((plain, da_TKR), (map(scattered, plain), scattered(da_TKR))):
        inputs = [x.requires_grad_() for x in tensors]
        a_TKR = ops.grouped_shrink(*inputs, plan)
        results.append([a_TKR, *torch.autograd.grad(a_TKR, inputs, da)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_reference_switch(monkeypatch) -> None:
    plan, x_TI, lora_a_ERI = some_plan(60, 2, 5, "zipf"), normal(60, I), normal(5, R, I, seed=1)
    wanted_TKR = ops.grouped_shrink(x_TI, lora_a_ERI, plan)
    assert torch.equal(ops.grouped_shrink(x_TI, lora_a_ERI, plan), wanted_TKR)
    x_TI.requires_grad_()
    with ops.reference():
        a_TKR = ops.grouped_shrink(x_TI, lora_a_ERI, plan)
    ref_TKR = ops.grouped_shrink_ref(x_TI, lora_a_ERI, plan)
    assert a_TKR.grad_fn.name() == ref_TKR.grad_fn.name()
    assert torch.equal(a_TKR, ref_TKR)
    assert_close(a_TKR, wanted_TKR)
