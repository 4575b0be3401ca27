"""What `--estimate` predicts without a weight is what a step takes: ten settings on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mixlora
import models
import train
from benchmarks.worker import Trainee, saved_bytes, serve
from mixlora.adapters import adapter_parameters, freeze_but, trained_parameters
from mixlora.batches import joined
from mixlora.checkpoint import Checkpoints
from mixlora.data import Sample, collate
from mixlora.estimate import GIB, RESERVED, Estimate, Held, estimate, rows_of, sizes_of
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.optim import OptimConfig, make_optimizer
from mixlora.train_config import AdapterRun, LoopConfig, RunConfig
from tests.tiny import FAMILIES

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MIXTURE = {"routing_strategy": "mixlora", "r": 8, "num_experts": 8, "top_k": 2}
DROPOUT = {**MIXTURE, "lora_dropout": 0.1}
MILORA = {"routing_strategy": "milora", "r": 8}


@dataclass
class Case:
    adapters: dict[str, dict[str, Any]]
    train: dict[str, Any] = field(default_factory=dict)
    kind: str = "llama"
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[AdapterRun]:
        loop = {"steps": 1, "batch_size": 4, "max_seq_len": 96, **self.train}
        return [
            AdapterRun(name, LoopConfig(**loop), mixlora.AdapterConfig(**adapter))
            for name, adapter in self.adapters.items()
        ]

    def values(self) -> dict[str, Any]:
        return {"model_type": self.kind, **SIZES, **FAMILIES[self.kind], **self.config}


CASES = {
    "LoRA": Case({"a": {"r": 80}}),
    "DoRA, grouped keys": Case({"a": {"use_dora": True}}, config={"num_key_value_heads": 2}),
    "MixLoRA, dropout": Case({"a": DROPOUT}),
    "MixLoRA, dropout, bf16": Case({"a": DROPOUT}, dtype=torch.bfloat16),
    "MixLoRA, checkpointing": Case({"a": DROPOUT}, {"gradient_checkpointing": True}),
    "MixLoRA, recompute": Case({"a": DROPOUT}, {"activation": "recompute"}),
    "MixDoRA": Case({"a": {**MIXTURE, "use_dora": True}}),
    "MiLoRA": Case({"a": MILORA}, {"batch_size": 16}),
    "MiLoRA, one prompt": Case({"a": MILORA}, {"batch_size": 2, "micro_batch_size": 1}),
    "together": Case({"a": {"r": 16}, "b": MIXTURE, "c": {"routing_strategy": "mola"}}),
    "Mistral, dynamic": Case({"a": {"routing_strategy": "mixlora-dynamic"}}, kind="mistral"),
    "Gemma 2, switch": Case({"a": {"routing_strategy": "mixlora-switch"}}, kind="gemma2"),
    "experts alone": Case({"a": MIXTURE}, {"parts": ["experts"], "micro_batch_size": 2}),
}


def put_adapters(model: AdaptedModel, runs: list[AdapterRun]) -> AdaptedModel:
    for run in runs:
        mixlora.add_adapter(model, run.adapter, run.name)
        freeze_but(model, run.name, run.train.parts)
    return model


def predicted(case: Case, folder: Path) -> Estimate:
    (folder / "config.json").write_text(json.dumps(case.values()))
    with torch.device("meta"):
        model = put_adapters(models.without_data(folder, case.dtype), case.runs())
    return estimate(model, case.runs(), "cpu")


def begun(case: Case) -> tuple[AdaptedModel, Callable[[], torch.Tensor]]:
    """A model with the case's adapters, and the loss of a full micro-batch."""
    torch.manual_seed(0)
    runs = case.runs()
    model = put_adapters(models.new(case.values()).to(case.dtype), runs).train()
    for run in runs:
        for name, parameter in adapter_parameters(model, run.name).items():
            if ".prompt_router." in name and name.endswith("weight"):
                parameter.data.normal_()  # prompts choose differently
    settings = runs[0].train
    model.gradient_checkpointing = settings.gradient_checkpointing
    model.recompute_ffn = settings.activation == "recompute"
    tokens_BS = torch.randint(1, 500, (rows_of(runs[0]), settings.max_seq_len))
    samples = [Sample(tokens, tokens) for tokens in tokens_BS.tolist()]
    batch, spans = joined({run.name: collate(samples) for run in runs})

    def loss() -> torch.Tensor:
        loss_B, _ = model(
            batch.tokens_BS,
            mask_BS=batch.mask_BS,
            adapters=spans,
            labels_BS=batch.labels_BS,
            by_row=True,
        )
        return loss_B.sum() + model.router_loss()

    return model, loss


