"""Steps that go wrong, and that nothing else does for it: numbers that are not finite, odd rows,
long runs."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mixlora
import train
from mixlora import training
from mixlora.adapters import adapter_parameters, trained_parameters
from mixlora.files import TensorFile, write_tensors
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows
from tests.runs import LORA, MIXLORA, assert_same_weights, metrics, run, strict_json, weights
from tests.tiny import padded, tiny_model

SLOW = pytest.mark.slow
MILORA = {"routing_strategy": "milora", "r": 2, "top_k": 7, "lora_dropout": 0.1}


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.fixture
def poisoned(checkpoint: Path, tmp_path: Path, settings: dict) -> dict:
    """Ten rows in batches of 3, of which the seventh has a token whose embedding is inf."""
    folder = shutil.copytree(checkpoint, tmp_path / "poisoned")
    file = TensorFile(folder / "model.safetensors")
    tensors = {key: file[key].clone() for key in file.shapes}
    (token,) = set(Tokenizer(folder).encode("a Z")) - set(Tokenizer(folder).encode("a "))
    tensors["model.embed_tokens.weight"][token] = math.inf
    write_tensors(folder / "model.safetensors", tensors)
    rows = [{"instruction": f"sing {'Z' if i == 6 else i}", "output": "la " * i} for i in range(10)]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings["model"]["base"] = str(folder)
    settings["data"] = {"files": [{"path": str(tmp_path / "rows.jsonl")}]}
    settings["train"] |= {"steps": 8, "batch_size": 3, "micro_batch_size": 2, "max_seq_len": 192}
    settings["run"] |= {"save_every_steps": 1, "keep_last": 100}
    settings["token"] = token
    return settings


@pytest.mark.parametrize(
    "adapter",
    [MIXLORA, pytest.param(LORA, marks=SLOW), pytest.param(MILORA, marks=SLOW)],
    ids=["mixlora", "lora", "milora"],
)
def test_a_step_that_is_not_finite_is_skipped(
    poisoned: dict, tmp_path: Path, capsys, adapter: dict
) -> None:
    token = poisoned.pop("token")
    poisoned["adapter"] = adapter
    poisoned["train"] |= {"on_non_finite": "skip", "max_skips": 2}
    folder = run(poisoned, tmp_path)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert len(skipped) == 2  # two epochs of four steps
    said, told = capsys.readouterr()
    assert f"default: 2 steps were skipped: {folder / 'default'}/not-finite-*.json\n" in said
    assert strict_json(folder / "results.json")["skipped_steps"] == {"default": 2}
    status = strict_json(folder / "status.json")["adapters"]["default"]
    assert (status["step"], status["of"], status["skipped"]) == (8, 8, 2)
    for count, step in enumerate(skipped, 1):
        name = f"not-finite-{step:06d}.json"
        assert f"default: step {step}: the loss or the gradient is not finite" in told
        assert f"{name}; the step is skipped ({count} of 2)" in told
        report = strict_json(folder / "default" / name)
        (bad,) = (s for s in report["samples"] if token in s["tokens"])
        assert bad["index"] == 6 and len(bad["tokens"]) == len(bad["labels"])
        losses = [x for micro in report["row_losses"] for x in micro]
        place = report["samples"].index(bad)
        assert [isinstance(x, float) for x in losses] == [i != place for i in range(len(losses))]
        for tensor in report["tensors"].values():
            assert tensor["weight_norm"] >= 0
        assert any(x["gradient_not_finite"] for x in report["tensors"].values())
        if step > 1:
            saved = folder / "default" / "checkpoints"
            before, after = saved / f"step-{step - 1:06d}", saved / f"step-{step:06d}"
            for file in ("adapter_model.safetensors", "optimizer.safetensors"):
                a, b = TensorFile(before / file), TensorFile(after / file)
                assert a.shapes == b.shapes
                same = [torch.equal(a[key], b[key]) for key in a.shapes]
                assert all(same)
    assert all(x.isfinite().all() for x in weights(folder).values())


def test_skips_are_counted_over_a_resumed_run(poisoned: dict, tmp_path: Path, capsys) -> None:
    poisoned.pop("token")
    poisoned["train"] |= {"on_non_finite": "skip"}
    poisoned["run"]["plot"] = True  # of the other steps
    shutil.copytree(run(poisoned, tmp_path), tmp_path / "whole")
    poisoned["run"]["overwrite"] = True
    poisoned["train"]["max_skips"] = 1
    folder = run(poisoned, tmp_path, code=2)
    err = capsys.readouterr().err
    assert "train.max_skips 1 are used up; checkpoints are in" in err
    assert not (folder / "default" / "adapter").exists()
    run(poisoned, tmp_path, "--resume", code=2)
    run({**poisoned, "train": {**poisoned["train"], "max_skips": 2}}, tmp_path, "--resume")
    assert (folder / "summary.png").exists()
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert_same_weights(weights(folder), weights(tmp_path / "whole"))


def nan_loss(loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def inf_gradient(loss: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The loss itself is finite."""
    return loss + (parameter.flatten()[0] * 0).abs().sqrt() * 1e30 * 1e30


