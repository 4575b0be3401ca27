"""Each family against `transformers`, and what all of them promise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixlora
import models
from mixlora import engine
from mixlora.adapters import adapter_parameters
from mixlora.errors import InputError
from mixlora.ops import topk_router
from models.common import attention_mask, positions_of
from tests.numerics import assert_close
from tests.tiny import (
    FAMILIES,
    MIXLORA,
    SIZES,
    add_filled,
    padded,
    some_tokens,
    tiny_checkpoint,
    tiny_model,
)

LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 7.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 8 pairs 1 is kept, 2 fade, 5 are scaled
}
YARN = {
    "rope_type": "yarn",
    "factor": 3.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 6.0,
    "beta_slow": 0.5,
}
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
}
VARIANTS: dict[str, tuple[str, dict]] = {
    "GQA": ("llama", {}),
    "MQA": ("llama", {"num_key_value_heads": 1}),
    "MHA": ("llama", {"num_key_value_heads": 4}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wider heads": ("llama", {"head_dim": 14}),
    "narrower heads": ("llama", {"head_dim": 6, "num_key_value_heads": 1}),
    "other theta and eps": ("llama", {"rope_theta": 500.0, "rms_norm_eps": 0.1}),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "sharded": ("llama", {"shard_size": "10KB"}),
    "stored in bfloat16": ("llama", {"stored": torch.bfloat16}),
    "linear RoPE": ("llama", {"rope_parameters": LINEAR}),
    "llama3 RoPE": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "YaRN": ("llama", {"head_dim": 16, "rope_parameters": YARN}),
    "Mistral": ("mistral", {}),
    "Mistral, whole attention": ("mistral", {"sliding_window": None}),
    "Mistral, YaRN": ("mistral", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "Gemma": ("gemma", {}),
    "Gemma, untied, biases": ("gemma", {"tie_word_embeddings": False, "attention_bias": True}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 2, first layers whole": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "Gemma 2, no caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}
GENERATING = {
    name: VARIANTS[name]
    for name in (
        *("MQA", "MHA", "tied embeddings", "biases", "wider heads"),
        *("linear RoPE", "llama3 RoPE", "YaRN", "Mistral", "Gemma", "Gemma 2"),
    )
}
LENGTH = 80  # longer than the windows, and than the length that the RoPE kinds start from
LOGITS = 1e-6  # of logits up to 10: differences of at most 1e-5


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """(ours, that of `transformers`)"""
    kind, config = request.param
    folder, hf_model = tiny_checkpoint(kind, tmp_path_factory.mktemp("checkpoint"), **config)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in config)
    return models.load(folder), hf_model


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_logits(pair) -> None:
    model, hf_model = pair
    tokens_BS = some_tokens(3, LENGTH)
    logits_BSV = model(tokens_BS)
    assert logits_BSV.dtype == torch.float32
    assert 1 < logits_BSV.abs().max() < 16
    assert_close(logits_BSV, hf_model(tokens_BS).logits, rel=LOGITS)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits(pair, side: str) -> None:
    model, hf_model = pair
    tokens_BS, mask_BS = padded([9, 1, LENGTH, 70], side)
    positions_BS = (mask_BS.long().cumsum(1) - 1).clamp_min(0)
    wanted = hf_model(tokens_BS, attention_mask=mask_BS.long(), position_ids=positions_BS).logits
    got = model(tokens_BS, mask_BS=mask_BS)
    assert got.isfinite().all()
    assert_close(got[mask_BS], wanted[mask_BS], rel=LOGITS)


@torch.no_grad()
def test_packed_and_cached_logits(pair) -> None:
    model, hf_model = pair
    lengths = [9, 1, LENGTH]
    documents = some_tokens(2, sum(lengths)).split(lengths, dim=1)
    wanted = [hf_model(document_BS, use_cache=False).logits for document_BS in documents]
    segments_BS = torch.tensor([0, 4, 2]).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed = model(torch.cat(documents, dim=1), segments_BS=segments_BS)
    assert_close(packed, torch.cat(wanted, dim=1), rel=LOGITS)

    cache = model.new_cache(2, LENGTH)
    pieces = [model(piece, cache=cache) for piece in documents[-1].split([3, 70, 1, 1, 5], dim=1)]
    assert_close(torch.cat(pieces, dim=1), wanted[-1], rel=LOGITS)


@pytest.mark.parametrize("pair", GENERATING.values(), ids=GENERATING, indirect=True)
@torch.no_grad()
def test_greedy_generation(pair) -> None:
    model, hf_model = pair
    tokens_BS, mask_BS = padded([5, 1, 12], "left")
    prompts = [row[mask].tolist() for row, mask in zip(tokens_BS, mask_BS, strict=True)]
    wanted_BS = hf_model.generate(
        tokens_BS,
        attention_mask=mask_BS.long(),
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=0,
    )
    assert engine.generate(model, prompts, 64) == wanted_BS[:, tokens_BS.shape[1] :].tolist()


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    folder, hf_model = tiny_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"), **DYNAMIC)
    return models.load(folder), hf_model


def without_cache(hf_model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Its dynamic RoPE keeps the longest text's theta until it is given a short one."""
    hf_model(tokens_BS[:, :1], use_cache=False)
    return hf_model(tokens_BS, use_cache=False).logits