def measured(case: Case, folder: Path) -> Estimate:
    runs, (model, loss) = case.runs(), begun(case)
    resting = sum(sizes_of([*model.parameters(), *model.buffers()]).values())
    saved = saved_bytes(loss)
    trained = {run.name: trained_parameters(model, run.name) for run in runs}
    learned = [p for parameters in trained.values() for p in parameters.values()]
    accumulates = runs[0].train.batch_size > rows_of(runs[0])
    for p in learned if accumulates else ():  # of earlier micro-batches
        p.grad = torch.zeros_like(p)
    held = Held(model, runs)
    held.known |= sizes_of([p.grad for p in learned if p.grad is not None]).keys()
    before = sum(p.grad.nbytes for p in learned if p.grad is not None)
    with held:
        loss().backward()
    peak, gradients = before + held.most, sum(p.grad.nbytes for p in learned if p.grad is not None)
    optimizer = written = 0
    for run in runs:
        updated = make_optimizer(trained[run.name], OptimConfig(), 1.0)
        for p in trained[run.name].values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # MiLoRA's may have none
        updated.step()
        state = [x for values in updated.state.values() for x in values.values()]
        optimizer += sum(x.nbytes for x in state)
        config = RunConfig(dir=str(folder))
        Checkpoints(folder / run.name, model, run.name, updated, config).save(1, {})
        files = (folder / run.name).rglob("*.safetensors")
        written += sum(path.stat().st_size for path in files)
    adapters = sum(p.nbytes for run in runs for p in adapter_parameters(model, run.name).values())
    peak = resting + optimizer + max(peak, gradients)
    return Estimate(
        resting - adapters, adapters, gradients, optimizer, saved, 0, 0, 0, peak, written
    )


QUICK = "MixLoRA, dropout", "MiLoRA, one prompt", "together", "Gemma 2, switch"


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_what_is_predicted_is_what_is_measured(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found, wanted = predicted(case, tmp_path), measured(case, tmp_path)
    for key in ("base", "adapters", "optimizer"):
        assert getattr(found, key) == getattr(wanted, key), key
    for key in ("gradients", "saved", "peak", "checkpoint"):
        print(f"{key} {getattr(found, key)} / {getattr(wanted, key)}", end="; ")
        assert getattr(found, key) == pytest.approx(getattr(wanted, key), rel=0.1), key


RESIDENT = [name for name, case in CASES.items() if "micro_batch_size" not in case.train]


def larger(name: str, rows: int) -> Case:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    loop = {"batch_size": rows, "max_seq_len": 512}
    case = CASES[name]
    return replace(case, config=case.config | sizes, train=case.train | loop)


def trainee(options: dict) -> Trainee:
    case = larger(**options["case"])
    model, loss = begun(case)
    trained = [trained_parameters(model, run.name).values() for run in case.runs()]
    return Trainee(loss, [p for parameters in trained for p in parameters])


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDENT)
def test_a_process_grows_as_predicted(name: str, tmp_path: Path) -> None:
    """Physical memory, at most, of two steps: what more rows add to it. (In the first step a
    process also imports much.)"""
    wanted, grown = [], []
    for rows in (1, 6):
        wanted.append(predicted(larger(name, rows), tmp_path).peak)
        answers = subprocess.run(
            [sys.executable, "-m", "tests.test_estimate"],
            input=json.dumps({"case": {"name": name, "rows": rows}}) + "\nstep\nstep\npeak\n",
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        ).stdout.splitlines()
        peak = json.loads(answers[-1])
        grown.append(peak["peak_bytes"] + peak["held_bytes"])
    print(f"{wanted} / {grown}: {(wanted[1] - wanted[0]) / (grown[1] - grown[0]):.3f}")
    assert wanted[1] - wanted[0] == pytest.approx(grown[1] - grown[0], rel=0.1)


def test_train_prints_it_and_writes_nothing(tmp_path: Path, capsys) -> None:
    """From config.json alone: there are no weights and no data."""
    (tmp_path / "config.json").write_text(json.dumps(CASES["LoRA"].values()))
    settings = {
        "model": {"base": str(tmp_path)},
        "train": {"steps": 1, "max_seq_len": 32},
        "run": {"dir": str(tmp_path / "run"), "together": 1},
        "adapters": [{"name": "small", "adapter": {"r": 1}}, {"name": "large"}],
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "x.yaml"), "--estimate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "large: 16 x 32 tokens, float32 base"
    assert lines[1].split()[:2] == ["base", "weights"]
    assert lines[-1].startswith("fits a card of: 24 GB yes, 48 GB yes, 80 GB yes")
    assert not (tmp_path / "run").exists()


def test_a_card_is_not_filled() -> None:
    nothing = [0] * 8
    assert Estimate(*nothing, peak=int(24 * GIB - RESERVED), checkpoint=0).fits(24)
    assert not Estimate(*nothing, peak=int(24 * GIB - RESERVED) + 1, checkpoint=0).fits(24)


if __name__ == "__main__":  # the process that grows
    serve(trainee)