@pytest.mark.parametrize(
    "fault, step",
    [
        (nan_loss, 4),
        *(pytest.param(nan_loss, n, marks=SLOW) for n in (1, 2, 3, 5, 6)),
        *(pytest.param(inf_gradient, n, marks=SLOW) for n in range(1, 7)),
    ],
)
def test_after_a_fault_the_run_goes_on_as_if_it_had_not_been(
    settings: dict, tmp_path: Path, monkeypatch, capsys, fault: Callable, step: int
) -> None:
    """In a step's second micro-batch; nothing of it is left in weights or moments."""
    settings["run"] |= {"save_every_steps": 1, "keep_last": 100}
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"]["overwrite"] = True
    real = train.AdapterTraining.loss

    def loss(self: train.AdapterTraining, loss_B: torch.Tensor) -> torch.Tensor:
        if self.step == step - 1 and len(self.losses) == len(self.batches) - 1:
            loss_B = fault(loss_B, next(iter(self.parameters.values())))
        return real(self, loss_B)

    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTraining, "loss", loss)
        folder = run(settings, tmp_path, code=2)
    err = capsys.readouterr().err
    report = folder / "default" / f"not-finite-{step:06d}.json"
    assert f"samples and norms are in {report}; checkpoints are in" in err
    assert strict_json(report)["step"] == step
    assert len(metrics(folder)) == step - 1
    run(settings, tmp_path, "--resume")
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert_same_weights(weights(folder), weights(tmp_path / "whole"))


# --- odd rows -------------------------------------------------------------------------------------

ODD_ROWS = {
    "one row": ([{"instruction": "sing", "output": "la"}], 0),
    "empty strings": ([{"instruction": "", "output": ""}, {"instruction": "a", "output": "b"}], 0),
    "only EOS is learned": ([{"instruction": "sing", "output": ""}], 0),
    "an answer that is too long": (
        [{"instruction": "a", "output": "la " * 400}, {"instruction": "a", "output": "b"}],
        1,
    ),
    "a line of 10 MB": (
        [{"instruction": "a", "output": "la " * 3_500_000}, {"instruction": "a", "output": "b"}],
        1,
    ),
    "a prompt that is too long": ([{"instruction": "la " * 400, "output": "b"}], 0),
    "emoji, joined ones, right to left": (
        [{"instruction": "👩‍👩‍👧‍👦 \u202eabc\u202c שלום", "output": "🏳️‍🌈 مرحبا"}],
        0,
    ),
    "NUL": ([{"instruction": "a\x00b", "output": "\x00"}], 0),
    "line ends": ([{"instruction": "a\r\nb\u2028c\x85d", "output": "\r\n"}], 0),
    "BOM within": ([{"instruction": "\ufeffa", "output": "\ufeff"}], 0),
    "special tokens as text": ([{"instruction": "<s>[INST]</s>", "output": "</s>"}], 0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=SLOW if "10 MB" in x else ()) for x in ODD_ROWS]
)
def test_odd_rows_train_or_are_counted(settings: dict, tmp_path: Path, capsys, name: str) -> None:
    rows, num_skipped = ODD_ROWS[name]
    write_rows(tmp_path / "rows.jsonl", rows)
    settings["data"] = {"files": [{"path": str(tmp_path / "rows.jsonl")}]}
    settings["train"] |= {"steps": 2, "max_seq_len": 192}
    folder = run(settings, tmp_path)
    told = capsys.readouterr().out
    assert f"default: {len(rows) - num_skipped} samples" in told
    assert f" {num_skipped} skipped" in told
    steps = metrics(folder)
    assert len(steps) == 2
    assert all(math.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in steps)


@pytest.mark.parametrize("masked", [[1], [0, 2], [0, 1, 2]])
def test_rows_without_a_label_add_nothing(masked: list[int]) -> None:
    """0 and not 0 / 0, alone and beside others."""
    model = tiny_model()
    mixlora.add_adapter(model, mixlora.AdapterConfig(r=4))
    tokens_BS, mask_BS = padded([9, 5, 12], "right")
    labels_BS = tokens_BS.masked_fill(~mask_BS, -100)
    labels_BS[masked] = -100
    loss_B, num_labels = model(tokens_BS, mask_BS=mask_BS, labels_BS=labels_BS, by_row=True)
    assert (loss_B[masked] == 0).all() and loss_B.isfinite().all()
    loss_B.sum().backward()
    gradients = [p.grad for p in trained_parameters(model).values()]
    assert all(x.isfinite().all() for x in gradients)
    assert any(x.any() for x in gradients) == (len(masked) < 3)


