"""Adapter files of other programs, both ways, and what is done with a loaded adapter."""

import io
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixlora
import models
from mixlora import AdapterConfig
from mixlora.adapter_config import LoraSettings
from mixlora.adapter_files import CONFIG_FILE, PICKLED_FILE, TENSOR_FILE, adapter_tensors
from mixlora.adapters import adapter_parameters, freeze_but, part_of
from mixlora.errors import InputError
from mixlora.layers.lora import Linear, Lora, rescale
from tests.numerics import assert_close
from tests.tiny import (
    MIXLORA,
    SIZES,
    add_filled,
    fill,
    normal,
    padded,
    some_tokens,
    tiny_llama,
    tiny_model,
)

INSTRUCT = Path(__file__).resolve().parents[2] / "shared/data/instruct"
TOKENS_BS = some_tokens(2, 9)
FILES = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "r": 5, "lora_alpha": 1.5},
    "DoRA": {"use_dora": True},
    "rsDoRA of two projections": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["v_proj", "down_proj"],
    },
    "DoRA by a regular expression": {
        "use_dora": True,
        "target_modules": r".*layers\.1\.(self_attn|mlp)\.(q|up|down)_proj",
    },
}
files = pytest.mark.parametrize("kind", FILES.values(), ids=FILES)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(TOKENS_BS)


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def peft_model(folder: Path, hf_model: nn.Module, kind: dict) -> nn.Module:
    """peft's model of the kind, every tensor filled, saved in the folder."""
    from peft import LoraConfig, get_peft_model

    values = {"r": 4, "lora_alpha": 2, "target_modules": "all-linear", **kind}
    model = get_peft_model(hf_model, LoraConfig(task_type="CAUSAL_LM", **values)).eval()
    fill({name: p for name, p in model.named_parameters() if "lora_" in name}, seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.abs_().add_(0.2)
    model.save_pretrained(folder)
    return model


@files
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_what_peft_saves_loads_here(kind: dict, bias: bool, ending: str, tmp_path) -> None:
    base, hf_model = tiny_llama(tmp_path / "base", attention_bias=bias, mlp_bias=bias)
    theirs = peft_model(tmp_path / "adapter", hf_model, kind)
    if ending == "bin":
        torch.save(
            load_file(tmp_path / "adapter" / TENSOR_FILE), tmp_path / "adapter/adapter_model.bin"
        )
        (tmp_path / "adapter" / TENSOR_FILE).unlink()
    ours = models.load(base)
    before = logits_of(ours)
    mixlora.load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(TOKENS_BS).logits
    assert (logits_of(ours) - wanted).abs().max() <= 1e-5
    assert (before - wanted).abs().max() > 0.1


@files
@pytest.mark.parametrize("bias", [False, True])
def test_peft_loads_what_is_saved_here(kind: dict, bias: bool, tmp_path) -> None:
    from peft import PeftModel

    base, hf_model = tiny_llama(tmp_path / "base", attention_bias=bias, mlp_bias=bias)
    ours = models.load(base)
    add_filled(ours, **{"target_modules": "all-linear", **kind})
    mixlora.save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(hf_model, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = theirs(TOKENS_BS).logits
    assert (found - logits_of(ours)).abs().max() <= 1e-5
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            assert p.any(), name


@pytest.mark.parametrize("bias", [False, True])
def test_dora_trains_as_in_peft(bias: bool, tmp_path) -> None:
    """20 steps of AdamW on the same data from the same weights."""
    base, hf_model = tiny_llama(tmp_path / "base", attention_bias=bias, mlp_bias=bias)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    theirs = get_peft_model(hf_model, config).train()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models.load(base).train()
    mixlora.load_adapter(ours, tmp_path / "adapter")
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for model in (ours, theirs)
    ]
    moved = 0.0
    start = {k: v.clone() for k, v in adapter_tensors(ours).items() if "magnitude" in k}
    for step in range(20):
        tokens_BS = some_tokens(4, 16, seed=step)
        loss, num_labels = ours(tokens_BS, labels_BS=tokens_BS)
        losses = loss / num_labels, theirs(tokens_BS, labels=tokens_BS).loss
        assert abs(losses[0].item() - losses[1].item()) <= 1e-5, step
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    magnitudes = {k: p for k, p in theirs.named_parameters() if "magnitude" in k}
    for key, ours_O in adapter_tensors(ours).items():
        if "magnitude" in key:
            (theirs_O,) = (p for k, p in magnitudes.items() if key.partition(".layers.")[2] in k)
            assert_close(ours_O, theirs_O, rel=1e-5)
            moved = max(moved, (ours_O - start[key]).abs().max().item())
    assert moved > 0.05


def test_dora_of_a_fresh_adapter_changes_no_bit() -> None:
    for bias in (False, True):
        model = tiny_model(attention_bias=bias, mlp_bias=bias)
        before = logits_of(model)
        mixlora.add_adapter(model, AdapterConfig(use_dora=True, target_modules="all-linear"))
        assert torch.equal(logits_of(model), before)


@torch.no_grad()
@pytest.mark.parametrize("what", ["weight", "lora_A", "lora_B"])
def test_dora_norms_follow_each_parameter(what: str) -> None:
    """Changed in place or replaced."""
    base = Linear(6, 5)
    fill(dict(base.named_parameters()))
    lora = Lora(base, r=2, lora_alpha=3, use_dora=True)
    fill(dict(lora.named_parameters()), seed=1)
    parameter = getattr(base if what == "weight" else lora, what)
    for change in range(2):
        lora.dora_scale(base)
        parameter.data = 2 * parameter.data if change else parameter.mul_(2).data
        norm_O = (base.weight + 1.5 * lora.lora_B @ lora.lora_A).norm(dim=1)
        assert_close(lora.dora_scale(base), lora.lora_magnitude_vector / norm_O)


def test_a_scale_near_1_keeps_its_digits_in_bf16() -> None:
    y_NO = normal(50, 40, dtype=torch.bfloat16)
    scale_O = 1 + normal(40, seed=1).float() / 300
    wanted_NO = scale_O.double() * y_NO.double()
    found_NO = rescale(y_NO.clone(), torch.zeros_like(y_NO), scale_O, Linear(3, 40)).double()
    assert ((found_NO - wanted_NO).abs() <= 1.02 * 2**-8 * wanted_NO.abs()).all()  # one rounding


@torch.no_grad()
def test_dora_norms_follow_the_parameters() -> None:
    """They are kept between forwards, but never stale: not after a step, nor from inference."""
    model = tiny_model()
    add_filled(model, use_dora=True)
    with model.evaluating():
        before = model(TOKENS_BS)
    parameters = adapter_parameters(model)
    key = next(key for key in parameters if key.endswith("lora_B"))
    parameters[key].mul_(2)
    changed = logits_of(model)
    fresh = tiny_model()
    add_filled(fresh, use_dora=True)
    adapter_parameters(fresh)[key].mul_(2)
    assert torch.equal(changed, logits_of(fresh)) and not torch.equal(changed, before)
    with torch.enable_grad():
        loss, _ = model(TOKENS_BS, labels_BS=TOKENS_BS)
        loss.backward()


# -- MoE-PEFT and pip mixlora ----------------------------------------------------------------------


def moe_peft_files(folder: Path, model: nn.Module, legacy: bool = False, **changes) -> None:
    """The adapter "default" as MoE-PEFT, or mLoRA before it, writes it: config and .bin, by names
    and order of its own."""
    config = model.adapter_configs["default"]
    new = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    tensors = {}
    for layer, block in enumerate(model.model["layers"]):
        mixture = block.mlp.mixtures["default"]
        at = f"mixlora.layers.{layer}"
        gate = f"{at}.gate.weight" if legacy else f"{at}.mlp.moe_gate.weight"
        tensors[gate] = mixture.moe_gate.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            lora = getattr(block.self_attn, name).adapters["default"]
            tensors[f"{at}.self_attn.{name}.lora_A.weight"] = lora.lora_A
            tensors[f"{at}.self_attn.{name}.lora_B.weight"] = lora.lora_B
        for name in ("gate_proj", "down_proj", "up_proj"):
            pair = getattr(mixture, name)
            for e in range(config.num_experts):
                key = f"{at}.experts.{e}.{new[name]}" if legacy else f"{at}.mlp.{name}.experts.{e}"
                tensors[f"{key}.lora_A.weight"] = nn.Parameter(pair.lora_A[e].clone())
                tensors[f"{key}.lora_B.weight"] = nn.Parameter(pair.lora_B[e].clone())
    values = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.05,
        "target_modules": [new.get(t, t) if legacy else t for t in config.target_modules],
        "routing_strategy": config.routing_strategy,
        "num_experts": config.num_experts,
        "base_model_name_or_path": "some/base",
        "task_type": None,
        **changes,
    }
    folder.mkdir()
    torch.save(tensors, folder / PICKLED_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=4))


