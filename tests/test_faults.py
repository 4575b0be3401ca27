"""Steps that go wrong, and that nothing else does for it: numbers that are not finite, memory that
does not suffice, odd rows, long runs."""

import errno
import gc
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import mixlora
import models
import train
from mixlora import memory, ops, training
from mixlora.adapters import adapter_parameters, trained_parameters
from mixlora.errors import InputError
from mixlora.evaluation import evaluate, load_questions
from mixlora.faults import in_batches
from mixlora.files import TensorFile, write_tensors
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.memory import Snapshot, is_out_of_memory, largest_tensors
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows
from tests.runs import LORA, MIXLORA, assert_same_weights, metrics, run, weights
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


def strict_json(path: Path) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


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


# --- memory that does not suffice -----------------------------------------------------------------


def cpu_error() -> RuntimeError:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("an exabyte was there")


def operator_error() -> RuntimeError:
    """It speaks of no memory."""
    try:
        ops.dropout(torch.empty(1, 1).expand(1 << 30, 1 << 30), 0.1, torch.tensor(0))
    except RuntimeError as error:
        return error
    raise AssertionError("exabytes were there")


ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": cpu_error,
    "operator": operator_error,
}


def test_what_is_an_out_of_memory_error() -> None:
    assert all(is_out_of_memory(error()) for error in ERRORS.values())
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(OSError())
    other = str(operator_error()).replace("new_empty", "view").replace("contiguous", "view")
    assert "API call failed" in other and not is_out_of_memory(RuntimeError(other))


def test_what_a_gpu_did_before_is_not_taken_for_memory(monkeypatch) -> None:
    """An allocation fails of it, too."""

    def wait() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    error = operator_error()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        is_out_of_memory(error)


class Failing:
    """What stands for a method and raises at its `at`-th call, or where `when` holds."""

    def __init__(
        self, real: Callable, error: Callable, at: int = 0, when: Callable = lambda *_: False
    ) -> None:
        self.real, self.error, self.at, self.when, self.calls = real, error, at, when, 0

    def __call__(self, *arguments: object, **more: object) -> object:
        self.calls += 1
        if self.calls == self.at or self.when(*arguments):
            raise self.error()
        return self.real(*arguments, **more)