# --- what training changes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter", [MIXLORA, pytest.param(LORA, marks=SLOW)], ids=["mixlora", "lora"]
)
@pytest.mark.parametrize("key", [{"gradient_checkpointing": True}, {"activation": "recompute"}])
def test_recomputing_changes_no_bit(
    settings: dict, tmp_path: Path, adapter: dict, key: dict
) -> None:
    settings["adapter"] = adapter
    shutil.copytree(run(settings, tmp_path), tmp_path / "saved")
    settings["train"] |= key
    settings["run"]["overwrite"] = True
    folder = run(settings, tmp_path)
    assert metrics(folder) == metrics(tmp_path / "saved")
    assert_same_weights(weights(folder), weights(tmp_path / "saved"))


EVERYWHERE = {
    "mixlora": MIXLORA,
    "lora": LORA,
    "dora": {"r": 4, "use_dora": True},
    "mixdora": {**MIXLORA, "use_dora": True},
    "mola": {"routing_strategy": "mola", "r": 2, "num_experts": 3, "router_loss": True},
    "loramoe": {"routing_strategy": "loramoe", "r": 2, "num_experts": 3},
    "milora": MILORA,
}


def base_hash(model: AdaptedModel) -> str:
    digest = hashlib.sha256()
    names = model.adapter_configs
    adapters = {p for name in names for p in adapter_parameters(model, name).values()}
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x not in adapters:
            digest.update(name.encode())
            digest.update(x.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("mixlora", "milora") else SLOW)
        for name in EVERYWHERE
    ],
)
def test_every_trained_tensor_moves_and_no_other(
    settings: dict, tmp_path: Path, monkeypatch, name: str
) -> None:
    settings |= {"adapter": EVERYWHERE[name]}
    settings["train"]["steps"] = 3
    before: dict[str, torch.Tensor] = {}
    bases: list[str] = []
    real_begin, real_end = training.begin_adapter, train.AdapterTraining.end

    def begin(model: AdaptedModel, run: train.AdapterRun) -> None:
        bases.append(base_hash(model))
        real_begin(model, run)
        parameters = trained_parameters(model, run.name)
        before.update({key: x.detach().clone() for key, x in parameters.items()})

    def end(self: train.AdapterTraining) -> None:
        bases.append(base_hash(self.model))
        assert self.parameters.keys() == before.keys()
        still = [key for key, x in self.parameters.items() if torch.equal(x, before[key])]
        assert still == []
        real_end(self)

    monkeypatch.setattr(training, "begin_adapter", begin)
    monkeypatch.setattr(train.AdapterTraining, "end", end)
    run(settings, tmp_path)
    assert len(bases) == 2 and len(set(bases)) == 1


# --- long runs ------------------------------------------------------------------------------------


@SLOW
def test_a_long_run_needs_no_more_than_a_short_one(
    settings: dict, tmp_path: Path, monkeypatch
) -> None:
    """Memory and descriptors at every checkpoint: a line through the latter four fifths of them
    rises by less than 1 MB in all. SOAK_STEPS says how long it is."""
    num_steps = int(os.environ.get("SOAK_STEPS", 10_000))
    write_rows(tmp_path / "rows.jsonl", [{"text": "la " * n} for n in range(2, 9)])
    settings["data"] = {"files": [{"path": str(tmp_path / "rows.jsonl")}], "loss_on": "text"}
    settings["train"] |= {"steps": num_steps, "batch_size": 1, "micro_batch_size": None}
    settings["adapter"] = {**MIXLORA, "num_experts": 2, "target_modules": ["down_proj"]}
    settings["run"] |= {"save_every_steps": 50}
    kilobytes, descriptors = [], []
    real = train.AdapterTraining.save_state

    def save_state(self: train.AdapterTraining) -> None:
        real(self)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        kilobytes.append(int(status["VmRSS"].split()[0]))
        descriptors.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(train.AdapterTraining, "save_state", save_state)
    run(settings, tmp_path)
    assert len(kilobytes) == num_steps // 50
    late = torch.tensor(kilobytes[len(kilobytes) // 5 :], dtype=torch.float64)
    place = torch.arange(len(late), dtype=torch.float64)
    slope = ((place - place.mean()) * (late - late.mean())).sum() / place.var() / (len(late) - 1)
    rise = slope.item() * len(late)
    print(f"{num_steps} steps: {rise:.0f} kB, {set(descriptors)} descriptors, {kilobytes[::20]}")
    assert abs(rise) < 1024
    assert len(set(descriptors)) == 1