THEIR_KINDS = {
    "top k": ({"routing_strategy": "mixlora", "top_k": 2}, {"top_k": 2, "act_fn": "silu"}),
    "no act_fn": ({"routing_strategy": "mixlora", "top_k": 3}, {"top_k": 3}),
    "dynamic": (
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.5},
        {"top_p": 0.6, "temperature": 0.5, "act_fn": "silu"},
    ),
    "switch": (
        {"routing_strategy": "mixlora-switch", "expert_capacity": 3},
        {"expert_capacity": 3, "sparse_step": 2, "act_fn": "silu"},
    ),
    "expert_lora": (
        {"routing_strategy": "mixlora", "expert_lora": LoraSettings(r=3, lora_alpha=7)},
        {
            "top_k": 2,
            "expert_lora": {"bias": "none", "r": 3, "lora_alpha": 7, "lora_dropout": 0.05},
        },
    ),
}


@pytest.mark.parametrize("settings, written", THEIR_KINDS.values(), ids=THEIR_KINDS)
def test_what_moe_peft_saves_loads_here(settings: dict, written: dict, tmp_path) -> None:
    model = tiny_model()
    add_filled(model, num_experts=4, **settings)
    moe_peft_files(tmp_path / "theirs", model, **written)
    other = tiny_model()
    mixlora.load_adapter(other, tmp_path / "theirs")
    assert torch.equal(logits_of(other), logits_of(model))
    assert not torch.equal(logits_of(other), logits_of(tiny_model()))
    config = other.adapter_configs["default"]
    assert config.lora_dropout == 0.05 and config.task_type is None
    mixlora.save_adapter(other, tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert values["task_type"] == "CAUSAL_LM" and values["act_fn"] == "silu"
    assert (tmp_path / "ours" / PICKLED_FILE).exists() == (
        settings["routing_strategy"] == "mixlora" and "expert_lora" not in settings
    )
    ours = load_file(tmp_path / "ours" / TENSOR_FILE)
    theirs = torch.load(tmp_path / "theirs" / PICKLED_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason="../shared/data/instruct is not there")
def test_the_published_legacy_config(tmp_path) -> None:
    """The config of alpaca-mixlora-7b as it was published, around legacy tensors."""
    (path,) = INSTRUCT.glob("*legacy*.json")
    published = json.loads(path.read_text())
    config = AdapterConfig.from_dict(published, path)
    assert config.routing_strategy == "mixlora" and "gate_proj" in config.target_modules
    model = tiny_model()
    fill_values = {**config.to_dict(), "act_fn": None}
    mixlora.add_adapter(model, AdapterConfig.from_dict(fill_values))
    fill(adapter_parameters(model), seed=1)
    moe_peft_files(tmp_path / "theirs", model, legacy=True, **published)
    other = tiny_model()
    mixlora.load_adapter(other, tmp_path / "theirs")
    assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("strategy", ["loramoe", "mola"])
def test_names_of_plugged_mixtures(strategy: str) -> None:
    """As MoE-PEFT writes them: a router for every projection that has experts."""
    model = tiny_model()
    add_filled(
        model, routing_strategy=strategy, num_experts=2, target_modules=["q_proj", "up_proj"]
    )
    names = {re.sub(r"layers\.\d", "layers.0", name) for name in adapter_tensors(model)}
    pair = ["lora_A.weight", "lora_B.weight"]
    up = f"{strategy}.layers.0.mlp.up_proj"
    wanted = {f"{up}.moe_gate.weight"} | {f"{up}.experts.{e}.{x}" for e in (0, 1) for x in pair}
    q = f"{strategy}.layers.0.self_attn.q_proj"
    if strategy == "mola":
        wanted |= {f"{q}.moe_gate.weight"} | {f"{q}.experts.{e}.{x}" for e in (0, 1) for x in pair}
    else:
        wanted |= {f"{q}.{x}" for x in pair}
    assert names == wanted


def test_magnitudes_of_experts_have_names_of_their_own(tmp_path) -> None:
    model = tiny_model()
    add_filled(model, use_dora=True, **MIXLORA)
    mixlora.save_adapter(model, tmp_path)
    shapes = {k: list(x.shape) for k, x in load_file(tmp_path / TENSOR_FILE).items()}
    assert shapes["mixlora.layers.1.mlp.down_proj.experts.3.lora_magnitude_vector"] == [32]
    assert shapes["mixlora.layers.1.self_attn.q_proj.lora_magnitude_vector"] == [32]
    assert not (tmp_path / PICKLED_FILE).exists()


def edited(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **changes}))


