"""The training loop as a user runs it: what a run leaves, and that one taken up is the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import mixlora
import models
import train
from mixlora.adapters import adapter_parameters
from mixlora.data import DataConfig, Order, Sample, collate, load_dataset
from mixlora.files import TensorFile
from mixlora.sources import Source
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows
from tests.runs import (
    LORA,
    MIXLORA,
    assert_same_weights,
    metrics,
    run,
    weights,
)


def test_a_run_leaves_what_it_says(settings: dict, tmp_path: Path, capsys) -> None:
    settings["eval"] = {"tasks": ["arc-e", "mine"]}
    settings["run"] |= {"plot": True, "save_every_steps": 2, "keep_last": 2}
    folder = run(settings, tmp_path)
    steps = metrics(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert len(step["expert_load"]) == len(step["router_entropy"]) == 2
        for load in step["expert_load"]:
            assert sum(load) == pytest.approx(1, abs=1e-4)
        assert 0 < step["router_loss"] < 0.01
    saved = sorted(path.name for path in (folder / "default" / "checkpoints").iterdir())
    assert saved == ["step-000004", "step-000006"]
    written = json.loads((folder / "results.json").read_text())
    results = written["results"]
    assert results.keys() == written["averages"].keys() == {"base", "default"}
    settled = {key: written[key] for key in ("protocol", "dtype", "quantize", "seed")}
    expected = {"protocol": "mixlora-fixed", "dtype": "float32", "quantize": "none", "seed": 0}
    assert settled == expected and written["batch_size"] == 32
    assert written["data"].keys() == {"arc-e", "mine"}
    assert written["data"]["mine"]["num_rows"] == results["base"]["mine"]["num_rows"] == 6
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for task in ("arc-e", "mine"):
        accuracy = f"{100 * results['default'][task]['accuracy']:.1f} ±"
        (line,) = (x for x in printed.splitlines() if x.startswith(task))
        assert accuracy in line
    assert yaml.safe_load((folder / "config.yaml").read_text())["adapter"]["num_experts"] == 4

    model = models.load(settings["model"]["base"])
    mixlora.load_adapter(model, folder / "default" / "adapter")
    last = TensorFile(folder / "default/checkpoints/step-000006/adapter_model.safetensors")
    assert_same_weights(weights(folder), {key: last[key] for key in last.shapes})


def test_8_bit_optimizer_and_4_bit_base_resume_exactly(settings: dict, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings["model"]["quantize"], settings["optim"]["kind"] = "nf4", "adamw8bit"
    settings["adapter"] = {"routing_strategy": "mixlora", "r": 16, "lora_dropout": 0.1}
    settings["run"] |= {"save_every_steps": 2, "keep_last": 100}
    whole = run(settings, tmp_path)
    expected_metrics, expected_weights = metrics(whole), weights(whole)
    file = TensorFile(whole / "default/checkpoints/step-000002/optimizer.safetensors")
    assert any(key.endswith("absmax1") for key in file.shapes)
    for step in (4, 6):
        shutil.rmtree(whole / "default" / "checkpoints" / f"step-{step:06d}")
    resumed = run(settings, tmp_path, "--resume")
    assert metrics(resumed) == expected_metrics
    assert_same_weights(weights(resumed), expected_weights)


@pytest.mark.parametrize("loss_on", ["answer", "text", "padded_text"])
def test_a_run_on_files(settings: dict, tmp_path: Path, checkpoint: Path, loss_on: str) -> None:
    """Mixed with a task, weighted, grouped: resumed it is the same, and a step's loss is the sum
    of its labels' losses over their number, however it is cut."""
    rows = [{"instruction": f"sing {i} " * i, "output": "la " * i} for i in range(1, 9)]
    write_rows(tmp_path / "rows.jsonl", rows)
    files = [{"path": str(tmp_path / "rows.jsonl"), "template": "plain", "weight": 1.5}]
    settings["data"] |= {"files": files, "group_by_length": True, "loss_on": loss_on}
    settings["run"]["save_every_steps"] = 4
    whole = run(settings, tmp_path)
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/default/checkpoints/step-000006")
    settings["run"]["dir"] = str(tmp_path / "resumed")
    resumed = run(settings, tmp_path, "--resume")
    assert metrics(resumed) == metrics(whole)
    assert_same_weights(weights(resumed), weights(whole))

    config = DataConfig(**{**settings["data"], "files": [Source(**files[0])]})
    dataset = load_dataset(config, Tokenizer(checkpoint), 96)
    chosen = [dataset.samples[i] for i in Order(dataset, config, 7, seed=0).samples(0)]
    model = models.load(checkpoint)
    losses = num_labels = 0
    for part in (chosen[:3], chosen[3:6], chosen[6:]):
        tokens, mask, labels, _, positions, _ = collate(part, pad_id=dataset.pad_id)
        logits = model(tokens, mask_BS=mask, positions_BS=positions)[:, :-1].flatten(0, 1)
        wanted = labels[:, 1:].flatten()
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        num_labels += int((wanted != -100).sum())
    assert metrics(whole)[0]["loss"] == pytest.approx(float(losses / num_labels), rel=1e-5)


