"""Every kind of mixture against its definition, token by token in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixlora
from mixlora.adapters import adapter_parameters
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Linear, LoraPair
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward
from mixlora.ops.philox import draw_seed
from tests.numerics import assert_close
from tests.tiny import MIXLORA, add_filled, fill, normal, padded, some_tokens, tiny_model

E, D, FFN = 4, 10, 14
STRATEGIES = {
    "mixlora": {"top_k": 2},
    "mixlora-dynamic": {"top_p": 0.6},
    "mixlora-switch": {"expert_capacity": 3, "jitter_noise": 0.0},
    "loramoe": {},
    "mola": {"top_k": 3},
}
FUSED = [name for name in STRATEGIES if name.startswith("mixlora")]


class Block(mixlora.layers.adapted_model.AdaptedModel):
    """A model that is nothing but a feed-forward, so that an adapter can be added to it."""

    def __init__(self, bias: bool, act: str = "silu") -> None:
        super().__init__()
        self.model = nn.ModuleDict({"mlp": FeedForward(D, FFN, act, bias)})
        self.requires_grad_(False)
        fill(dict(self.named_parameters()))

    @property
    def ffn(self) -> FeedForward:
        return self.model["mlp"]


def make_block(strategy: str, bias: bool = False, targets=PROJECTIONS, **config) -> Block:
    block = Block(bias)
    settings = {"r": 3, "lora_alpha": 5, "num_experts": E, **STRATEGIES[strategy], **config}
    config = mixlora.AdapterConfig(
        routing_strategy=strategy, target_modules=list(targets), **settings
    )
    mixlora.add_adapter(block, config, "m")
    fill(adapter_parameters(block, "m"), seed=1)
    return block.double()


def adapted(base: Linear, pair: LoraPair | None, e: int, x: Tensor) -> Tensor:
    """One projection of expert e by its whole weight."""
    weight = base.weight
    if pair is not None:
        weight = weight + pair.scaling * pair.lora_B[e] @ pair.lora_A[e]
        if pair.lora_magnitude_vector is not None:
            norm_O = weight.detach().norm(dim=1)
            weight = (pair.lora_magnitude_vector[e] / norm_O)[:, None] * weight
    return F.linear(x, weight, base.bias)


def chosen(strategy: str, router: nn.Module, prob_E: Tensor, taken: list[int]) -> dict[int, Tensor]:
    """The weights of a token's experts; `taken` counts what its sequence chose before."""
    order = sorted(range(E), key=lambda e: -prob_E[e].item())
    if strategy == "loramoe":
        return {e: prob_E[e] for e in range(E)}
    if strategy in ("mixlora", "mola"):
        kept = order[: router.top_k]
        return {e: prob_E[e] / sum(prob_E[i] for i in kept) for e in kept}
    if strategy == "mixlora-dynamic":
        prob_E = prob_E / router.temperature if router.temperature else prob_E
        kept, reached = [], 0.0
        for e in order:
            if reached > router.top_p:
                break
            kept.append(e)
            reached += prob_E[e].item()
        return {e: prob_E[e] for e in kept}
    taken[order[0]] += 1
    return {order[0]: prob_E[order[0]]} if taken[order[0]] <= router.expert_capacity else {}


def fused_by_token(block: Block, strategy: str, x_SD: Tensor) -> Tensor:
    ffn, mixture = block.ffn, block.ffn.mixtures["m"]
    taken, rows = [0] * E, []
    for x_D in x_SD:
        prob_E = (mixture.moe_gate.weight @ x_D).softmax(-1)
        weights = chosen(strategy, mixture.moe_gate, prob_E, taken)
        y_D = torch.zeros_like(x_D)
        for e, weight in weights.items():
            gate_F = adapted(ffn.gate_proj, mixture.gate_proj, e, x_D)
            up_F = adapted(ffn.up_proj, mixture.up_proj, e, x_D)
            y_D = y_D + weight * adapted(ffn.down_proj, mixture.down_proj, e, F.silu(gate_F) * up_F)
        if strategy == "mixlora-switch" and not weights:
            y_D = prob_E.max() * x_D
        rows.append(y_D)
    return torch.stack(rows)