def test_likely_causes(tmp_path) -> None:
    folder = tmp_path / "adapter"

    def said(kind: dict, change) -> str:
        model = tiny_model()
        model.name_or_path = "this/base"
        add_filled(model, base_model_name_or_path="that/base", **kind)
        mixlora.save_adapter(model, folder)
        change()
        mixlora.remove_adapter(model)
        return error_of(mixlora.load_adapter, model, folder)

    text = said(MIXLORA, lambda: edited(folder, use_dora=True))
    assert text.endswith("use_dora of adapter_config.json; MoE-PEFT never saved magnitudes")
    text = said(MIXLORA, lambda: edited(folder, num_experts=5))
    assert text.endswith("likely cause: num_experts or target_modules of adapter_config.json")
    text = said({}, lambda: edited(folder, r=3))
    assert "(made for that/base, this is this/base), or r of adapter_config.json" in text

    def add_classifier() -> None:
        tensors = load_file(folder / TENSOR_FILE)
        save_file({**tensors, "classifier": torch.zeros(2, 32)}, folder / TENSOR_FILE)

    assert "an adapter with a classifier" in said({}, add_classifier)

    def both_names() -> None:
        tensors = load_file(folder / TENSOR_FILE)
        old = tensors["mixlora.layers.0.mlp.moe_gate.weight"].clone()
        save_file({**tensors, "mixlora.layers.0.gate.weight": old}, folder / TENSOR_FILE)

    assert "holds tensors twice" in said(MIXLORA, both_names)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", ["code", "list", "cut", "text", "numbers"])
