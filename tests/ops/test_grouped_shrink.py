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
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)
both = pytest.mark.parametrize("op", ["grouped_shrink", "grouped_expand"])
I, R = 9, 3


def rows(plan: ops.Plan) -> tuple[Tensor, ...]:
    return plan.expert_TK, plan.expert_start_E1, plan.row_slot_N


def native(op: str):
    """The kernel, whatever the public function would choose."""
    kernel = getattr(torch.ops.mixlora, op)
    return lambda first, w, plan: kernel(first, w, op == "grouped_expand", *rows(plan))


def public(op: str):
    return getattr(ops, op)


def reference(op: str):
    return getattr(ops, f"{op}_ref")


def results(run, plan: ops.Plan, first: Tensor, w: Tensor, gradient: Tensor) -> list[Tensor]:
    """Its value and both gradients: (a, dx, dA) of shrink, (y, dz, dB) of expand."""
    leaves = [x.detach().requires_grad_() for x in (first, w)]
    value = run(*leaves, plan)
    return [value, *torch.autograd.grad(value, leaves, gradient)]


def inputs(op, T: int, K: int, E: int, R: int, I: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    """(x, A, da) or (z, B, dy)."""
    shapes = (T, I), (E, R, I), (T, K, R)
    if op == "grouped_expand":
        shapes = (T, K, R), (E, I, R), (T, I)
    return tuple(normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("run", [native, public, reference])
@cases
def test_shrink(T: int, K: int, E: int, load: str, run) -> None:
    plan, (x_TI, w_ERI, da_TKR) = some_plan(T, K, E, load), inputs("grouped_shrink", T, K, E, R, I)
    da_TKR[plan.expert_TK < 0] = torch.nan  # nobody's
    with poisoned():
        a_TKR, dx_TI, da_ERI = results(run("grouped_shrink"), plan, x_TI, w_ERI, da_TKR)
    wanted = [torch.zeros_like(x) for x in (da_TKR, x_TI, w_ERI)]
    for t in range(T):
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e >= 0:
                wanted[0][t, k] = w_ERI[e] @ x_TI[t]
                wanted[1][t] += da_TKR[t, k] @ w_ERI[e]
                wanted[2][e] += torch.outer(da_TKR[t, k], x_TI[t])
    for a, b in zip((a_TKR, dx_TI, da_ERI), wanted, strict=True):
        assert_close(a, b)
    assert not a_TKR[plan.expert_TK < 0].any()
    assert not da_ERI[plan.expert_start_E1.diff() == 0].any()


@pytest.mark.parametrize("run", [native, public, reference])
@cases
def test_expand(T: int, K: int, E: int, load: str, run) -> None:
    plan, (z_TKR, b_EOR, dy_TO) = some_plan(T, K, E, load), inputs("grouped_expand", T, K, E, R, I)
    z_TKR[plan.expert_TK < 0] = torch.nan  # nobody's
    with poisoned():
        y_TO, dz_TKR, db_EOR = results(run("grouped_expand"), plan, z_TKR, b_EOR, dy_TO)
    wanted = [torch.zeros_like(x) for x in (dy_TO, z_TKR, b_EOR)]
    for t in range(T):
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e >= 0:
                wanted[0][t] += b_EOR[e] @ z_TKR[t, k]
                wanted[1][t, k] = dy_TO[t] @ b_EOR[e]
                wanted[2][e] += torch.outer(dy_TO[t], z_TKR[t, k])
    for a, b in zip((y_TO, dz_TKR, db_EOR), wanted, strict=True):
        assert_close(a, b)
    assert not dz_TKR[plan.expert_TK < 0].any()
    assert not db_EOR[plan.expert_start_E1.diff() == 0].any()


@both
@pytest.mark.parametrize("K, E, dense", [(2, 3, True), (2, 4, False), (3, 8, False), (5, 5, True)])
def test_the_sizes_choose(op: str, K: int, E: int, dense: bool) -> None:
    plan, (first, w, _) = some_plan(40, K, E, "uniform"), inputs(op, 40, K, E, R, I)
    name = public(op)(first.requires_grad_(), w, plan).grad_fn.name()
    assert ("mixlora" not in name) == dense


@only_cpu
@both
@pytest.mark.parametrize("load", ["uniform", "empty slots"])
@pytest.mark.parametrize(
    "R, I", [(1, 1), (1, 8), (2, 3), (3, 17), (4, 4), (5, 31), (7, 2), (17, 5)]
)
def test_gradcheck(op: str, load: str, R: int, I: int) -> None:
    plan, tensors = some_plan(5, 2, 4, load), inputs(op, 5, 2, 4, R, I)[:2]
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *tensors: native(op)(*tensors, plan), tensors)


@only_cpu
@both
@cases
def test_gradcheck_of_routings(op: str, T: int, K: int, E: int, load: str) -> None:
    T = min(T, 6)
    plan, tensors = some_plan(T, K, E, load), inputs(op, T, K, E, 2, 3)[:2]
    tensors = [x.requires_grad_() for x in tensors]
    for run in (native, reference):
        assert T == 0 or torch.autograd.gradcheck(
            lambda *tensors: run(op)(*tensors, plan),  # noqa: B023  called in this turn
            tensors,
        )


# Below, at and beyond each block and tile: 48 rows, 16 ranks, 256 columns; 64 terms, 96 columns,
# 512 tokens.
SIZES = {
    "one of each": (1, 1, 1, 1, 1),
    "one more than a block": (97, 1, 1, 17, 257),
    "panels": (130, 2, 3, 16, 193),
    "whole blocks": (96, 2, 2, 32, 512),
    "rank 128": (100, 2, 3, 128, 40),
    "rank 13": (150, 3, 4, 13, 311),
    "many experts": (200, 6, 64, 8, 72),
    "chunks of tokens": (1030, 2, 3, 7, 100),
    "few rows": (8, 2, 40, 16, 193),
    "few rows of one expert": (30, 1, 2, 8, 1100),
    "few rows of rank 24": (5, 3, 9, 24, 96),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@slow_cuda
@pytest.mark.parametrize("T, K, E, R, I", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@both
def test_against_reference(
    op: str, T: int, K: int, E: int, R: int, I: int, dtype: torch.dtype
) -> None:
    plan, tensors = some_plan(T, K, E, "zipf"), inputs(op, T, K, E, R, I, dtype)
    with poisoned():
        found = results(native(op), plan, *tensors)
    ref = results(reference(op), plan, *tensors)
    ref64 = results(reference(op), plan, *(x.double() for x in tensors))
    for values, factor in zip(zip(found, ref, ref64, strict=True), (2, 3, 3), strict=True):
        assert values[0].dtype == dtype
        if dtype == torch.float64:
            assert_close(values[0], values[1])
        else:
            assert_close_to_ref64(*values, factor=factor)
        if dtype in (torch.bfloat16, torch.float16):  # one rounding: fp32 inside
            assert_close(values[0].double(), values[2], rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("R", [1, 4, 8, 16, 24, 64])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 257])
@both
def test_edges(op: str, T: int, R: int) -> None:
    load = ("uniform", "one pair", "empty slots", "some empty")[(T + R) % 4]
    dtype, I = DTYPES[1:][(T + R) % 3], 300 if R == 1 else 72 if T % 2 else 67
    K, E = 2 if load == "one pair" else 1 + (T + R // 4) % 8, 40 if R == 4 else 9
    plan, tensors = some_plan(T, K, E, load), inputs(op, T, K, E, R, I, dtype)
    with poisoned():
        found = results(native(op), plan, *tensors)
    ref = results(reference(op), plan, *tensors)
    ref64 = results(reference(op), plan, *(x.double() for x in tensors))
    for values, factor in zip(zip(found, ref, ref64, strict=True), (2, 3, 3), strict=True):
        assert_close_to_ref64(*values, factor=factor)


@both
def test_slots_in_any_order_and_repeated_experts(op: str) -> None:
    expert_TK = torch.tensor([[2, 1], [0, 2], [1, 1], [2, 0], [-1, 1], [1, -1]], dtype=torch.int32)
    plan, tensors = ops.moe_sort(expert_TK, 3), inputs(op, 6, 2, 3, R, I)
    found = results(native(op), plan, *tensors)
    wanted = results(reference(op), plan, *tensors)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)


def test_experts_are_added_in_their_order() -> None:
    """(-1e8 + 1) + 1e8 is 0 in fp32, and 1e8 - 1e8 + 1 is 1."""
    plan = ops.moe_sort(torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.int32), 3)
    z_TKR = torch.tensor([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]])
    y_TO = native("grouped_expand")(z_TKR, torch.ones(3, 50, 1), plan)
    assert torch.equal(y_TO, torch.tensor([[0.0], [1.0]]).expand(2, 50))


