"""MiLoRA against a loop over sequences in float64, and how long a prompt's decision holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixlora
from mixlora import AdapterConfig
from mixlora.adapters import adapter_parameters
from mixlora.engine import generate
from mixlora.errors import InputError
from mixlora.layers.context import before_labels
from mixlora.layers.lora import Linear
from mixlora.layers.milora import DENOMINATOR, NUMERATOR, MiLora, PromptRouter, rational
from mixlora.ops import Routing
from models.rotary import apply_rotary, rotary
from tests.numerics import assert_close
from tests.tiny import FAMILIES, add_filled, normal, padded, some_tokens, tiny_model

MILORA = {"routing_strategy": "milora", "top_k": 3}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS, PROMPTS = [9, 4, 7], [5, 1, 6]


def make(bias: bool = True, **config) -> nn.Module:
    """A model in float64 whose hidden states the routers can tell apart."""
    model = tiny_model(attention_bias=bias, mlp_bias=bias, num_hidden_layers=2)
    add_filled(model, **{**MILORA, **config})
    for key, parameter in adapter_parameters(model).items():
        if key.endswith(("numerator", "denominator")):
            parameter.data.copy_(torch.tensor(NUMERATOR if "num" in key else DENOMINATOR))
            parameter.data += 0.01 * torch.randn(parameter.shape)
    return model.double()


def batch(side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, prompt), rows of LENGTHS of which the first PROMPTS are the prompt."""
    tokens_BS, mask_BS = padded(LENGTHS, side)
    prompt_BS = mask_BS & (mask_BS.cumsum(1) <= torch.tensor(PROMPTS)[:, None])
    return tokens_BS, mask_BS, prompt_BS


# -- the reference: one sequence without padding ---------------------------------------------------


def pooled(router: PromptRouter, x_PD: Tensor) -> Tensor:
    if router.pooler == "attention":
        return (x_PD @ router.query).softmax(0) @ x_PD
    return {"last": x_PD[-1], "mean": x_PD.mean(0), "max": x_PD.max(0).values}[router.pooler]


def activated(router: PromptRouter, h_D: Tensor) -> Tensor:
    if router.router_act != "rational":
        return {"gelu": F.gelu, "relu": F.relu}[router.router_act](h_D)
    above = sum(a * h_D**j for j, a in enumerate(router.numerator))
    below = sum(b * h_D**i for i, b in enumerate(router.denominator, 1))
    return above / (1 + below.abs())


