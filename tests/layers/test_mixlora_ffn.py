import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mixlora
from mixlora import ops
from mixlora.adapters import adapter_parameters
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Lora
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward, MixLora
from mixlora.layers.router import ROUTERS
from mixlora.ops.philox import keep_mask
from tests.numerics import assert_close
from tests.tiny import MIXLORA, add_filled, fill, normal, padded, some_tokens, tiny_model

ACTS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp_min(0),
}


def make_ffn(
    D: int,
    F: int,
    act: str = "silu",
    bias: bool = False,
    strategy: str = "mixlora",
    router: dict | None = None,
    **config,
) -> FeedForward:
    """A frozen feed-forward with one mixture, "m", of filled experts."""
    ffn = FeedForward(D, F, act, bias).requires_grad_(False)
    fill(dict(ffn.named_parameters()))
    settings = {"num_experts": 4} | (router or {})
    for key in ("num_experts", "top_k"):
        if key in config:
            settings[key] = config.pop(key)
    config = {"projections": PROJECTIONS, "r": 3, "lora_alpha": 5, **config}
    ffn.mixtures["m"] = MixLora(ffn, ROUTERS[strategy](D, **settings), **config)
    fill(trained(ffn), seed=1)
    return ffn


def context(x_BSD: Tensor, mask_BS: Tensor | None = None) -> ForwardContext:
    return ForwardContext((Span("m", 0, len(x_BSD)),), mask_BS)


