import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora import _C, ops
from mixlora.ops.philox import keep_mask
from tests.kernels import every_instruction_set, only_cpu, poisoned, said_with, slow_cuda
from tests.numerics import assert_close, assert_close_to_ref64
from tests.tiny import ROUTINGS, normal, scattered, some_plan

cases = pytest.mark.parametrize("T, K, E, load", ROUTINGS.values(), ids=ROUTINGS)
act = pytest.mark.parametrize("act", ops.ACTIVATIONS)
dropout = pytest.mark.parametrize("dropout", [0.0, 0.3])
ACTS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp_min(0),
}
SCALING, SEED = 1.7, torch.tensor(2**61 + 12345)
ABSENT = {
    "nothing": (),
    "gate": (2, 4),
    "up": (3, 5),
    "down": (6,),
    "gate and up": (2, 3, 4, 5),
    "all": (2, 3, 4, 5, 6),
}
absent = pytest.mark.parametrize("without", ABSENT.values(), ids=ABSENT)


def inputs(
    plan: ops.Plan, E: int, F: int = 13, R: int = 3, dtype=torch.float64, without=()
) -> list[Tensor | None]:
    """The seven tensors and weight_TK; empty slots' weights and a_TKR are NaN: nobody's."""
    T, K = plan.expert_TK.shape
    shapes = (T, F), (T, F), (T, K, R), (T, K, R), (E, F, R), (E, F, R), (E, R, F), (T, K)
    tensors = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    for i in (2, 3, 7):
        tensors[i][plan.expert_TK < 0] = torch.nan
    return [None if i in without else x for i, x in enumerate(tensors)]


def call(op, tensors: list[Tensor | None], plan: ops.Plan, *options) -> tuple:
    return op(*tensors[:7], plan, tensors[7], SCALING, *options)


def with_gradients(op, tensors, plan: ops.Plan, *options) -> dict[str, Tensor]:
    """Both outputs and the gradients of every input, by name."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in call(op, leaves, plan, *options) if x is not None]
    dys = [normal(*x.shape, seed=20 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
    used = [x for x in leaves if x is not None]
    names = "gate up a_gate a_up b_gate b_up a_down weight".split()
    found = iter(torch.autograd.grad(outputs, used, dys))
    gradients = {
        f"d_{name}": next(found) for name, x in zip(names, leaves, strict=True) if x is not None
    }
    return {**dict(zip(("hbar", "z"), outputs, strict=False)), **gradients}


def slot_by_slot(tensors, plan: ops.Plan, act: str, dropout: float) -> tuple:
    """The definition, one slot at a time."""
    gate_TF, up_TF, a_gate, a_up, b_gate, b_up, a_down, weight_TK = tensors
    T, K = plan.expert_TK.shape
    hbar, z = [], []
    for t in range(T):
        hbar_F = torch.zeros_like(gate_TF[t])
        for k, e in enumerate(plan.expert_TK[t].tolist()):
            if e < 0:
                z.append(None if a_down is None else a_down.new_zeros(a_down.shape[1]))
                continue
            gate_F = gate_TF[t] + (0 if a_gate is None else SCALING * (b_gate[e] @ a_gate[t, k]))
            up_F = up_TF[t] + (0 if a_up is None else SCALING * (b_up[e] @ a_up[t, k]))
            h_F = ACTS[act](gate_F) * up_F
            hbar_F = hbar_F + weight_TK[t, k] * h_F
            kept_F = keep_mask(SEED, torch.tensor([t * K + k]), len(h_F), dropout)[0]
            z.append(None if a_down is None else a_down[e] @ (h_F * kept_F / (1 - dropout)))
        hbar.append(hbar_F)
    if not T:
        return gate_TF * 0, None if a_down is None else a_down.new_zeros(0, K, a_down.shape[1])
    return torch.stack(hbar), None if a_down is None else torch.stack(z).unflatten(0, (T, K))


@cases
@dropout
@pytest.mark.parametrize("op", [ops.shared_glu, ops.shared_glu_ref])
def test_definition(op, T: int, K: int, E: int, load: str, dropout: float) -> None:
    plan = some_plan(T, K, E, load)
    tensors = inputs(plan, E)
    hbar_TF, z_TKR = call(op, tensors, plan, "silu", dropout, SEED)
    wanted_TF, wanted_TKR = slot_by_slot(tensors, plan, "silu", dropout)
    assert_close(hbar_TF, wanted_TF)
    assert_close(z_TKR, wanted_TKR)
    assert not z_TKR[plan.expert_TK < 0].any()


@cases
@absent
def test_all_gradients(T: int, K: int, E: int, load: str, without: tuple) -> None:
    plan = some_plan(T, K, E, load)
    tensors = inputs(plan, E, without=without)
    options = "silu", 0.3, SEED
    native = with_gradients(ops.shared_glu, tensors, plan, *options)
    wanted = with_gradients(ops.shared_glu_ref, tensors, plan, *options)
    assert native.keys() == wanted.keys()
    assert ("z" in native) == (6 not in without)
    for name, value in native.items():
        assert_close(value, wanted[name].nan_to_num() if "d_" in name else wanted[name])


@pytest.mark.parametrize("token", [0, 6])
def test_what_is_not_finite_stays_with_its_experts(token: int) -> None:
    """Rows are computed several at a time, and padded: none may touch another expert's."""
    expert_TK = torch.tensor([[0, 1], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3], [0, 1]]).int()
    plan = ops.moe_sort(expert_TK, 4)
    tensors = [x.nan_to_num() for x in inputs(plan, 4, F=40, R=5)]
    for x in tensors[:4]:
        x[token] = torch.nan
    for name, value in with_gradients(ops.shared_glu, tensors, plan, "silu", 0.3, SEED).items():
        by_expert = name in ("d_b_gate", "d_b_up", "d_a_down")
        assert value[2:4].isfinite().all() if by_expert else value[1:6].isfinite().all(), name