def plugged_by_token(block: Block, strategy: str, x_SD: Tensor) -> Tensor:
    def project(base: Linear, x_I: Tensor) -> Tensor:
        y_O = F.linear(x_I, base.weight, base.bias)
        if "m" not in base.adapters:
            return y_O
        mixture = base.adapters["m"]
        prob_E = (mixture.moe_gate.weight @ x_I).softmax(-1)
        for e, weight in chosen(strategy, mixture.moe_gate, prob_E, []).items():
            delta_O = mixture.lora_B[e] @ (mixture.lora_A[e] @ x_I)
            y_O = y_O + weight * mixture.scaling * delta_O
        return y_O

    ffn = block.ffn
    return torch.stack(
        [
            project(ffn.down_proj, F.silu(project(ffn.gate_proj, x)) * project(ffn.up_proj, x))
            for x in x_SD
        ]
    )


def context(x_BSD: Tensor, **options) -> ForwardContext:
    return ForwardContext((Span("m", 0, len(x_BSD)),), **options)


def compare(block: Block, strategy: str, x_BSD: Tensor) -> None:
    by_token = fused_by_token if strategy in FUSED else plugged_by_token
    parameters = adapter_parameters(block, "m")
    inputs = [x_BSD.requires_grad_(), *parameters.values()]
    y_BSD = block.ffn(x_BSD, context(x_BSD))
    wanted_BSD = torch.stack([by_token(block, strategy, x_SD) for x_SD in x_BSD])
    assert_close(y_BSD, wanted_BSD, rel=1e-9)
    dy_BSD = normal(*y_BSD.shape, seed=7)
    found, wanted = (
        torch.autograd.grad(y, inputs, dy_BSD, materialize_grads=True) for y in (y_BSD, wanted_BSD)
    )
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rel=1e-9)
    moved = {name for name, d in zip(["x", *parameters], wanted, strict=True) if d.any()}
    assert {"x"} < moved


TARGETS = [PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:2], PROJECTIONS[2:], PROJECTIONS[1:]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_equals_the_loop_over_tokens(strategy: str, bias: bool, targets: tuple) -> None:
    compare(make_block(strategy, bias, targets), strategy, normal(3, 12, D))