def expert_loop(ffn: FeedForward, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(y_TD, probabilities): every expert a feed-forward of its own, of weights W + s B A."""
    mixture = ffn.mixtures["m"]
    prob_TE = (x_TD @ mixture.moe_gate.weight.T).softmax(-1)
    chosen_TE = torch.zeros_like(prob_TE)
    chosen_TE.scatter_(1, prob_TE.topk(mixture.moe_gate.top_k).indices, 1.0)
    weight_TE = prob_TE * chosen_TE / (prob_TE * chosen_TE).sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for e in range(mixture.num_experts):

        def project(x: Tensor, name: str, e: int = e) -> Tensor:
            base, experts = getattr(ffn, name), getattr(mixture, name)
            weight = base.weight
            if experts is not None:
                weight = weight + mixture.scaling * experts.lora_B[e] @ experts.lora_A[e]
            return F.linear(x, weight, base.bias)

        h_TF = ACTS[mixture.act](project(x_TD, "gate_proj")) * project(x_TD, "up_proj")
        y_TD = y_TD + weight_TE[:, e, None] * project(h_TF, "down_proj")
    return y_TD, prob_TE


def trained(ffn: FeedForward) -> dict[str, nn.Parameter]:
    return {name: p for name, p in ffn.named_parameters() if p.requires_grad}


def compare_with_expert_loop(
    ffn: FeedForward, x_BSD: Tensor, rel: float, run: Callable | None = None
) -> None:
    """Outputs and every gradient; the router's also through the probabilities' sum, since with
    K = 1 its weights are constant."""
    x_BSD = x_BSD.requires_grad_()
    inputs = {"x": x_BSD, **trained(ffn)}
    dy_BSD = normal(*x_BSD.shape, seed=7, dtype=x_BSD.dtype)
    dprob_E = normal(ffn.mixtures["m"].num_experts, seed=8, dtype=x_BSD.dtype)

    of = context(x_BSD)
    y_BSD = ffn(x_BSD, of)
    (routing,) = of.routing.values()
    loss = (y_BSD * dy_BSD).sum() + (routing.prob_E * dprob_E).sum()
    found = torch.autograd.grad(loss, list(inputs.values()))

    wanted_TD, prob_TE = expert_loop(ffn, x_BSD.flatten(0, 1))
    loss = (wanted_TD.view_as(x_BSD) * dy_BSD).sum() + (prob_TE.sum(0) * dprob_E).sum()
    wanted = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    assert_close(y_BSD, wanted_TD.view_as(x_BSD), rel=rel)
    for name, a, b in zip(inputs, found, wanted, strict=True):
        assert a.shape == inputs[name].shape, name
        assert_close(a, b, rel=rel)


@pytest.mark.parametrize("seed", range(200))
def test_equals_a_loop_over_whole_experts(seed: int) -> None:
    rng = random.Random(seed)
    E = rng.randint(1, 8)
    K = rng.randint(1, E)
    B, S = rng.choice([(2, 0), (0, 3), (1, 1), (1, 5), (3, 4), (2, 17)])
    D = rng.randint(1, 20)
    ffn = make_ffn(
        D,
        rng.randint(1, 33),
        act=rng.choice(list(ACTS)),
        bias=rng.random() < 0.3,
        projections=tuple(p for p in PROJECTIONS if rng.random() < 0.8),
        num_experts=E,
        top_k=K,
        r=rng.randint(1, 7),
        lora_alpha=rng.choice([1, 16, 32.5]),
        use_rslora=rng.random() < 0.3,
        act_fn=rng.choice([None, *ACTS]),
    ).double()
    x_BSD = normal(B, S, D, seed=seed)
    if rng.random() < 0.5:  # nobody chooses the first E - K experts
        x_BSD[..., 0] = 5
        with torch.no_grad():
            ffn.mixtures["m"].moe_gate.weight[: E - K, 0] = -100
    compare_with_expert_loop(ffn, x_BSD, rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [PROJECTIONS, PROJECTIONS[:2], PROJECTIONS[2:], ()])
def test_equals_the_loop_in_fp32(bias: bool, targets: tuple[str, ...]) -> None:
    ffn = make_ffn(32, 48, bias=bias, num_experts=4, top_k=2, projections=targets)
    compare_with_expert_loop(ffn, normal(3, 7, 32, dtype=torch.float32), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_one_expert_is_plain_lora(bias: bool) -> None:
    ffn = make_ffn(32, 48, bias=bias, num_experts=1, top_k=1, use_rslora=True)
    x_BSD = normal(3, 7, 32, dtype=torch.float32)
    mixture_BSD = ffn(x_BSD, context(x_BSD))
    plain = FeedForward(32, 48, "silu", bias)
    plain.load_state_dict(ffn.state_dict(), strict=False)
    for name in PROJECTIONS:
        base, experts = getattr(plain, name), getattr(ffn.mixtures["m"], name)
        lora = Lora(base, r=3, lora_alpha=5, use_rslora=True)
        lora.lora_A.copy_(experts.lora_A[0])
        lora.lora_B.copy_(experts.lora_B[0])
        base.adapters["m"] = lora
    assert_close(mixture_BSD, plain(x_BSD, context(x_BSD)), rel=1e-6)
    base_BSD = plain(x_BSD, ForwardContext((Span(None, 0, 3),)))
    assert (mixture_BSD - base_BSD).abs().max() > 0.1


def outputs_and_gradients(ffn: FeedForward, x_BSD: Tensor) -> list[Tensor]:
    x_BSD = x_BSD.detach().requires_grad_()
    y_BSD = ffn(x_BSD, context(x_BSD))
    dy_BSD = normal(*y_BSD.shape, seed=7, dtype=y_BSD.dtype)
    return [y_BSD, *torch.autograd.grad(y_BSD, [x_BSD, *trained(ffn).values()], dy_BSD)]


def test_reference_switch() -> None:
    ffn = make_ffn(32, 48, num_experts=4, top_k=2, lora_dropout=0.2)
    x_BSD = normal(3, 7, 32, dtype=torch.float32)
    torch.manual_seed(0)
    native = outputs_and_gradients(ffn, x_BSD)
    torch.manual_seed(0)
    with ops.reference():
        reference = outputs_and_gradients(ffn, x_BSD)
    for a, b in zip(native, reference, strict=True):
        assert_close(a, b)


def test_same_bits_again_and_for_any_number_of_threads() -> None:
    ffn = make_ffn(32, 48, num_experts=4, top_k=2, lora_dropout=0.2)
    x_BSD = normal(4, 16, 32, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(outputs_and_gradients(ffn, x_BSD))
    finally:
        torch.set_num_threads(before)
    for one, again, two in zip(*results, strict=True):
        assert torch.equal(again, one)
        assert torch.equal(two, one)


def test_dropout_in_training_alone() -> None:
    ffn = make_ffn(32, 48, num_experts=4, top_k=2, lora_dropout=0.5)
    x_BSD = normal(3, 7, 32, dtype=torch.float32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ffn(x_BSD, context(x_BSD))

    assert not torch.equal(run(0), run(1))
    assert torch.equal(run(0), run(0))
    ffn.eval()
    assert torch.equal(run(0), run(1))


@torch.no_grad()
def test_dropout_keeps_the_mean_of_what_is_linear_in_it() -> None:
    """With down_proj alone adapted, y is linear in the mask."""
    ffn = make_ffn(8, 12, num_experts=3, top_k=2, lora_dropout=0.3, projections=PROJECTIONS[2:])
    x_BSD = normal(1, 5, 8, dtype=torch.float32).expand(2000, 5, 8)
    torch.manual_seed(0)
    mean_SD = ffn(x_BSD, context(x_BSD)).mean(0)
    wanted_SD = ffn.eval()(x_BSD[:1], context(x_BSD[:1]))[0]
    assert_close(mean_SD, wanted_SD, rel=0.05)


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_dropout_masks(monkeypatch, masks: str) -> None:
    """One mask per token on the input of A1 and A3, or one for each A of each expert."""
    p, E, K, D = 0.4, 4, 2, 6
    config = {"lora_dropout": p, "dropout_masks": masks, "projections": PROJECTIONS[:2]}
    ffn = make_ffn(D, 10, num_experts=E, top_k=K, **config).double()
    x_BSD = normal(2, 9, D)
    seen = []

    def dropout(x_ND: Tensor, p: float, seed: Tensor) -> Tensor:
        seen.append(keep_mask(seed, torch.arange(len(x_ND)), D, p).double() / (1 - p))
        return ops.dropout(x_ND, p, seed)

    monkeypatch.setattr("mixlora.layers.lora.dropout", dropout)
    of = context(x_BSD)
    y_BSD = ffn(x_BSD, of)
    mixture, (routing,) = ffn.mixtures["m"], of.routing.values()
    plan = ops.moe_sort(routing.expert_TK, E)
    wanted_TD = torch.zeros(18, D, dtype=torch.float64)
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        for k, e in enumerate(routing.expert_TK[t].tolist()):
            row = t if masks == "shared" else plan.slot_row_TK[t, k]
            h_F = 1.0
            for i, (name, act) in enumerate([("gate_proj", F.silu), ("up_proj", lambda x: x)]):
                mask_D = seen[0 if masks == "shared" else i][row]
                pair = getattr(mixture, name)
                delta_F = mixture.scaling * pair.lora_B[e] @ (pair.lora_A[e] @ (x_D * mask_D))
                h_F = h_F * act(getattr(ffn, name).weight @ x_D + delta_F)
            wanted_TD[t] += routing.weight_TK[t, k] * (ffn.down_proj.weight @ h_F)
    assert [len(mask) for mask in seen] == ([18] if masks == "shared" else [18 * K] * 2)
    assert_close(y_BSD.flatten(0, 1), wanted_TD, rel=1e-9)
    ffn.eval()
    assert_close(ffn(x_BSD, context(x_BSD)).flatten(0, 1), expert_loop(ffn, x_BSD.flatten(0, 1))[0])


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["mixlora", "mixdora"])
def test_a_feed_forward_computed_again_in_backward(config: dict) -> None:
    """The same bits; gate and up are not kept. W2 runs again only where a scale follows it."""
    D, F = 8, 64
    ffn = make_ffn(D, F, lora_dropout=0.3, top_k=2, **config)
    x_BSD = normal(2, 16, D, dtype=torch.float32)

    def run(recompute: bool) -> tuple[list[Tensor], int, int]:
        kept = []
        hook = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        torch.manual_seed(0)
        leaves = x_BSD.requires_grad_(), *trained(ffn).values()
        of = context(x_BSD)
        of.recompute_ffn = recompute
        with hook:
            y_BSD = ffn(x_BSD, of)
        with FlopCounterMode(display=False) as counter:
            gradients = torch.autograd.grad(y_BSD, leaves, torch.ones_like(y_BSD))
        size = max((x.numel() for x in kept if x.dim() < 3 and x.shape[-1:] == (F,)), default=0)
        return [y_BSD, *gradients], size, counter.get_total_flops()

    (saved, size, flops), (again, size_again, flops_again) = run(False), run(True)
    for a, b in zip(saved, again, strict=True):
        assert torch.equal(a, b)
    assert size >= 32 * F
    assert size_again == 0
    product = 2 * 32 * D * F
    assert (flops_again - flops < 3 * product) == (not config)  # W1, W3 and the low ranks


@torch.no_grad()
def test_bfloat16() -> None:
    ffn = make_ffn(32, 48, num_experts=4, top_k=2)
    for projection in PROJECTIONS:
        getattr(ffn, projection).weight.data = getattr(ffn, projection).weight.bfloat16()
    x_BSD = normal(3, 7, 32, dtype=torch.bfloat16)
    y_BSD = ffn(x_BSD, context(x_BSD))
    assert y_BSD.dtype == torch.bfloat16
    wide = make_ffn(32, 48, num_experts=4, top_k=2)
    wide.load_state_dict(ffn.state_dict())
    assert_close(y_BSD.float(), wide(x_BSD.float(), context(x_BSD)), rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "strategy, use_dora",
    [(x, False) for x in (None, "loramoe", "mola", "mixlora")] + [(None, True), ("mixlora", True)],
)
def test_fresh_adapters_change_nothing(
    strategy: str | None, use_dora: bool, use_rslora: bool
) -> None:
    """Not a bit, but MixLoRA's renormalised weights add up to 1 as nearly as they are rounded."""
    model = tiny_model(attention_bias=True, mlp_bias=True)
    tokens_BS, mask_BS = padded([5, 12, 9], "right")
    base_BSV = model(tokens_BS, mask_BS=mask_BS)
    experts = {"num_experts": 4} if strategy else {}
    config = {"routing_strategy": strategy, "use_dora": use_dora, "use_rslora": use_rslora}
    mixlora.add_adapter(model, mixlora.AdapterConfig(**config, **experts))
    y_BSV = model(tokens_BS, mask_BS=mask_BS)
    if strategy == "mixlora":
        assert_close(y_BSV, base_BSV, rel=1e-6)
    else:
        assert torch.equal(y_BSV, base_BSV)


def several_adapters() -> nn.Module:
    model = tiny_model(mlp_bias=True)
    add_filled(model, "a", seed=1, **MIXLORA)
    add_filled(model, "b", seed=2, **{**MIXLORA, "num_experts": 3}, r=2, act_fn="gelu")
    add_filled(model, "c", seed=3, use_rslora=True)
    add_filled(model, "d", seed=4, target_modules=["q_proj", "down_proj"], **MIXLORA)
    return model


ROWS = {
    "all different": ["a", None, "b", "c", "d"],
    "neighbours": ["a", "a", "b", "b", "b"],
    "one in two places": ["a", "b", "a"],
    "one in two places of other sizes": ["a", "a", None, "a", "c", "c", "a"],
    "the base model": [None, None],
}


@pytest.mark.parametrize("names", ROWS.values(), ids=ROWS)
@torch.no_grad()
def test_adapters_by_row(names: list[str | None]) -> None:
    model = several_adapters()
    tokens_BS, mask_BS = padded([9 - b for b in range(len(names))], "right")
    logits_BSV = model(tokens_BS, mask_BS=mask_BS, adapters=names)
    for b, name in enumerate(names):
        row_S = tokens_BS[b][mask_BS[b]]
        alone_1SV = model(row_S[None], adapters=[name])
        assert_close(logits_BSV[b, : len(row_S)], alone_1SV[0], rel=2e-6)
        if name is None:
            with mixlora.disable_adapters(model):
                assert torch.equal(alone_1SV, model(row_S[None]))


@pytest.mark.parametrize("names", [["a", None, "b", "c"], ["a", "c", "a", "b"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_crosses_to_another_row(names: list[str | None], checkpointing: bool) -> None:
    model = several_adapters().train()
    model.gradient_checkpointing = checkpointing
    tokens_BS = some_tokens(len(names), 9)
    for row, name in enumerate(names):
        if name is None:
            continue
        labels_BS = torch.full_like(tokens_BS, -100)
        labels_BS[row] = tokens_BS[row]
        model.zero_grad()
        loss, _ = model(tokens_BS, labels_BS=labels_BS, adapters=names)
        loss.backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        own = adapter_parameters(model, name)
        assert all(not grad.any() for key, grad in found.items() if key not in own)
        model.zero_grad()
        alone, _ = model(tokens_BS[row, None], labels_BS=labels_BS[row, None], adapters=[name])
        alone.backward()
        assert_close(loss, alone)
        for key, parameter in own.items():
            assert parameter.grad.any(), key
            assert_close(found[key], parameter.grad)


@pytest.mark.parametrize("names", [["a", "a", None, "b"], ["a", None, "a", "b"]])
@torch.no_grad()
def test_routing_of_an_adapter_covers_all_its_rows(names: list[str | None]) -> None:
    model = several_adapters()
    tokens_BS, mask_BS = padded([9, 5, 7, 8], "right")
    rows_B = torch.tensor([name == "a" for name in names])
    model(tokens_BS, mask_BS=mask_BS, adapters=names)
    together = model.router_loss("a")
    num_tokens = sum(int(routing.num_tokens) for routing in model.routing("a"))
    assert num_tokens == 2 * mask_BS[rows_B].sum()  # of two layers
    model(tokens_BS[rows_B], mask_BS=mask_BS[rows_B], adapters=["a"] * int(rows_B.sum()))
    assert_close(together, model.router_loss("a"))
