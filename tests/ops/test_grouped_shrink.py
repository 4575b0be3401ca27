import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.kernels import (
    assert_any_number_of_threads,
    assert_compiles,
    assert_same_bits,
    every_instruction_set,
    poisoned,
    said_with,
)
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)
I, R = 9, 3


def op_arguments(plan: ops.Plan) -> tuple[Tensor, ...]:
    return plan.expert_TK, plan.expert_start_E1, plan.row_slot_N, plan.token_order_T


def results(op, plan: ops.Plan, x_TI: Tensor, lora_a_ERI: Tensor, da_TKR: Tensor) -> list[Tensor]:
    """(a, dx, dA)."""
    leaves = [x.detach().requires_grad_() for x in (x_TI, lora_a_ERI)]
    a_TKR = op(*leaves, plan)
    return [a_TKR, *torch.autograd.grad(a_TKR, leaves, da_TKR)]


def inputs(T: int, K: int, E: int, R: int, I: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    shapes = (T, I), (E, R, I), (T, K, R)
    return tuple(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


@cases
def test_values_and_gradients(T: int, K: int, E: int, load: str) -> None:
    plan, (x_TI, lora_a_ERI, da_TKR) = some_plan(T, K, E, load), inputs(T, K, E, R, I)
    da_TKR[plan.expert_TK < 0] = torch.nan  # nobody's
    with poisoned():
        a_TKR, dx_TI, da_ERI = results(ops.grouped_shrink, plan, x_TI, lora_a_ERI, da_TKR)
    wanted = [torch.zeros_like(x) for x in (da_TKR, x_TI, lora_a_ERI)]
    for t in range(T):
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e >= 0:
                wanted[0][t, k] = lora_a_ERI[e] @ x_TI[t]
                wanted[1][t] += da_TKR[t, k] @ lora_a_ERI[e]
                wanted[2][e] += torch.outer(da_TKR[t, k], x_TI[t])
    for a, b in zip((a_TKR, dx_TI, da_ERI), wanted, strict=True):
        assert_close(a, b)
    assert not a_TKR[plan.expert_TK < 0].any()
    assert not da_ERI[plan.expert_start_E1.diff() == 0].any()
    assert_close(ops.grouped_shrink_ref(x_TI, lora_a_ERI, plan), a_TKR)


@pytest.mark.parametrize("load", ["uniform", "empty slots"])
@pytest.mark.parametrize(
    "R, I", [(1, 1), (1, 8), (2, 3), (3, 17), (4, 4), (5, 31), (7, 2), (17, 5)]
)
def test_gradcheck(load: str, R: int, I: int) -> None:
    plan, tensors = some_plan(5, 2, 4, load), inputs(5, 2, 4, R, I)[:2]
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *tensors: ops.grouped_shrink(*tensors, plan), tensors)


@cases
def test_gradcheck_of_routings(T: int, K: int, E: int, load: str) -> None:
    T = min(T, 6)
    plan, tensors = some_plan(T, K, E, load), inputs(T, K, E, 2, 3)[:2]
    tensors = [x.requires_grad_() for x in tensors]
    assert T == 0 or torch.autograd.gradcheck(
        lambda *tensors: ops.grouped_shrink(*tensors, plan), tensors
    )


# Below, at and beyond each block and tile: 48 rows, 16 ranks, 256 columns; 64 terms, 96 columns.
SIZES = {
    "one of each": (1, 1, 1, 1, 1),
    "one more than a block": (97, 1, 1, 17, 257),
    "panels": (130, 2, 3, 16, 193),
    "whole blocks": (96, 2, 2, 32, 512),
    "rank 128": (100, 2, 3, 128, 40),
    "rank 13": (150, 3, 4, 13, 311),
    "many experts": (200, 6, 64, 8, 72),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("T, K, E, R, I", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(T: int, K: int, E: int, R: int, I: int, dtype: torch.dtype) -> None:
    plan, tensors = some_plan(T, K, E, "zipf"), inputs(T, K, E, R, I, dtype)
    with poisoned():
        found = results(ops.grouped_shrink, plan, *tensors)
    ref = results(ops.grouped_shrink_ref, plan, *tensors)
    ref64 = results(ops.grouped_shrink_ref, plan, *(x.double() for x in tensors))
    for values, factor in zip(zip(found, ref, ref64, strict=True), (2, 3, 3), strict=True):
        assert values[0].dtype == dtype
        if dtype == torch.float64:
            assert_close(values[0], values[1])
        else:
            assert_close_to_ref64(*values, factor=factor)
        if dtype in (torch.bfloat16, torch.float16):  # one rounding: fp32 inside
            assert_close(values[0].double(), values[2], rel=torch.finfo(dtype).eps)


def test_slots_in_any_order_and_repeated_experts() -> None:
    expert_TK = torch.tensor([[2, 0], [0, 2], [1, 1], [2, 0], [-1, 1], [1, -1]], dtype=torch.int32)
    plan, tensors = ops.moe_sort(expert_TK, 3), inputs(6, 2, 3, R, I)
    found = results(ops.grouped_shrink, plan, *tensors)
    wanted = results(ops.grouped_shrink_ref, plan, *tensors)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


def test_gradient_of_x_is_added_in_slot_order() -> None:
    """(1e8 + 1) - 1e8 is 0 in fp32, and 1e8 - 1e8 + 1 is 1."""
    plan = ops.moe_sort(torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.int32), 3)
    da_TKR = torch.tensor([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]])
    x_TI, lora_a_ERI = torch.ones(2, 50), torch.ones(3, 1, 50)
    _, dx_TI, _ = results(ops.grouped_shrink, plan, x_TI, lora_a_ERI, da_TKR)
    assert torch.equal(dx_TI, torch.tensor([[0.0], [1.0]]).expand(2, 50))


def test_non_contiguous() -> None:
    plan = some_plan(60, 3, 5, "empty slots")
    far_plan = ops.Plan(*map(scattered_int, plan))
    tensors = inputs(60, 3, 5, R, I)
    far = results(ops.grouped_shrink, far_plan, *map(scattered, tensors))
    assert_same_bits(far, results(ops.grouped_shrink, plan, *tensors))


def scattered_int(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 99)], dim=-1)[..., 0]


