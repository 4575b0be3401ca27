"""Training configs of mLoRA and MoE-PEFT."""

import json
from pathlib import Path

import pytest
import yaml

import train
from mixlora import config as configs
from mixlora import mlora_config

TARGETS = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj".split()
TEMPLATE = {  # as `launch.py gen --template mixlora --tasks "arc-e;boolq"` of MoE-PEFT writes it
    "cutoff_len": 96,
    "save_step": 10,
    "train_lora_candidate_num": 2,
    "train_lora_simultaneously_num": 2,
    "train_strategy": "optim",
    "lora": [
        {
            "name": "arc-e_0",
            "task_name": "arc-e",
            "optim": "adamw",
            "scheduler_type": "constant",
            "warmup_steps": 0,
            "lr": 2e-4,
            "batch_size": 8,
            "micro_batch_size": 4,
            "evaluate_batch_size": 16,
            "num_epochs": 2,
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.05,
            "target_modules": dict.fromkeys(TARGETS, True) | {"o_proj": False},
            "routing_strategy": "mixlora",
            "num_experts": 4,
            "top_k": 2,
            "group_by_length": False,
        }
    ],
}


def variant(**changes: object) -> dict:
    return {**TEMPLATE, "lora": [{**TEMPLATE["lora"][0], **changes}]}


def loaded(values: dict, folder: Path, *overrides: str) -> train.TrainConfig:
    path = folder / "theirs.json"
    path.write_text(json.dumps(values, indent=4))
    more = ["model.base=base", "data.dir=tasks", f"run.dir={folder / 'run'}", *overrides]
    return configs.load(train.TrainConfig, path, more, mlora_config.translate)


def test_every_setting(tmp_path: Path) -> None:
    config = loaded(TEMPLATE, tmp_path)
    (run,) = config.runs()
    assert (run.name, run.data.tasks, run.data.dir) == ("arc-e_0", ["arc-e"], "tasks")
    assert (run.train.epochs, run.train.steps, run.train.max_seq_len) == (2, None, 96)
    assert (run.train.batch_size, run.train.micro_batch_size) == (8, 4)
    assert (run.optim.lr, run.optim.schedule, run.optim.weight_decay) == (2e-4, "constant", 0.01)
    assert (run.optim.warmup_steps, run.optim.max_grad_norm) == (0, 0.0)
    assert (run.eval.tasks, run.eval.protocol, run.eval.batch_size) == (["arc-e"], "mixlora", 16)
    adapter = run.adapter
    assert (adapter.routing_strategy, adapter.num_experts, adapter.top_k) == ("mixlora", 4, 2)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 8, 0.05)
    assert adapter.target_modules == [t for t in TARGETS if t != "o_proj"]
    assert adapter.router_aux_loss_coef == 0.001
    data = run.data
    assert (data.loss_on, data.append_eos, data.truncate) == ("padded_text", False, "end")
    assert not data.reshuffle and not data.group_by_length
    assert config.run.save_every_steps == 5  # they count forwards
    assert config.run.together == 2


def test_a_setting_of_ours_wins(tmp_path: Path) -> None:
    config = loaded(TEMPLATE, tmp_path, "adapters.0.optim.max_grad_norm=1", "run.seed=42")
    assert config.runs()[0].optim.max_grad_norm == 1 and config.run.seed == 42


def test_several_tasks_and_legacy_names(tmp_path: Path) -> None:
    legacy = {"w1_proj": True, "w2_proj": True, "w3_proj": False}
    values = variant(task_name="arc-e;boolq", routing_strategy="mixtral", target_modules=legacy)
    (run,) = loaded(values, tmp_path).runs()
    assert run.data.tasks == run.eval.tasks == ["arc-e", "boolq"]
    assert run.adapter.routing_strategy == "mixlora"
    assert run.adapter.target_modules == ["gate_proj", "down_proj"]


@pytest.mark.parametrize("prompt, template", [(None, "moe_peft"), ("alpaca", "alpaca")])
def test_instructions(prompt: str | None, template: str, tmp_path: Path) -> None:
    values = variant(task_name="casual", data="alpaca.json", prompt=prompt)
    (run,) = loaded(values, tmp_path).runs()
    (source,) = run.data.files
    assert (source.path, source.template) == ("alpaca.json", template)
    assert run.data.tasks == run.eval.tasks == []


