"""A run seen from its folder: where it stands, how its experts fare, what its time goes to."""

import gzip
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import train
from mixlora import watch
from mixlora.checkpoint import Checkpoints
from mixlora.files import read_json, write_json
from mixlora.layers.context import ForwardContext, Sequences, Span
from mixlora.layers.router import SwitchRouter
from mixlora.metrics import WINDOW, MetricsLog, dead_experts, routing_metrics, scalars
from mixlora.report import plot_routing
from mixlora.status import Status
from tests.runs import run

SWITCH = {"routing_strategy": "mixlora-switch", "num_experts": 4, "expert_capacity": 5}
STEP = {"of": 10, "skipped": 0, "loss": 0.5, "tokens_per_second": 100.0}


def test_a_status_is_there_from_the_beginning(tmp_path: Path) -> None:
    with Status(tmp_path) as status:
        assert read_json(tmp_path / "status.json")["state"] == "running"
        assert read_json(tmp_path / "status.json")["pid"] == os.getpid()
        (tmp_path / "a" / "checkpoints" / "step-000004").mkdir(parents=True)
        status.tell("a", 5, **STEP)
        status.told = 0.0  # long ago
        status.tell("a", 6, **STEP)
        told = read_json(tmp_path / "status.json")["adapters"]["a"]
        assert told.pop("seconds_left") >= 0
        assert told == {"step": 6, **STEP, "last_checkpoint": "step-000004"}
        status.finish()
    assert read_json(tmp_path / "status.json")["state"] == "finished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "status.json"]


@pytest.mark.parametrize(
    "error, state",
    [(None, "stopped"), (KeyboardInterrupt(), "stopped"), (SystemExit(143), "stopped")]
    + [(ValueError("a wrong\nshape"), "failed"), (MemoryError(), "failed")],
    ids=repr,
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException | None, state: str) -> None:
    try:
        with Status(tmp_path):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    status = read_json(tmp_path / "status.json")
    assert status["state"] == state
    assert ("message" in status) == (state == "failed")


def look(capsys: pytest.CaptureFixture, folder: Path, *options: str) -> str:
    assert watch.main([str(folder), *options]) == 0
    return capsys.readouterr().out