def test_one_tensor_of_three_wants_a_gradient() -> None:
    plan, tensors = some_plan(20, 2, 5, "zipf"), inputs(20, 2, 5, R, I)
    _, *wanted = results(ops.grouped_shrink, plan, *tensors)
    for i, want in enumerate(wanted):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors[:2])]
        ops.grouped_shrink(*leaves, plan).backward(tensors[2])
        assert leaves[1 - i].grad is None
        assert torch.equal(leaves[i].grad, want)


def test_any_number_of_threads() -> None:
    plan, tensors = some_plan(700, 2, 8, "zipf"), inputs(700, 2, 8, 16, 200, torch.float32)
    assert_any_number_of_threads(lambda: results(ops.grouped_shrink, plan, *tensors))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "plan = ops.moe_sort(torch.randint(-1, 8, (300, 3), dtype=torch.int32), 8)\n"
        "x, a, da = torch.randn(300, 331), torch.randn(8, 19, 331), torch.randn(300, 3, 19)\n"
        "def grads(op, dtype):\n"
        "    leaves = [t.to(dtype).requires_grad_() for t in (x, a)]\n"
        "    out = op(*leaves, plan)\n"
        "    return out, *torch.autograd.grad(out, leaves, da.to(dtype))\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    for a_, b in zip(grads(ops.grouped_shrink, dtype),\n"
        "                     grads(ops.grouped_shrink_ref, dtype)):\n"
        "        print((a_ - b).abs().max() <= b.abs().max() * 8 * torch.finfo(dtype).eps)"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 12


@pytest.mark.parametrize("name", ["empty slots", "no token", "one slot", "one expert"])
def test_opcheck(name: str) -> None:
    T, K, E, _ = ROUTINGS[name]
    plan = some_plan(*ROUTINGS[name])
    x_TI, lora_a_ERI, da_TKR = inputs(T, K, E, R, I)
    arguments = x_TI, lora_a_ERI, *op_arguments(plan)
    torch.library.opcheck(torch.ops.mixlora.grouped_shrink_backward.default, (da_TKR, *arguments))
    x_TI.requires_grad_(), lora_a_ERI.requires_grad_()
    torch.library.opcheck(torch.ops.mixlora.grouped_shrink.default, arguments)


