"""Memory that does not suffice: for a step, as a training begins, for an evaluation's batch."""

import errno
import gc
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

import models
import train
from mixlora import memory, ops, training
from mixlora.errors import InputError
from mixlora.evaluation import evaluate, load_questions
from mixlora.faults import in_batches
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.memory import Snapshot, is_out_of_memory, largest_tensors
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows
from tests.runs import assert_same_weights, metrics, run, strict_json, weights
from tests.tiny import tiny_model

SLOW = pytest.mark.slow


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