@pytest.mark.parametrize(
    "place, error",
    [
        ("forward", "cpu"),
        pytest.param("forward", "gpu", marks=SLOW),
        pytest.param("forward", "operator", marks=SLOW),
        pytest.param("backward", "cpu", marks=SLOW),
        pytest.param("optimizer", "cpu", marks=SLOW),
    ],
)
def test_memory_that_fails_in_training(
    settings: dict, tmp_path: Path, monkeypatch, capsys, error: str, place: str
) -> None:
    """At the k-th call for growing k, until none fails any more."""
    settings["train"] |= {"steps": 2, "batch_size": 5}
    settings["run"] |= {"save_every_steps": 1}
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"]["overwrite"] = True
    owner, name = {
        "forward": (train, "forward_backward"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
    }[place]
    for at in range(1, 10):
        with monkeypatch.context() as patch:
            failing = Failing(getattr(owner, name), ERRORS[error], at)
            patch.setattr(owner, name, lambda *a, failing=failing, **k: failing(*a, **k))
            config = tmp_path / "config.yaml"
            config.write_text(yaml.safe_dump(settings))
            code = train.main(["--config", str(config)])
        told = capsys.readouterr().err
        if failing.calls < at:
            break
        assert code == 2 and "Traceback" not in told
        assert told.splitlines()[-1].startswith("error: out of memory (")
        knobs = ("gradient_checkpointing=true", "activation=recompute", "micro_batch_size")
        assert all(f"train.{knob}" in told for knob in (*knobs, "max_seq_len"))
        per_step = 1 if place == "optimizer" else 2
        assert "By --estimate it takes up to 0.00" in told
        saved = "none saved" if at <= per_step else "last checkpoint after step 1"
        step = (at + per_step - 1) // per_step
        assert f"in default, step {step} with batches of [3, " in told
        assert saved in told
        path = tmp_path / "run" / f"out-of-memory-{step:06d}.json"
        assert f"; what held memory is in {path}. By --estimate" in told
        assert strict_json(path)["tensors"]["storages"] > 0
        run(settings, tmp_path, "--resume", "train.gradient_checkpointing=true")
        assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
        assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert at == 2 * per_step + 1 and code == 0


def failing_forward(at: int, *sizes: int) -> Callable:
    """Has made a tensor of these sizes where at its `at`-th call it fails."""
    forward_backward = Failing(train.forward_backward, cpu_error, at)

    def run(*arguments: object) -> None:
        large = torch.empty(*sizes)
        forward_backward(*arguments)
        del large

    return run


def test_what_held_memory_is_in_a_file(settings: dict, tmp_path: Path, monkeypatch, capsys) -> None:
    settings["run"] |= {"save_every_steps": 1}
    monkeypatch.setattr(train, "forward_backward", failing_forward(5, 1001, 997))
    monkeypatch.setattr(memory, "MOST", 10**6)  # what tests before keep may be larger
    folder = run(settings, tmp_path, code=2)
    monkeypatch.undo()
    report = strict_json(folder / "out-of-memory-000002.json")
    told = capsys.readouterr().err.splitlines()[-1]
    assert report["error"] in told and report["state"] in told
    assert report["state"].startswith("default, step 2 with batches of [3, ")
    parts = report["estimated_bytes"]
    assert f"up to {parts['peak'] / 2**30:.3f} GiB" in told
    assert {"base", "adapters", "gradients", "optimizer", "saved", "backward"} < parts.keys()
    assert parts["base"] < report["resident_bytes"] <= report["peak_bytes"] < 1 << 40
    tensors = report["tensors"]
    size = {"bytes": 4 * 1001 * 997, "count": 1, "shape": [1001, 997], "name": None}
    assert {**size, "dtype": "float32", "device": "cpu"} in tensors["largest"]
    sizes = [kind["bytes"] for kind in tensors["largest"]]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == tensors["bytes"]
    assert size["bytes"] + parts["base"] < tensors["bytes"]
    assert sum(kind["count"] for kind in tensors["largest"]) == tensors["storages"]
    model = models.load(settings["model"]["base"])
    shapes = {name: list(x.shape) for name, x in model.named_parameters()}
    largest = max(shapes, key=lambda name: math.prod(shapes[name]))
    (found,) = (kind for kind in tensors["largest"] if kind["name"] == largest)
    assert (found["shape"], found["count"]) == (shapes[largest], 1)
    run(settings, tmp_path, "--resume")


@pytest.mark.parametrize("fault", ["the disk is full", "there is no memory for it"])
def test_what_cannot_be_written_hides_no_error(
    settings: dict, tmp_path: Path, monkeypatch, capsys, fault: str
) -> None:
    settings["run"] |= {"save_every_steps": 1}
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        if "out-of-memory" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    def no_memory(model: AdaptedModel) -> dict:
        raise MemoryError

    path = tmp_path / "run" / "out-of-memory-000002.json"
    wanted = f"cannot be written to {path}: No space left on device."
    monkeypatch.setattr(train, "forward_backward", failing_forward(5, 2))
    if fault == "the disk is full":
        monkeypatch.setattr(os, "write", full)
    else:
        monkeypatch.setattr(memory, "largest_tensors", no_memory)
        wanted = "cannot be told: MemoryError."
    folder = run(settings, tmp_path, code=2)
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.splitlines()[-1].startswith("error: out of memory (")
    assert f"; what held memory {wanted} By --estimate" in told
    assert not [path.name for path in folder.iterdir() if "out-of-memory" in path.name]
    monkeypatch.undo()
    run(settings, tmp_path, "--resume")


def test_memory_that_fails_as_training_begins(
    settings: dict, tmp_path: Path, monkeypatch, capsys
) -> None:
    collate = Failing(training.collate, cpu_error, 1)
    monkeypatch.setattr(training, "collate", lambda *a: collate(*a))
    folder = run(settings, tmp_path, code=2)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: out of memory (")
    path = folder / "out-of-memory-000000.json"
    assert f"in the beginning of an adapter's training; what held memory is in {path}" in told
    assert strict_json(path)["tensors"]["storages"] > 0


def test_tensors_are_counted_by_their_storage(monkeypatch) -> None:
    monkeypatch.setattr(memory, "MOST", 10**6)  # what tests before keep may be larger
    model = tiny_model()
    weight = model.model["embed_tokens"].weight
    weight.grad = torch.ones_like(weight)
    expanded = torch.empty(77, 1).expand(77, 10**9)
    whole = torch.empty(3 * 5003)
    parts = whole.view(3, 5003).unbind()
    pairs = [torch.empty(6007, dtype=torch.float64) for _ in range(2)]
    others = [torch.empty(8009, device="meta"), torch.eye(91).to_sparse()]
    gc.collect()
    before = largest_tensors(model)
    more = torch.empty(10**6, dtype=torch.uint8)
    after = largest_tensors(model)
    assert after["bytes"] == before["bytes"] + len(more)
    assert after["storages"] == before["storages"] + 1
    found = {tuple(x["shape"]): x for x in after["largest"]}
    assert found[10**6,]["dtype"] == "uint8" and found[10**6,]["bytes"] == 10**6
    assert (found[15009,]["bytes"], found[15009,]["count"]) == (4 * 15009, 1)
    assert found[15009,]["name"] is None and (5003,) not in found
    assert (found[6007,]["bytes"], found[6007,]["count"]) == (2 * 8 * 6007, 2)
    names = [kind["name"] for kind in after["largest"]]
    assert names.count("model.embed_tokens.weight") == 1
    assert names.count("model.embed_tokens.weight.grad") == 1
    assert not {(77, 10**9), (8009,), (91, 91)} & found.keys()
    monkeypatch.setattr(memory, "MOST", 3)
    fewer = largest_tensors(model)
    assert fewer == {**after, "largest": after["largest"][:3]}
    del expanded, whole, parts, pairs, others


def test_a_gpus_allocator_is_asked(tmp_path: Path, monkeypatch) -> None:
    """With the CPU in the GPU's place."""
    stats, blocks = {"num_ooms": 1}, {"segments": [], "device_traces": []}
    model = tiny_model()
    assert "cuda" not in Snapshot(model).held
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: blocks)
    monkeypatch.setattr(memory, "device_of", lambda model: torch.device("cuda:0"))
    path = tmp_path / "held.json"
    said = Snapshot(model).write(path, step=3)
    assert said == f"what held memory is in {path}; what held memory is in {tmp_path}/held.pickle"
    report = strict_json(path)
    assert report["step"] == 3 and report["cuda"] == stats
    assert pickle.loads((tmp_path / "held.pickle").read_bytes()) == blocks


def too_large(settings: dict, tmp_path: Path) -> dict:
    """A step of 4,000 rows, which takes 3 GB."""
    settings["train"] |= {"batch_size": 4000, "micro_batch_size": 4000}
    settings["data"] |= {"files": [{"path": str(tmp_path / "rows.jsonl")}]}
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "la " * 30, "output": "la"}] * 4000)
    return settings