def test_bin_files_that_are_not_tensors(content: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    add_filled(model, **MIXLORA)
    mixlora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / TENSOR_FILE).unlink()
    path = tmp_path / "adapter" / PICKLED_FILE
    whole = io.BytesIO()
    torch.save({"a": Evil()}, whole)
    path.write_bytes(
        {
            "code": whole.getvalue(),
            "list": pickle.dumps([1, 2]),
            "cut": path.read_bytes()[:-1000],
            "text": b"hello",
            "numbers": pickle.dumps({"a": 1}),
        }[content]
    )
    said = error_of(mixlora.load_adapter, tiny_model(), tmp_path / "adapter")
    assert said.startswith(f"{path}: ")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("version, is_safe", [("2.9.1+cpu", False), ("2.10.0", True)])
def test_bin_files_need_a_torch_that_runs_no_code(
    version: str, is_safe: bool, tmp_path, monkeypatch
) -> None:
    """T18: of an older one (CVE-2026-24747) not a byte of the file is read."""
    model, reads = tiny_model(), []
    add_filled(model, **MIXLORA)
    mixlora.save_adapter(model, tmp_path)
    (tmp_path / TENSOR_FILE).unlink()
    monkeypatch.setattr(torch, "__version__", version)
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: reads.append(a) or load(*a, **k))
    if is_safe:
        mixlora.load_adapter(tiny_model(), tmp_path)
    else:
        said = error_of(mixlora.load_adapter, tiny_model(), tmp_path)
        assert said == f"{tmp_path / PICKLED_FILE}: a .bin file is read by torch 2.10 or newer only"
    assert bool(reads) == is_safe


@pytest.mark.parametrize("kind", [{}, MIXLORA, {**MIXLORA, "use_dora": True}], ids=str)
def test_each_tensor_that_is_not_as_it_should(kind: dict, tmp_path) -> None:
    """T20: absent, or turned."""
    model = tiny_model(num_hidden_layers=1)
    add_filled(model, **kind)
    mixlora.save_adapter(model, tmp_path, pickled=False)
    mixlora.remove_adapter(model)
    tensors = load_file(tmp_path / TENSOR_FILE)
    for name, x in tensors.items():
        save_file({k: y for k, y in tensors.items() if k != name}, tmp_path / TENSOR_FILE)
        said = error_of(mixlora.load_adapter, model, tmp_path)
        assert f": 1 missing, 0 unexpected, 0 misshaped tensors; missing: {name}; likely" in said
        if x.dim() == 2:
            save_file({**tensors, name: x.T.contiguous()}, tmp_path / TENSOR_FILE)
            said = error_of(mixlora.load_adapter, model, tmp_path)
            assert f"misshaped: {name} must be {[*x.shape]}, got {[*x.T.shape]}; likely" in said
    assert model.adapter_configs == {}