@pytest.mark.parametrize("strategy", FUSED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_mixdora_equals_the_loop_over_tokens(strategy: str, bias: bool, targets: tuple) -> None:
    compare(make_block(strategy, bias, targets, use_dora=True), strategy, normal(3, 12, D))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_dynamic(top_p: float, temperature: float) -> None:
    """A low top_p keeps one expert, top_p 1 or a temperature above 1 / top_p keeps all."""
    block = make_block("mixlora-dynamic", top_p=top_p, temperature=temperature)
    x_BSD = normal(2, 9, D)
    compare(block, "mixlora-dynamic", x_BSD)
    of = context(x_BSD)
    block.ffn(x_BSD, of)
    (routing,) = of.routing.values()
    kept_T = (routing.expert_TK >= 0).sum(-1)
    if top_p == 0.01:
        assert (kept_T == 1).all()
    if temperature == 3.0 and top_p > 0.4 or temperature == 0.0 and top_p == 1.0:
        assert (kept_T == E).all()  # the probabilities' sum never passes it
    assert_close(routing.count_E.sum(), kept_T.sum().double())


@torch.no_grad()
@pytest.mark.parametrize("strategy", FUSED)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_equal_experts_are_one_times_the_sum_of_weights(
    strategy: str, use_dora: bool, fresh: bool
) -> None:
    """Fresh ones, of zero B, are the frozen feed-forward."""
    block = make_block(strategy, bias=True, use_dora=use_dora)
    ffn, mixture, x_BSD = block.ffn, block.ffn.mixtures["m"], normal(3, 12, D)
    for name in PROJECTIONS:
        pair = getattr(mixture, name)
        for parameter in pair.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
        if fresh:
            pair.lora_B.zero_()
        if fresh and use_dora:
            pair.lora_magnitude_vector.copy_(getattr(ffn, name).weight.norm(dim=1))
    gate, up = (
        adapted(getattr(ffn, x), getattr(mixture, x), 0, x_BSD) for x in ("gate_proj", "up_proj")
    )
    one_BSD = adapted(ffn.down_proj, mixture.down_proj, 0, F.silu(gate) * up)
    if fresh:
        assert_close(one_BSD, ffn(x_BSD, ForwardContext((Span(None, 0, 3),))), rel=1e-9)
    router, sums, skips = mixture.moe_gate, torch.zeros(3, 12, 1), torch.zeros(3, 12, 1)
    for b, prob_SE in enumerate((x_BSD @ router.weight.T).softmax(-1)):
        taken = [0] * E
        for s, prob_E in enumerate(prob_SE):
            weights = chosen(strategy, router, prob_E, taken)
            sums[b, s] = sum(weights.values())
            skips[b, s] = 0 if weights else prob_E.max()
    if strategy == "mixlora":
        assert_close(sums, torch.ones_like(sums))
    assert skips.any() == (strategy == "mixlora-switch")
    y_BSD = ffn(x_BSD, context(x_BSD))
    assert_close(y_BSD, sums * one_BSD + skips * x_BSD, rel=1e-6)


def test_expert_lora_is_of_the_experts_alone() -> None:
    model = tiny_model()
    own = mixlora.adapter_config.LoraSettings(r=2, lora_alpha=9, use_dora=True)
    add_filled(model, routing_strategy="mixlora", num_experts=3, expert_lora=own)
    block = model.model["layers"][0]
    q, mixture = block.self_attn.q_proj.adapters["default"], block.mlp.mixtures["default"]
    assert q.lora_A.shape[0] == 4 and q.lora_magnitude_vector is None and q.scaling == 0.5
    for name in PROJECTIONS:
        pair = getattr(mixture, name)
        assert pair.lora_A.shape[:2] == (3, 2) and pair.scaling == 4.5
        assert pair.lora_magnitude_vector.shape == pair.lora_B.shape[:2]


def test_switch_capacity_is_of_a_sequence() -> None:
    """Padding takes no room; documents of a packed row have room of their own."""
    block = make_block("mixlora-switch", expert_capacity=2)
    with torch.no_grad():
        block.ffn.mixtures["m"].moe_gate.weight.zero_()  # all choose expert 0
    x_BSD = normal(1, 8, D)
    mask_BS = torch.tensor([[False, True, True, False, True, True, True, True]])
    segments_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])

    def kept(**options) -> list[bool]:
        of = context(x_BSD, **options)
        block.ffn(x_BSD, of)
        (routing,) = of.routing.values()
        return (routing.expert_TK[:, 0] >= 0).tolist()

    yes, no = True, False
    assert kept() == [yes, yes, no, no, no, no, no, no]
    real = [k for k, m in zip(kept(mask_BS=mask_BS), mask_BS[0].tolist(), strict=True) if m]
    assert real == [yes, yes, no, no, no, no]
    assert kept(segments_BS=segments_BS) == [yes, yes, no, yes, yes, no, yes, yes]


