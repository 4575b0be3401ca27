import math

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
from tests.tiny import scattered


def random_logits(T: int, E: int, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(a: ops.Routing, b: ops.Routing) -> list[tuple[Tensor, Tensor]]:
    """What the operator gives; the rest is a router's."""
    assert a[7:] == b[7:] == (None, None)
    return list(zip(a[:7], b[:7], strict=True))


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(logits_E: list[float], K: int) -> tuple[list[int], list[float], list[float]]:
    """(experts ascending, their weights, all probabilities) of one token, in plain Python."""
    raised = [math.exp(logit - max(logits_E)) for logit in logits_E]
    prob = [x / sum(raised) for x in raised]
    experts = sorted(sorted(range(len(prob)), key=lambda e: (-prob[e], e))[:K])
    return experts, [prob[e] / sum(prob[i] for i in experts) for e in experts], prob


@pytest.mark.parametrize("T, E, K", [(40, 8, 2), (40, 8, 8), (7, 3, 1), (1, 1, 1), (0, 8, 2)])
@pytest.mark.parametrize("padding", [False, True])
def test_against_plain_python(T: int, E: int, K: int, padding: bool) -> None:
    logits_TE = random_logits(T, E)
    mask_T = torch.arange(T) % 3 != 1 if padding else None
    with poisoned():
        routing = ops.topk_router(logits_TE, K, mask_T)
    tokens = [by_hand(row, K) for row in logits_TE.tolist()]
    assert routing.expert_TK.dtype == torch.int32
    assert routing.expert_TK.shape == routing.weight_TK.shape == (T, K)
    assert routing.expert_TK.tolist() == [experts for experts, _, _ in tokens]
    assert_close(routing.weight_TK, float64([weights for _, weights, _ in tokens]).view(T, K))

    real = [token for t, token in enumerate(tokens) if mask_T is None or mask_T[t]]
    count = [sum(e in experts for experts, _, _ in real) for e in range(E)]
    assert routing.count_E.tolist() == count
    assert_close(routing.prob_E, float64([sum(prob[e] for *_, prob in real) for e in range(E)]))
    entropy = sum(-p * math.log(p) for *_, prob in real for p in prob)
    assert_close(routing.entropy, float64(entropy))
    assert routing.num_tokens == len(real)
    real_TE = logits_TE if mask_T is None else logits_TE[mask_T]
    assert_close(
        routing.z, float64(sum(math.log(sum(map(math.exp, x))) ** 2 for x in real_TE.tolist()))
    )


def test_ties_go_to_the_lowest_index() -> None:
    logits_TE = torch.tensor([[0.0] * 70, [1.0] * 35 + [2.0] * 35, [0.0] * 69 + [1.0]])
    routing = ops.topk_router(logits_TE, 3)
    assert routing.expert_TK.tolist() == [[0, 1, 2], [35, 36, 37], [0, 1, 69]]
    assert_close(routing.weight_TK[:2], torch.full((2, 3), 1 / 3), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_indices_stay_in_range(bad: float) -> None:
    logits_TE = random_logits(6, 5).float()
    logits_TE[0, 2] = logits_TE[1] = logits_TE[2, 1:] = bad
    routing = ops.topk_router(logits_TE, 2)
    assert routing.expert_TK.min() >= 0 and routing.expert_TK.max() < 5
    assert (routing.expert_TK[:, 0] < routing.expert_TK[:, 1]).all()
    ops.moe_sort(routing.expert_TK, 5)
    assert routing.weight_TK[3:].isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e-8])