def test_compile() -> None:
    plan = some_plan(*ROUTINGS["empty slots"])
    x_TI, lora_a_ERI, _ = inputs(24, 3, 5, R, I)

    def loss(x_TI: Tensor, lora_a_ERI: Tensor) -> Tensor:
        return (ops.grouped_shrink(x_TI, lora_a_ERI, plan) ** 2).sum()

    assert_compiles(loss, x_TI.requires_grad_(), lora_a_ERI.requires_grad_())


def test_second_derivative_is_an_error() -> None:
    plan, (x_TI, lora_a_ERI, _) = some_plan(6, 2, 5, "uniform"), inputs(6, 2, 5, R, I)
    a_TKR = ops.grouped_shrink(x_TI.requires_grad_(), lora_a_ERI, plan)
    (dx_TI,) = torch.autograd.grad((a_TKR**2).sum(), x_TI, create_graph=True)
    with pytest.raises(RuntimeError, match="^grouped_shrink_backward has no derivative"):
        dx_TI.sum().backward()


def test_reference_switch() -> None:
    plan, (x_TI, lora_a_ERI, _) = some_plan(60, 2, 5, "zipf"), inputs(60, 2, 5, R, I)
    wanted_TKR = ops.grouped_shrink(x_TI, lora_a_ERI, plan)
    x_TI.requires_grad_()
    with ops.reference():
        a_TKR = ops.grouped_shrink(x_TI, lora_a_ERI, plan)
    ref_TKR = ops.grouped_shrink_ref(x_TI, lora_a_ERI, plan)
    assert a_TKR.grad_fn.name() == ref_TKR.grad_fn.name()
    assert torch.equal(a_TKR, ref_TKR)
    assert_close(a_TKR, wanted_TKR)


def full(shape: tuple[int, ...], value: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x_TI": torch.zeros(3, 4).int()}, "x_TI must be float64, float32, bfloat16 or float16"),
        ({"x_TI": torch.zeros(2, 4)}, "x_TI must be [T, I] = [3, 4], got [2, 4]"),
        ({"x_TI": torch.zeros(3, 5)}, "lora_a_ERI must be [E, R, I] = [3, 2, 5], got [3, 2, 4]"),
        ({"lora_a_ERI": torch.zeros(3, 2, 4).double()}, "lora_a_ERI must be float32, got float64"),
        ({"lora_a_ERI": torch.zeros(2, 2, 4)}, "lora_a_ERI must be [E, R, I] = [3, 2, 4]"),
        ({"expert_TK": full((3, 2), 3)}, "expert_TK must be in [-1, 3), got 3"),
        ({"expert_TK": full((3, 2), 0).long()}, "expert_TK must be int32, got int64"),
        ({"row_slot_N": full((6,), -1)}, "row_slot_N must be in [0, 6), got -1"),
        ({"row_slot_N": full((6,), 6)}, "row_slot_N must be in [0, 6), got 6"),
        ({"row_slot_N": full((5,), 0)}, "row_slot_N must be [N] = [6], got [5]"),
        ({"token_order_T": full((3,), 3)}, "token_order_T must be in [0, 3), got 3"),
        ({"expert_start_E1": full((4,), 1)}, "expert_start_E1 must ascend from 0 to at most 6"),
        ({"expert_start_E1": torch.tensor([0, 2, 1, 6]).int()}, "expert_start_E1 must ascend"),
        ({"expert_start_E1": torch.tensor([0, 2, 4, 7]).int()}, "expert_start_E1 must ascend"),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    plan = ops.moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32), 3)
    right = {"x_TI": torch.zeros(3, 4), "lora_a_ERI": torch.zeros(3, 2, 4)}
    names = "expert_TK", "expert_start_E1", "row_slot_N", "token_order_T"
    right |= dict(zip(names, op_arguments(plan), strict=True))
    for op in ("grouped_shrink", "grouped_shrink_backward"):
        gradient = {} if op == "grouped_shrink" else {"da_TKR": torch.zeros(3, 2, 2)}
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.mixlora, op)(**gradient, **{**right, **changes})
        assert str(error.value).startswith(f"{op}: {message}")
