"""What is kept for backward, and that keeping less changes no bit."""

import pytest
import torch
from torch import Tensor

from mixlora.adapters import adapter_parameters
from mixlora.estimate import Held
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.router import Router
from mixlora.ops import Routing
from tests.tiny import MIXLORA, add_filled, some_tokens, tiny_model

KINDS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "MixLoRA": {**MIXLORA, "jitter_noise": 0.1},
    "MixLoRA, independent masks": {**MIXLORA, "dropout_masks": "independent"},
    "MixDoRA": {**MIXLORA, "use_dora": True},
    "dynamic": {"routing_strategy": "mixlora-dynamic"},
    "switch": {"routing_strategy": "mixlora-switch", "expert_capacity": 3, "ffn_dropout": 0.1},
    "LoRAMoE": {"routing_strategy": "loramoe"},
    "MoLA": {"routing_strategy": "mola"},
    "MiLoRA": {"routing_strategy": "milora"},
    "MiDoRA": {"routing_strategy": "milora", "use_dora": True},
}


def a_model(kind: str, p: float = 0.2) -> AdaptedModel:
    model = tiny_model(num_hidden_layers=3).train()
    add_filled(model, lora_dropout=p, **KINDS[kind])
    return model


def loss_of(model: AdaptedModel) -> Tensor:
    torch.manual_seed(0)
    tokens_BS = some_tokens(3, 40)
    loss, num_labels = model(tokens_BS, labels_BS=tokens_BS)
    return loss / num_labels + model.router_loss()


def kept(model: AdaptedModel) -> int:
    """Bytes that a forward's graph holds."""
    with Held(model, []) as held:
        loss = loss_of(model)
        return held.now - loss.nbytes


QUICK = {("LoRA", torch.float32), ("MixLoRA", torch.bfloat16), ("MiLoRA", torch.float32)}


@pytest.mark.parametrize(
    "kind, dtype",
    [
        pytest.param(kind, dtype, marks=() if (kind, dtype) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_computing_again_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model = a_model(kind)
    parameters = adapter_parameters(model)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.to(parameter.dtype if key in parameters else dtype)

    def gradients(checkpointing: bool, recompute: bool) -> dict[str, Tensor]:
        model.zero_grad()
        model.gradient_checkpointing, model.recompute_ffn = checkpointing, recompute
        loss = loss_of(model)
        loss.backward()
        # a module that no prompt chose has no gradient
        found = {k: p.grad for k, p in parameters.items() if p.grad is not None}
        return {"loss": loss.detach(), **found}

    expected = gradients(False, False)
    assert len(expected) > 3
    for settings in [(True, False), (False, True), (True, True)]:
        found = gradients(*settings)
        assert found.keys() == expected.keys()
        assert [k for k in found if not torch.equal(found[k], expected[k])] == []


@pytest.mark.parametrize("kind", ["MixLoRA", "dynamic", "switch", "MoLA", "MiLoRA"])
def test_experts_are_not_chosen_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the logits computed again are quite others."""
    model = a_model(kind, p=0.0)
    model.gradient_checkpointing = True
    real, chosen, is_again = Router.logits, [], False

    def logits(self: Router, *inputs) -> Tensor:
        found = real(self, *inputs)
        return found.flip(-1) if is_again else found

    def spied(choose):
        def spy(self: Router, *inputs) -> Routing:
            chosen.append(choose(self, *inputs))
            return chosen[-1]

        return spy

    monkeypatch.setattr(Router, "logits", logits)
    router = next(x for x in model.modules() if isinstance(x, Router))
    monkeypatch.setattr(type(router), "choose", spied(type(router).choose))
    loss = loss_of(model)
    first, is_again = list(chosen), True
    chosen.clear()
    loss.backward()
    by_block = len(first) // 3
    blocks = [first[i : i + by_block] for i in range(0, len(first), by_block)][::-1]
    again = [routing for block in blocks for routing in block]
    assert len(chosen) == len(again)
    for a, b in zip(chosen, again, strict=True):
        assert torch.equal(a.expert_TK, b.expert_TK)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["LoRA", "MixLoRA", "LoRAMoE"])
def test_dropout_keeps_nothing(kind: str, checkpointing: bool) -> None:
    """But its seeds, and what a torch.utils.checkpoint costs of its own."""
    sizes = []
    for p in (0.0, 0.2):
        model = a_model(kind, p)
        model.gradient_checkpointing = checkpointing
        sizes.append(kept(model))
    without, with_dropout = sizes
    plan = 3 * 6 * 4 * 120 * 2 if kind == "MixLoRA" else 0  # its integers
    assert with_dropout <= without * 1.02 + plan


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "MixLoRA", "MiLoRA"])
def test_checkpointing_keeps_a_blocks_input_alone(kind: str) -> None:
    """A layer adds its input, and with routers what it chose."""
    sizes = []
    for num_layers in (2, 6):
        model = tiny_model(num_hidden_layers=num_layers).train()
        add_filled(model, lora_dropout=0.2, **KINDS[kind])
        model.gradient_checkpointing = True
        sizes.append(kept(model))
    T, D, E = 3 * 40, 32, 8
    a_layer = (sizes[1] - sizes[0]) / 4
    of_routers = 7 * T * E * 8 if KINDS[kind].get("routing_strategy") else 0
    assert T * D * 4 <= a_layer <= T * D * 4 + of_routers + 2048  # a DoRA's norms