@both
def test_non_contiguous(op: str) -> None:
    plan = some_plan(60, 3, 5, "empty slots")
    far_plan = ops.Plan(*map(scattered_int, plan))
    tensors = inputs(op, 60, 3, 5, R, I)
    far = results(native(op), far_plan, *map(scattered, tensors))
    assert_same_bits(far, results(native(op), plan, *tensors))
    for a, b in zip(results(reference(op), far_plan, *map(scattered, tensors)), far, strict=True):
        assert_close(a, b)


def scattered_int(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 99)], dim=-1)[..., 0]


@both
@pytest.mark.parametrize("run", [native, reference])
def test_one_tensor_of_two_wants_a_gradient(op: str, run) -> None:
    plan, tensors = some_plan(20, 2, 5, "zipf"), inputs(op, 20, 2, 5, R, I)
    _, *wanted = results(run(op), plan, *tensors)
    for i, want in enumerate(wanted):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(tensors[:2])]
        run(op)(*leaves, plan).backward(tensors[2])
        assert leaves[1 - i].grad is None
        assert torch.equal(leaves[i].grad, want)


@only_cpu
@both
def test_any_number_of_threads(op: str) -> None:
    plan, tensors = some_plan(700, 2, 8, "zipf"), inputs(op, 700, 2, 8, 16, 200, torch.float32)
    assert_any_number_of_threads(lambda: results(public(op), plan, *tensors))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "plan = ops.moe_sort(torch.randint(-1, 8, (300, 3), dtype=torch.int32), 8)\n"
        "x, a, da = torch.randn(300, 331), torch.randn(8, 19, 331), torch.randn(300, 3, 19)\n"
        "def grads(op, dtype, *tensors):\n"
        "    *leaves, gradient = [t.to(dtype).requires_grad_() for t in tensors]\n"
        "    out = op(*leaves, plan)\n"
        "    return out, *torch.autograd.grad(out, leaves, gradient)\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    for op, *tensors in (('grouped_shrink', x, a, da),\n"
        "                         ('grouped_expand', da, a.mT.contiguous(), x)):\n"
        "        for a_, b in zip(grads(getattr(ops, op), dtype, *tensors),\n"
        "                         grads(getattr(ops, op + '_ref'), dtype, *tensors)):\n"
        "            print((a_ - b).abs().max() <= b.abs().max() * 8 * torch.finfo(dtype).eps)"
    )
    assert said_with(isa, program).split() == [isa] + ["tensor(True)"] * 24


