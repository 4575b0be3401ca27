"""Several processes give what one gives; where one fails, all end. On a CPU, by gloo."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import mixlora
import models
import train
from mixlora import processes, training
from mixlora.checkpoint import checkpoints
from mixlora.files import TensorFile
from mixlora.layers.router import Router
from tests import several
from tests.tiny import add_filled

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {
    "lora": {"r": 8, "lora_dropout": 0.1},
    "dora": {"r": 4, "use_dora": True},
    "mixlora": {"routing_strategy": "mixlora", "r": 4, "num_experts": 4, "lora_dropout": 0.1},
    "switch": {"routing_strategy": "mixlora-switch", "r": 4, "num_experts": 4},
    "milora": {"routing_strategy": "milora", "r": 4, "lora_dropout": 0.1},
}
KILLS = int(os.environ.get("MIXLORA_KILLS", "3"))  # of processes that save; T06 wants 100


@pytest.fixture
def settings(checkpoint: Path, task_folder: Path, tmp_path: Path) -> dict:
    """24 samples by 7: steps of 4 micro-batches; the fourth has 3 samples and 2 micro-batches, the
    last of which is a single one."""
    return {
        "model": {"base": str(checkpoint), "device": "cpu"},
        "data": {"dir": str(task_folder), "tasks": ["arc-e", "boolq"]},
        "adapter": ADAPTERS["mixlora"],
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 20, "batch_size": 7, "micro_batch_size": 2, "max_seq_len": 96},
        "run": {"dir": str(tmp_path / "one"), "plot": False},
    }


def written(settings: dict, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def run(world_size: int, settings: dict, folder: Path, *more: str) -> Path:
    arguments = "--config", written(settings, folder), *more
    if world_size == 1:
        assert train.main([*arguments]) == 0
    else:
        codes, _, errors = several.run(world_size, folder / "out", several.train_rank, *arguments)
        assert codes == [0] * world_size, errors
    return Path(settings["run"]["dir"])


def metrics(folder: Path, name: str = "default") -> list[dict]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(one: Path, other: Path, name: str = "default", of_norm: float = 1e-5) -> None:
    assert len(metrics(one, name)) == len(metrics(other, name)) > 0
    for a, b in zip(metrics(one, name), metrics(other, name), strict=True):
        if "skipped" in a:
            assert a == b
            continue
        assert b["loss"] == pytest.approx(a["loss"], rel=0, abs=1e-6), a["step"]
        assert b["router_loss"] == pytest.approx(a["router_loss"], rel=0, abs=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=of_norm)
        for key in ("step", "lr"):
            assert b[key] == a[key]
        for key in ("expert_load", "router_entropy"):
            torch.testing.assert_close(
                torch.tensor(b[key]), torch.tensor(a[key]), rtol=0, atol=2e-5
            )
    a, b = (TensorFile(x / name / "adapter" / "adapter_model.safetensors") for x in (one, other))
    assert a.shapes == b.shapes
    for key in a.shapes:
        scale = a[key].abs().max()
        assert (a[key] - b[key]).abs().max() <= 1e-3 * scale, key  # AdamW's follow a sign near 0


@pytest.mark.parametrize(
    "kind, world_size, shard, dtype, num_steps",
    [
        ("mixlora", 2, True, "float32", 5),
        ("milora", 2, True, "float32", 4),
        *(
            pytest.param(kind, world_size, shard, dtype, num_steps, marks=pytest.mark.slow)
            for kind in ADAPTERS
            for world_size in (2, 4)
            for shard, dtype, num_steps in (
                (False, "float32", 20),
                (True, "float32", 20),
                (True, "bfloat16", 8),  # after more a rounding turns, and an expert with it
            )
        ),
    ],
)
def test_as_in_one_process(
    settings: dict,
    tmp_path: Path,
    kind: str,
    world_size: int,
    shard: bool,
    dtype: str,
    num_steps: int,
) -> None:
    """Losses, gradients, routing, weights and accuracies; with 4 processes two have no row of each
    fourth step. Evaluation differs in its number of forwards from process to process."""
    settings["adapter"] = ADAPTERS[kind]
    settings["model"]["dtype"] = dtype
    settings["train"]["steps"] = num_steps
    settings["eval"] = {"tasks": ["arc-e"], "batch_size": 2, "max_rows": 5}
    one = run(1, settings, tmp_path)
    settings["run"]["dir"] = str(tmp_path / "several")
    settings["model"]["shard"] = shard
    other = run(world_size, settings, tmp_path)
    # a weight's last bit, which the order of sums decides, can turn the rounding of an activation
    assert_same(one, other, of_norm=1e-5 if dtype == "float32" else 1e-4)
    results = [json.loads((x / "results.json").read_text())["results"] for x in (one, other)]
    assert results[0] == results[1]


def first_gradients(
    settings: dict, tmp_path: Path, micro_batch_size: int, world_size: int
) -> dict[str, torch.Tensor]:
    """Of 8 rows, of an adapter whose every tensor has one: AdamW's first moments, times ten."""
    filled = tmp_path / "filled"
    if not filled.exists():
        model = models.load(settings["model"]["base"])
        add_filled(model, "default", **settings["adapter"])
        mixlora.save_adapter(model, filled)
    settings["optim"]["max_grad_norm"] = 0.0
    settings["train"] |= {"steps": 1, "batch_size": 8, "start_from": str(filled)}
    settings["train"]["micro_batch_size"] = micro_batch_size
    settings["run"]["dir"] = str(tmp_path / f"{micro_batch_size} of {world_size}")
    folder = run(world_size, settings, tmp_path)
    assert metrics(folder)[0]["lr"] == settings["optim"]["lr"] / 2
    file = TensorFile(folder / "default/checkpoints/step-000001/optimizer.safetensors")
    found = {key: 10 * file[key] for key in file.shapes if key.endswith("exp_avg")}
    assert found and all(x.abs().max() > 0 for x in found.values())
    return found