def test_a_run_goes_on_after_a_stop_between_checkpoints(settings: dict, tmp_path: Path) -> None:
    settings["run"]["save_every_steps"] = 4
    expected = metrics(run(settings, tmp_path))
    folder = Path(settings["run"]["dir"])
    shutil.rmtree(folder / "default" / "checkpoints" / "step-000006")
    log = folder / "default" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 7, "lo')  # a line that a crash cut off
    assert metrics(run(settings, tmp_path, "--resume")) == expected


def test_bfloat16_trains(settings: dict, tmp_path: Path) -> None:
    settings["model"]["dtype"] = "bfloat16"
    settings["train"]["steps"] = 30
    losses = [step["loss"] for step in metrics(run(settings, tmp_path))]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("adapter", [MIXLORA, LORA], ids=["mixlora", "lora"])
def test_how_a_batch_is_cut_does_not_change_the_gradient(
    checkpoint: Path, adapter: dict, dtype: torch.dtype
) -> None:
    """Batch 8 at once against 8 batches of 1, ragged, without dropout or router loss. Weights of
    the usual size, or in float64 the checkpoint's, ten times as large: in float32 their products
    alone differ by as much as 1.5e-6 with their sizes."""
    no_loss = {"router_loss": False} if "routing_strategy" in adapter else {}
    config = mixlora.AdapterConfig(**{**adapter, "lora_dropout": 0.0, **no_loss})
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (5, 30, 9, 17, 40, 8, 23, 12):
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        num_prompt = length - 1 - length % 4
        samples.append(Sample(tokens, [-100] * num_prompt + tokens[num_prompt:]))
    num_labels = collate(samples).num_labels

    def gradients(size: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = models.load(checkpoint)
        mixlora.add_adapter(model, config)
        parameters = adapter_parameters(model)
        with torch.no_grad():
            for key, parameter in parameters.items():
                if key.endswith("lora_B"):
                    parameter.normal_(std=0.02)
            if dtype == torch.float32:
                for parameter in {*model.parameters()} - {*parameters.values()}:
                    parameter.mul_(0.1 if parameter.dim() > 1 else 1)
        model.to(dtype).train()
        for start in range(0, 8, size):
            batch = collate(samples[start : start + size])
            loss, _ = model(batch.tokens_BS, mask_BS=batch.mask_BS, labels_BS=batch.labels_BS)
            (loss / num_labels).backward()
        return {key: parameter.grad for key, parameter in parameters.items()}

    at_once, one_by_one = gradients(8), gradients(1)
    for key in at_once:
        assert at_once[key].abs().max() > 1e-5, key
        assert (at_once[key] - one_by_one[key]).abs().max() <= 1e-6, key


def test_print_config_shows_every_key_and_does_nothing(
    settings: dict, tmp_path: Path, capsys
) -> None:
    run(settings, tmp_path, "--print-config", "optim.lr=1e-5")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 1e-5
    assert printed["adapter"]["num_experts"] == 4
    assert printed["train"]["gradient_checkpointing"] is False
    assert not Path(settings["run"]["dir"]).exists()


def test_config_documentation_names_every_key() -> None:
    import dataclasses
    import typing

    text = Path("docs/config.md").read_text()

    def keys(kind: type, prefix: str = "") -> list[str]:
        found = []
        for name, hint in typing.get_type_hints(kind).items():
            inner = typing.get_args(hint)[0] if typing.get_args(hint) else hint
            nested = dataclasses.is_dataclass(inner)
            found += keys(inner, f"{prefix}{name}.") if nested else [prefix + name]
        return found

    wanted = [key for key in keys(train.TrainConfig) if not key.startswith("adapters.")]
    assert [key for key in wanted if f"`{key}`" not in text] == []


KINDS = {
    "DoRA": {"r": 4, "use_dora": True, "lora_dropout": 0.1},
    "MixDoRA": {**MIXLORA, "use_dora": True},
    "dynamic": {"routing_strategy": "mixlora-dynamic", "r": 2, "num_experts": 3},
    "switch": {"routing_strategy": "mixlora-switch", "r": 2, "num_experts": 3, "ffn_dropout": 0.1},
    "mola": {"routing_strategy": "mola", "r": 2, "num_experts": 3, "router_loss": True},
    "loramoe": {"routing_strategy": "loramoe", "r": 2, "num_experts": 3},
    "milora": {"routing_strategy": "milora", "r": 2, "top_k": 1, "lora_dropout": 0.1},
    "midora": {"routing_strategy": "milora", "r": 2, "top_k": 3, "use_dora": True},
}


@pytest.mark.parametrize("adapter", KINDS.values(), ids=KINDS)
def test_every_kind_trains_and_resumes_exactly(
    adapter: dict, settings: dict, tmp_path: Path
) -> None:
    settings |= {"adapter": adapter}
    settings["optim"]["schedule"] = "constant"
    settings["train"] |= {"steps": 3, "gradient_checkpointing": True}
    shutil.move(run(settings, tmp_path), tmp_path / "whole")
    settings["train"]["steps"] = 2
    folder = run(settings, tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 2\n", "steps: 3\n", 1))
    settings["train"]["steps"] = 3
    run(settings, tmp_path, "--resume")
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert_same_weights(weights(folder), weights(tmp_path / "whole"))


MILORA = {"routing_strategy": "milora", "r": 4, "top_k": 2, "router_weight": "straight_through"}


def test_milora_learns(settings: dict, tmp_path: Path) -> None:
    settings |= {"adapter": MILORA}
    settings["train"]["steps"] = 30
    steps = metrics(run(settings, tmp_path))
    losses = [step["loss"] for step in steps]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for step in steps:
        assert [len(load) for load in step["expert_load"]] == [7, 7]
        assert 0 < step["router_loss"] <= 0.07  # 1e-2 when balanced, 7e-2 when one takes all


def test_modules_that_were_never_active_resume_too(settings: dict, tmp_path: Path) -> None:
    """AdamW has no moments for them: one sample makes two modules of seven active."""
    settings |= {"adapter": MILORA}
    settings["train"] = {"steps": 3, "batch_size": 1, "max_seq_len": 96}
    settings["run"] |= {"save_every_steps": 1, "keep_last": 9}
    folder = run(settings, tmp_path)
    first = folder / "default/checkpoints/step-000001/optimizer.safetensors"
    assert sum(key.endswith("lora_A.step") for key in TensorFile(first).shapes) == 2 * 2
    expected_metrics, expected_weights = metrics(folder), weights(folder)
    for step in (2, 3):
        shutil.rmtree(folder / f"default/checkpoints/step-00000{step}")
    run(settings, tmp_path, "--resume")
    assert metrics(folder) == expected_metrics
    assert_same_weights(weights(folder), expected_weights)


def test_milora_needs_to_know_the_prompt(settings: dict, tmp_path: Path, capsys) -> None:
    settings |= {"adapter": MILORA}
    settings["data"]["loss_on"] = "text"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(path)]) == 2
    assert "data.loss_on must be answer with routing_strategy milora" in capsys.readouterr().err
    assert not Path(settings["run"]["dir"]).exists()