def routed(router: PromptRouter, x_PD: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """(probabilities, weight of each active module)"""
    prob_E = (router.weight @ activated(router, pooled(router, x_PD))).softmax(0)
    order = sorted(range(len(prob_E)), key=lambda m: -prob_E[m].item())[: router.top_k]
    if router.router_weight == "straight_through":  # 1, with the probability's gradient
        return prob_E, {m: 1 + prob_E[m] - prob_E[m].detach() for m in order}
    return prob_E, {m: prob_E[m] for m in order}


def by_sequence(model: nn.Module, tokens_S: Tensor, num_prompt: int) -> tuple[Tensor, list[Tensor]]:
    """(logits [S, V], each layer's probabilities)"""
    x_SD, config = model.model["embed_tokens"].weight[tokens_S], model.config
    S, C, probs = len(tokens_S), config.head_dim, []
    rope = rotary(config.rope_parameters, torch.arange(S)[None], None, C, x_SD.dtype)
    for block in model.model["layers"]:
        router, weights, attention, ffn = None, {}, block.self_attn, block.mlp
        if "default" in block.prompt_router.adapters:
            router = block.prompt_router.adapters["default"]
            prob_E, weights = routed(router, x_SD[:num_prompt])
            probs.append(prob_E)

        def project(base: Linear, x_SI: Tensor, router=router, weights=weights) -> Tensor:
            y_SO = F.linear(x_SI, base.weight, base.bias)
            if "default" not in base.adapters or base.adapters["default"].module not in weights:
                return y_SO
            pair = base.adapters["default"]
            weight = base.weight + pair.scaling * pair.lora_B @ pair.lora_A
            if pair.lora_magnitude_vector is not None:
                norm_O = weight.detach().norm(dim=1)
                weight = (pair.lora_magnitude_vector / norm_O)[:, None] * weight
            gate_S1 = weights[pair.module] * torch.ones(S, 1, dtype=x_SI.dtype)
            if not router.route_prompt:
                gate_S1 = gate_S1 * (torch.arange(S) >= num_prompt)[:, None]
            return y_SO + gate_S1 * (F.linear(x_SI, weight, base.bias) - y_SO)

        def heads(x_SI: Tensor) -> Tensor:
            return x_SI.unflatten(1, (-1, C)).transpose(0, 1)[None]

        h_SD = block.input_layernorm(x_SD)
        q, k = (
            apply_rotary(heads(project(p, h_SD)), rope)
            for p in (attention.q_proj, attention.k_proj)
        )
        v = heads(project(attention.v_proj, h_SD))
        y_HSC = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
        x_SD = x_SD + project(attention.o_proj, y_HSC.transpose(0, 1).flatten(1))
        h_SD = block.post_attention_layernorm(x_SD)
        h_SD = F.silu(project(ffn.gate_proj, h_SD)) * project(ffn.up_proj, h_SD)
        x_SD = x_SD + project(ffn.down_proj, h_SD)
    return F.linear(model.model["norm"](x_SD), model.lm_head.weight), probs


def compare(model: nn.Module, side: str = "right") -> None:
    tokens_BS, mask_BS, prompt_BS = batch(side)
    embedding = model.model["embed_tokens"].weight.requires_grad_()
    leaves = {"embedding": embedding, **adapter_parameters(model)}
    logits = model(tokens_BS, mask_BS=mask_BS, prompt_BS=prompt_BS)[mask_BS]
    loss = model.router_loss()
    rows = [
        by_sequence(model, tokens_S[mask_S], num_prompt)
        for tokens_S, mask_S, num_prompt in zip(tokens_BS, mask_BS, PROMPTS, strict=True)
    ]
    wanted = torch.cat([logits for logits, _ in rows])
    assert_close(logits, wanted, rel=1e-9)

    losses = []  # eq. 4 and 5, written out
    for prob_BE in map(torch.stack, zip(*(probs for _, probs in rows), strict=True)):
        B, E = prob_BE.shape
        first = [row.index(max(row)) for row in prob_BE.tolist()]
        share = [first.count(i) / B for i in range(E)]
        losses.append(E * sum(share[i] * prob_BE[:, i].mean() for i in range(E)))
    wanted_loss = 0.01 * sum(losses) / len(losses)
    assert_close(loss, wanted_loss, rel=1e-9)

    dy = normal(*logits.shape, seed=7)
    found, grads = (
        torch.autograd.grad(
            [y, aux], list(leaves.values()), [dy, torch.tensor(100.0).double()], allow_unused=True
        )
        for y, aux in ((logits, loss), (wanted, wanted_loss))
    )
    moved = set()
    for key, a, b in zip(leaves, found, grads, strict=True):
        a, b = (torch.zeros_like(leaves[key]) if x is None else x for x in (a, b))
        assert_close(a, b, rel=1e-9)
        moved |= {key.rpartition(".")[2]} if b.any() else set()
    assert {"embedding", "lora_A", "lora_B"} <= moved
    routers = [x for x in model.modules() if isinstance(x, PromptRouter) and x.num_experts > 1]
    assert {name for router in routers for name, _ in router.named_parameters()} <= moved


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooler", ["attention", "last", "mean", "max"])
@pytest.mark.parametrize("bias", [False, True])
def test_poolers(pooler: str, side: str, bias: bool) -> None:
    compare(make(bias, pooler=pooler), side)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("top_k", range(1, 8))
@pytest.mark.parametrize("router_weight", ["probability", "straight_through"])
def test_top_k(top_k: int, router_weight: str, use_dora: bool) -> None:
    compare(make(top_k=top_k, router_weight=router_weight, use_dora=use_dora), "left")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["v_proj", "down_proj"], ["gate_proj", "up_proj"], r".*(1\..*|0\..*v)_proj"],
)
def test_targets(targets: list[str] | str, use_dora: bool) -> None:
    compare(make(target_modules=targets, top_k=1, use_dora=use_dora))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("router_act", ["rational", "gelu", "relu"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_the_base_alone(router_act: str, side: str, use_dora: bool) -> None:
    compare(make(route_prompt=False, router_act=router_act, use_dora=use_dora), side)


# -- what is decided when --------------------------------------------------------------------------


def test_rational_is_gelu_at_first_and_has_no_poles() -> None:
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    start = [torch.tensor(c, dtype=torch.float64) for c in (NUMERATOR, DENOMINATOR)]
    assert (rational(x, *start) - F.gelu(x)).abs().max() <= 1e-2
    for seed in range(20):
        coefficients = normal(7, seed=seed), 100 * normal(5, seed=seed)
        y = rational(1000 * x, *coefficients)
        assert y.isfinite().all() and (y.abs() <= polynomial(1000 * x.abs(), coefficients)).all()


def polynomial(x: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    return sum(a.abs() * x**j for j, a in enumerate(coefficients[0])) * (1 + 1e-12)


def test_the_prompt_is_what_comes_before_the_first_label() -> None:
    no = -100
    labels_BS = torch.tensor([[no, no, 5, no, 6], [7, 8, no, no, no], [no] * 5, [3, no, no, 4, 4]])
    segments_BS = torch.tensor([[0] * 5, [0] * 5, [0] * 5, [0, 0, 1, 1, 2]])
    prompts = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1] * 5, [1, 1, 1, 0, 0]]
    assert before_labels(labels_BS, None).long().tolist() == prompts
    prompts[3] = [1, 1, 1, 0, 1]  # a document's first token is never predicted
    assert before_labels(labels_BS, segments_BS).long().tolist() == prompts


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(kind: str, use_dora: bool, dtype: torch.dtype) -> None:
    model, tokens_BS = tiny_model(kind).to(dtype), some_tokens(3, 9)
    wanted = model(tokens_BS)
    config = AdapterConfig(r=4, use_dora=use_dora, **MILORA)
    mixlora.add_adapter(model, config)
    assert torch.equal(model(tokens_BS), wanted)
    for parameter in adapter_parameters(model).values():
        parameter.add_(0.1)
    assert not torch.equal(model(tokens_BS), wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_router_stands_before_the_layer(kind: str) -> None:
    """It reads what enters the block, before the norm, of all prompt tokens and no others."""
    model = tiny_model(kind)
    add_filled(model, pooler="mean", **MILORA)
    tokens_BS, mask_BS, prompt_BS = batch("left")
    seen: list[Tensor] = []
    for block in model.model["layers"]:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model(tokens_BS, mask_BS=mask_BS, prompt_BS=prompt_BS)
    assert len(seen) == model.config.num_hidden_layers
    for x_BSD, routing, block in zip(
        seen, model.routing("default"), model.model["layers"], strict=True
    ):
        router = block.prompt_router.adapters["default"]
        rows = [routed(router, x[prompt])[1] for x, prompt in zip(x_BSD, prompt_BS, strict=True)]
        assert routing.expert_TK.tolist() == [sorted(row) for row in rows]
        wanted = torch.stack([torch.stack([row[m] for m in sorted(row)]) for row in rows])
        assert_close(routing.weight_TK, wanted)


@pytest.mark.parametrize("route_prompt", [False, True])
@pytest.mark.parametrize("pooler", ["attention", "last", "mean", "max"])
def test_documents_of_packed_rows_are_sequences(pooler: str, route_prompt: bool) -> None:
    model = make(pooler=pooler, route_prompt=route_prompt, use_dora=True)
    tokens_BS, mask_BS, prompt_BS = batch()
    names = ["default", None, "default"]
    alone = model(tokens_BS, mask_BS=mask_BS, prompt_BS=prompt_BS, adapters=["default"] * 3)
    packed = [tokens_BS[mask_BS][None].expand(3, -1), prompt_BS[mask_BS][None].expand(3, -1)]
    segments_S = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    segments_BS = torch.stack([segments_S, segments_S, segments_S.eq(1).long()])
    together = model(
        packed[0], prompt_BS=packed[1], segments_BS=segments_BS, adapters=["default", *names[1:]]
    )
    for sums in model.routing("default"):
        assert sums.num_tokens == 6 and sums.count_E.sum() == 6
    assert_close(together[0], alone[mask_BS], rel=1e-9)
    with mixlora.disable_adapters(model):
        base = model(tokens_BS, mask_BS=mask_BS)
    assert_close(together[1], base[mask_BS], rel=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("route_prompt", [False, True])
@torch.no_grad()
def test_prefill_and_decode_equal_one_forward(kind: str, side: str, route_prompt: bool) -> None:
    model = tiny_model(kind)
    add_filled(model, route_prompt=route_prompt, **MILORA)
    prompt_BS, mask_BS = padded([7, 4, 6], side)
    names = ["default", None, "default"]
    tokens_BS = torch.cat([prompt_BS, some_tokens(3, 6, seed=1)], dim=1)
    whole_BS = torch.cat([mask_BS, torch.ones(3, 6, dtype=torch.bool)], dim=1)
    is_prompt_BS = torch.arange(13).expand(3, 13) < 7
    inputs = {"mask_BS": whole_BS, "prompt_BS": is_prompt_BS, "adapters": names}
    wanted = model(tokens_BS, **inputs)
    for steps in ([1] * 6, [2, 4]):
        cache = model.new_cache(3, 13)
        parts = [model(prompt_BS, mask_BS=mask_BS, cache=cache, adapters=names)]
        for new_BS in tokens_BS[:, 7:].split(steps, dim=1):
            parts.append(model(new_BS, cache=cache, adapters=names))
        assert_close(torch.cat(parts, dim=1)[whole_BS], wanted[whole_BS])
    assert len(cache.states) == model.config.num_hidden_layers
    for state_BE in cache.states.values():
        assert (state_BE != 0).sum(1).tolist() == [3, 0, 3]


def count(monkeypatch, owner: object, name: str) -> list:
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **b: calls.append(a) or real(*a, **b))
    return calls


def test_a_prompt_is_routed_once(monkeypatch) -> None:
    model = tiny_model()
    add_filled(model, **MILORA)
    calls = count(monkeypatch, PromptRouter, "forward")
    prompt = some_tokens(1, 20)[0].tolist()
    assert len(generate(model, [prompt], max_new_tokens=100)[0]) == 100
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_modules_that_no_row_uses_compute_nothing(top_k: int, monkeypatch) -> None:
    """In training, at the prompt and in decode: as many products as there are active modules."""
    model = tiny_model()
    add_filled(model, **{**MILORA, "top_k": top_k})
    rows: list[int] = []
    real = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if 4 in weight.shape:  # the rank
            rows.append(len(x))
        return real(x, weight, bias)

    monkeypatch.setattr("mixlora.layers.milora.linear", spy)
    L, tokens_BS = model.config.num_hidden_layers, some_tokens(1, 6)
    model.train()(tokens_BS, labels_BS=tokens_BS)
    assert rows == [6] * (2 * top_k * L)
    rows.clear()
    cache = model.eval().new_cache(3, 9)
    model(some_tokens(3, 6), cache=cache)
    chosen = [routing.expert_TK for routing in model.routing("default")]
    rows.clear()
    model(some_tokens(3, 1), cache=cache)
    loads = [(expert_TK == m).sum().item() for expert_TK in chosen for m in range(7)]
    assert sorted(rows) == sorted(2 * [load for load in loads if load])


@torch.no_grad()
def test_a_row_that_does_not_use_a_module_gets_the_bases_output() -> None:
    model = tiny_model()
    add_filled(model, use_dora=True, **{**MILORA, "top_k": 1})
    outputs: dict[tuple, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, MiLora):

            def compare(module, inputs, y_BSO, path=path) -> None:
                _, before_BSO, _, context, span = inputs
                outputs[path] = before_BSO.clone()

            module.register_forward_pre_hook(lambda m, i, path=path: compare(m, i, None, path))
            module.register_forward_hook(
                lambda m, i, y, path=path: changed.__setitem__(path, (y != outputs[path]).any(-1))
            )
    changed: dict[str, Tensor] = {}
    model(some_tokens(5, 6))
    for layer, routing in enumerate(model.routing("default")):
        for module, name in enumerate(ALL):
            (path,) = (p for p in changed if f"layers.{layer}." in p and f".{name}." in p)
            uses_B1 = routing.expert_TK == module
            assert torch.equal(changed[path].view(5, 6), uses_B1.expand(5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_generates_what_its_rows_do_alone(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    add_filled(model, **MILORA)
    add_filled(model, "other", seed=2, use_dora=True, **{**MILORA, "top_k": 1})
    prompts = [some_tokens(1, n, seed=n)[0].tolist() for n in (3, 20, 1, 11)]
    names = ["default", "other", "default", None]
    together = generate(model, prompts, 20, adapters=names)
    alone = [generate(model, [p], 20, adapters=[n])[0] for p, n in zip(prompts, names, strict=True)]
    assert together == alone


@pytest.mark.parametrize("recompute_ffn", [False, True])
def test_a_block_computed_again_keeps_its_first_decision(recompute_ffn: bool) -> None:
    model = tiny_model().train()
    add_filled(model, **{**MILORA, "top_k": 2})
    model.gradient_checkpointing, model.recompute_ffn = True, recompute_ffn
    tokens_BS = some_tokens(1, 8)
    loss, _ = model(tokens_BS, labels_BS=tokens_BS)
    chosen = [routing.expert_TK[0].tolist() for routing in model.routing("default")]
    for module in model.modules():
        if isinstance(module, PromptRouter):
            module.weight.data.neg_()  # all that was last is first
    loss.backward()
    for layer, experts in enumerate(chosen):
        for module, name in enumerate(ALL):
            part = f"layers.{layer}."
            of_module = [p for k, p in adapter_parameters(model).items() if part in k and name in k]
            assert {p.grad is not None for p in of_module} == {module in experts}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recompute_ffn", [False, True])
def test_recomputing_changes_no_bit(checkpointing: bool, recompute_ffn: bool) -> None:
    def gradients() -> list[Tensor | None]:
        model = tiny_model().train()
        add_filled(model, use_dora=True, lora_dropout=0.2, **MILORA)
        model.gradient_checkpointing, model.recompute_ffn = checkpointing, recompute_ffn
        tokens_BS, mask_BS, prompt_BS = batch()
        torch.manual_seed(0)
        inputs = {"mask_BS": mask_BS, "prompt_BS": prompt_BS, "labels_BS": tokens_BS}
        loss, _ = model(tokens_BS, **inputs)
        (loss + model.router_loss()).backward()
        return [p.grad for p in adapter_parameters(model).values()]

    found, checkpointing, recompute_ffn = gradients(), False, False
    for a, b in zip(found, gradients(), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@torch.no_grad()
def test_labels_without_prompt_mean_the_tokens_before_them() -> None:
    model = tiny_model()
    add_filled(model, **MILORA)
    tokens_BS, mask_BS, prompt_BS = batch()
    labels_BS = tokens_BS.where(mask_BS & ~prompt_BS, -100)
    given = model(tokens_BS, mask_BS=mask_BS, prompt_BS=prompt_BS, labels_BS=labels_BS)
    assert torch.equal(model(tokens_BS, mask_BS=mask_BS, labels_BS=labels_BS)[0], given[0])
    every = model(tokens_BS, mask_BS=mask_BS, prompt_BS=mask_BS, labels_BS=labels_BS)
    assert not torch.equal(every[0], given[0])
    assert torch.equal(
        model(tokens_BS, mask_BS=mask_BS), model(tokens_BS, mask_BS=mask_BS, prompt_BS=mask_BS)
    )


@torch.no_grad()
def test_a_row_without_a_prompt_counts_nowhere() -> None:
    model = make()
    tokens_BS, mask_BS, prompt_BS = batch()
    prompt_BS[1] = False
    assert model(tokens_BS, mask_BS=mask_BS, prompt_BS=prompt_BS).isfinite().all()
    rows = model.routing("default")
    loss = model.router_loss()
    model(tokens_BS[[0, 2]], mask_BS=mask_BS[[0, 2]], prompt_BS=prompt_BS[[0, 2]])
    assert_close(loss, model.router_loss(), rel=1e-9)
    for a, b in zip(rows, model.routing("default"), strict=True):
        assert isinstance(a, Routing) and a.num_tokens == b.num_tokens == 2
        assert torch.equal(a.count_E, b.count_E)


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_prompts_prefill_whole() -> None:
    model = tiny_model()
    add_filled(model, "routed", **MILORA)
    add_filled(model, "plain")
    tokens_BS, prompt_BS = some_tokens(2, 4), torch.ones(2, 4, dtype=torch.bool)
    cache = model.new_cache(2, 12)
    model(tokens_BS, cache=cache, prompt_BS=prompt_BS, adapters=["routed"] * 2)
    said = error_of(
        model, tokens_BS, cache=cache, prompt_BS=prompt_BS, adapters=["plain", "routed"]
    )
    assert said == (
        "prompt_BS: the cache holds 4 tokens already, but MiLoRA routes by the whole prompt: "
        "prefill it in one forward"
    )
    model(tokens_BS, cache=cache, prompt_BS=prompt_BS, adapters=["plain"] * 2)
    cache = model.new_cache(2, 12)
    model(tokens_BS, cache=cache, adapters=["plain"] * 2)
    assert error_of(model, tokens_BS, cache=cache, adapters=["plain", "routed"]) == (
        "adapter 'routed' saw none of the cache's 4 tokens: MiLoRA routes by the whole prompt, in "
        "one forward"
    )


def test_defaults() -> None:
    """Those that docs/milora.md found; alpha is by rank, for milora alone."""
    config = AdapterConfig(routing_strategy="milora", r=5)
    assert (config.top_k, config.router_weight, config.route_prompt) == (3, "probability", True)
    assert (config.lora_alpha, config.router_aux_loss_coef, config.pooler) == (
        40,
        0.01,
        "attention",
    )
    assert (
        AdapterConfig(r=5).lora_alpha
        == AdapterConfig(r=5, routing_strategy="mola").lora_alpha
        == 32
    )
    assert AdapterConfig(routing_strategy="milora", lora_alpha=3).lora_alpha == 3


def test_wrong_settings() -> None:
    def said(**values) -> str:
        return error_of(AdapterConfig.from_dict, {"routing_strategy": "milora", **values})

    assert "top_k must be in [1, 7], got 8" in said(top_k=8)
    assert "pooler must be attention or last or mean or max, got 'first'" in said(pooler="first")
    assert "router_act must be rational or gelu or relu" in said(router_act="silu")
    assert "router_weight must be probability or straight_through" in said(router_weight="one")
    assert "num_experts = 4: routing_strategy milora has no such setting" in said(num_experts=4)
    assert "router_loss_scope must be per_layer for milora" in said(router_loss_scope="global")
    assert "expert_lora must be absent" in said(expert_lora={"r": 4})
    plain = error_of(AdapterConfig.from_dict, {"pooler": "mean"})
    assert "pooler = 'mean': plain LoRA has no such setting" in plain
    config = AdapterConfig(target_modules=r".*\.1\.mlp\.up_proj", **{**MILORA, "top_k": 2})
    assert error_of(mixlora.add_adapter, tiny_model(), config) == (
        "top_k must be at most the number of a layer's targets, 1 in layer 1, got 2"
    )
    model = tiny_model()
    add_filled(model, **MILORA)
    assert error_of(mixlora.merge, model).startswith("merge: default has experts only")
    tokens_BS = some_tokens(2, 5)
    wrong = error_of(model, tokens_BS, prompt_BS=torch.ones(2, 4, dtype=torch.bool))
    assert wrong == "prompt_BS must be [B, S] = [2, 5], got [2, 4]"
    assert error_of(model, tokens_BS, prompt_BS=tokens_BS) == (
        "prompt_BS must be bool, got torch.int64"
    )


@pytest.mark.parametrize("inference", [False, True])
def test_rows_of_a_cache_may_be_moved(inference: bool) -> None:
    """Between two tokens: each row's decision goes with it."""
    model = tiny_model()
    add_filled(model, **{**MILORA, "top_k": 2})
    tokens_BS, new_B1 = some_tokens(4, 9), some_tokens(4, 1, seed=1)
    with torch.inference_mode() if inference else torch.no_grad():
        cache, same = model.new_cache(5, 12), model.new_cache(4, 12)
        model(tokens_BS, cache=cache.rows(slice(0, 4)))
        model(tokens_BS, cache=same)
        model(new_B1, cache=cache.rows(slice(0, 4)))
        model(new_B1, cache=same)
        for source, target in ((0, 4), (3, 0), (4, 3)):  # the first row and the last change places
            cache.move(source, target)
        order = [3, 1, 2, 0]
        found = model(new_B1, cache=cache.rows(slice(0, 4)))
        assert_close(found, model(new_B1[order], cache=same)[order])