# -- targets, freezing, merging --------------------------------------------------------------------


def test_targets_by_regular_expression_and_all() -> None:
    def targets(target_modules, **kind) -> set[str]:
        model = tiny_model()
        mixlora.add_adapter(model, AdapterConfig(target_modules=target_modules, **kind))
        return {re.sub(r"\.(adapters|mixtures)\..*", "", key) for key in adapter_parameters(model)}

    assert targets(r".*\.1\.self_attn\.[qk]_proj") == {
        f"model.layers.1.self_attn.{x}_proj" for x in "qk"
    }
    assert len(targets("all-linear")) == 14 == len(targets(list(AdapterConfig().target_modules)))
    assert targets(r".*\.0\..*(q|up)_proj", **MIXLORA) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp",
    }
    config = AdapterConfig(target_modules=r".*\.7\.q_proj")
    said = error_of(mixlora.add_adapter, tiny_model(), config)
    assert "fits none of the model's projections, such as model.layers.0.self_attn.q_proj" in said


@pytest.mark.parametrize("parts", [["routers"], ["experts"], ["lora"], ["routers", "lora"]])
@pytest.mark.parametrize("strategy", ["mixlora", "loramoe"])
def test_freeze_but(parts: list[str], strategy: str, capsys) -> None:
    model = tiny_model().train()
    add_filled(model, routing_strategy=strategy, num_experts=3)
    freeze_but(model, "default", parts)
    loss, _ = model(TOKENS_BS, labels_BS=TOKENS_BS)
    (loss + model.router_loss()).backward()
    for key, p in adapter_parameters(model).items():
        assert (p.grad is not None) == (part_of(key, model) in parts), key
    mixlora.print_trainable_parameters(model)
    said = capsys.readouterr().out
    assert all(
        (part in said.partition(":")[2]) == (part in parts) for part in ("routers", "experts")
    )


def test_a_part_is_not_told_by_the_adapters_name() -> None:
    model = tiny_model()
    add_filled(model, "moe_gate")
    freeze_but(model, "moe_gate", ["lora"])
    assert all(p.requires_grad for p in adapter_parameters(model, "moe_gate").values())


def test_freeze_but_what_is_not_there() -> None:
    model = tiny_model()
    add_filled(model)
    assert error_of(freeze_but, model, "default", ["routers"]) == (
        "of routers the adapter has none: it has lora"
    )


