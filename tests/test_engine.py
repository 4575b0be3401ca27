"""Requests that share a batch generate what each would alone."""

import random

import pytest
import torch
from torch import nn

import mixlora
from mixlora.engine import Engine, Request, Sampling, generate
from mixlora.errors import InputError
from mixlora.layers.context import Member
from tests.numerics import assert_close
from tests.tiny import FAMILIES, MIXLORA, add_filled, some_tokens, tiny_model

KINDS = {  # of each, two adapters that share a stack, or have none
    "lora": [{"r": 3}, {"r": 8, "lora_alpha": 5}],
    "dora": [{"use_dora": True}, {"use_dora": True, "r": 7}],
    "attention": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    "mixlora": [MIXLORA, {**MIXLORA, "r": 5}],
    "mixdora": [{**MIXLORA, "use_dora": True}, {**MIXLORA, "use_dora": True}],
    "experts": [{**MIXLORA, "target_modules": ["up_proj"]}] * 2,
    "switch": [
        {"routing_strategy": "mixlora-switch", "num_experts": 4, "expert_capacity": 3},
        {"routing_strategy": "mixlora-switch", "num_experts": 4, "expert_capacity": 3},
    ],
    "dynamic": [{"routing_strategy": "mixlora-dynamic", "num_experts": 4}] * 2,
    "milora": [{"routing_strategy": "milora", "top_k": 2}] * 2,
    "midora": [{"routing_strategy": "milora", "top_k": 3, "use_dora": True}] * 2,
    "mola": [{**MIXLORA, "routing_strategy": "mola"}] * 2,
}
STACKED = [kind for kind in KINDS if kind != "mola"]


def model_with(kinds: list[str], family: str = "llama", **config) -> tuple[nn.Module, list]:
    """A model with two adapters of each kind, and their names, None among them."""
    model, names = tiny_model(family, **config), []
    for kind in kinds:
        for i, settings in enumerate(KINDS[kind]):
            names.append(f"{kind}-{i}")
            add_filled(model, names[-1], seed=len(names), **settings)
    return model, [*names, None]


def alone(
    model: nn.Module, prompt: list[int], num_new: int, name: str | None
) -> tuple[list, float]:
    """Greedy tokens without a cache, and how close the two likeliest ever were."""
    tokens, closest = list(prompt), float("inf")
    with model.evaluating():
        for _ in range(num_new):
            is_prompt_BS = torch.arange(len(tokens))[None] < len(prompt)
            logits_BSV = model(torch.tensor([tokens]), adapters=[name], prompt_BS=is_prompt_BS)
            logits_V = logits_BSV[0, -1]
            first, second = logits_V.topk(2).values.tolist()
            closest = min(closest, first - second)
            tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :], closest


def some_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(96) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    "family", [x if x == "llama" else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES]
)
def test_every_method_in_one_batch(family: str) -> None:
    """Prompts in pieces, rows that come and go, more requests than rows."""
    model, names = model_with(list(KINDS), family)
    prompts = some_prompts(2 * len(names), 12)
    engine = Engine(model, max_rows=6, max_len=40, prefill_tokens=7)
    requests = [
        engine.submit(prompt, 3 + place % 7, adapter=name)
        for place, (prompt, name) in enumerate(zip(prompts, names * 2, strict=True))
    ]
    engine.run()
    for request in requests:
        wanted, closest = alone(model, request.prompt, request.max_new_tokens, request.adapter)
        assert request.is_done and request.row is None
        assert request.tokens == wanted or closest < 1e-4, request.adapter
    stacked = {name for stack in engine.stacks.stacks.values() for name in stack.members}
    assert stacked == {name for name in names if name and not name.startswith("mola")}
    assert len(engine.stacks.stacks) == len(STACKED)
    assert engine.rows == [None] * 6 and not engine.cache.seen_B.any()
    parameters = len(list(model.named_buffers()))
    engine.close()
    assert not model.stack_sizes and len(list(model.named_buffers())) < parameters