def assert_same_gradients(one: dict, other: dict, bound: float) -> None:
    assert one.keys() == other.keys()
    for key, x in one.items():
        assert (other[key] - x).abs().max() <= bound * max(1.0, x.abs().max()), key


@pytest.mark.parametrize("kind", ["lora", "mixlora"])
def test_a_steps_gradient_does_not_depend_on_micro_batches(
    settings: dict, tmp_path: Path, float64: None, kind: str
) -> None:
    """In float64: of 8 rows at once, or one after the other. A router loss is a micro-batch's."""
    settings["adapter"] = {**ADAPTERS[kind], "lora_dropout": 0.0}
    if kind == "mixlora":
        settings["adapter"]["router_aux_loss_coef"] = 0.0
    whole, rows = (first_gradients(settings, tmp_path, size, 1) for size in (8, 1))
    assert_same_gradients(whole, rows, 1e-9)


def test_a_steps_gradient_does_not_depend_on_processes(settings: dict, tmp_path: Path) -> None:
    one, two = (first_gradients(settings, tmp_path, 1, size) for size in (1, 2))
    assert_same_gradients(one, two, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_several_adapters(settings: dict, tmp_path: Path, shard: bool) -> None:
    """Of different numbers of micro-batches, lengths and steps: processes do not run the same
    forwards."""
    settings["adapter"] = {}
    settings["adapters"] = [
        {"name": "a", "adapter": ADAPTERS["mixlora"], "train": {"steps": 7, "batch_size": 3}},
        {"name": "b", "adapter": ADAPTERS["lora"], "data": {"tasks": ["boolq"]}},
        {"name": "c", "adapter": ADAPTERS["milora"], "train": {"steps": 4, "batch_size": 5}},
    ]
    settings["train"]["gradient_checkpointing"] = True
    settings["run"] |= {"together": 2}
    one = run(1, settings, tmp_path)
    settings["run"]["dir"] = str(tmp_path / "several")
    settings["model"]["shard"] = shard
    other = run(2, settings, tmp_path)
    for name in "abc":
        assert_same(one, other, name)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_answers_by_generation(settings: dict, tmp_path: Path, shard: bool) -> None:
    settings["eval"] = {"tasks": ["arc-e"], "protocol": "llm-adapters", "batch_size": 2}
    settings["eval"]["max_rows"] = 5
    settings["train"]["steps"] = 2
    one = run(1, settings, tmp_path)
    settings["run"]["dir"] = str(tmp_path / "several")
    settings["model"]["shard"] = shard
    other = run(2, settings, tmp_path)
    results = [json.loads((x / "results.json").read_text())["results"] for x in (one, other)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(settings: dict, tmp_path: Path) -> None:
    """1 -> 2 -> 4, one of the stops behind an epoch's edge."""
    settings["run"] |= {"save_every_steps": 1, "keep_last": 100}
    one = run(1, settings, tmp_path)
    settings["run"]["dir"] = str(tmp_path / "several")
    shutil.copytree(one, tmp_path / "several")
    saved = tmp_path / "several" / "default" / "checkpoints"
    for world_size, stop in ((2, 5), (4, 13)):
        for path in checkpoints(saved):
            if int(path.name.removeprefix("step-")) > stop:
                shutil.rmtree(path)
        other = run(world_size, settings, tmp_path, "--resume")
        state = json.loads((saved / f"step-{stop + 1:06d}" / "state.json").read_text())
        assert state["processes"] == world_size
    assert_same(one, other)


def exchange(folder: str) -> int:
    """What the small functions do, in each of three processes."""

    def body(argv: list[str]) -> int:
        rank, items = processes.rank(), list(range(7))
        assert processes.world_size() == 3
        assert processes.gathered(list(processes.share(items))) == items
        assert processes.gathered([["ä", None, float(rank)]] * rank) == [
            ["ä", None, 1.0],
            ["ä", None, 2.0],
            ["ä", None, 2.0],
        ]
        assert processes.gathered([]) == []
        rounds = [items[rank], items[rank + 3], 6 if rank == 0 else None]
        assert processes.rounds(items) == rounds
        assert processes.rounds([]) == []
        assert processes.anyone(rank == 2) and not processes.anyone(False)

        large = processes.BUCKET // 2 + 1
        parameters = [nn.Parameter(torch.zeros(n)) for n in (3, large, large, 2, 1)]
        parameters[0].grad = torch.full((3,), 1.0 + rank)
        if rank == 1:
            parameters[1].grad = torch.ones(large)
        parameters[2].grad = torch.full((large,), 1.0 if rank else 2.0)
        if rank != 1:
            parameters[4].grad = torch.full((1,), torch.nan if rank else 1.0)
        processes.sum_gradients(parameters)
        assert parameters[0].grad.tolist() == [6.0] * 3
        assert (parameters[1].grad == 1).all() and (parameters[2].grad == 4).all()
        assert parameters[3].grad is None and parameters[4].grad.isnan().all()
        processes.sum_gradients([])
        x = torch.full((2,), float(rank))
        processes.copy_from_first([x])
        assert x.tolist() == [0, 0]
        print("told")
        return 0

    return processes.together(body)([])


def test_exchanges(tmp_path: Path) -> None:
    codes, outputs, errors = several.run(3, tmp_path, exchange, "")
    assert codes == [0, 0, 0], errors
    assert outputs == ["told\n", "", ""] and errors == [""] * 3


def test_alone_all_is_as_it_was() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    processes.sum_gradients([parameter])
    assert parameter.grad is None
    assert processes.rounds("abc") == ["a", "b", "c"] and processes.share("abc") == "abc"
    assert processes.gathered([1]) == [1]
    assert processes.is_first() and processes.anyone(True) and not processes.anyone(False)
    assert processes.device("cpu") == torch.device("cpu")


def test_all_leave_without_the_interpreters_end() -> None:
    """In which a thread of torch's exchange aborts a run of four processes one time in five."""
    code = (
        "import atexit, sys; from mixlora import processes\n"
        "atexit.register(print, 'the interpreter ends')\n"
        "processes.together(lambda argv: print('done') or 3)([])"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    started = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", code]
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert outputs == ["done\n", ""] and [process.returncode for process in started] == [3, 3]


def fail_in_the_second(kind: str, *arguments: str) -> int:
    """A run whose process 1 fails in its third step."""
    set_lr = training.set_lr

    def fail(optimizer: torch.optim.Optimizer, lr: float) -> None:
        set_lr(optimizer, lr)
        fail.calls += 1
        if processes.rank() == 1 and fail.calls == 3:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            errors = {"input": train.InputError, "bug": ZeroDivisionError, "memory": MemoryError}
            raise errors[kind]("it is\nthis")

    fail.calls = 0
    training.set_lr = fail
    return train.main([*arguments])


@pytest.mark.parametrize(
    "kind, code",
    [
        ("input", 2),
        ("memory", 2),
        pytest.param("bug", 1, marks=pytest.mark.slow),
        pytest.param("killed", -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_one_that_fails_ends_all(settings: dict, tmp_path: Path, kind: str, code: int) -> None:
    """Without a launcher that would end them, and within seconds; one message."""
    settings["model"]["shard"] = kind == "memory"
    arguments = fail_in_the_second, kind, "--config", written(settings, tmp_path)
    codes, _, errors = several.run(2, tmp_path / "out", *arguments, seconds=60)
    assert codes[1] == code and codes[0] not in (0, None)
    text = "".join(errors)
    if kind == "input":
        assert errors[1] == "error: it is this (in process 1 of 2)\n"
    if kind == "memory":
        name = "out-of-memory-000003-process-1.json"
        (path,) = Path(settings["run"]["dir"]).glob("out-of-memory*")
        assert path.name == name and f"; what held memory is in {path}. By --estimate" in errors[1]
        tensors = json.loads(path.read_text())["tensors"]
        model = models.load(settings["model"]["base"])
        (found,) = (x for x in tensors["largest"] if x["name"] == "model.embed_tokens.weight")
        assert found["bytes"] == model.model["embed_tokens"].weight.nbytes // 2  # its shard
        assert text.count("error: ") == 1 and "Traceback" not in text
    if kind == "bug":
        assert "ZeroDivisionError: it is" in errors[1] and text.count("Traceback") == 1
        assert "error:" not in errors[0]
    if kind == "killed":
        assert "error: lost another process, which may have told why" in errors[0]
        assert text.count("error: ") == 1 and "Traceback" not in text
    assert [line["step"] for line in metrics(Path(settings["run"]["dir"]))][:2] == [1, 2]


@pytest.mark.parametrize(
    "change, wanted",
    [
        ("optim.lr=0", "lr must be > 0"),
        pytest.param("model.device=cuda:1", "device is auto, cpu or cuda", marks=pytest.mark.slow),
    ],
)
def test_what_all_find_wrong_is_said_once(
    settings: dict, tmp_path: Path, change: str, wanted: str
) -> None:
    arguments = several.train_rank, "--config", written(settings, tmp_path), change
    codes, outputs, errors = several.run(2, tmp_path / "out", *arguments)
    assert codes == [2, 2] and outputs == ["", ""]
    (text,) = filter(None, errors)
    assert wanted in text and text.count("\n") == 1
    assert not Path(settings["run"]["dir"]).exists()


def poison(place: str, value: float, rank: int, *arguments: str) -> int:
    """A process's losses of the third step are not finite, or its gradients alone."""
    loss = train.AdapterTraining.loss

    def poisoned(self: train.AdapterTraining, loss_B: torch.Tensor) -> torch.Tensor:
        is_bad = processes.rank() == rank and self.step == 2
        found = loss(self, loss_B * value if is_bad and place == "loss" else loss_B)
        if is_bad and place == "gradient":
            found.register_hook(lambda x: x * value)
        return found

    train.AdapterTraining.loss = poisoned
    return train.main([*arguments])


FAULTS = list(
    itertools.product(
        ("loss", "gradient"), (torch.nan, torch.inf), (0, 1), ("stop", "skip"), (False, True)
    )
)
QUICK = [("gradient", torch.inf, 1, "skip", False), ("loss", torch.nan, 0, "stop", True)]


@pytest.mark.parametrize(
    "place, value, rank, policy, shard",
    [pytest.param(*x, marks=[] if x in QUICK else [pytest.mark.slow]) for x in FAULTS],
)
def test_what_is_not_finite_in_one_process(
    settings: dict,
    tmp_path: Path,
    monkeypatch,
    place: str,
    value: float,
    rank: int,
    policy: str,
    shard: bool,
) -> None:
    """T23: all notice, and no weight changes anywhere: the next steps are those of one process."""
    settings["train"] |= {"steps": 5, "on_non_finite": policy}
    settings["run"] |= {"save_every_steps": 1, "keep_last": 100}
    monkeypatch.setattr(train.AdapterTraining, "loss", train.AdapterTraining.loss)  # undone later
    one = Path(settings["run"]["dir"])
    code = 2 if policy == "stop" else 0
    assert poison(place, value, 0, "--config", written(settings, tmp_path)) == code
    settings["run"]["dir"] = str(tmp_path / "several")
    settings["model"]["shard"] = shard
    arguments = "--config", written(settings, tmp_path)
    codes, _, errors = several.run(2, tmp_path / "out", poison, place, value, rank, *arguments)
    assert codes == [code, code] and errors[0].count("is not finite") == 1
    other = Path(settings["run"]["dir"])
    report = json.loads((other / "default" / "not-finite-000003.json").read_text())
    is_bad = [isinstance(x, str) for losses in report["row_losses"] for x in losses]
    own = [0, 1, 4, 5] if rank == 0 else [2, 3, 6]  # micro-batches of 2 rows, in turn
    assert is_bad == [place == "loss" and i in own for i in range(7)]
    saved = [x.name for x in checkpoints(other / "default" / "checkpoints")]
    if policy == "stop":
        assert saved == ["step-000001", "step-000002"]
        assert [line["step"] for line in metrics(other)] == [1, 2]
        return
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = (TensorFile(other / "default/checkpoints" / x / file) for x in saved[1:3])
        assert a.shapes == b.shapes and all(torch.equal(a[key], b[key]) for key in a.shapes)
    assert_same(one, other)


def fail_in_evaluation(*arguments: str) -> int:
    """Process 1 has no memory for a forward of several rows, and finds out in its midst."""
    attend = models.llama.Attention.forward

    def fail(self: nn.Module, x_BSD: torch.Tensor, *rest: object) -> torch.Tensor:
        if processes.rank() == 1 and len(x_BSD) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return attend(self, x_BSD, *rest)

    models.llama.Attention.forward = fail
    return train.main([*arguments])


@pytest.mark.parametrize(
    "protocol", ["mixlora-fixed", pytest.param("llm-adapters", marks=pytest.mark.slow)]
)
def test_memory_that_fails_in_an_evaluation_with_a_sharded_base(
    settings: dict, tmp_path: Path, protocol: str
) -> None:
    """The others are gathering weights with it: all end, where alone it would halve its batch."""
    settings["model"]["shard"] = True
    settings["eval"] = {"tasks": ["arc-e"], "protocol": protocol, "batch_size": 4}
    arguments = fail_in_evaluation, "--config", written(settings, tmp_path)
    codes, _, errors = several.run(2, tmp_path / "out", *arguments, seconds=60)
    assert codes[1] == 2 and codes[0] != 0
    (text,) = (line for error in errors for line in error.splitlines() if "error: " in line)
    assert text == (
        "error: out of memory in a batch of 4: with model.shard no process can halve its batch "
        "alone, eval.batch_size must be smaller for all (in process 1 of 2)"
    )


def edge(favoured: list[int], *arguments: str) -> int:
    """A run whose tokens all choose the favoured experts; without one, a run of which some rows
    have no label: in the third step all that process 1 has, in the fourth one beside others."""
    begin_step, logits = train.AdapterTraining.begin_step, Router.logits

    def begin(self: train.AdapterTraining) -> None:
        rows, samples = list(self.order.samples(self.step)), self.dataset.samples
        for i in {2: rows[2:], 3: rows[:1]}.get(self.step, []) if not favoured else []:
            samples[i] = samples[i]._replace(labels=[-100] * len(samples[i].labels))
        begin_step(self)
        if processes.world_size() == 2 and self.step == 2 and not favoured:
            assert (self.batches[0].num_labels == 0) == (processes.rank() == 1)

    def biased(self: Router, *inputs: object) -> torch.Tensor:
        bias_E = torch.zeros(self.num_experts)
        bias_E[favoured] = 50.0
        return logits(self, *inputs) + bias_E

    train.AdapterTraining.begin_step, Router.logits = begin, biased
    return train.main([*arguments])


@pytest.mark.parametrize(
    "favoured, shard",
    [
        ([], False),
        *(
            pytest.param(favoured, shard, marks=pytest.mark.slow)
            for favoured, shard in itertools.product(([], [2], [1, 3]), (False, True))
            if favoured or shard
        ),
    ],
)
def test_edges_as_in_one_process(
    settings: dict, tmp_path: Path, monkeypatch, favoured: list[int], shard: bool
) -> None:
    """T29, T34: no labels, all tokens to one expert, experts without any."""
    settings["adapter"] = {**ADAPTERS["mixlora"], "top_k": len(favoured) or 2}
    settings["train"] |= {"steps": 8, "batch_size": 4}  # six are an epoch
    one = Path(settings["run"]["dir"])
    for place, name in ((train.AdapterTraining, "begin_step"), (Router, "logits")):
        monkeypatch.setattr(place, name, getattr(place, name))  # undone later
    assert edge(favoured, "--config", written(settings, tmp_path)) == 0
    settings["run"]["dir"] = str(tmp_path / "several")
    settings["model"]["shard"] = shard
    arguments = "--config", written(settings, tmp_path)
    codes, _, errors = several.run(2, tmp_path / "out", edge, favoured, *arguments)
    assert codes == [0, 0], errors
    other = Path(settings["run"]["dir"])
    assert_same(one, other)
    chosen = {
        e for x in metrics(other) for load_E in x["expert_load"] for e in range(4) if load_E[e]
    }
    assert chosen == set(favoured or range(4))


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_save_leaves_whole_checkpoints(
    settings: dict, tmp_path: Path
) -> None:
    """T06: any of four, at any moment; the others end within a minute, and the run then goes on."""
    settings["train"]["steps"] = 2000
    settings["run"]["save_every_steps"] = 1
    folder = Path(settings["run"]["dir"]) / "default" / "checkpoints"
    generator = torch.Generator().manual_seed(0)
    argv = "--config", written(settings, tmp_path)
    for kill in range(KILLS):
        resumed = ["--resume"] if kill else []
        before = len(checkpoints(folder)) and int(checkpoints(folder)[-1].name[5:])
        begun = several.started(4, tmp_path / "out", several.train_rank, *argv, *resumed)
        with begun as running:
            end = time.monotonic() + 120
            while not list(
                folder.glob(f"*step-{before + 2:06d}*")
            ):  # the save, from its first file
                assert time.monotonic() < end and all(x.is_alive() for x in running)
                time.sleep(0.001)
            time.sleep(0.02 * float(torch.rand((), generator=generator)))
            killed = running[kill % 4]
            killed.kill()
            end = time.monotonic() + 60
            for process in running:
                process.join(max(0.0, end - time.monotonic()))
            assert [x.exitcode for x in running].count(None) == 0
        saved = checkpoints(folder)
        assert saved
        for path in saved:
            tensors = TensorFile(path / "adapter_model.safetensors")
            assert all(tensors[key].isfinite().all() for key in tensors.shapes)
            assert json.loads((path / "state.json").read_text())["step"] == int(path.name[5:])


@pytest.mark.slow
def test_torchrun(settings: dict, tmp_path: Path) -> None:
    """As a user starts it: a run, and one that fails."""
    settings["train"]["steps"] = 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "train.py"), "--config", written(settings, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(metrics(Path(settings["run"]["dir"]))) == 2
    assert done.stdout.count("the run is in") == 1
    again = subprocess.run(command, **options, timeout=300)  # run.dir holds a run
    assert again.returncode != 0
    assert len(re.findall(r"^error: .*--resume goes on with it", again.stderr, re.M)) == 1