@only_cpu
@both
@pytest.mark.parametrize("name", ["empty slots", "no token", "one slot", "one expert"])
def test_opcheck(op: str, name: str) -> None:
    T, K, E, _ = ROUTINGS[name]
    plan = some_plan(*ROUTINGS[name])
    first, w, gradient = inputs(op, T, K, E, R, I)
    transposed = op == "grouped_expand"
    a_TKR, x_TI = (first, gradient) if transposed else (gradient, first)
    for tensor in (first, w, gradient):
        tensor.requires_grad_()
    for name, tensors in {op: (first, w), "grouped_outer": (a_TKR, x_TI)}.items():
        arguments = *tensors, transposed, *rows(plan)
        torch.library.opcheck(getattr(torch.ops.mixlora, name).default, arguments)


@both
def test_compile(op: str) -> None:
    plan = some_plan(*ROUTINGS["uniform"])
    first, w, _ = inputs(op, 24, 2, 5, R, I)

    def loss(first: Tensor, w: Tensor) -> Tensor:
        return (public(op)(first, w, plan) ** 2).sum()

    assert_compiles(loss, first.requires_grad_(), w.requires_grad_())


@only_cpu
@both
def test_second_derivative(op: str) -> None:
    plan, tensors = some_plan(4, 2, 5, "empty slots"), inputs(op, 4, 2, 5, 2, 3)[:2]
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(lambda *tensors: native(op)(*tensors, plan), tensors)