@pytest.mark.parametrize("kind", [kind for kind in STACKED if kind not in ("milora", "midora")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_stack_computes_what_its_members_do(kind: str, dtype: torch.dtype) -> None:
    model, names = model_with([kind, "lora" if kind != "lora" else "dora"])
    model.to(dtype)
    engine = Engine(model, max_rows=1)
    tokens_BS = some_tokens(7, 5)
    order = [names[i] for i in (0, 2, 1, 4, 0, 3, 1)]
    with model.evaluating():
        called = engine.stacks.members(order)
        members = [called[name] for name in order]
        assert all(isinstance(member, Member) == (member is not None) for member in members)
        assert len({member.stack for member in members if member}) == 2
        found, wanted = model(tokens_BS, adapters=members), model(tokens_BS, adapters=order)
        assert_close(found, wanted, rel=5e-2 if dtype == torch.bfloat16 else None)
        only = [called[name] for name in names[:2]]
        assert_close(
            model(tokens_BS[:2], adapters=only),
            model(tokens_BS[:2], adapters=names[:2]),
            rel=5e-2 if dtype == torch.bfloat16 else None,
        )


def test_stacks_grow_and_follow_their_members() -> None:
    model = tiny_model()
    engine = Engine(model, max_rows=1)
    names = [f"a{i}" for i in range(9)]
    for i, name in enumerate(names):
        add_filled(model, name, seed=i, r=1 + i % 8)
    for count, size in ((1, 1), (3, 4), (4, 4), (9, 16)):
        called = engine.stacks.members(names[:count])
        assert [called[name] for name in names[:count]] == [
            Member("stack:0", index) for index in range(count)
        ]
        assert model.stack_sizes == {"stack:0": size}
    tokens_BS = some_tokens(9, 4)

    def check() -> None:
        with model.evaluating():
            called = engine.stacks.members(names)
            members = [called[name] for name in names]
            assert_close(model(tokens_BS, adapters=members), model(tokens_BS, adapters=names))

    check()
    with torch.no_grad():  # trained on
        model.model["layers"][1].self_attn.q_proj.adapters["a3"].lora_B.mul_(-2)
    check()
    engine.remove_adapter("a5")
    assert "a5" not in model.adapter_configs
    names[5] = "b"
    add_filled(model, "b", seed=77, r=2)
    assert engine.stacks.members(["b"])["b"].index == 5  # the place that became free
    check()
    mixlora.remove_adapter(model, "a2")  # behind the engine's back, and another under its name
    add_filled(model, "a2", seed=78, r=8)
    check()


def test_sampling_does_not_depend_on_company() -> None:
    model, names = model_with(["lora", "mixlora"])
    prompts = some_prompts(8, 9)
    settings = [Sampling(0.5 + i / 4, 1.0 if i % 2 else 0.8, seed=i) for i in range(8)]

    def run(places: list[int], **options) -> list[list[int]]:
        engine = Engine(model, max_len=40, **options)
        requests = [
            engine.submit(prompts[i], 12, settings[i], names[i % len(names)], draw=i)
            for i in places
        ]
        engine.run()
        return [request.tokens for request in requests]

    together = run(list(range(8)))
    assert run(list(range(8))) == together
    assert run(list(range(8)), max_rows=3, prefill_tokens=4) == together
    assert [run([i])[0] for i in range(8)] == together
    assert len({tuple(tokens) for tokens in together}) == 8


def test_requests_come_and_go_between_steps() -> None:
    model, names = model_with(["lora", "mixlora"])
    engine = Engine(model, max_rows=3, max_len=60, prefill_tokens=8)
    prompts = some_prompts(12, 30, seed=3)
    draw, requests, heard = random.Random(1), [], {}
    while len(requests) < len(prompts) or engine.step():
        if len(requests) < len(prompts) and draw.random() < 0.6:
            place = len(requests)
            heard[place] = []
            on_token = heard[place].append
            name = names[place % len(names)]
            requests.append(engine.submit(prompts[place], 10, adapter=name, on_token=on_token))
        running = [x for x in requests if not x.is_done]
        if running and draw.random() < 0.15:
            engine.cancel(draw.choice(running))
        engine.step()
        assert sum(x is not None for x in engine.rows) <= 3
    assert any(len(x.tokens) < 10 for x in requests) and any(len(x.tokens) == 10 for x in requests)
    for place, request in enumerate(requests):
        wanted, closest = alone(model, request.prompt, len(request.tokens), request.adapter)
        assert request.is_done and heard[place] == request.tokens
        assert request.tokens == wanted or closest < 1e-4
    assert engine.rows == [None] * 3 and not engine.cache.seen_B.any()


def test_stop_tokens_and_listeners_end_a_request() -> None:
    model = tiny_model()
    prompt = some_prompts(1, 9)[0]
    whole, _ = alone(model, prompt, 10, None)
    engine = Engine(model)
    stopped = engine.submit(prompt, 10, stop_tokens=[whole[4]])
    told = engine.submit(prompt, 10, on_token=lambda token: token == whole[4])
    engine.run()
    assert stopped.tokens == whole[: whole.index(whole[4])]
    assert told.tokens == whole[: whole.index(whole[4]) + 1]


def test_generate_gives_results_in_order() -> None:
    model, names = model_with(["lora"])
    prompts = some_prompts(5, 9)
    order = [names[i % 3] for i in range(5)]
    found = generate(model, prompts, 6, adapters=order)
    assert found == [alone(model, p, 6, name)[0] for p, name in zip(prompts, order, strict=True)]
    model.active_adapter = names[1]
    assert generate(model, prompts[:1], 6) == [alone(model, prompts[0], 6, names[1])[0]]
    assert not model.stack_sizes


def test_the_cache_is_all_the_memory_there_is() -> None:
    model = tiny_model()
    engine = Engine(model, max_rows=2, max_len=20)
    pointers = engine.cache.key.data_ptr(), engine.cache.value.data_ptr()
    layers, G, C = 2, 2, 8
    assert engine.cache.num_bytes == 2 * layers * 2 * G * 21 * C * 4
    for prompt in some_prompts(9, 10):
        engine.submit(prompt, 9)
    engine.run()
    assert pointers == (engine.cache.key.data_ptr(), engine.cache.value.data_ptr())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: Engine(m, max_rows=0), "max_rows must be >= 1, got 0"),
        (lambda m: Engine(m, prefill_tokens=0), "prefill_tokens must be >= 1, got 0"),
        (
            lambda m: Engine(m, max_len=129),
            r"max_len must be in \[1, max_position_embeddings = 128",
        ),
        (lambda m: Engine(m).submit([], 1), "every prompt must have at least one token"),
        (lambda m: Engine(m).submit([1], 0), "max_new_tokens must be >= 1, got 0"),
        (lambda m: Engine(m, max_len=9).submit([1] * 6, 4), "a prompt of 6 tokens and max_new_tok"),
        (
            lambda m: Engine(m).submit([1], 1, adapter="lora-9"),
            "no adapter named 'lora-9' .did you mean",
        ),
        (lambda m: generate(m, [[1]], 1, adapters=[]), "adapters must be 1 names, got 0"),
    ],
)
def test_bad_requests(make, message: str) -> None:
    model, _ = model_with(["lora"])
    with pytest.raises(InputError, match=message):
        make(model)