@act
def test_activations(act: str) -> None:
    plan = some_plan(8, 2, 4, "empty slots")
    tensors = inputs(plan, 4)
    for found, wanted in zip(
        call(ops.shared_glu, tensors, plan, act), slot_by_slot(tensors, plan, act, 0.0), strict=True
    ):
        assert_close(found, wanted)


@slow_cuda
@act
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [30.0, 89.0, 200.0, 1e4])
def test_large_activations(act: str, dtype: torch.dtype, size: float) -> None:
    """Beyond what exp holds; one unit more than 88 in float32."""
    plan = some_plan(24, 2, 4, "uniform")
    tensors = inputs(plan, 4, dtype=dtype)
    tensors[0] = size * tensors[0].sign()
    native = with_gradients(ops.shared_glu, tensors, plan, act)
    ref = with_gradients(ops.shared_glu_ref, tensors, plan, act)
    for name, value in native.items():
        assert_close(value, ref[name])


@slow_cuda
@act
def test_gradcheck(act: str) -> None:
    plan = some_plan(3, 2, 3, "uniform")
    leaves = [x.requires_grad_() for x in inputs(plan, 3, F=3, R=2)]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(ops.shared_glu, tensors, plan, act, 0.3, SEED)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=act != "silu")


@slow_cuda
@absent
@pytest.mark.parametrize("load", ["empty slots", "some empty"])
def test_gradcheck_without(without: tuple, load: str) -> None:
    plan = some_plan(4, 2, 3, load)
    tensors = [
        None if x is None else x.nan_to_num() for x in inputs(plan, 3, 4, 2, without=without)
    ]
    used = [x.requires_grad_() for x in tensors if x is not None]

    def run(*used: Tensor) -> list[Tensor]:
        values = iter(used)
        filled = [None if x is None else next(values) for x in tensors]
        return [x for x in call(ops.shared_glu, filled, plan, "silu", 0.3, SEED) if x is not None]

    assert torch.autograd.gradcheck(run, used, fast_mode=True)


