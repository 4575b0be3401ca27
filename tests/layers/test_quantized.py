"""A quantised base computes what a base of the rounded weights computes; it keeps no copy."""

import copy
import sys

import pytest
import torch
from torch import Tensor

import mixlora
import models
from mixlora.adapters import adapter_parameters
from mixlora.errors import InputError
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear
from mixlora.layers.quantized import KINDS, QuantizedWeight, quantized_linear
from mixlora.layers.stack import LoraStack
from tests.tiny import MIXLORA, add_filled, some_tokens, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

ADAPTERS = {
    "LoRA": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "MixLoRA": {**MIXLORA, "lora_dropout": 0.1},
    "MixDoRA": {**MIXLORA, "use_dora": True},
    "MoLA": {"routing_strategy": "mola"},
    "MiLoRA": {"routing_strategy": "milora"},
}
DTYPES = [torch.float32, torch.bfloat16]


def pair_of(kind: str, dtype: torch.dtype, bias: bool = True) -> tuple[AdaptedModel, AdaptedModel]:
    """A quantised model, and one that holds the weights which that one computes with."""
    model = tiny_model(attention_bias=bias, mlp_bias=bias).to(dtype)
    models.quantize_projections(model, kind, "cpu")
    held = copy.deepcopy(model)
    for x in (x for x in held.modules() if isinstance(x, Linear)):
        x.weight, x.quantized = torch.nn.Parameter(x.matrix(), requires_grad=False), None
    return model, held


def results(model: AdaptedModel, adapter: dict, checkpointing: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    add_filled(model, **adapter)
    model.train().gradient_checkpointing = checkpointing
    tokens_BS = some_tokens(3, 20)
    loss, num_labels = model(tokens_BS, labels_BS=tokens_BS)
    (loss / num_labels + model.router_loss()).backward()
    parameters = adapter_parameters(model)
    return {
        "loss": loss.detach(),
        **{k: p.grad for k, p in parameters.items() if p.grad is not None},
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_with_rounded_weights(kind: str, adapter: str, checkpointing: bool) -> None:
    model, held = pair_of(kind, torch.float32)
    found = results(model, ADAPTERS[adapter], checkpointing)
    wanted = results(held, ADAPTERS[adapter], checkpointing)
    assert found.keys() == wanted.keys() and len(wanted) > 3
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (40, 10), (1, 64)])
def test_one_product(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    stored = QuantizedWeight(weight, kind)
    matrix = stored.matrix()
    assert matrix.dtype == dtype and matrix.shape == shape
    largest = weight.abs().amax(1, keepdim=True) if kind == "int8" else weight.abs().max()
    step = largest / 127 if kind == "int8" else 0.16 * largest  # nf4: half of its widest gap
    assert ((matrix - weight).abs() <= step).all()
    for rows in (2, 50):
        x = torch.randn(3, rows, shape[1], generator=generator).to(dtype).requires_grad_()
        y = quantized_linear(x, stored, None)
        again = x.detach().clone().requires_grad_()
        expected = torch.nn.functional.linear(again, matrix)
        dy = torch.randn(y.shape, generator=generator).to(dtype)
        y.add_(0)  # as adapters do: it is no view
        y.backward(dy)
        expected.backward(dy)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(x.grad, again.grad, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_is_kept(kind: str) -> None:
    """Neither the matrices nor, for backward, what they were formed of."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    model, _ = pair_of(kind, torch.float32)
    add_filled(model)
    shapes = {tuple(x.weight.shape) for x in model.modules() if isinstance(x, Linear)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tokens_BS = some_tokens(3, 21)
        loss, _ = model.train()(tokens_BS, labels_BS=tokens_BS)
    assert [tuple(x.shape) for x in kept if tuple(x.shape) in shapes] == []
    loss.backward()


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("int8", 8)])
def test_its_size_with_and_without_data(kind: str, bits: float) -> None:
    weight = torch.randn(128, 256)
    stored = QuantizedWeight(weight, kind)
    shapes = QuantizedWeight(weight.to("meta"), kind)
    for name in ("packed", "scale"):
        a, b = getattr(stored, name), getattr(shapes, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    scales = 4 * 128 if kind == "int8" else 0
    assert sum(x.nbytes for x in stored.buffers()) == weight.numel() * bits / 8 + scales


@pytest.mark.parametrize("kind", KINDS)
def test_loading(kind: str, checkpoint, tmp_path) -> None:
    model, plain = models.load(checkpoint, quantize=kind), models.load(checkpoint)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    tokens_BS = some_tokens(2, 9)
    assert model(tokens_BS).isfinite().all()
    assert not torch.equal(model(tokens_BS), plain(tokens_BS))
    with pytest.raises(InputError, match="save: the base is quantised"):
        models.save(model, tmp_path / "copy")
    add_filled(model)
    with pytest.raises(InputError, match="merge: the base is quantised"):
        mixlora.adapters.merge(model)
    assert (
        LoraStack(
            "s",
            model.model.layers[0].mlp.gate_proj.adapters["default"],
            model.model.layers[0].mlp.gate_proj,
            1,
            4,
        ).lora_A.dtype
        == torch.float32
    )


def test_without_bitsandbytes(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="quantize nf4 needs bitsandbytes: pip install bitsandb"):
        models.load(checkpoint, quantize="nf4")
