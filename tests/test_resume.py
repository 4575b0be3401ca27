"""A run that is stopped anywhere and taken up is the run that never stopped, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import models
import train
from mixlora.files import TensorFile, write_json, write_tensors
from mixlora.run_folder import may_change
from mixlora.stopping import SIGNALS, Stop
from tests.conftest import ARC_ROWS, BOOLQ_ROWS, write_rows
from tests.runs import LORA, MIXLORA, assert_same_weights, metrics, run, tiny_settings, weights

EVERY_STEP = {"save_every_steps": 1, "keep_last": 100}


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """No signal is ignored, as it is where the tests run in the background."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        hear(number)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def hear(number: int) -> None:
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, usual)


def forget(folder: Path, after: int, name: str = "default") -> None:
    """As if the run had ended right after that step's checkpoint."""
    shutil.rmtree(folder / name / "adapter", ignore_errors=True)
    for path in (folder / name / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)


def assert_same_runs(a: Path, b: Path, name: str = "default") -> None:
    """Losses, gradient norms, routing and weights."""
    assert metrics(a, name) == metrics(b, name)
    assert_same_weights(weights(a, name), weights(b, name))


class Whole:
    """A run that never stopped: a step has micro-batches, the last of an epoch is short."""

    def __init__(self, settings: dict, folder: Path, num_steps: int) -> None:
        settings["train"]["steps"] = num_steps
        settings["run"] |= EVERY_STEP
        self.settings, self.folder, self.whole = settings, folder, run(settings, folder)

    def assert_resumed_is_the_same(self, stop: int) -> None:
        copy = self.folder / f"resumed-{stop}"
        shutil.copytree(self.whole, copy)
        forget(copy, stop)
        resumed = {**self.settings, "run": {**self.settings["run"], "dir": str(copy)}}
        assert_same_runs(run(resumed, self.folder, "--resume"), self.whole)
        shutil.rmtree(copy)


@pytest.fixture(scope="module", params=[8, 60])
def whole(request, checkpoint: Path, task_folder: Path, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    settings = tiny_settings(checkpoint, task_folder, folder / "run")
    if request.param == 60:
        settings["data"]["packing"] = True
        settings["train"]["micro_batch_size"] = 1  # row of several samples
    return Whole(settings, folder, request.param)


@pytest.mark.parametrize("whole", [8], indirect=True)
@pytest.mark.parametrize("stop", [4, 6, 7])  # an epoch's edge, within one, before the last step
def test_a_resumed_run_is_the_uninterrupted_one(whole: Whole, stop: int) -> None:
    whole.assert_resumed_is_the_same(stop)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [60], indirect=True)
@pytest.mark.parametrize("stop", range(1, 60))
def test_wherever_it_stops(whole: Whole, stop: int) -> None:
    whole.assert_resumed_is_the_same(stop)


