import pytest
import torch
from torch import Tensor

from mixlora import ops
from mixlora.layers.context import ForwardContext, Sequences, Span
from mixlora.layers.router import ROUTERS, Router, TopKRouter, load_balance_loss
from tests.numerics import assert_close
from tests.tiny import MIXLORA, add_filled, normal, padded, some_tokens, tiny_model

SEQUENCES = Sequences(ForwardContext((Span("m", 0, 1),)), Span("m", 0, 1), None)


def hf_loss(layers: list[Tensor], K: int, mask_BS: Tensor | None = None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mask_BS = mask_BS if mask_BS is None else mask_BS.long()
    return load_balancing_loss_func(tuple(layers), layers[0].shape[1], K, mask_BS)


def some_layers(num_layers: int, T: int, E: int) -> list[Tensor]:
    """Some experts are loved in one layer, others in the next."""
    return [
        normal(T, E, seed=layer, dtype=torch.float32) + 2 * normal(E, seed=50 + layer).float()
        for layer in range(num_layers)
    ]


def test_logits_are_fp32_and_keep_no_copy_of_x() -> None:
    router = TopKRouter(64, 8)
    x_TD = normal(20, 64, dtype=torch.bfloat16).requires_grad_()
    dlogits_TE = normal(20, 8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logits_TE = router.logits(x_TD, SEQUENCES)
    leaves = x_TD, router.weight
    wanted_TE = x_TD.float() @ router.weight.T
    assert_close(logits_TE, wanted_TE, rel=1e-6)  # few rows are summed in another order
    assert logits_TE.dtype == torch.float32
    found, wanted = (torch.autograd.grad(y, leaves, dlogits_TE) for y in (logits_TE, wanted_TE))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves}


@pytest.mark.parametrize("E, K", [(8, 2), (4, 1), (5, 5), (3, 2), (1, 1)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_loss_equals_that_of_mixtral(E: int, K: int, padding: bool, num_layers: int) -> None:
    mask_BS = padded([9, 20, 1, 14], "left")[1]
    layers = some_layers(num_layers, mask_BS.numel(), E)
    mask_BS = mask_BS if padding else None
    mask_T = mask_BS.flatten() if padding else None
    leaves = [x.requires_grad_() for x in layers]
    loss = load_balance_loss([ops.topk_router(x, K, mask_T) for x in leaves])
    wanted = hf_loss(leaves, K, mask_BS)
    assert loss.dtype == torch.float32
    assert_close(loss, wanted, rel=1e-6)
    found, known = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, wanted))
    for a, b in zip(found, known, strict=True):
        if E == K:  # the loss is a constant, and its gradient nothing but rounding
            assert a.abs().max() < 1e-7
        else:
            assert a.any()
            assert_close(a, b, rel=1e-5)


def test_loss_does_not_see_what_stands_in_padding() -> None:
    mask_T = torch.arange(30) % 4 != 0
    layers = some_layers(2, 30, 4)
    wanted = load_balance_loss([ops.topk_router(x, 2, mask_T) for x in layers])
    for x in layers:
        x[~mask_T] = 100 * torch.rand(4)
    assert torch.equal(load_balance_loss([ops.topk_router(x, 2, mask_T) for x in layers]), wanted)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_uniform_routing_gives_k(scope: str, K: int) -> None:
    """Every token prefers K neighbouring experts of a circle, all equally often."""
    E = 6
    logits_TE = torch.zeros(E, E)
    for t in range(E):
        logits_TE[t, (t + torch.arange(K)) % E] = 0.1
    loss = load_balance_loss([ops.topk_router(logits_TE, K)] * 3, scope)
    assert_close(loss, torch.tensor(float(K)), rel=1e-6)


def test_collapsed_routing_gives_the_number_of_experts() -> None:
    logits_TE = torch.tensor([[50.0, 0, 0, 0]]).expand(9, 4)
    assert_close(load_balance_loss([ops.topk_router(logits_TE, 1)]), torch.tensor(4.0), rel=1e-6)


def test_scope_per_layer_is_the_mean_of_the_layers_losses() -> None:
    layers = [ops.topk_router(x, 2) for x in some_layers(3, 40, 5)]
    alone = torch.stack([load_balance_loss([layer]) for layer in layers])
    assert_close(load_balance_loss(layers, "per_layer"), alone.mean(), rel=1e-6)
    assert (load_balance_loss(layers, "global") - alone.mean()).abs() > 0.01


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_nothing_but_padding_gives_zero(scope: str) -> None:
    layers = [ops.topk_router(x, 2, torch.zeros(6, dtype=torch.bool)) for x in some_layers(2, 6, 4)]
    assert load_balance_loss(layers, scope) == 0


def test_gradient_reaches_the_router_both_ways() -> None:
    router = TopKRouter(6, 4, top_k=2, router_init_range=1.0)
    x_TD = normal(20, 6, dtype=torch.float32).requires_grad_()
    routing = router(x_TD, SEQUENCES)
    for loss in ((routing.weight_TK * normal(20, 2).float()).sum(), load_balance_loss([routing])):
        dweight, dx_TD = torch.autograd.grad(loss, (router.weight, x_TD), retain_graph=True)
        assert dweight.abs().max() > 1e-6
        assert dx_TD.abs().max() > 1e-6


def test_router_is_fp32_and_jitters_in_training_alone() -> None:
    torch.manual_seed(0)
    router = TopKRouter(64, 4, top_k=2, jitter_noise=0.3)
    assert router.weight.std() < 0.05
    x_TD = normal(50, 64, dtype=torch.bfloat16)
    before_TD = x_TD.clone()
    noisy, other = router(x_TD, SEQUENCES), router(x_TD, SEQUENCES)
    assert not torch.equal(noisy.weight_TK, other.weight_TK)
    router.eval()
    quiet = router(x_TD, SEQUENCES)
    assert quiet.weight_TK.dtype == torch.float32
    wanted = ops.topk_router(x_TD.float() @ router.weight.T, 2)
    assert torch.equal(quiet.weight_TK, wanted.weight_TK)
    assert torch.equal(x_TD, before_TD)


def captured_logits(model) -> tuple[list[Tensor], list]:
    logits: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda router, inputs: logits.append(inputs[0].float() @ router.weight.T)
        )
        for module in model.modules()
        if isinstance(module, Router)
    ]
    return logits, hooks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_loss_of_a_whole_model(side: str, scope: str) -> None:
    model = tiny_model()
    add_filled(model, router_aux_loss_coef=0.25, router_loss_scope=scope, **MIXLORA)
    logits, _ = captured_logits(model)
    tokens_BS, mask_BS = padded([9, 2, 13], side)
    model(tokens_BS, mask_BS=mask_BS)
    loss = model.router_loss()
    assert len(logits) == 2
    if scope == "global":
        wanted = hf_loss(logits, 2, mask_BS)
    else:
        wanted = torch.stack([hf_loss([x], 2, mask_BS) for x in logits]).mean()
    assert_close(loss, 0.25 * wanted, rel=1e-6)
    assert torch.equal(model.router_loss("default"), loss)
    gates = [p for name, p in model.named_parameters() if "moe_gate" in name]
    for a, b in zip(
        torch.autograd.grad(loss, gates, retain_graph=True),
        torch.autograd.grad(0.25 * wanted, gates),
        strict=True,
    ):
        assert_close(a, b)