@torch.no_grad()
def test_switch_dropout_is_on_its_output() -> None:
    block = make_block("mixlora-switch", ffn_dropout=0.5)
    x_BSD = normal(2, 9, D)
    torch.manual_seed(0)
    y_BSD = block.train().ffn(x_BSD, context(x_BSD))
    wanted_BSD = block.eval().ffn(x_BSD, context(x_BSD))
    dropped = y_BSD == 0
    assert 0.3 < dropped.double().mean() < 0.7
    assert_close(y_BSD[~dropped], 2 * wanted_BSD[~dropped], rel=1e-9)


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "mixlora": MIXLORA,
    "mixdora": {**MIXLORA, "use_dora": True},
    **{
        name: {"routing_strategy": name, "num_experts": E} | STRATEGIES[name] for name in STRATEGIES
    },
    "milora": {"routing_strategy": "milora", "top_k": 7},
    "midora": {"routing_strategy": "milora", "top_k": 7, "use_dora": True, "pooler": "max"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_in_one_batch(checkpointing: bool, bias: bool) -> None:
    """The gradients of a batch are the sum of its rows', whichever kind comes after which."""
    model = tiny_model(attention_bias=bias, mlp_bias=bias)
    for seed, (name, config) in enumerate(KINDS.items()):
        add_filled(model, name, seed=seed, **config)
    model.double().train().gradient_checkpointing = checkpointing
    names = [*KINDS, None, *reversed(KINDS)]
    tokens_BS, mask_BS = padded([9 - b % 4 for b in range(len(names))], "left")
    labels_BS = tokens_BS.where(torch.arange(9) >= 6, -100)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def of_rows(rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = {"mask_BS": mask_BS[rows], "labels_BS": labels_BS[rows]}
        loss, _ = model(tokens_BS[rows], adapters=names[rows], **inputs)
        if not loss.requires_grad:
            return loss, ()
        return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)

    loss, found = of_rows(slice(None))
    alone = [of_rows(slice(row, row + 1)) for row in range(len(names))]
    assert_close(loss, sum(loss for loss, _ in alone), rel=1e-6)
    for a, *parts in zip(found, *(grads for _, grads in alone if grads), strict=True):
        assert a.any()
        assert_close(a, sum(parts), rel=1e-5)  # the loss is fp32


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(kind: dict, shape: tuple[int, int]) -> None:
    model = tiny_model()
    add_filled(model, **kind)
    tokens_BS = torch.zeros(shape, dtype=torch.long)
    assert model(tokens_BS, adapters=["default"] * shape[0]).shape == (*shape, 96)
    loss = model(tokens_BS).sum()
    if kind.get("routing_strategy") != "milora":  # whose modules all have nothing to do
        loss.backward()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_copy_after_a_forward(kind: dict) -> None:
    model = tiny_model().train()
    add_filled(model, lora_dropout=0.0, **kind)
    model(some_tokens(1, 4))
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(some_tokens(2, 5)), model.eval()(some_tokens(2, 5)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_inference_mode_may_end(kind: dict) -> None:
    """A cache filled within it serves outside of it; an adapter made within it works."""
    model = tiny_model()
    add_filled(model, **kind)
    tokens_BS = some_tokens(2, 8)
    prompt_BS = (torch.arange(8) < 5).expand(2, 8)
    with torch.no_grad():
        wanted = model(tokens_BS, prompt_BS=prompt_BS)
    cache = model.new_cache(2, 8)
    with torch.inference_mode():
        model(tokens_BS[:, :5], cache=cache)
    with torch.no_grad():
        assert_close(model(tokens_BS[:, 5:], cache=cache), wanted[:, 5:])
    with torch.inference_mode():
        model = tiny_model()
        add_filled(model, **kind)
        assert torch.equal(model(tokens_BS, prompt_BS=prompt_BS), wanted)
        fill(adapter_parameters(model), seed=9)
        assert not torch.equal(model(tokens_BS), wanted)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["loramoe", "mola"])
def test_dropout_of_plugged_mixtures_is_in_training_alone(strategy: str) -> None:
    block = make_block(strategy, lora_dropout=0.5)
    x_BSD = normal(2, 9, D)
    torch.manual_seed(0)
    first, second = (block.train().ffn(x_BSD, context(x_BSD)) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (block.eval().ffn(x_BSD, context(x_BSD)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_dropout_keeps_seeds_alone(kind: dict) -> None:
    """No mask and no dropped copy of anything."""

    def kept(p: float) -> int:
        model, tensors = tiny_model().train(), []
        add_filled(model, lora_dropout=p, **kind)
        known = {x.data_ptr() for x in model.parameters()}
        hooks = lambda x: tensors.append(x) or x, lambda x: x
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            model(some_tokens(3, 7))
        sizes = {x.data_ptr(): x.numel() for x in tensors if x.dim() and x.data_ptr() not in known}
        return sum(sizes.values())

    assert kept(0.3) <= kept(0.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_mask_has_a_seed_of_its_own(kind: dict, monkeypatch) -> None:
    model, seeds = tiny_model().train(), []
    add_filled(model, lora_dropout=0.3, **kind)

    def draw(generator: torch.Generator | None) -> int:
        seeds.append(draw_seed(generator))
        return seeds[-1]

    monkeypatch.setattr("mixlora.layers.context.draw_seed", draw)
    for _ in range(2):
        model(some_tokens(3, 7))
    assert len(seeds) >= 2 * 2 * 2  # forwards, layers, masks
    assert len(set(seeds)) == len(seeds)


@torch.no_grad()
def test_routing_of_switch_covers_rows_that_are_not_adjacent() -> None:
    model = tiny_model()
    add_filled(model, "m", **KINDS["mixlora-switch"])
    model(some_tokens(4, 9), adapters=["m", None, "m", "m"])
    for routing in model.routing("m"):
        skipped_T = routing.skip_T > 0
        assert skipped_T.shape == (27,) and skipped_T.any()
        assert torch.equal(skipped_T, routing.expert_TK[:, 0] < 0)