KINDS = {
    "lora": LORA,
    "DoRA": {"r": 4, "use_dora": True, "lora_dropout": 0.1},
    "milora": {"routing_strategy": "milora", "r": 2, "top_k": 1, "lora_dropout": 0.1},
    "switch": {"routing_strategy": "mixlora-switch", "r": 2, "num_experts": 3, "ffn_dropout": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_every_kind(settings: dict, tmp_path: Path, adapter: dict, stop: int) -> None:
    settings["adapter"] = adapter
    settings["run"] |= EVERY_STEP
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    forget(tmp_path / "run", stop)
    assert_same_runs(run(settings, tmp_path, "--resume"), tmp_path / "whole")


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Calls `ask` as soon as some adapter's optimizer has done so many steps."""

    def arrange(num_steps: int, ask) -> None:
        real = train.AdapterTraining.end_step
        seen = [0]

        def end_step(self: train.AdapterTraining) -> None:
            real(self)
            seen[0] += 1
            if seen[0] == num_steps:
                ask()

        monkeypatch.setattr(train.AdapterTraining, "end_step", end_step)

    return arrange


def test_a_run_that_is_stopped_after_every_step(
    settings: dict, tmp_path: Path, stop_after, monkeypatch, capsys
) -> None:
    """By the file, which is gone when it has been seen."""
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"]["overwrite"] = True
    folder = Path(settings["run"]["dir"])
    for step in range(1, 6):
        stop_after(1, (folder / "stop").touch)
        run(settings, tmp_path, *(("--resume",) if step > 1 else ()))
        monkeypatch.undo()
        assert len(metrics(folder)) == step and not (folder / "stop").exists()
        err = capsys.readouterr().err
        assert f"default: saved after step {step} of 6\n" in err
        command = f"python train.py --config {folder / 'config.yaml'} --resume goes on\n"
        assert err.endswith(f"stopped by {folder / 'stop'}; {command}")
        assert not (folder / "default" / "adapter").exists()
    run(settings, tmp_path, "--resume")
    assert_same_runs(folder, tmp_path / "whole")
    assert (folder / "results.json").exists()


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_signals_save_everything(
    settings: dict, tmp_path: Path, stop_after, monkeypatch, capsys, number: int, code: int
) -> None:
    """Two adapters, of which one is in the middle of a step when the signal comes."""
    train_of = settings["train"]
    train_of["steps"] = 5
    settings["adapters"] = [
        {"name": "a", "adapter": {**LORA, "r": 4}, "train": {**train_of, "micro_batch_size": 7}},
        {"name": "b", "adapter": {**MIXLORA, "r": 2}},
    ]
    settings |= {"adapter": {}, "run": {**settings["run"], "together": 1}}
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"] |= {"overwrite": True, "together": None}
    before = signal.getsignal(number)
    stop_after(5, lambda: os.kill(os.getpid(), number))  # 4 of a, 1 of b: b is in its 2nd
    folder = run(settings, tmp_path, code=code)
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}; python train.py" in said
    assert [len(metrics(folder, name)) for name in "ab"] == [4, 2]
    assert {path.name for path in folder.glob("*/checkpoints/*")} == {"step-000002", "step-000004"}
    run(settings, tmp_path, "--resume")
    for name in "ab":
        losses, expected = (
            [step["loss"] for step in metrics(x, name)] for x in (folder, tmp_path / "whole")
        )
        assert losses == pytest.approx(expected, rel=1e-3)  # rounding, as docs/config.md says


def test_several_adapters_that_are_stopped_at_one_moment(
    settings: dict, tmp_path: Path, stop_after, monkeypatch
) -> None:
    settings["adapters"] = [{"name": name, "adapter": MIXLORA} for name in "ab"]
    settings["adapter"] = {}
    settings["train"]["steps"] = 4
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"]["overwrite"] = True
    stop_after(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    folder = run(settings, tmp_path, code=143)
    monkeypatch.undo()
    assert [len(metrics(folder, name)) for name in "ab"] == [3, 3]
    run(settings, tmp_path, "--resume")
    for name in "ab":
        assert_same_runs(folder, tmp_path / "whole", name)


def test_a_signal_ends_an_evaluation_where_it_is(
    settings: dict, tmp_path: Path, monkeypatch, capsys
) -> None:
    settings["eval"] = {"tasks": ["mine"]}
    settings["train"]["steps"] = 2
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"]["overwrite"] = True
    real, calls = train.score, []

    def score(*arguments: object) -> dict:
        calls.append(arguments)
        if len(calls) == 2:  # the base was the first
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(*arguments)

    monkeypatch.setattr(train, "score", score)
    began = time.monotonic()
    folder = run(settings, tmp_path, code=143)
    assert time.monotonic() - began < 30
    assert len(calls) == 2 and not (folder / "results.json").exists()
    run(settings, tmp_path, "--resume")
    assert_same_runs(folder, tmp_path / "whole")
    assert (folder / "results.json").exists()


def begin_program(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_as_a_program(settings: dict, tmp_path: Path) -> None:
    """What a shell sees; the second one goes on, and the third, to the bits of one that never
    stopped."""
    settings["train"]["steps"] = 100_000
    settings["optim"]["schedule"] = "constant"  # whatever the number of steps
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = ["train.py", "--config", str(config)]
    log = tmp_path / "run" / "default" / "metrics.jsonl"

    def stop(number: int, *more: str) -> tuple[int, str]:
        """The exit code and what is said of a program that hears the signal in its first steps."""
        size = log.stat().st_size if log.exists() else 0
        program = begin_program(*command, *more)
        try:
            while not log.exists() or log.stat().st_size <= size:
                assert program.poll() is None
                time.sleep(0.01)
            program.send_signal(number)
            _, said = program.communicate(timeout=60)
        finally:
            program.kill()
        return program.returncode, said

    code, said = stop(signal.SIGINT)
    assert code == 130 and "stopped by SIGINT" in said and "Traceback" not in said
    done = len(metrics(tmp_path / "run"))
    assert f"saved after step {done} of 100000" in said
    code, said = stop(signal.SIGTERM, "--resume")
    assert code == 143 and "stopped by SIGTERM" in said
    assert len(metrics(tmp_path / "run")) > done
    command.append(f"train.steps={len(metrics(tmp_path / 'run')) + 2}")
    for more in (("--resume", "--allow-changes"), (f"run.dir={tmp_path / 'whole'}",)):
        subprocess.run([sys.executable, *command, *more], check=True)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_the_second_interrupt_ends_a_program_in_its_step(settings: dict, tmp_path: Path) -> None:
    """Of 10,000 micro-batches; the first one would wait for its end."""
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "sing", "output": "la"}] * 10_000)
    settings["data"] = {"files": [{"path": str(tmp_path / "rows.jsonl")}]}
    settings["train"] |= {"batch_size": 10_000, "micro_batch_size": 1}
    config, begun = tmp_path / "config.yaml", tmp_path / "begun"
    config.write_text(yaml.safe_dump(settings))
    tells_of_its_step = f"""
import pathlib, sys, train
real = train.forward_backward
def forward_backward(*arguments):
    real(*arguments)
    pathlib.Path({str(begun)!r}).touch()
train.forward_backward = forward_backward
sys.exit(train.main(["--config", {str(config)!r}]))
"""
    program = begin_program("-c", tells_of_its_step)
    try:
        while not begun.exists():
            assert program.poll() is None
            time.sleep(0.01)
        program.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(timeout=1)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=10)
    finally:
        program.kill()
    assert program.returncode == 130 and said.endswith("stopped\n") and "Traceback" not in said
    folder = Path(settings["run"]["dir"])
    assert metrics(folder) == [] and not list((folder / "default" / "checkpoints").iterdir())
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"