@torch.no_grad()
def test_loss_of_a_model_without_router_is_zero() -> None:
    model = tiny_model()
    tokens_BS = some_tokens(2, 5)
    assert model.router_loss() == 0
    add_filled(model, "lora")
    model(tokens_BS)
    assert model.router_loss() == model.router_loss("lora") == 0
    add_filled(model, "off", router_loss=False, **MIXLORA)
    model(tokens_BS)
    assert model.router_loss() == 0


@torch.no_grad()
def test_loss_of_several_adapters_is_their_sum() -> None:
    model = tiny_model()
    add_filled(model, "a", router_aux_loss_coef=0.5, **MIXLORA)
    add_filled(model, "b", router_aux_loss_coef=2, **MIXLORA, seed=5)
    model(some_tokens(3, 9), adapters=["a", "b", None])
    a, b = model.router_loss("a"), model.router_loss("b")
    assert a > 0.4 and b > 1.6
    assert_close(model.router_loss(), a + b)
    assert model.routing("none") == []


@pytest.mark.parametrize(
    "strategy, std",
    [
        ("mixlora", 0.02),
        ("mixlora-dynamic", 0.02),
        ("mixlora-switch", 1.0),
        ("loramoe", (2 / 6 / 400) ** 0.5),  # kaiming uniform, a = sqrt(5)
        ("mola", (2 / 6 / 400) ** 0.5),
    ],
)
def test_initial_weights(strategy: str, std: float) -> None:
    torch.manual_seed(0)
    router = ROUTERS[strategy](400, 50)
    assert router.weight.std().item() == pytest.approx(std, rel=0.03)
    assert getattr(router, "jitter_noise", 0) == (0.01 if strategy == "mixlora-switch" else 0)


def test_router_of_a_model_cast_to_bf16_computes_in_fp32() -> None:
    router = TopKRouter(64, 4, router_init_range=1.0).bfloat16()
    x_TD = normal(50, 64, dtype=torch.bfloat16)
    wanted = ops.topk_router(x_TD.float() @ router.weight.float().T, 2)
    assert torch.equal(router(x_TD, SEQUENCES).weight_TK, wanted.weight_TK)


def test_sums_count_what_the_router_wished() -> None:
    """Also the tokens that an expert has no room for; probabilities before the temperature."""
    x_TD = normal(20, 6, dtype=torch.float32)
    switch = ROUTERS["mixlora-switch"](6, 4, expert_capacity=1).eval()(x_TD, SEQUENCES)
    assert (switch.expert_TK < 0).any() and switch.count_E.sum() == 20
    dynamic = ROUTERS["mixlora-dynamic"](6, 4, temperature=3.0)(x_TD, SEQUENCES)
    assert_close(dynamic.prob_E.sum(), torch.tensor(20.0))
