import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.kernels import (
    assert_any_number_of_threads,
    every_instruction_set,
    only_cpu,
    said_with,
)

# name: (T, K, E, load)
CASES = {
    "uniform": (300, 2, 8, "uniform"),
    "zipf": (300, 2, 8, "zipf"),
    "one expert takes all": (300, 2, 8, "one"),
    "some experts empty": (300, 2, 8, "some empty"),
    "empty slots": (300, 2, 8, "empty slots"),
    "all slots empty": (5, 3, 4, "all empty"),
    "no token": (0, 2, 8, "uniform"),
    "one token": (1, 2, 8, "uniform"),
    "one slot": (300, 1, 8, "uniform"),
    "every expert": (50, 8, 8, "uniform"),
    "every expert, empty slots": (50, 8, 8, "empty slots"),
    "64 experts": (300, 6, 64, "zipf"),
    "one expert": (7, 1, 1, "uniform"),
    "several chunks": (40_000, 2, 8, "empty slots"),
}


def make_experts(T: int, K: int, E: int, load: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight_E = torch.ones(E)
    if load == "zipf":
        weight_E = 1 / torch.arange(1, E + 1)
    if load == "some empty":
        weight_E[::2] = 0
    expert_TK = torch.empty(T, K, dtype=torch.int32)
    if T:
        expert_TK[:] = torch.multinomial(weight_E.expand(T, E), K, generator=generator)
    if load == "one":
        expert_TK[:] = 3
    if load == "all empty":
        expert_TK[:] = -1
    if load == "empty slots":
        expert_TK[torch.rand(T, K, generator=generator) < 0.3] = -1
    return expert_TK


def assert_equal(plan: ops.Plan, wanted: ops.Plan) -> None:
    for name, a, b in zip(ops.Plan._fields, plan, wanted, strict=True):
        assert a.dtype == torch.int32, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("T, K, E, load", CASES.values(), ids=CASES)
def test_equals_reference(T: int, K: int, E: int, load: str) -> None:
    expert_TK = make_experts(T, K, E, load)
    plan = ops.moe_sort(expert_TK, E)
    assert_equal(plan, ops.moe_sort_ref(expert_TK, E))
    assert_equal(plan, ops.moe_sort(expert_TK, E))


def test_example_of_the_docstring() -> None:
    expert_TK = torch.tensor([[0, 2], [1, 2], [0, -1]], dtype=torch.int32)
    plan = ops.moe_sort(expert_TK, 3)
    assert plan.expert_start_E1.tolist() == [0, 2, 3, 5]
    assert plan.row_slot_N.tolist() == [0, 4, 2, 1, 3, -1]
    assert plan.slot_row_TK.tolist() == [[0, 3], [2, 4], [1, -1]]
    assert plan.token_order_T.tolist() == [2, 0, 1]


@pytest.mark.parametrize("view", [lambda x: x[::3], lambda x: x[:, 1:4], lambda x: x[:6, :6].T])
def test_non_contiguous(view) -> None:
    expert_TK = view(make_experts(60, 6, 8, "empty slots"))
    assert not expert_TK.is_contiguous()
    assert_equal(ops.moe_sort(expert_TK, 8), ops.moe_sort_ref(expert_TK, 8))


@only_cpu
def test_any_number_of_threads() -> None:
    expert_TK = make_experts(50_000, 2, 8, "zipf")
    assert_any_number_of_threads(lambda: ops.moe_sort(expert_TK, 8))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "x = torch.randint(-1, 8, (5000, 3), dtype=torch.int32)\n"
        "pairs = zip(ops.moe_sort(x, 8), ops.moe_sort_ref(x, 8))\n"
        "print(all(torch.equal(a, b) for a, b in pairs))"
    )
    assert said_with(isa, program).split() == [isa, "True"]


@only_cpu
def test_opcheck() -> None:
    for T in (0, 20):
        arguments = make_experts(T, 2, 4, "empty slots"), 4
        torch.library.opcheck(torch.ops.mixlora.moe_sort.default, arguments)


@pytest.mark.slow
@only_cpu
def test_compile() -> None:
    expert_TK = make_experts(20, 2, 4, "empty slots")
    compiled = torch.compile(ops.moe_sort, fullgraph=True)
    assert_equal(compiled(expert_TK, 4), ops.moe_sort_ref(expert_TK, 4))


def test_reference_switch() -> None:
    expert_TK = make_experts(5, 2, 4, "uniform").long()  # the reference takes int64, the kernel not
    with ops.reference():
        ops.moe_sort(expert_TK, 4)
    with pytest.raises(RuntimeError):
        ops.moe_sort(expert_TK, 4)


@pytest.mark.parametrize(
    "expert, num_experts, message",
    [
        ([[0, 1]], 0, "num_experts must be at least 1, got 0"),
        ([0, 1, 2], 4, "expert_TK must be [T, K], got [3]"),
        ([[], []], 4, "expert_TK must have K >= 1 slots, got [2, 0]"),
        ([[0, 1], [3, 4]], 4, "expert_TK must be in [-1, 4), got 4 at 3"),
        ([[0, 1], [-2, 3]], 4, "expert_TK must be in [-1, 4), got -2 at 2"),
    ],
)
def test_errors(expert: list, num_experts: int, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        ops.moe_sort(torch.tensor(expert, dtype=torch.int32), num_experts)
    assert str(error.value) == f"moe_sort: {message}"


def test_wrong_dtype() -> None:
    with pytest.raises(RuntimeError, match="^moe_sort: expert_TK must be int32, got int64$"):
        ops.moe_sort(torch.zeros(2, 2, dtype=torch.int64), 4)
