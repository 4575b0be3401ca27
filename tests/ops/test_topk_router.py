import math

import pytest
import torch
from torch import Tensor

from mixlora import ops
from tests.numerics import assert_close, assert_close_to_ref64


def random_logits(T: int, E: int, seed: int = 0) -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(a: ops.Routing, b: ops.Routing) -> list[tuple[Tensor, Tensor]]:
    assert a.skip_T is b.skip_T is None
    return list(zip(a[:-1], b[:-1], strict=True))


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


@pytest.mark.parametrize("padding", [False, True])
def test_gradients(padding: bool) -> None:
    logits_TE = random_logits(7, 5).requires_grad_()
    mask_T = torch.arange(7) != 3 if padding else None

    def outputs(logits_TE: Tensor) -> tuple[Tensor, ...]:
        routing = ops.topk_router(logits_TE, 2, mask_T)
        return routing.weight_TK, routing.prob_E, routing.z

    assert torch.autograd.gradcheck(outputs, logits_TE)
    routing = ops.topk_router(logits_TE, 2, mask_T)
    assert not any(x.requires_grad for x in (routing.count_E, routing.entropy, routing.num_tokens))
    if padding:
        (dlogits_TE,) = torch.autograd.grad(routing.prob_E.square().sum(), logits_TE)
        assert not dlogits_TE[3].any() and dlogits_TE[2].any()


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[:, 1:6], lambda x: x[:8].T])
def test_non_contiguous(view) -> None:
    logits_TE = view(random_logits(20, 8))
    assert not logits_TE.is_contiguous()
    for a, b in pairs(ops.topk_router(logits_TE, 2), ops.topk_router(logits_TE.contiguous(), 2)):
        assert_close(a, b)


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
