"""The learning rate of every step, and which parameters learn faster."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mixlora
import models
from mixlora.adapters import adapter_parameters
from mixlora.errors import InputError
from mixlora.optim import (
    OptimConfig,
    lr_at,
    make_optimizer,
    set_lr,
    state_bytes,
    state_from,
    state_tensors,
)


def rates(num_steps: int, **config: object) -> list[float]:
    return [lr_at(step, num_steps, OptimConfig(lr=8.0, **config)) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule: str) -> None:
    assert rates(10, schedule=schedule, warmup_steps=4)[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(5, schedule=schedule)[0] == 8.0


def test_linear_goes_down_evenly_to_one_step_before_zero() -> None:
    assert rates(6, schedule="linear", warmup_steps=2) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert lr_at(6, 6, OptimConfig(lr=8.0, schedule="linear", warmup_steps=2)) == 0.0


def test_cosine_halves_in_the_middle_and_ends_at_zero() -> None:
    config = OptimConfig(lr=8.0, schedule="cosine", warmup_steps=2)
    assert lr_at(6, 10, config) == pytest.approx(4.0)
    assert lr_at(4, 10, config) == pytest.approx(4 * (1 + math.sqrt(0.5)))
    assert lr_at(10, 10, config) == pytest.approx(0.0)


def test_constant_stays() -> None:
    assert rates(5, schedule="constant") == [8.0] * 5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_steps, warmup", [(1, 0), (1, 1), (3, 3), (3, 9)])
def test_runs_shorter_than_their_warm_up(schedule: str, num_steps: int, warmup: int) -> None:
    found = rates(num_steps, schedule=schedule, warmup_steps=warmup)
    assert found == [8.0 * min(1, (step + 1) / max(1, warmup)) for step in range(num_steps)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lr": 0.0}, "lr must be > 0"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be >= 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
    ],
)
def test_a_value_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimConfig(**values)


def test_lora_plus_gives_b_a_higher_rate(checkpoint: Path) -> None:
    model = models.load(checkpoint)
    mixlora.add_adapter(
        model, mixlora.AdapterConfig(r=2, num_experts=2, routing_strategy="mixlora")
    )
    parameters = adapter_parameters(model)
    config = OptimConfig(lr=0.5, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1)
    optimizer = make_optimizer(parameters, config, loraplus_lr_ratio=16.0)
    set_lr(optimizer, 0.25)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(parameters)
    for name, parameter in parameters.items():
        assert rate[id(parameter)] == (4.0 if name.endswith("lora_B") else 0.25), name
    assert {"lora_A", "lora_B", "weight"} == {name.rpartition(".")[2] for name in parameters}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.99), 1e-6, 0.1)


def test_a_step_moves_b_by_the_ratio() -> None:
    """AdamW's first step is lr * sign(gradient), apart from eps and decay."""
    parameters = {"x.lora_A": nn.Parameter(torch.ones(3)), "x.lora_B": nn.Parameter(torch.ones(3))}
    optimizer = make_optimizer(parameters, OptimConfig(weight_decay=0.0), loraplus_lr_ratio=4.0)
    set_lr(optimizer, 0.125)
    for parameter in parameters.values():
        parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    torch.testing.assert_close(parameters["x.lora_A"].data, torch.full((3,), 0.875))
    torch.testing.assert_close(parameters["x.lora_B"].data, torch.full((3,), 0.5))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_restored_state_goes_on_to_the_bit(kind: str) -> None:
    """Of a tensor that is large enough for 8 bits and of one that is not."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    config = OptimConfig(kind=kind, lr=0.01)

    def begun() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"a.lora_A": (64, 65), "a.lora_B": (7, 3)}
        parameters = {
            key: nn.Parameter(torch.randn(shape, generator=generator))
            for key, shape in shapes.items()
        }
        return parameters, make_optimizer(parameters, config, 2.0)

    def step(parameters: dict, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    first, optimizer = begun()
    for seed in range(3):
        step(first, optimizer, seed)
    second, taken_up = begun()
    for key, p in second.items():
        kept = state_tensors(optimizer, first[key])
        p.data.copy_(first[key])
        copied = {name: x.clone() for name, x in kept.items()}
        taken_up.state[p] = state_from(copied, taken_up, p)
    used = sum(x.nbytes for p in first.values() for x in state_tensors(optimizer, p).values())
    counts = 4 * 2 if kind == "adamw8bit" else 0  # there a count of steps is no tensor
    assert state_bytes(first.values(), config) == used - counts
    for seed in range(3, 6):
        step(first, optimizer, seed)
        step(second, taken_up, seed)
    for key in first:
        assert torch.equal(first[key], second[key])
    kept.pop("step")
    with pytest.raises(InputError, match="a state must hold"):
        state_from(kept, taken_up, second["a.lora_B"])


def test_8_bits_are_near_fp32() -> None:
    pytest.importorskip("bitsandbytes")
    found = {}
    for kind in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.ones(64, 80))
        optimizer = make_optimizer({"w": weight}, OptimConfig(kind=kind, lr=0.01), 1.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            weight.grad = 1 + 0.1 * torch.randn(weight.shape, generator=generator)
            optimizer.step()
        found[kind] = weight.detach()
    assert (found["adamw"] - 1).abs().min() > 0.05
    assert (found["adamw8bit"] - found["adamw"]).abs().max() < 0.01


def test_8_bits_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="optim.kind adamw8bit needs bitsandbytes: pip install"):
        make_optimizer({"w": nn.Parameter(torch.ones(2))}, OptimConfig(kind="adamw8bit"), 1.0)