def test_it_trains(checkpoint: Path, task_folder: Path, tmp_path: Path) -> None:
    second = {**TEMPLATE["lora"][0], "name": "boolq_1", "task_name": "boolq", "num_epochs": 1}
    plain = {k: second[k] for k in second if k not in ("routing_strategy", "num_experts", "top_k")}
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({**TEMPLATE, "lora": [TEMPLATE["lora"][0], plain]}))
    overrides = [
        f"model.base={checkpoint}",
        f"data.dir={task_folder}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert train.main(["--config", str(path), *overrides, "run.plot=false"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["protocol"] == "mixlora"
    assert {name: list(tasks) for name, tasks in results["results"].items()} == {
        "base": ["arc-e", "boolq"],
        "arc-e_0": ["arc-e"],
        "boolq_1": ["boolq"],
    }
    # what was resolved is a config of ours, which goes on with the run
    assert train.main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


@pytest.mark.parametrize(
    "values, said",
    [
        (variant(optim="sgd"), "theirs.json:11: optim = 'sgd': there is only AdamW"),
        (variant(warmup_steps=100), "upstream reads it nowhere: set optim.warmup_steps"),
        (variant(warmup_ratio=0.1), "warmup_ratio = 0.1: set optim.warmup_steps"),
        (variant(task_name=""), "an adapter needs data, or a task_name"),
        (variant(data="x.json"), "data = 'x.json': tasks are read from data.dir"),
        (variant(num_epoch=1), "unknown key 'lora.num_epoch' (did you mean 'num_epochs'?)"),
        (variant(lr="fast"), "theirs.json:14: adapters.0.optim.lr must be a finite number"),
        (variant(scheduler_type="polynomial"), "adapters.0.optim.schedule must be constant or"),
        (
            {**TEMPLATE, "cutoff_length": 3},
            "unknown key 'cutoff_length' (did you mean 'cutoff_len'?)",
        ),
        ({**TEMPLATE, "lora": []}, "lora must be a list of at least one adapter"),
        ({**TEMPLATE, "lora": [3]}, "an adapter of lora must be a mapping"),
        ({"lora": [{"task_name": "arc-e"}]}, "steps or epochs must be given"),
        (variant(batch_size=0), "batch_size must be >= 1, got 0"),
        (variant(task_name=["arc-e"]), "adapters.0.data.tasks.0 must be text, got a list"),
        (variant(routing_strategy=["mola"]), "routing_strategy must be text, got a list"),
        (variant(target_modules=[["q_proj"]]), "target_modules.0 must be text, got a list"),
    ],
)
def test_wrong_configs(values: dict, said: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(values, indent=4))
    overrides = ["model.base=base", f"run.dir={tmp_path / 'run'}"]
    assert train.main(["--config", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


PAPER = sorted((Path(__file__).resolve().parents[1] / "configs/paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=[path.stem for path in PAPER])
def test_recipes_of_the_paper(path: Path) -> None:
    config = configs.load(train.TrainConfig, path)
    quirky = not path.stem.endswith(("_tuned", "_alpaca"))
    for run in config.runs():
        is_mixture = run.adapter.routing_strategy is not None
        assert (run.adapter.r, run.adapter.lora_alpha) == ((16, 32) if is_mixture else (80, 160))
        assert run.adapter.use_dora == ("dora" in path.stem)
        assert run.adapter.use_rslora == path.stem.endswith("_tuned")
        assert run.adapter.router_aux_loss_coef == 0.001
        assert (run.data.loss_on == "padded_text") == quirky
        assert (run.optim.max_grad_norm == 0) == quirky
        assert run.eval.protocol == ("mixlora" if quirky else "mixlora-fixed")
        assert f"configs/paper/{path.name}" in path.read_text()
    names = [run.name for run in config.runs()]
    assert len(names) == (1 if "multitask" in path.stem or "alpaca" in path.stem else 8)


@pytest.mark.parametrize("name", ["mixdora", "switch_tuned", "lora_multitask"])
def test_a_recipe_runs(name: str, checkpoint: Path, task_folder: Path, tmp_path: Path) -> None:
    """On a tiny model, on the two tasks that are here."""
    (path,) = (path for path in PAPER if path.stem == name)
    values = yaml.safe_load(path.read_text())
    if "adapters" in values:
        values["adapters"] = [a for a in values["adapters"] if a["name"] in ("arc-e", "boolq")]
    else:
        values["data"]["tasks"] = values["eval"]["tasks"] = ["arc-e", "boolq"]
    values["train"] |= {"epochs": 1, "max_seq_len": 96}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    overrides = [
        f"model.base={checkpoint}",
        f"data.dir={task_folder}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert train.main(["--config", str(config), *overrides, "run.plot=false"]) == 0