def test_extreme_logits(scale: float) -> None:
    routing = ops.topk_router(random_logits(50, 8).float() * scale, 2)
    assert routing.weight_TK.isfinite().all()
    assert routing.entropy.isfinite()
    assert_close(routing.weight_TK.sum(-1), torch.ones(50), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_route_in_fp32(dtype: torch.dtype) -> None:
    logits_TE = random_logits(200, 8).to(dtype)
    routing, routing64 = ops.topk_router(logits_TE, 2), ops.topk_router(logits_TE.double(), 2)
    ref = ops.topk_router_ref(logits_TE, 2)
    assert torch.equal(routing.expert_TK, routing64.expert_TK)
    assert routing.weight_TK.dtype == routing.prob_E.dtype == torch.float32
    for name in ("weight_TK", "prob_E", "entropy"):
        values = (getattr(x, name) for x in (routing, ref, routing64))
        assert_close_to_ref64(*values)


def test_chosen_experts_are_kept() -> None:
    logits_TE = random_logits(9, 4)
    expert_TK = torch.tensor([[0, 3]] * 9, dtype=torch.int32)
    mask_T = torch.arange(9) < 5
    routing = ops.topk_router(logits_TE, 2, mask_T, expert_TK)
    assert torch.equal(routing.expert_TK, expert_TK)
    pair_TK = logits_TE[:, [0, 3]].softmax(-1)  # renormalising is a softmax over the chosen
    assert_close(routing.weight_TK, pair_TK)
    assert routing.count_E.tolist() == [5, 0, 0, 5]
    again = ops.topk_router(logits_TE, 2, mask_T, ops.topk_router(logits_TE, 2).expert_TK)
    for a, b in pairs(again, ops.topk_router(logits_TE, 2, mask_T)):
        assert torch.equal(a, b)


@only_cpu  # on the CPU, CUDA kernels are too slow for so many calls
@pytest.mark.parametrize("T, E, K", [(7, 5, 2), (3, 9, 9), (4, 3, 1), (2, 1, 1), (3, 17, 4)])
@pytest.mark.parametrize("padding", [False, True])
def test_gradients(T: int, E: int, K: int, padding: bool) -> None:
    logits_TE = random_logits(T, E).requires_grad_()
    mask_T = torch.arange(T) != 1 if padding else None

    def outputs(logits_TE: Tensor) -> tuple[Tensor, ...]:
        routing = ops.topk_router(logits_TE, K, mask_T)
        return routing.weight_TK, routing.prob_E, routing.z

    with poisoned():
        assert torch.autograd.gradcheck(outputs, logits_TE)
    routing = ops.topk_router(logits_TE, K, mask_T)
    assert not any(x.requires_grad for x in (routing.count_E, routing.entropy, routing.num_tokens))
    if padding and E > 1:
        (dlogits_TE,) = torch.autograd.grad(routing.prob_E.square().sum(), logits_TE)
        assert not dlogits_TE[1].any() and dlogits_TE[0].any()


def test_second_derivative_is_an_error() -> None:
    logits_TE = random_logits(7, 5).requires_grad_()
    z = ops.topk_router(logits_TE, 2).z
    (dlogits_TE,) = torch.autograd.grad(z, logits_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="^topk_router_backward has no derivative of its own"):
        dlogits_TE.sum().backward()


def everything(op, logits_TE: Tensor, K: int, mask_T: Tensor | None = None) -> list[Tensor]:
    """The routing and the gradient of all that has one, with different weights for each."""
    logits_TE = logits_TE.detach().requires_grad_()
    routing = op(logits_TE, K, mask_T)
    outputs = routing.weight_TK, routing.prob_E, routing.z
    doutputs = [random_logits(x.numel(), 1, seed=i).view_as(x) for i, x in enumerate(outputs)]
    doutputs = [x.to(outputs[0].dtype) for x in doutputs]
    return [*routing[:7], *torch.autograd.grad(outputs, logits_TE, doutputs)]


@pytest.mark.parametrize("T, E, K", [(1000, 8, 2), (256, 64, 6), (257, 31, 5), (600, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [False, True])
def test_against_reference(T: int, E: int, K: int, dtype: torch.dtype, padding: bool) -> None:
    logits_TE = 3 * random_logits(T, E).to(dtype)
    mask_T = torch.arange(T) % 3 != 1 if padding else None
    found = everything(ops.topk_router, logits_TE, K, mask_T)
    ref = everything(ops.topk_router_ref, logits_TE, K, mask_T)
    ref64 = everything(ops.topk_router_ref, logits_TE.double(), K, mask_T)
    names = (*ops.Routing._fields[:7], "dlogits_TE")
    for name, a, b, b64 in zip(names, found, ref, ref64, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if name in ("expert_TK", "count_E", "num_tokens"):
            assert torch.equal(a, b), name
        elif dtype == torch.float64:
            assert_close(a, b)
        else:
            assert_close_to_ref64(a, b, b64)


def test_bad_logits_choose_what_the_reference_chooses() -> None:
    logits_TE = random_logits(60, 9).float()
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    where_TE = random_logits(60, 9, seed=1) > 0.3
    logits_TE[where_TE] = bad[torch.arange(int(where_TE.sum())) % 5]
    for K in (1, 3, 9):
        wanted = ops.topk_router_ref(logits_TE, K).expert_TK
        assert torch.equal(ops.topk_router(logits_TE, K).expert_TK, wanted)


def test_padding_may_hold_anything() -> None:
    logits_TE, mask_T = random_logits(300, 8).float(), torch.arange(300) % 4 != 0
    _, _, *wanted, wanted_TE = everything(ops.topk_router, logits_TE, 2, mask_T)
    logits_TE[~mask_T] = math.nan
    _, _, *found, found_TE = everything(ops.topk_router, logits_TE, 2, mask_T)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(found_TE[mask_T], wanted_TE[mask_T])


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:, 1:6], lambda x: x[:8].T])
def test_non_contiguous(view) -> None:
    logits_TE = view(random_logits(20, 8))
    assert not logits_TE.is_contiguous()
    mask_T = (torch.arange(2 * len(logits_TE)) % 4 != 0)[::2]
    assert not mask_T.is_contiguous()
    dense = everything(ops.topk_router, logits_TE.contiguous(), 2, mask_T.contiguous())
    for a, b in zip(everything(ops.topk_router, logits_TE, 2, mask_T), dense, strict=True):
        assert torch.equal(a, b)
    expert_TK = dense[0].flip(0)
    given = ops.topk_router(logits_TE, 2, mask_T, expert_TK)
    expert_TK = expert_TK.T.contiguous().T
    for a, b in pairs(given, ops.topk_router(logits_TE, 2, mask_T, expert_TK)):
        assert torch.equal(a, b)
    grads = random_logits(len(logits_TE), 2), random_logits(logits_TE.shape[1], 1)[:, 0]
    backward = torch.ops.mixlora.topk_router_backward
    far = backward(*map(scattered, grads), torch.ones(()).double(), logits_TE, expert_TK, mask_T)
    assert torch.equal(backward(*grads, torch.ones(()).double(), logits_TE, expert_TK, mask_T), far)


@only_cpu
def test_compile() -> None:
    mask_T = torch.arange(20) % 3 != 1

    def loss(logits_TE: Tensor) -> Tensor:
        routing = ops.topk_router(logits_TE, 2, mask_T)
        return routing.weight_TK[:, 0].sum() + routing.prob_E @ routing.count_E + routing.z

    assert_compiles(loss, random_logits(20, 5).requires_grad_())


@only_cpu
@pytest.mark.parametrize("T, E, K", [(9, 5, 2), (0, 5, 2), (3, 1, 1)])
def test_opcheck(T: int, E: int, K: int) -> None:
    logits_TE, mask_T = random_logits(T, E), torch.arange(T) % 3 != 1
    expert_TK = ops.topk_router(logits_TE, K).expert_TK
    grads = random_logits(T, K), random_logits(1, E)[0], torch.tensor(2.0).double()
    for mask in (mask_T, None):
        arguments = *grads, logits_TE.detach(), expert_TK, mask
        torch.library.opcheck(torch.ops.mixlora.topk_router_backward.default, arguments)
        arguments = logits_TE.requires_grad_(), K, mask, expert_TK if mask is None else None
        torch.library.opcheck(torch.ops.mixlora.topk_router.default, arguments)


@only_cpu
def test_any_number_of_threads() -> None:
    logits_TE, mask_T = random_logits(5000, 8).float(), torch.arange(5000) % 3 != 1
    assert_any_number_of_threads(lambda: everything(ops.topk_router, logits_TE, 2, mask_T))


@every_instruction_set
def test_every_instruction_set(isa: str) -> None:
    program = (
        "import torch; from mixlora import ops\n"
        "for E, dtype in [(9, torch.float32), (9, torch.float64), (8, torch.bfloat16)]:\n"
        "    x = (3 * torch.randn(700, E)).to(dtype).requires_grad_()\n"
        "    def results(op):\n"
        "        routing = op(x, 3)\n"
        "        loss = routing.weight_TK[:, 0].sum() + routing.prob_E[2] + routing.z / 700\n"
        "        return *routing[:7], *torch.autograd.grad(loss, x)\n"
        "    for a, b in zip(results(ops.topk_router), results(ops.topk_router_ref)):\n"
        "        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0\n"
        "        print(((a - b).abs().max() <= b.abs().max() * 16 * eps).item())"
    )
    assert said_with(isa, program).split() == [isa] + ["True"] * 24


@pytest.mark.parametrize(
    "logits_TE, options, message",
    [
        (torch.zeros(3), {}, "logits_TE must be [T, E], got [3]"),
        (torch.zeros(3, 4).int(), {}, "logits_TE must be float64, float32, bfloat16 or float16"),
        (torch.zeros(3, 4), {"top_k": 5}, "top_k must be in [1, 4], got 5"),
        (torch.zeros(3, 4), {"mask_T": torch.ones(3)}, "mask_T must be bool, got float32"),
        (torch.zeros(3, 4), {"mask_T": torch.ones(2).bool()}, "mask_T must be [T] = [3], got [2]"),
        (
            torch.zeros(3, 4),
            {"expert_TK": torch.full((3, 2), 4).int()},
            "expert_TK must be in [0, 4), got 4 at 0",
        ),
        (
            torch.zeros(3, 4),
            {"expert_TK": torch.zeros(3, 1).int()},
            "expert_TK must be [T, K] = [3, 2], got [3, 1]",
        ),
    ],
)
def test_errors(logits_TE: Tensor, options: dict, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        right = {"top_k": 2, "mask_T": None, "expert_TK": None}
        torch.ops.mixlora.topk_router(logits_TE, **{**right, **options})
    assert str(error.value).startswith(f"topk_router: {message}")


def test_reference_switch_and_repetition() -> None:
    logits_TE = random_logits(300, 8).float()
    routing = ops.topk_router(logits_TE, 2)
    for a, b in pairs(ops.topk_router(logits_TE, 2), routing):
        assert torch.equal(a, b)
    with ops.reference():
        reference = ops.topk_router(logits_TE, 2)
    for a, b in pairs(reference, routing):
        assert_close(a, b)


@pytest.mark.parametrize("K", [0, 5, -1])
def test_wrong_top_k(K: int) -> None:
    with pytest.raises(ValueError, match=rf"^topk_router: top_k must be in \[1, 4\], got {K}$"):
        ops.topk_router(torch.zeros(2, 4), K)