def test_gradient_of_a_weight_that_is_zero() -> None:
    plan = some_plan(6, 2, 4, "uniform")
    tensors = inputs(plan, 4)
    tensors[7][:, 0] = 0
    native = with_gradients(ops.shared_glu, tensors, plan)
    wanted = with_gradients(ops.shared_glu_ref, tensors, plan)
    assert (native["d_weight"][:, 0].abs() > 1e-3).all()
    assert_close(native["d_weight"], wanted["d_weight"])


def test_only_one_output_is_used() -> None:
    plan = some_plan(6, 2, 4, "uniform")
    for output, unused in ((0, 6), (1, 7)):
        leaves = [x.requires_grad_() for x in inputs(plan, 4)]
        found = torch.autograd.grad(call(ops.shared_glu, leaves, plan)[output].sum(), leaves)
        ref = call(ops.shared_glu_ref, leaves, plan)[output].sum()
        wanted = torch.autograd.grad(ref, leaves, allow_unused=True, materialize_grads=True)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert a.any() == (i != unused)
            assert_close(a, b)


FEW = [  # (T, K, E, load, F, R, DoRA's sides, biases)
    (1, 2, 8, "uniform", 300, 16, "", False),
    (16, 2, 64, "empty slots", 256, 8, "", False),
    (5, 1, 3, "zipf", 13, 24, "gate", True),
    (4, 8, 9, "uniform", 517, 64, "gate up", True),
    (3, 2, 5, "all empty", 40, 8, "up", False),
]


@only_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, K, E, load, F, R, sides, bias", FEW)
@pytest.mark.parametrize("without", [(), (2, 4), (6,)])
def test_few_rows(T, K, E, load, F, R, sides: str, bias: bool, without, dtype) -> None:
    """As in decoding: the matrices are read in place; a token's results are its own."""
    plan = some_plan(T, K, E, load)
    tensors = [x if x is None else x.nan_to_num() for x in inputs(plan, E, F, R, dtype, without)]
    extra = {
        name: x
        for name, x in dora(E, F, sides, bias, dtype).items()
        if not (2 in without and "gate" in name)
    }

    def run(op, dtype: torch.dtype) -> list[Tensor]:
        cast = [x if x is None else x.to(dtype) for x in tensors]
        scales = {name: x.to(dtype) for name, x in extra.items()}
        found = op(*cast[:7], plan, cast[7], SCALING, "silu", **scales)
        return [x.to(dtype) for x in found if x is not None]

    found = run(ops.shared_glu, dtype)
    exact = run(ops.shared_glu_ref, torch.float64)
    for native, ref, ref64 in zip(found, run(ops.shared_glu_ref, dtype), exact, strict=True):
        if dtype == torch.float64:
            assert_close(native, ref64)
        else:
            assert_close_to_ref64(native, ref, ref64)
    last = [x if x is None or i in (4, 5, 6) else x[-1:] for i, x in enumerate(tensors)]
    alone = ops.moe_sort(plan.expert_TK[-1:], E)
    again = ops.shared_glu(*last[:7], alone, last[7], SCALING, "silu", **extra)
    for native, row in zip(found, (x for x in again if x is not None), strict=True):
        assert torch.equal(native[-1:], row.to(dtype))