def test_an_adapter_in_use_stays() -> None:
    model, names = model_with(["lora"])
    engine = Engine(model)
    request = engine.submit([1, 2], 5, adapter=names[0])
    engine.step()
    with pytest.raises(InputError, match="adapter 'lora-0' has requests that are not done"):
        engine.remove_adapter(names[0])
    engine.cancel(request)
    engine.remove_adapter(names[0])
    assert not engine.step()


def stress(count: int) -> None:
    """Random lengths, settings, adapters and cancellations."""
    model, names = model_with(["lora", "dora", "mixlora", "milora", "mola"])
    engine = Engine(model, max_rows=7, max_len=64, prefill_tokens=24)
    draw = random.Random(5)
    requests: list[Request] = []
    cancelled: set[Request] = set()
    while len(requests) < count or engine.step():
        for _ in range(draw.randint(0, 4) if len(requests) < count else 0):
            prompt = [draw.randrange(96) for _ in range(draw.randint(1, 40))]
            sampling = Sampling(draw.choice([0.0, 0.0, 0.7]), draw.choice([1.0, 0.9]))
            num_new = draw.randint(1, 24)
            requests.append(engine.submit(prompt, num_new, sampling, draw.choice(names)))
        if requests and draw.random() < 0.3:
            chosen = draw.choice(requests)
            if not chosen.is_done:
                cancelled.add(chosen)
                engine.cancel(chosen)
        engine.step()
    assert cancelled and engine.rows == [None] * 7 and not engine.waiting
    assert not engine.cache.seen_B.any()
    assert not any(state.any() for state in engine.cache.states.values())
    greedy = [x for x in requests if x.sampling.temperature == 0]
    close = 0
    for request in greedy:
        wanted, closest = alone(model, request.prompt, len(request.tokens), request.adapter)
        assert request in cancelled or len(request.tokens) == request.max_new_tokens
        assert request.tokens == wanted or closest < 1e-4
        close += request.tokens != wanted
    print(f"{len(greedy)} greedy of {len(requests)}, {len(cancelled)} cancelled, {close} too close")


def test_many_requests() -> None:
    stress(25)


@pytest.mark.slow
def test_five_hundred_requests() -> None:
    stress(500)


def test_two_engines_around_one_model() -> None:
    model, names = model_with(["lora", "mixlora"])
    engines = [Engine(model, max_len=40), Engine(model, max_len=40)]
    prompts = some_prompts(4, 9)
    requests = [
        engine.submit(prompt, 8, adapter=name)
        for engine, order in zip(engines, (names[:2], names[2:4]), strict=True)
        for prompt, name in zip(prompts, order, strict=False)
    ]
    while any([engine.step() for engine in engines]):
        pass
    for request in requests:
        assert request.tokens == alone(model, request.prompt, 8, request.adapter)[0]
    engines[0].close()
    assert len(model.stack_sizes) == 1