@both
def test_reference_switch(op: str) -> None:
    plan, (first, w, _) = some_plan(60, 2, 5, "zipf"), inputs(op, 60, 2, 5, R, I)
    wanted = public(op)(first, w, plan)
    first.requires_grad_()
    with ops.reference():
        value = public(op)(first, w, plan)
        ref = reference(op)(first, w, plan)
    assert value.grad_fn.name() == ref.grad_fn.name()
    assert torch.equal(value, ref)
    assert_close(value, wanted)


def full(shape: tuple[int, ...], value: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32)


X, W, A = torch.zeros(3, 4), torch.zeros(3, 2, 4), torch.zeros(3, 2, 2)
PLAN = "transposed", "expert_TK", "expert_start_E1", "row_slot_N"
ARGUMENTS = {
    "grouped_shrink": ("x_TI", "w", *PLAN),
    "grouped_expand": ("a_TKR", "w", *PLAN),
    "grouped_outer": ("a_TKR", "x_TI", *PLAN),
}
# Of the operators that have the first word of each.
ERRORS = [
    ("x_TI must be float", {"x_TI": X.int()}),
    ("x_TI must be [T, I] = [3, 4], got [2, 4]", {"x_TI": X[:2]}),
    ("a_TKR must be float", {"a_TKR": A.int()}),
    ("a_TKR must be [T, K, R] = [3, 2, 2], got [2, 2, 2]", {"a_TKR": A[:2]}),
    ("w must be float32, got float64", {"w": W.double()}),
    ("w must be [E, R, I] = [3, 2, 4], got [2, 2, 4]", {"w": W[:2]}),
    ("w must be [E, R, I], got [3, 8]", {"w": W.flatten(1)}),
    ("w must be [E, R, I] = [3, ", {"w": W.mT}),
    ("w must be [E, I, R] = [3, ", {"transposed": True}),
    ("expert_TK must be in [-1, 3), got 3", {"expert_TK": full((3, 2), 3)}),
    ("expert_TK must be int32, got int64", {"expert_TK": full((3, 2), 0).long()}),
    ("row_slot_N must be in [0, 6), got -1", {"row_slot_N": full((6,), -1)}),
    ("row_slot_N must be in [0, 6), got 6", {"row_slot_N": full((6,), 6)}),
    ("row_slot_N must be [N] = [6], got [5]", {"row_slot_N": full((5,), 0)}),
    (
        "row_slot_N must ascend among the rows of expert 1",
        {"row_slot_N": torch.tensor([0, 4, 2, 1, 3, 5]).int()},
    ),
    ("expert_start_E1 must ascend from 0 to at most 6", {"expert_start_E1": full((4,), 1)}),
    ("expert_start_E1 must ascend", {"expert_start_E1": torch.tensor([0, 2, 1, 6]).int()}),
    ("expert_start_E1 must ascend", {"expert_start_E1": torch.tensor([0, 2, 4, 7]).int()}),
]


@pytest.mark.parametrize(
    "op, message, changes",
    [
        (op, *error)
        for op, names in ARGUMENTS.items()
        for error in ERRORS
        if error[0].split()[0] in names
    ],
)
def test_errors(op: str, message: str, changes: dict) -> None:
    plan = ops.moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32), 3)
    given = {"x_TI": X, "w": W, "a_TKR": A, "transposed": False}
    given |= dict(zip(PLAN[1:], rows(plan), strict=True))
    given |= changes
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.mixlora, op)(**{name: given[name] for name in ARGUMENTS[op]})
    assert str(error.value).startswith(f"{op}: {message}")