def test_the_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    stop = Stop(tmp_path / "stop")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.asked() and stop.exit_code == 130
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop(tmp_path / "stop")
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CHANGES = {  # change: what becomes of it
    "adapter.r=8": "never",
    "adapter.num_experts=2": "never",
    "adapter.lora_dropout=0.0": "never",
    "train.parts=[experts]": "never",
    "adapters=[{name: other}]": "never",
    "run.seed=1": "if allowed",
    "optim.lr=0.5": "if allowed",
    "train.steps=7": "if allowed",
    "train.batch_size=6": "if allowed",
    "data.tasks=[boolq]": "if allowed",
    "run.keep_last=5": "freely",
    "eval.tasks=[mine]": "freely",
    "train.gradient_checkpointing=true": "freely",
    "train.on_non_finite=skip": "freely",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_change(change: str) -> None:
    key = change.partition("=")[0]
    assert may_change(key) == CHANGES[change]
    if not key.startswith(("run.", "adapters")):
        assert may_change(f"adapters.12.{key}") == CHANGES[change]


def test_a_run_goes_on_under_other_settings_as_they_allow(
    settings: dict, tmp_path: Path, capsys
) -> None:
    settings["train"]["steps"] = 2
    config = run(settings, tmp_path) / "config.yaml"
    before = config.read_text()
    for change in ("adapter.r=8", "optim.lr=0.5", "run.keep_last=5"):
        key, may = change.partition("=")[0], CHANGES[change]
        for allow in ((), ("--allow-changes",)):
            goes_on = may == "freely" or (may == "if allowed" and bool(allow))
            code = train.main(["--config", str(config), "--resume", *allow, change])
            told = capsys.readouterr()
            assert code == (0 if goes_on else 2), (change, allow, told.err)
            if goes_on:
                assert f"--resume: {key} was" in told.out and config.read_text() != before
                config.write_text(before)
            else:
                assert f"{key} was" in told.err and config.read_text() == before
                assert ("--allow-changes goes on" in told.err) == (may == "if allowed")
                assert ("which never goes on" in told.err) == (may == "never")
    assert train.main(["--config", str(config), "--allow-changes"]) == 2
    assert "--allow-changes must go with --resume" in capsys.readouterr().err


def test_more_steps_and_another_rate(settings: dict, tmp_path: Path) -> None:
    settings["train"]["steps"] = 2
    folder = run(settings, tmp_path)
    settings["train"]["steps"] = 4
    settings["optim"] |= {"lr": 0.001, "schedule": "constant"}
    run(settings, tmp_path, "--resume", "--allow-changes")
    assert [step["lr"] for step in metrics(folder)][2:] == [0.001, 0.001]
    settings["train"]["steps"] = 3  # fewer than are done: nothing is left to do
    run(settings, tmp_path, "--resume", "--allow-changes")
    assert len(metrics(folder)) == 4


def test_another_base_under_the_same_path(
    settings: dict, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    """Of other weights, or another vocabulary that gives the same samples."""
    base = shutil.copytree(checkpoint, tmp_path / "base")
    settings["model"]["base"] = str(base)
    settings["train"]["steps"] = 2
    folder = run(settings, tmp_path)
    run(settings, tmp_path, "--resume")
    before = json.loads((folder / "base.json").read_text())
    file = TensorFile(base / "model.safetensors")
    tensors = {name: file[name].clone() for name in file.shapes}
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(0.5)
    write_tensors(base / "model.safetensors", tensors)
    write_json(base / "generation_config.json", {"eos_token_id": [2, 5]})
    run(settings, tmp_path, "--resume", code=2)
    after = models.fingerprint(base)
    was_is = {part: f"was {before[part][:12]}, is {after[part][:12]}" for part in before}
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    for part in ("weights", "tokenizer"):
        assert f"model.base, {part} {was_is[part]} (SHA-256); " in line
    assert "config.json" not in line and "--allow-changes goes on all the same" in line
    assert json.loads((folder / "base.json").read_text()) == before
    run(settings, tmp_path, "--resume", "--allow-changes")
    assert json.loads((folder / "base.json").read_text()) == after
    (folder / "base.json").unlink()  # as of an earlier version
    run(settings, tmp_path, "--resume")


def test_shards_and_places_do_not_change_a_fingerprint(tmp_path: Path, checkpoint: Path) -> None:
    file = TensorFile(checkpoint / "model.safetensors")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "model.safetensors").unlink()
    shards = {name: f"{i % 3}.safetensors" for i, name in enumerate(file.shapes)}
    for shard in set(shards.values()):
        names = [name for name in shards if shards[name] == shard]
        write_tensors(other / shard, {name: file[name] for name in names})
    write_json(other / "model.safetensors.index.json", {"weight_map": shards})
    assert models.fingerprint(other) == models.fingerprint(checkpoint)
    write_json(other / "config.json", {**json.loads((other / "config.json").read_text()), "a": 1})
    found, expected = models.fingerprint(other), models.fingerprint(checkpoint)
    assert [part for part in found if found[part] != expected[part]] == ["config.json"]


def test_data_that_has_changed(settings: dict, tmp_path: Path, capsys) -> None:
    """It is the samples that count, not how their rows are written."""
    write_rows(tmp_path / "data/arc-e/train.jsonl", ARC_ROWS)
    write_rows(tmp_path / "data/boolq/train.jsonl", BOOLQ_ROWS)
    settings["data"]["dir"] = str(tmp_path / "data")
    settings["train"]["steps"] = 2
    folder = run(settings, tmp_path)
    before = (folder / "data.json").read_bytes()
    path = tmp_path / "data/arc-e/train.jsonl"
    path.write_text(path.read_text() + "\n")
    run(settings, tmp_path, "--resume")
    path.write_text(path.read_text().replace("what is 3", "what was 3"))
    run(settings, tmp_path, "--resume", code=2)
    err = capsys.readouterr().err
    assert "data of default, arc-e was" in err and "boolq" not in err
    assert (folder / "data.json").read_bytes() == before
    run(settings, tmp_path, "--resume", "--allow-changes")
    run(settings, tmp_path, "--resume")
    assert (folder / "data.json").read_bytes() != before
