import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from mixlora import engine
from mixlora.adapters import adapter_parameters
from mixlora.errors import InputError
from mixlora.ops import topk_router
from models.common import positions_of
from tests.numerics import assert_close
from tests.tiny import MIXLORA, SIZES, add_filled, padded, some_tokens, tiny_llama, tiny_model

VARIANTS = {
    "GQA": {},
    "MQA": {"num_key_value_heads": 1},
    "MHA": {"num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wider heads": {"head_dim": 14},
    "narrower heads": {"head_dim": 6, "num_key_value_heads": 1},
    "other theta and eps": {"rope_theta": 500.0, "rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "sharded": {"shard_size": "10KB"},
    "stored in bfloat16": {"stored": torch.bfloat16},
}
GENERATING = {
    name: VARIANTS[name] for name in ("MQA", "MHA", "tied embeddings", "biases", "wider heads")
}
LOGITS = 1e-6  # of logits up to 10: differences of at most 1e-5


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """(ours, that of `transformers`)"""
    folder, hf_model = tiny_llama(tmp_path_factory.mktemp("checkpoint"), **request.param)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in request.param)
    return models.load(folder), hf_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("whole"))[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sharded"), shard_size="10KB")[0]


@torch.no_grad()
def test_logits(pair) -> None:
    model, hf_model = pair
    tokens_BS = some_tokens(3, 40)
    logits_BSV = model(tokens_BS)
    assert logits_BSV.dtype == torch.float32
    assert 1 < logits_BSV.abs().max() < 12
    assert_close(logits_BSV, hf_model(tokens_BS).logits, rel=LOGITS)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits(pair, side: str) -> None:
    model, hf_model = pair
    tokens_BS, mask_BS = padded([9, 1, 17, 16], side)
    positions_BS = (mask_BS.long().cumsum(1) - 1).clamp_min(0)
    wanted = hf_model(tokens_BS, attention_mask=mask_BS.long(), position_ids=positions_BS).logits
    got = model(tokens_BS, mask_BS=mask_BS)
    assert got.isfinite().all()
    assert_close(got[mask_BS], wanted[mask_BS], rel=LOGITS)


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


def test_loaded_model_is_frozen_and_in_eval_mode(pair) -> None:
    model, _ = pair
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_dtype_of_load(whole) -> None:
    model = models.load(whole, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokens_BS = some_tokens(2, 7)
    assert model(tokens_BS).dtype == torch.bfloat16
    assert_close(model(tokens_BS).float(), models.load(whole)(tokens_BS), rel=0.1)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    model = tiny_model()
    lengths = [7, 1, 12]
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
def test_right_padded_prefill_then_decode() -> None:
    model = tiny_model()
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
def test_prefill_in_pieces() -> None:
    model = tiny_model()
    tokens_BS = some_tokens(2, 12)
    cache = model.new_cache(2, 12)
    pieces = [model(piece_BS, cache=cache) for piece_BS in tokens_BS.split([5, 1, 6], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(tokens_BS), rel=LOGITS)
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
def test_chunked_loss(monkeypatch, rows_per_chunk: int) -> None:
    model = tiny_model()
    add_filled(model)
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


@torch.no_grad()
def test_first_label_of_a_segment_is_ignored() -> None:
    model = tiny_model()
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


def test_all_labels_masked() -> None:
    model = tiny_model()
    add_filled(model)
    tokens_BS = some_tokens(2, 5)
    loss, num_labels = model(tokens_BS, labels_BS=torch.full_like(tokens_BS, -100))
    assert (loss.item(), num_labels.item()) == (0, 0)
    loss.backward()
    for parameter in adapter_parameters(model).values():
        assert parameter.grad is None or not parameter.grad.any()


@torch.no_grad()
def test_selected_logits() -> None:
    model = tiny_model()
    tokens_BS, mask_BS = padded([9, 1, 17], "right")
    select_BS = mask_BS & (torch.arange(17) % 3 == 0)
    logits_BSV = model(tokens_BS, mask_BS=mask_BS)
    selected = model(tokens_BS, mask_BS=mask_BS, select_BS=select_BS)
    assert selected.shape == (int(select_BS.sum()), SIZES["vocab_size"])
    assert_close(selected, logits_BSV[select_BS], rel=LOGITS)
    nothing = model(tokens_BS, mask_BS=mask_BS, select_BS=torch.zeros_like(select_BS))
    assert nothing.shape == (0, SIZES["vocab_size"])


@pytest.mark.parametrize("kind", [{}, {**MIXLORA, "jitter_noise": 0.1}], ids=["LoRA", "MixLoRA"])
def test_gradient_checkpointing_changes_nothing(kind: dict) -> None:
    model = tiny_model()
    add_filled(model, lora_dropout=0.2, **kind)
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
        ({"adapters": ["a"]}, "adapters must name an adapter for 2 rows, got 1"),
        ({"adapters": ["a", None]}, "the model has no adapter named 'a'"),
    ],
)
def test_wrong_inputs(inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model()(some_tokens(2, 5), **inputs)


Q = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
NORM = "model.norm.weight"


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        models.load(folder)
    said = str(error.value)
    assert "\n" not in said
    return said


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def test_missing_shard(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    shard.unlink()
    said = error_of(folder)
    assert said.endswith(f"names shards that are not there: {shard.name}")


def test_shard_lacks_an_indexed_tensor(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    edit_tensors(shard, lambda tensors: tensors.pop(GATE))
    said = error_of(folder)
    assert said.startswith(f"{shard}: 1 missing, 0 unexpected, 0 misshaped tensors")
    assert f"missing: {GATE}" in said


def test_shard_holds_a_tensor_that_is_not_indexed(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    edit_tensors(shard, lambda tensors: tensors.update(surplus=torch.ones(2)))
    said = error_of(folder)
    assert said.startswith(f"{shard}: 0 missing, 1 unexpected, 0 misshaped tensors")
    assert "unexpected: surplus" in said


def test_tensor_in_two_shards(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    other = shard_of(folder, Q)
    assert other != shard_of(folder, GATE)
    edit_tensors(other, lambda tensors: tensors.update({GATE: torch.ones(48, 32)}))
    said = error_of(folder)
    assert said.startswith(f"{other}: 0 missing, 1 unexpected, 0 misshaped tensors")
    assert f"unexpected: {GATE}" in said


@pytest.mark.parametrize(
    "place", ["../{}", "/tmp/{}", "sub/{}", "..", ".", "", "pytorch_model.bin", "{}\0"]
)
def test_index_that_leaves_the_folder(sharded, tmp_path, place: str) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, Q)
    for target in (tmp_path, folder / "sub"):
        target.mkdir(exist_ok=True)
        shutil.copy(shard, target)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    place = place.format(shard.name)
    moved = {name: place if file == shard.name else file for name, file in weight_map.items()}
    edit_json(index, weight_map=moved)
    assert error_of(folder) == f"{index}: {place!r} is no safetensors file of this folder"


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "model.safetensors"])
def test_index_without_a_map(sharded, tmp_path, weight_map: object) -> None:
    folder = copy(sharded, tmp_path)
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "weight_map must map tensors to files" in error_of(folder)


def test_transposed_tensor(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_tensors(folder / "model.safetensors", lambda x: x.update({GATE: x[GATE].T}))
    said = error_of(folder)
    assert f"0 missing, 0 unexpected, 1 misshaped tensors; misshaped: {GATE}" in said
    assert f"{GATE} must be [48, 32], got [32, 48]" in said


def test_all_wrong_tensors_are_one_error(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[Q], tensors[NORM]
        tensors.update({"zzz.weight": torch.ones(3), GATE: torch.ones(48, 31)})

    edit_tensors(folder / "model.safetensors", edit)
    said = error_of(folder)
    assert "2 missing, 1 unexpected, 1 misshaped tensors" in said
    assert f"missing: {Q}, {NORM}; unexpected: zzz.weight; misshaped: {GATE} must be" in said


def test_untied_checkpoint_without_lm_head(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert "likely cause: config.json lacks tie_word_embeddings: true" in error_of(folder)


@torch.no_grad()
def test_tensors_that_are_passed_over(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=True)  # and lm_head.weight is stored
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(buffer))
    model = models.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, models.load(whole).model.embed_tokens.weight)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_truncated_file(whole, tmp_path, length: int) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


@pytest.mark.parametrize("lie", [0, 7, 100, 10**6, 2**40, 2**63, 2**64 - 1])
def test_header_that_lies_about_its_length(whole, tmp_path, lie: int) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(lie.to_bytes(8, "little") + path.read_bytes()[8:])
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


def test_bytes_behind_the_tensors(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"surplus")
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


def test_no_weights(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.unlink()
    assert error_of(path.parent) == f"{path}: no such file"


def test_no_folder(tmp_path) -> None:
    assert error_of(tmp_path / "none") == f"model {tmp_path}/none: no such folder"


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported (did you mean 'llama'?)"),
        ({"model_type": "bert"}, "model_type 'bert' is not supported (known: llama)"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is"),
        ({"rope_scaling": LINEAR}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_parameters": LINEAR}, "rope_parameters of type 'linear' is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"hidden_act": "swish_of_another_kind"}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"hidden_size": 32.0}, "hidden_size must be int, got 32.0"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"hidden_size": None}, "hidden_size must be int, got None"),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, got 7"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size 32 must be a multiple of num"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool, got 1"),
        ({"sliding_window": 128}, "sliding_window = 128 is not supported for llama"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not support"),
    ],
)
def test_wrong_config(whole, tmp_path, values: dict, message: str) -> None:
    folder = copy(whole, tmp_path)
    edit_json(folder / "config.json", **values)
    said = error_of(folder)
    assert said.startswith(f"{folder / 'config.json'}: ")
    assert message in said


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"model_type": "llama"}'])
def test_config_that_is_none(whole, tmp_path, text: str) -> None:
    path = copy(whole, tmp_path) / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert error_of(path.parent).startswith(str(path))


def test_no_config(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "config.json"
    path.unlink()
    assert error_of(path.parent) == f"{path}: no such file"


@torch.no_grad()
def test_rope_theta_wherever_it_is_written(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    wanted = models.new({**values, "rope_theta": 500.0}).config
    for written in (
        {"rope_theta": 500.0},
        {"rope_theta": 500, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ):
        path.write_text(json.dumps({**values, **written}))
        assert models.load(path.parent).config == wanted