@pytest.mark.parametrize("kind", [*FILES.values(), MIXLORA, {**MIXLORA, "use_dora": True}])
def test_merge(kind: dict, capsys) -> None:
    model = tiny_model(attention_bias=True)
    add_filled(model, **kind)
    wanted = logits_of(model)
    difference = mixlora.merge(model)
    assert difference <= 1e-5
    assert (logits_of(model) - wanted).abs().max() <= 1e-5
    assert f"logits differ by at most {difference:.2g}" in capsys.readouterr().out
    with mixlora.disable_adapters(model):
        assert (logits_of(model) - logits_of(tiny_model(attention_bias=True))).abs().max() > 0.1
    if kind.get("routing_strategy"):
        assert sorted(model.adapter_configs["default"].target_modules) == [
            "down_proj",
            "gate_proj",
            "up_proj",
        ]
        assert all(".mixtures." in key for key in adapter_parameters(model))
    else:
        assert not model.adapter_configs


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_checkpoint_in_transformers(tied: bool, tmp_path) -> None:
    """What peft's adapter makes of transformers' model, merged and saved here, loaded there."""
    from transformers import AutoModelForCausalLM

    base, hf_model = tiny_llama(tmp_path / "base", tie_word_embeddings=tied, attention_bias=True)
    (base / "tokenizer.model").write_bytes(b"kept")
    theirs = peft_model(tmp_path / "adapter", hf_model, {"use_dora": True})
    model = models.load(base)
    mixlora.load_adapter(model, tmp_path / "adapter")
    mixlora.merge(model)
    models.save(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"kept"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = theirs(TOKENS_BS).logits
        assert (again(TOKENS_BS).logits - wanted).abs().max() <= 1e-5
    assert torch.equal(logits_of(models.load(tmp_path / "merged")), logits_of(model))


def test_save_that_cannot_be(tmp_path) -> None:
    base, _ = tiny_llama(tmp_path / "base")
    assert "own weights are read from" in error_of(models.save, models.load(base), base)
    assert "not loaded from a checkpoint" in error_of(models.save, tiny_model(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("targets", [r"model\.layers\.0\..*", ["layers.1.mlp.up_proj", "q_proj"]])
def test_what_a_merge_leaves_is_saved_and_loaded(targets: str | list, tmp_path) -> None:
    model = tiny_model()
    add_filled(model, target_modules=targets, **MIXLORA)
    mixlora.merge(model)
    wanted = logits_of(model)
    mixlora.save_adapter(model, tmp_path)
    mixlora.remove_adapter(model)
    mixlora.load_adapter(model, tmp_path)
    assert torch.equal(logits_of(model), wanted)


def test_a_merge_tells_what_lost_routers_change() -> None:
    """Switch scales every feed-forward by its weight, also where none has experts."""
    model = tiny_model()
    add_filled(model, target_modules=["q_proj"], routing_strategy="mixlora-switch")
    assert mixlora.merge(model) > 0.1
    assert not model.adapter_configs and model.active_adapter is None


def test_merge_that_cannot_be() -> None:
    model = tiny_model()
    add_filled(model, target_modules=["up_proj"], **MIXLORA)
    assert "has experts only" in error_of(mixlora.merge, model)
    add_filled(model, "other")
    assert "also has the adapter" in error_of(mixlora.merge, model, "other")


# -- switch, step by step --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dora", [False, True])
def test_switch_prefill_and_decode_equal_one_forward(side: str, dora: bool) -> None:
    """The cache counts on where the prompt stopped, for every row."""
    model = tiny_model()
    config = {"routing_strategy": "mixlora-switch", "num_experts": 3, "expert_capacity": 2}
    add_filled(model, use_dora=dora, **config)
    prompt_BS, mask_BS = padded([7, 4], side)
    new_BS = some_tokens(2, 6, seed=5)
    whole_BS = torch.cat([prompt_BS, new_BS], dim=1)
    whole_mask_BS = torch.cat([mask_BS, torch.ones_like(new_BS, dtype=torch.bool)], dim=1)
    wanted = model(whole_BS, mask_BS=whole_mask_BS)
    dropped = (model.routing("default")[0].expert_TK < 0).float().mean()
    assert 0.2 < dropped < 0.9
    assert torch.equal(model.train()(whole_BS, mask_BS=whole_mask_BS), wanted) is False  # jitter
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    assert torch.equal(model(whole_BS, mask_BS=whole_mask_BS), wanted)  # training is as inference
    model.eval()

    cache = model.new_cache(2, 20)
    parts = [model(prompt_BS, mask_BS=mask_BS, cache=cache)]
    parts += [model(new_BS[:, i : i + 1], cache=cache) for i in range(6)]
    found = torch.cat(parts, dim=1)
    assert_close(found[whole_mask_BS], wanted[whole_mask_BS], rel=1e-5)


def test_capacity_of_the_formula() -> None:
    values = {"routing_strategy": "mixlora-switch", "num_experts": 8, "capacity_factor": 1.25}
    assert AdapterConfig(**values, capacity_seq_len=512).expert_capacity == 80
    assert AdapterConfig(**values, capacity_seq_len=1).expert_capacity == 1
    assert AdapterConfig(routing_strategy="mixlora-switch").expert_capacity == 32
    said = error_of(mixlora.add_adapter, tiny_model(), AdapterConfig(**values))
    assert said.startswith("capacity_factor needs capacity_seq_len")


def test_z_loss() -> None:
    model = tiny_model()
    config = {"routing_strategy": "mixlora-switch", "num_experts": 3, "router_aux_loss_coef": 0.0}
    add_filled(model, router_z_loss_coef=0.5, jitter_noise=0.0, **config)
    logits: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "jitter_noise"):
            module.register_forward_pre_hook(
                lambda router, inputs: logits.append(inputs[0] @ router.weight.T)
            )
    tokens_BS, mask_BS = padded([9, 4], "right")
    model(tokens_BS, mask_BS=mask_BS)
    real = torch.cat([x[mask_BS.flatten()] for x in logits])
    wanted = 0.5 * real.exp().sum(-1).log().square().mean()
    assert_close(model.router_loss(), wanted, rel=1e-5)
    assert SIZES["num_hidden_layers"] == len(logits)