@torch.no_grad()
def test_dynamic_rope(dynamic) -> None:
    """A row's theta is its own, where that of `transformers` is the batch's: rows one by one."""
    model, hf_model = dynamic
    lengths = [9, 1, LENGTH, 24]
    outputs = []
    for side in ("left", "right"):
        tokens_BS, mask_BS = padded(lengths, side)
        rows = [row[mask][None] for row, mask in zip(tokens_BS, mask_BS, strict=True)]
        outputs.append((model(tokens_BS, mask_BS=mask_BS)[mask_BS], rows))
    segments_BS = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    outputs.append((model(torch.cat(rows, dim=1), segments_BS=segments_BS)[0], rows))
    for logits_TV, rows in outputs:
        wanted = [without_cache(hf_model, row)[0] for row in rows]
        assert_close(logits_TV, torch.cat(wanted), rel=LOGITS)
    assert_close(model(some_tokens(3, LENGTH)), without_cache(hf_model, some_tokens(3, LENGTH)))


@pytest.mark.parametrize("row", [0, 1])
@torch.no_grad()
def test_dynamic_rope_decodes_as_transformers(dynamic, row: int) -> None:
    model, hf_model = dynamic
    prompt_BS = some_tokens(2, 12)[row : row + 1]

    def greedy(logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        tokens_BS = prompt_BS
        for _ in range(64):
            new_BS = logits_of(tokens_BS)[:, -1:].argmax(-1)
            tokens_BS = torch.cat([tokens_BS, new_BS], dim=1)
        return tokens_BS

    wanted_BS = greedy(lambda tokens_BS: without_cache(hf_model, tokens_BS))
    assert torch.equal(greedy(model), wanted_BS)

    without_cache(hf_model, prompt_BS)
    options = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    wanted_BS = hf_model.generate(prompt_BS, attention_mask=torch.ones_like(prompt_BS), **options)
    cache = model.new_cache(1, wanted_BS.shape[1])
    cached_BS = greedy(lambda tokens_BS: model(tokens_BS[:, cache.length :], cache=cache))
    assert torch.equal(cached_BS, wanted_BS)


def test_loaded_model_is_frozen_and_in_eval_mode(pair) -> None:
    model, _ = pair
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """sqrt(48) is 6.93 and 6.9375 in bfloat16: the embedding's scale of Gemma shows its dtype."""
    folder, hf_model = tiny_checkpoint(family, tmp_path, hidden_size=48)
    attention = hf_model.config._attn_implementation
    options = {"dtype": torch.bfloat16, "attn_implementation": attention}
    hf_model = type(hf_model).from_pretrained(folder, **options).eval()
    model = models.load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    embedded = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    tokens_BS = some_tokens(2, 30)
    logits_BSV = model(tokens_BS)
    assert torch.equal(embedded[0], hf_model.model.embed_tokens(tokens_BS))
    assert logits_BSV.dtype == torch.bfloat16
    assert_close(logits_BSV, hf_model(tokens_BS).logits, rel=0.01)


@pytest.mark.parametrize("config", [{}, DYNAMIC], ids=["default RoPE", "dynamic RoPE"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(family: str, config: dict) -> None:
    model = tiny_model(family, **config)
    lengths = [7, 1, 20]
    tokens_BS = some_tokens(2, sum(lengths))
    segments_BS = torch.tensor([0, 4, 2]).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed = model(tokens_BS, segments_BS=segments_BS).split(lengths, dim=1)
    for document_BS, logits_BSV in zip(tokens_BS.split(lengths, dim=1), packed, strict=True):
        assert_close(logits_BSV, model(document_BS), rel=LOGITS)

    for i in range(len(lengths)):
        edited = list(tokens_BS.split(lengths, dim=1))
        edited[i] = (edited[i] + 1) % SIZES["vocab_size"]
        after = model(torch.cat(edited, dim=1), segments_BS=segments_BS).split(lengths, dim=1)
        for j in range(len(lengths)):
            assert torch.equal(after[j], packed[j]) == (i != j)


def test_positions() -> None:
    segments_BS = torch.tensor([[0, 0, 4, 4, 4, 2], [7, 1, 1, 7, 7, 7]])
    nothing_BS = torch.zeros_like(segments_BS)
    assert positions_of(nothing_BS, None, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    wanted = [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 2]]
    assert positions_of(nothing_BS, None, segments_BS).tolist() == wanted
    mask_BS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    wanted = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2]]
    assert positions_of(nothing_BS, mask_BS, None).tolist() == wanted


def test_window() -> None:
    """Key j is visible to query i iff 0 <= i - j < window, counted in real tokens."""
    tokens_BS = torch.zeros(2, 6, dtype=torch.long)
    mask_BS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]).bool()
    seen = attention_mask(tokens_BS, None, None, None, 2)[0, 0].int()
    assert seen.tolist() == torch.ones(6, 6).tril().triu(-1).int().tolist()
    seen = attention_mask(tokens_BS, mask_BS, None, None, 3)[:, 0, 4:].int().tolist()
    assert seen == [
        [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
        [[1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 1]],
    ]
    assert attention_mask(tokens_BS, None, None, None, 6) is None


@torch.no_grad()
def test_given_positions(pair) -> None:
    model, hf_model = pair
    tokens_BS = some_tokens(2, 9)
    positions_BS = torch.arange(9).expand(2, 9).square() + 3
    logits_BSV = model(tokens_BS, positions_BS=positions_BS)
    assert (logits_BSV - model(tokens_BS)).abs().max() > 0.01
    wanted_BSV = hf_model(tokens_BS, position_ids=positions_BS).logits
    assert_close(logits_BSV, wanted_BSV, rel=LOGITS)


@torch.no_grad()
def test_right_padded_prefill_then_decode(family: str) -> None:
    model = tiny_model(family)
    lengths = [6, 1, 11]
    new_BS = some_tokens(len(lengths), 5, seed=1)
    logits = {}
    tokens_BS, mask_BS = padded(lengths, "left")
    rows = [row[mask] for row, mask in zip(tokens_BS, mask_BS, strict=True)]
    for side in ("left", "right"):
        tokens_BS, mask_BS = padded(lengths, side)
        tokens_BS[mask_BS] = torch.cat(rows)
        cache = model.new_cache(len(lengths), max(lengths) + new_BS.shape[1])
        model(tokens_BS, mask_BS=mask_BS, cache=cache)
        logits[side] = torch.cat(
            [model(token_B[:, None], cache=cache) for token_B in new_BS.T], dim=1
        )
    assert_close(logits["right"], logits["left"], rel=LOGITS)
    for b, row in enumerate(rows):
        whole = model(torch.cat([row, new_BS[b]])[None])
        assert_close(logits["left"][b], whole[0, len(row) :], rel=LOGITS)


@torch.no_grad()
def test_prefill_in_pieces(family: str) -> None:
    model = tiny_model(family)
    tokens_BS = some_tokens(2, 12)
    cache = model.new_cache(2, 12)
    pieces = [model(piece_BS, cache=cache) for piece_BS in tokens_BS.split([5, 1, 6], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(tokens_BS), rel=LOGITS)
    with pytest.raises(InputError, match="segments_BS needs cache=None"):
        model(tokens_BS[:, :1], segments_BS=torch.zeros(2, 1).long(), cache=cache)
    with pytest.raises(InputError, match="the cache holds 12 tokens: 12 are taken, 1 "):
        model(tokens_BS[:, :1], cache=cache)


def labelled(B: int = 3, S: int = 11) -> tuple[Tensor, Tensor]:
    tokens_BS = some_tokens(B, S)
    labels_BS = tokens_BS.clone()
    labels_BS[torch.rand(B, S, generator=torch.Generator().manual_seed(0)) < 0.3] = -100
    return tokens_BS, labels_BS


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("rows_per_chunk", [3, 1, 1000])
def test_chunked_loss(monkeypatch, family: str, rows_per_chunk: int) -> None:
    model = tiny_model(family)
    add_filled(model)
    for module in (model.model["norm"], model.lm_head):
        module.weight.requires_grad_()
    tokens_BS, labels_BS = labelled()
    logits_BSV = model(tokens_BS)
    wanted = F.cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum"
    )
    wanted_gradients = gradients(model, wanted)

    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr(models.common, "LOGITS_PER_CHUNK", rows_per_chunk * SIZES["vocab_size"] + 5)
    loss, num_labels = model(tokens_BS, labels_BS=labels_BS)
    found = gradients(model, loss)
    hook.remove()
    assert loss.dtype == torch.float32
    assert num_labels == (labels_BS[:, 1:] != -100).sum()
    assert max(seen) == min(rows_per_chunk, int(num_labels))
    assert_close(loss, wanted.detach())
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        assert_close(gradient, wanted_gradients[name])
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            assert_close(model(tokens_BS, labels_BS=labels_BS)[0], loss.detach())


def test_loss_by_row(family: str) -> None:
    """Each row's own, and gradients by its own weight."""
    model = tiny_model(family)
    add_filled(model)
    tokens_BS, labels_BS = labelled(4, 12)
    labels_BS[1] = -100
    weight_B = torch.tensor([1.0, 5.0, 0.5, -2.0])
    loss_B, num_labels_B = model(tokens_BS, labels_BS=labels_BS, by_row=True)
    alone = [model(tokens_BS[b, None], labels_BS=labels_BS[b, None]) for b in range(4)]
    assert num_labels_B.tolist() == [int(n) for _, n in alone]
    wanted_B = torch.stack([loss for loss, _ in alone])
    assert_close(loss_B, wanted_B.detach())
    found = gradients(model, (loss_B * weight_B).sum())
    wanted = gradients(model, (wanted_B * weight_B).sum())
    for name, gradient in found.items():
        assert_close(gradient, wanted[name])
    model.lm_head.weight.requires_grad_()
    with pytest.raises(InputError, match="by_row needs a frozen norm and lm_head"):
        model(tokens_BS, labels_BS=labels_BS, by_row=True)


@torch.no_grad()
def test_first_label_of_a_segment_is_ignored(family: str) -> None:
    model = tiny_model(family)
    tokens_BS, labels_BS = labelled(2, 20)
    lengths = [4, 1, 15]
    starts = [0, 4, 5]
    labels_BS[:, starts] = tokens_BS[:, starts]
    segments_BS = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    loss, num_labels = model(tokens_BS, labels_BS=labels_BS, segments_BS=segments_BS)
    alone = [
        model(tokens, labels_BS=labels)
        for tokens, labels in zip(
            tokens_BS.split(lengths, 1), labels_BS.split(lengths, 1), strict=True
        )
    ]
    assert num_labels == sum(n for _, n in alone) == (labels_BS != -100).sum() - 6
    assert_close(loss, torch.stack([part for part, _ in alone]).sum())


def test_all_labels_masked(family: str) -> None:
    model = tiny_model(family)
    add_filled(model)
    tokens_BS = some_tokens(2, 5)
    loss, num_labels = model(tokens_BS, labels_BS=torch.full_like(tokens_BS, -100))
    assert (loss.item(), num_labels.item()) == (0, 0)
    loss.backward()
    for parameter in adapter_parameters(model).values():
        assert parameter.grad is None or not parameter.grad.any()


@torch.no_grad()
def test_selected_logits(family: str) -> None:
    model = tiny_model(family)
    tokens_BS, mask_BS = padded([9, 1, 17], "right")
    select_BS = mask_BS & (torch.arange(17) % 3 == 0)
    logits_BSV = model(tokens_BS, mask_BS=mask_BS)
    selected = model(tokens_BS, mask_BS=mask_BS, select_BS=select_BS)
    assert selected.shape == (int(select_BS.sum()), SIZES["vocab_size"])
    assert_close(selected, logits_BSV[select_BS], rel=LOGITS)
    nothing = model(tokens_BS, mask_BS=mask_BS, select_BS=torch.zeros_like(select_BS))
    assert nothing.shape == (0, SIZES["vocab_size"])


@pytest.mark.parametrize("adapter", [{}, MIXLORA], ids=["LoRA", "MixLoRA"])
def test_adapters(family: str, adapter: dict) -> None:
    model = tiny_model(family)
    tokens_BS, labels_BS = labelled(3, 20)
    with torch.no_grad():
        base_BSV = model(tokens_BS)
        mixlora.add_adapter(model, mixlora.AdapterConfig(r=4, **adapter))
        assert_close(model(tokens_BS), base_BSV, rel=1e-6 if adapter else 0)
        mixlora.adapters.remove_adapter(model)
        add_filled(model, **adapter)
        assert (model(tokens_BS) - base_BSV).abs().max() > 0.01
    loss, num_labels = model(tokens_BS, labels_BS=labels_BS)
    found = gradients(model, loss / num_labels + model.router_loss())
    assert found.keys() == adapter_parameters(model).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("adapter", [{}, {**MIXLORA, "jitter_noise": 0.1}], ids=["LoRA", "MixLoRA"])
def test_gradient_checkpointing_changes_nothing(family: str, adapter: dict) -> None:
    model = tiny_model(family)
    add_filled(model, lora_dropout=0.2, **adapter)
    tokens_BS, mask_BS = padded([9, 4, 12], "right")
    labels_BS = tokens_BS.where(mask_BS, -100)

    def run(checkpointing: bool, seed: int = 0) -> tuple[list[Tensor], int]:
        calls = []
        block = model.model.layers[0]
        hook = block.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(seed)
        model.train()
        model.gradient_checkpointing = checkpointing
        loss, _ = model(tokens_BS, mask_BS=mask_BS, labels_BS=labels_BS)
        router_loss = model.router_loss()
        found = gradients(model, loss + router_loss)
        hook.remove()
        return [loss, router_loss, *found.values()], len(calls)

    (plain, num_plain), (again, num_again) = run(False), run(True)
    assert (num_plain, num_again) == (1, 2)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    (other, _) = run(True, seed=1)
    assert not torch.equal(plain[0], other[0])  # there was dropout


def test_recomputed_block_keeps_its_experts(monkeypatch) -> None:
    """Recomputed logits may differ in their last bits, and a tie could choose other experts."""
    model = tiny_model().train()
    add_filled(model, **MIXLORA)
    model.gradient_checkpointing = True
    given, chosen = [], []

    def spy(logits_TE: Tensor, top_k: int, mask_T: Tensor | None, expert_TK: Tensor | None):
        given.append(expert_TK)
        chosen.append(topk_router(logits_TE, top_k, mask_T, expert_TK))
        return chosen[-1]

    monkeypatch.setattr("mixlora.layers.router.topk_router", spy)
    tokens_BS = some_tokens(2, 9)
    loss, _ = model(tokens_BS, labels_BS=tokens_BS)
    loss.backward()
    assert given[:2] == [None, None]
    for experts_TK, first in zip(given[2:], reversed(chosen[:2]), strict=True):
        assert torch.equal(experts_TK, first.expert_TK)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"mask_BS": torch.ones(2, 5)}, "mask_BS must be bool, got torch.float32"),
        ({"mask_BS": torch.ones(2, 4, dtype=torch.bool)}, r"mask_BS must be \[B, S\] = \[2, 5\]"),
        ({"labels_BS": torch.ones(5)}, r"labels_BS must be \[B, S\] = \[2, 5\], got \[5\]"),
        ({"adapters": ["a"]}, "adapters must be 2 names, one for each row, got 1"),
        ({"adapters": "ab"}, "adapters must be 2 names, one for each row, got 'ab'"),
        ({"adapters": ["a", None]}, "the model has no adapter named 'a'"),
    ],
)
def test_wrong_inputs(inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model()(some_tokens(2, 5), **inputs)