def test_parts_of_a_trained_adapter(settings: dict, tmp_path: Path) -> None:
    """The routers alone, from where another run stopped."""
    first = run(settings, tmp_path)
    before = weights(first)
    start = shutil.move(first / "default" / "adapter", tmp_path / "start")
    settings["train"] |= {"start_from": str(start), "parts": ["routers"], "steps": 2}
    settings["run"] |= {"overwrite": True}
    after = weights(run(settings, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) == ("moe_gate" not in key), key


def test_capacity_by_the_formula(settings: dict, tmp_path: Path) -> None:
    settings["adapter"] = {
        "routing_strategy": "mixlora-switch",
        "num_experts": 4,
        "capacity_factor": 1.5,
    }
    settings["train"]["steps"] = 1
    folder = run(settings, tmp_path)
    saved = json.loads((folder / "default" / "adapter" / "adapter_config.json").read_text())
    assert saved["expert_capacity"] == 36  # 96 / 4 * 1.5


@pytest.mark.parametrize(
    "train_options, said",
    [
        ({"start_from": "nowhere"}, "nowhere/adapter_model.safetensors: no such file"),
        ({"parts": []}, "train.parts must name at least one of routers, experts, lora"),
        ({"parts": ["router"]}, "train.parts.0 must be routers or experts or lora, got 'router'"),
    ],
)
def test_wrong_beginnings(
    train_options: dict, said: str, settings: dict, tmp_path: Path, capsys
) -> None:
    settings["train"] |= train_options
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert not Path(settings["run"]["dir"]).exists()