@SLOW
@pytest.mark.parametrize("megabytes", [1, 64, 200, 600])
def test_memory_that_is_really_not_there(settings: dict, tmp_path: Path, megabytes: int) -> None:
    """The program may have so many more than it has when training begins; 1 may not suffice to look
    what holds the rest."""
    settings = too_large(settings, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    limited = f"""
import resource, sys, train
real = train.AdapterTraining.begin_step
def begin_step(self):
    real(self)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + ({megabytes} << 20),) * 2)
train.AdapterTraining.begin_step = begin_step
sys.exit(train.main(["--config", {str(tmp_path / "config.yaml")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    told = done.stderr.splitlines()[-1]
    path = tmp_path / "run" / "out-of-memory-000001.json"
    assert told.startswith("error: out of memory (")
    if megabytes == 1 and "; what held memory cannot be told: MemoryError. By" in told:
        return
    assert f"; what held memory is in {path}. By" in told
    report = strict_json(path)
    assert report["tensors"]["bytes"] > report["estimated_bytes"]["base"]


@pytest.mark.gpu
def test_memory_that_is_really_not_there_on_a_gpu(settings: dict, tmp_path: Path, capsys) -> None:
    settings = too_large(settings, tmp_path)
    settings["model"]["device"] = "cuda"
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1 << 30) / whole)
    try:
        folder = run(settings, tmp_path, code=2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory (")
    report = strict_json(folder / "out-of-memory-000001.json")
    assert report["cuda"]["num_ooms"] >= 1
    assert any(kind["device"] == "cuda:0" for kind in report["tensors"]["largest"])
    assert pickle.loads((folder / "out-of-memory-000001.pickle").read_bytes())["segments"]


TASKS = {"mixlora-fixed": ["arc-e", "boolq"], "mixlora": ["arc-e"], "llm-adapters": ["arc-e"]}


@pytest.mark.parametrize("protocol, error", [*zip(TASKS, ERRORS, strict=True)])
def test_an_evaluation_halves_its_batch_and_loses_no_row(
    checkpoint: Path, task_folder: Path, monkeypatch, capsys, protocol: str, error: str
) -> None:
    model, tokenizer = models.load(checkpoint), Tokenizer(checkpoint)
    questions = load_questions(protocol, task_folder, TASKS[protocol])
    expected = evaluate(model, tokenizer, questions, 12, protocol)
    capsys.readouterr()
    real = type(model).forward
    failing = Failing(real, ERRORS[error], when=lambda model, tokens_BS, *_: len(tokens_BS) > 3)
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: failing(*a, **k))
    results, rows = evaluate(model, tokenizer, questions, 12, protocol)
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("memory")]
    assert told == ["memory does not suffice for 12 rows at once, but for 3"] * len(questions)
    assert results == expected[0]
    for task, expected_rows in expected[1].items():
        for row, other in zip(rows[task], expected_rows, strict=True):
            assert (row.prompt, row.prediction) == (other.prompt, other.prediction)
    assert model.stack_sizes == {}


def test_a_batch_of_one_that_does_not_fit(checkpoint: Path, task_folder: Path, monkeypatch) -> None:
    model = models.load(checkpoint)
    questions = load_questions("mixlora-fixed", task_folder, ["arc-e"])
    failing = Failing(type(model).forward, ERRORS["cpu"], when=lambda *_: True)
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: failing(*a, **k))
    with pytest.raises(InputError, match="out of memory in a batch of 1"):
        evaluate(model, Tokenizer(checkpoint), questions, 5)
    assert failing.calls == 3  # 5, 2, 1


@pytest.mark.parametrize("at", range(1, 6))
def test_batches(at: int, capsys) -> None:
    work = Failing(lambda batch: [2 * x for x in batch], ERRORS["gpu"], at)
    done = list(in_batches(range(10), 4, work, is_sharded=False))
    assert [x for batch, _ in done for x in batch] == list(range(10))
    assert [x for _, results in done for x in results] == list(range(0, 20, 2))
    assert len(capsys.readouterr().err.splitlines()) == (at < 4)
    other = Failing(lambda batch: 1, lambda: RuntimeError("another"), 1)
    with pytest.raises(RuntimeError, match="another"):
        list(in_batches(range(10), 4, other, is_sharded=False))


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