def test_a_killed_process_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], text=True,
                          capture_output=True, check=True)  # fmt: skip
    Status(tmp_path)
    assert f"{tmp_path}: running, process {os.getpid()} on" in look(capsys, tmp_path)
    write_json(
        tmp_path / "status.json",
        {**read_json(tmp_path / "status.json"), "pid": int(done.stdout)},
    )
    assert "dead (its process is gone, --resume goes on)" in look(capsys, tmp_path)
    write_json(
        tmp_path / "status.json", {**read_json(tmp_path / "status.json"), "host": "elsewhere"}
    )
    assert ": running, process" in look(capsys, tmp_path)  # it cannot be looked for


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert watch.main([str(tmp_path)]) == 2
    assert f"{tmp_path}/status.json: no such file" in capsys.readouterr().err
    assert watch.main([str(tmp_path), "--every", "0"]) == 2
    assert "--every must be > 0" in capsys.readouterr().err


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (90, "1 min 30 s"), (7300, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert watch.duration(seconds) == text


def test_a_run_from_its_folder(
    settings: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    settings["adapter"] = SWITCH
    settings["run"]["save_every_steps"] = 4
    folder = run(settings, tmp_path)
    out = look(capsys, folder, "--every", "0.01")
    assert f"{folder}: finished, process {os.getpid()}" in out
    assert "default  step 6 of 6  loss" in out and "last checkpoint step-000006" in out
    lines = [json.loads(x) for x in (folder / "default/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["dead_experts"]) == len(line["dropped_tokens"]) == 2
        assert all(0 < share < 1 for share in line["dropped_tokens"])


def test_steps_that_are_skipped_count(
    settings: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last two of four."""
    loss = train.AdapterTraining.loss

    def not_finite(self: train.AdapterTraining, loss_B: torch.Tensor) -> torch.Tensor:
        return loss(self, loss_B * torch.nan if self.step >= 2 else loss_B)

    monkeypatch.setattr(train.AdapterTraining, "loss", not_finite)
    settings["train"] |= {"steps": 4, "on_non_finite": "skip"}
    out = look(capsys, run(settings, tmp_path))
    assert ": finished, process" in out
    assert "default  step 4 of 4 (2 skipped)  loss not finite  " in out


@pytest.mark.slow
def test_a_profile_and_pictures(
    settings: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    settings["run"]["plot"] = True
    folder = run(settings, tmp_path, "--profile", "2")
    picture = folder / "default" / "routing.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    look(capsys, folder, "--plot")
    assert picture.exists()

    with gzip.open(folder / "profile.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert len(steps) == 2
    assert "shared_glu" in (folder / "profile.txt").read_text()


def test_a_run_that_fails_says_so(
    settings: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Checkpoints, "save", fails)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    out = look(capsys, Path(settings["run"]["dir"]))
    assert ": failed (OSError: no space left), process" in out


def test_dropped_tokens_are_real_ones() -> None:
    """Six tokens and two of padding, an expert with room for two."""
    router = SwitchRouter(4, 2, expert_capacity=2, jitter_noise=0.0)
    mask_BS = torch.tensor([[True] * 6 + [False] * 2])
    span = Span("a", 0, 1)
    sequences = Sequences(ForwardContext((span,), mask_BS), span, "layer")
    logits_TE = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    routing = router.choose(logits_TE, sequences)
    assert routing.num_dropped == 4
    assert routing_metrics([[routing]])["dropped_tokens"] == [round(4 / 6, 5)]


def test_an_expert_is_dead_when_none_selects_it_for_a_while(tmp_path: Path) -> None:
    assert dead_experts([[[0.0, 1.0, 0.0]], [[0.5, 0.5, 0.0]]]) == [1]
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in range(1, WINDOW + 3):
        log.write(step=step, expert_load=[[1.0, 0.0], [0.5, 0.5]] if step > 2 else [[0.5, 0.5]] * 2)
    log.close()
    log = MetricsLog(tmp_path / "m.jsonl", WINDOW + 1)  # a step is repeated
    log.write(step=WINDOW + 2, expert_load=[[1.0, 0.0], [0.5, 0.5]])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["dead_experts"] for line in lines] == [[0, 0]] * (WINDOW + 1) + [[1, 0]]


def test_no_router_no_picture(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "expert_load": []}\n{"step": 2}\n')
    plot_routing(tmp_path / "routing.png", tmp_path / "m.jsonl")
    assert not (tmp_path / "routing.png").exists()


@pytest.mark.slow
def test_a_long_run_and_layers_of_different_experts_have_a_picture(tmp_path: Path) -> None:
    with open(tmp_path / "m.jsonl", "w") as file:
        for step in range(1, 1001):
            layers = {"expert_load": [[0.5, 0.5], [0.2, 0.3, 0.5]], "router_entropy": [0.1, 0.2]}
            layers |= {"dropped_tokens": [0.0, 0.0], "dead_experts": [0, 1]}
            file.write(json.dumps({"step": step, **layers}) + "\n")
    plot_routing(tmp_path / "routing.png", tmp_path / "m.jsonl")
    assert (tmp_path / "routing.png").stat().st_size > 1000


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_profiling_no_step(count: str, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--config", "x.yaml", f"--profile={count}"]) == 2
    assert "argument --profile: invalid whole_number value" in capsys.readouterr().err


def test_numbers_for_tensorboard() -> None:
    values = {"step": 3, "loss": 0.5, "router_entropy": [0.1, 0.2], "expert_load": [[0.25, 0.75]]}
    named = dict(scalars(values))
    wanted = {"router_entropy/00": 0.1, "router_entropy/01": 0.2, "expert_load/00": 0.75}
    assert named == {"step": 3, "loss": 0.5, **wanted}


def test_tensorboard_is_asked_for_where_it_is_absent(
    settings: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings["run"]["tensorboard"] = True
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "run.tensorboard needs tensorboard: pip install" in capsys.readouterr().err
    assert not Path(settings["run"]["dir"]).exists()


def test_tensorboard_gets_what_the_log_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple] = []
    writer = types.SimpleNamespace(add_scalar=lambda *x: found.append(x), close=lambda: None)
    made = types.SimpleNamespace(SummaryWriter=lambda *x, **y: found.append((x, y)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    log = MetricsLog(tmp_path / "m.jsonl", 0, tensorboard=True)
    log.write(step=1, loss=0.5)
    log.close()
    folder = str(tmp_path / "tensorboard")
    assert found == [((folder,), {"purge_step": 1}), ("step", 1, 1), ("loss", 0.5, 1)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "m.jsonl", 0, tensorboard=True)
    for step in (1, 2):
        log.write(step=step, loss=step / 2, expert_load=[[0.5, 0.5]])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert [e.value for e in events.Scalars("dead_experts/00")] == [0, 0]