@slow_cuda
@pytest.mark.parametrize("load", ["zipf", "empty slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@dropout
def test_low_precision(dtype: torch.dtype, load: str, dropout: float, kernels: str) -> None:
    plan = some_plan(150, 2, 8, load)
    tensors = [x.nan_to_num() for x in inputs(plan, 8, F=72, R=6, dtype=dtype)]
    tensors[7] = tensors[7].float()  # routing is fp32 whatever the model's dtype
    options = "silu", dropout, SEED
    native = with_gradients(ops.shared_glu, tensors, plan, *options)
    ref = with_gradients(reference_of(kernels, dtype), tensors, plan, *options)
    assert native["hbar"].dtype == native["d_gate"].dtype == native["d_a_gate"].dtype == dtype
    assert native["z"].dtype == native["d_weight"].dtype == torch.float32

    ref64 = with_double_gradients(tensors, plan, native, *options)
    for name, value in native.items():
        factor = 3 if name.startswith("d_") else 2
        assert_close_to_ref64(value, ref[name], ref64[name], factor=factor)


def plain(
    gate_TF,
    up_TF,
    a_gate,
    a_up,
    b_gate,
    b_up,
    a_down,
    plan,
    weight_TK,
    s,
    act="silu",
    dropout=0.0,
    seed=None,
):
    """All in gate's dtype, as PyTorch without this operator computes it."""
    dtype, E, (T, K) = gate_TF.dtype, len(plan.expert_start_E1) - 1, plan.expert_TK.shape
    a_gate, a_up, b_gate, b_up, a_down = (x.to(dtype) for x in (a_gate, a_up, b_gate, b_up, a_down))
    hbar_TF, z_NR = torch.zeros_like(gate_TF), gate_TF.new_zeros(T * K, a_down.shape[1])
    for e in range(E):
        t, k = torch.where(plan.expert_TK == e)
        gate_NF = gate_TF[t] + s * (a_gate[t, k] @ b_gate[e].T)
        h_NF = ops.ACTIVATIONS[act](gate_NF) * (up_TF[t] + s * (a_up[t, k] @ b_up[e].T))
        hbar_TF = hbar_TF.index_add(0, t, weight_TK[t, k, None].to(dtype) * h_NF)
        if dropout:
            h_NF = h_NF * keep_mask(seed, t * K + k, h_NF.shape[1], dropout) / (1 - dropout)
        z_NR = z_NR.index_copy(0, t * K + k, h_NF @ a_down[e].T)
    return hbar_TF, z_NR.unflatten(0, (T, K)).float()


def reference_of(kernels: str, dtype: torch.dtype):
    """Whose error in low precision the kernels' may be twice: tensor cores, and a CPU's products of
    bf16, multiply numbers that are rounded to the dtype; else the CPU's are fp32."""
    multiplies_bf16 = _C.build_info()["instruction_set"] == "avx512_bf16"
    rounds = kernels != "cpu" or (multiplies_bf16 and dtype == torch.bfloat16)
    return plain if rounds else ops.shared_glu_ref


# T, K, E, load, F, R
EDGES = [
    (0, 2, 8, "uniform", 40, 8),
    (1, 8, 8, "uniform", 17, 64),
    (63, 2, 8, "one pair", 17, 4),
    (64, 3, 8, "some empty", 40, 16),
    (65, 1, 4, "empty slots", 40, 24),
    (3, 2, 3, "uniform", 300, 3),
    (257, 2, 8, "zipf", 24, 1),
    (20, 2, 64, "uniform", 20, 5),
    (5, 2, 3, "uniform", 16, 72),
    (130, 2, 5, "one pair", 24, 8),
    (9, 4, 6, "some empty", 33, 7),
    (9, 5, 6, "empty slots", 33, 8),
    (5, 6, 8, "uniform", 9, 4),
    (5, 7, 9, "empty slots", 40, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, K, E, load, F, R", EDGES)
def test_edges(T: int, K: int, E: int, load: str, F: int, R: int, dtype, kernels: str) -> None:
    """Twice the same bits; nothing depends on what memory held before."""
    plan = some_plan(T, K, E, load)
    tensors = [x.nan_to_num() for x in inputs(plan, E, F, R, dtype=dtype)]
    tensors[7] = tensors[7].float()
    options = "silu", 0.3, SEED
    with poisoned():
        native = with_gradients(ops.shared_glu, tensors, plan, *options)
        again = with_gradients(ops.shared_glu, tensors, plan, *options)
    reference = ops.shared_glu_ref if dtype == torch.float32 else reference_of(kernels, dtype)
    ref = with_gradients(reference, tensors, plan, *options)
    ref64 = with_double_gradients(tensors, plan, native, *options)
    for name, value in native.items():
        assert torch.equal(value, again[name]), name
        if dtype == torch.float32:
            assert_close(value, ref64[name].float())
        else:
            factor = 3 if name.startswith("d_") else 2
            assert_close_to_ref64(value, ref[name], ref64[name], factor=factor)


def with_double_gradients(tensors, plan: ops.Plan, native: dict, *options) -> dict[str, Tensor]:
    """The reference in float64 on the same numbers, output gradients included."""
    leaves = [x.double().requires_grad_() for x in tensors]
    hbar_TF, z_TKR = call(ops.shared_glu_ref, leaves, plan, *options)
    dys = [
        normal(*x.shape, seed=20 + i, dtype=native[name].dtype).double()
        for i, (name, x) in enumerate({"hbar": hbar_TF, "z": z_TKR}.items())
    ]
    found = torch.autograd.grad((hbar_TF, z_TKR), leaves, dys)
    names = [name for name in native if name.startswith("d_")]
    return {"hbar": hbar_TF, "z": z_TKR, **dict(zip(names, found, strict=True))}


def test_adapter_in_fp32_around_a_model_in_bfloat16(kernels: str) -> None:
    plan = some_plan(40, 2, 4, "uniform")
    tensors = inputs(plan, 4, dtype=torch.bfloat16)
    tensors[4:] = [x.float() for x in tensors[4:]]
    native = with_gradients(ops.shared_glu, tensors, plan)
    assert native["d_b_gate"].dtype == native["d_a_down"].dtype == torch.float32
    ref = with_gradients(reference_of(kernels, torch.bfloat16), tensors, plan)
    ref64 = with_double_gradients(tensors, plan, native)
    for name, value in native.items():
        assert_close_to_ref64(value, ref[name], ref64[name], factor=3 if "d_" in name else 2)


@pytest.mark.parametrize("load", ["uniform", "empty slots"])
def test_non_contiguous(load: str) -> None:
    plan = some_plan(40, 3, 5, load)
    tensors = [x.nan_to_num() for x in inputs(plan, 5)]
    wanted = with_gradients(ops.shared_glu, tensors, plan, "silu", 0.3, SEED)
    for view in (scattered, last_first, second_first):
        leaves = [view(x) for x in tensors]
        assert not any(x.is_contiguous() for x in leaves)
        leaves = [x.requires_grad_() for x in leaves]
        outputs = call(ops.shared_glu, leaves, plan, "silu", 0.3, SEED)
        dys = [scattered(normal(*x.shape, seed=20 + i)) for i, x in enumerate(outputs)]
        found = [*outputs, *torch.autograd.grad(outputs, leaves, dys)]
        for a, (name, b) in zip(found, wanted.items(), strict=True):
            assert a.any(), name
            assert_close(a, b)


def last_first(x: Tensor) -> Tensor:
    """The same values, last dimension first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def second_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_dropout() -> None:
    plan = some_plan(60, 2, 5, "uniform")
    tensors = inputs(plan, 5)
    hbar_TF, z_TKR = call(ops.shared_glu, tensors, plan)
    dropped_TF, dropped_TKR = call(ops.shared_glu, tensors, plan, "silu", 0.3, SEED)
    assert torch.equal(dropped_TF, hbar_TF)  # dropout is on the LoRA path alone
    assert not torch.equal(dropped_TKR, z_TKR)
    other_TKR = call(ops.shared_glu, tensors, plan, "silu", 0.3, SEED + 1)[1]
    assert not torch.equal(other_TKR, dropped_TKR)
    off_TKR = call(ops.shared_glu, tensors, plan, "silu", 0.0, SEED)[1]
    assert torch.equal(off_TKR, z_TKR)


@only_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    plan = some_plan(300, 2, 3, "zipf")
    tensors = inputs(plan, 3, F=200, R=8, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(ops.shared_glu, tensors, plan, "silu", 0.1, SEED))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), f"{name}, again"
        assert torch.equal(results[2][name], value), f"{name}, two threads"


def test_reference_switch() -> None:
    plan = some_plan(60, 2, 5, "empty slots")
    tensors = [x.nan_to_num().requires_grad_() for x in inputs(plan, 5)]
    native = call(ops.shared_glu, tensors, plan)
    with ops.reference():
        switched = call(ops.shared_glu, tensors, plan)
    for a, b, c in zip(native, switched, call(ops.shared_glu_ref, tensors, plan), strict=True):
        assert b.grad_fn.name() == c.grad_fn.name() != a.grad_fn.name()
        assert torch.equal(b, c)
        assert_close(a, b)


def test_wrong_arguments() -> None:
    plan = some_plan(6, 2, 4, "uniform")
    tensors = inputs(plan, 4)
    with pytest.raises(ValueError, match="shared_glu: act must be one of .*, got 'tanh'"):
        call(ops.shared_glu, tensors, plan, "tanh")
    with pytest.raises(ValueError, match="shared_glu: dropout 0.3 needs a seed"):
        call(ops.shared_glu, tensors, plan, "silu", 0.3)


# -- DoRA's scales, and what the operator promises to torch ----------------------------------------


def dora(E: int, F: int, sides: str, bias: bool, dtype=torch.float64) -> dict[str, Tensor]:
    shapes = {f"scale_{side}_EF": (E, F) for side in sides.split()}
    if bias:
        shapes |= {"bias_gate_F": (F,), "bias_up_F": (F,)}
    return {
        name: normal(*shape, seed=40 + i, dtype=dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


@slow_cuda
@cases
@pytest.mark.parametrize("sides", ["gate", "up", "gate up"])
@pytest.mark.parametrize("bias", [False, True])
def test_dora(T: int, K: int, E: int, load: str, sides: str, bias: bool) -> None:
    compare_dora(some_plan(T, K, E, load), E, sides, bias, dropout=0.3)


@pytest.mark.parametrize("sides", ["gate", "up", "gate up"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_with_dropout_or_without(sides: str, dropout: float) -> None:
    compare_dora(some_plan(24, 3, 5, "empty slots"), 5, sides, True, dropout)


def compare_dora(plan: ops.Plan, E: int, sides: str, bias: bool, dropout: float) -> None:
    tensors = inputs(plan, E)
    results = []
    for op in (ops.shared_glu, ops.shared_glu_ref):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        extra = dora(E, 13, sides, bias)
        scales = [x.requires_grad_() for name, x in extra.items() if "scale" in name]
        arguments = *leaves[:7], plan, leaves[7], SCALING, "silu", dropout, SEED
        outputs = op(*arguments, **extra)
        dys = [normal(*x.shape, seed=20 + i) for i, x in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, [*leaves, *scales], dys, materialize_grads=True)
        results.append([*outputs, *(x.nan_to_num() for x in grads)])
    for native, wanted in zip(*results, strict=True):
        assert_close(native, wanted)


@slow_cuda
@pytest.mark.parametrize("shape", range(50))
def test_gradcheck_of_many_shapes(shape: int) -> None:
    """Every input, DoRA's scales too; ragged sizes, empty slots, all activations."""
    rng = random.Random(shape)
    E, F, R = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 5)
    T, K = rng.randint(1, 5), rng.randint(1, E)
    plan = some_plan(T, K, E, rng.choice(["uniform", "empty slots"]))
    tensors = [x.nan_to_num() for x in inputs(plan, E, F, R)]
    extra = dora(E, F, rng.choice(["", "gate", "up", "gate up"]), rng.random() < 0.5)
    names = [name for name in extra if "scale" in name]
    leaves = [x.requires_grad_() for x in (*tensors, *(extra[name] for name in names))]
    act = rng.choice([act for act in ops.ACTIVATIONS if act != "relu"])  # which has a kink

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        scaled = {**extra, **dict(zip(names, tensors[8:], strict=True))}
        return ops.shared_glu(*tensors[:7], plan, tensors[7], SCALING, act, 0.3, SEED, **scaled)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def op_arguments(plan: ops.Plan, tensors, E: int, dropout: float = 0.3) -> tuple:
    rest = (None, None, None, None, E, SCALING, 0, dropout, SEED)
    return (*tensors[:7], plan.expert_TK, plan.token_order_T, tensors[7], *rest)


@only_cpu
@pytest.mark.parametrize("without", [(), (6,), (2, 4)])
def test_opcheck(without: tuple) -> None:
    plan = some_plan(6, 2, 4, "empty slots")
    tensors = [
        None if x is None else x.nan_to_num().requires_grad_()
        for x in inputs(plan, 4, without=without)
    ]
    arguments = op_arguments(plan, tensors, 4)
    torch.library.opcheck(torch.ops.mixlora.shared_glu, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    dz_TKR = None if 6 in without else normal(6, 2, 3)
    torch.library.opcheck(torch.ops.mixlora.shared_glu_backward, (normal(6, 13), dz_TKR, *detached))


def test_compile_in_one_graph() -> None:
    plan = some_plan(12, 2, 4, "uniform")
    tensors = inputs(plan, 4, dtype=torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        hbar_TF, z_TKR = call(ops.shared_glu, tensors, plan, "silu", 0.3, SEED)
        return hbar_TF.sum() + z_TKR.square().sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


@only_cpu
def test_a_long_batch_is_cut_into_blocks() -> None:
    """The backward's partial sums are of 2048 tokens at most."""
    plan = some_plan(4500, 2, 3, "zipf")
    tensors = inputs(plan, 3, F=130, R=2)
    native = with_gradients(ops.shared_glu, tensors, plan)
    for name, wanted in with_gradients(ops.shared_glu_ref, tensors, plan).items():
        assert_close(native[name], wanted)


@slow_cuda
def test_a_wide_feed_forward_is_cut_into_strips() -> None:
    """The forward's sums of z are of 1024 columns at most."""
    plan = some_plan(20, 2, 3, "zipf")
    tensors = inputs(plan, 3, F=1900, R=5)
    options = "silu", 0.3, SEED
    native = with_gradients(ops.shared_glu, tensors, plan, *options)
    for name, wanted in with_gradients(ops.shared_glu_ref, tensors, plan, *options).items():
        assert_close(native[name], wanted)


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = """
import torch
from mixlora import ops
from tests.ops.test_shared_glu import SEED, inputs, with_gradients
from tests.tiny import some_plan
plan = some_plan(70, 2, 5, "empty slots")
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for F, R in ((200, 16), (37, 5)):
        tensors = [x.nan_to_num() for x in inputs(plan, 5, F=F, R=R, dtype=dtype)]
        tensors[7] = tensors[7].to(torch.promote_types(dtype, torch.float32))
        native = with_gradients(ops.shared_glu, tensors, plan, "silu", 0.3, SEED)
        ref = with_gradients(ops.shared_glu_ref, tensors, plan, "silu", 0.3, SEED)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        for name, value in native.items():
            wanted = ref[name].double()
            error = (value.double() - wanted).abs().max() / wanted.abs().max()
            assert error <= tolerance, (dtype, F, R, name, error)
"""
    assert said_with(isa, program).split() == [isa]


@pytest.mark.parametrize(
    "change, said",
    [
        ({1: torch.zeros(6, 12)}, r"up_TF must have gate_TF's dtype float64, got float32"),
        ({1: torch.zeros(6, 12).double()}, r"up_TF must be \[T, F\] = \[6, 13\], got \[6, 12\]"),
        ({4: None}, "a and b of a projection must both be given, or neither"),
        ({16: 4}, r"act must be in \[0, 4\), got 4"),
        ({16: -1}, r"act must be in \[0, 4\), got -1"),
        ({18: None}, "dropout needs a seed"),
        ({2: torch.zeros(6, 2, 4).double()}, r"a_gate_TKR must be \[6, 2, 3\], got \[6, 2, 4\]"),
        ({5: torch.zeros(4, 13, 3)}, "b_up_EFR must be float64 beside this gate_TF, got float32"),
        ({7: torch.full((6, 2), 4, dtype=torch.int32)}, r"expert_TK must be in \[-1, 4\), got 4"),
        ({8: torch.full((6,), 6, dtype=torch.int32)}, r"token_order_T must be in \[0, 6\), got 6"),
        (
            {0: torch.zeros(6, 13).half()},
            "gate_TF must be float32, float64 or bfloat16, got float16",
        ),
    ],
)
def test_errors(change: dict, said: str) -> None:
    plan = some_plan(6, 2, 4, "uniform")
    arguments = list(op_arguments(plan, inputs(plan, 4), 4))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=f"^shared_glu: {said}"):
        torch.ops.mixlora.shared_glu(*arguments)
