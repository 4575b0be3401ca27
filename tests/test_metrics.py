"""metrics.jsonl after a resume, progress without a terminal, and what routing is summed to."""

import json
import math
from pathlib import Path

import pytest
import torch

from mixlora.metrics import MetricsLog, Progress, routing_metrics
from mixlora.ops import topk_router


def write(path: Path, steps: range, first_step: int = 0) -> None:
    log = MetricsLog(path, first_step)
    for step in steps:
        log.write(step=step, loss=step / 2)
    log.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_per_step_is_there_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(step=1, loss=0.5)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    log.close()


@pytest.mark.parametrize("tail", ["", '{"step": 8, "lo', '{"step": 8}', "{"])
def test_a_resumed_run_drops_what_comes_after_its_step(tmp_path: Path, tail: str) -> None:
    """Steps 4 to 7 were done after the last checkpoint; the process died while it wrote a line."""
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    path.write_text(path.read_text() + tail)
    write(path, range(4, 6), first_step=3)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert path.read_text().endswith("\n")


def test_a_half_written_line_that_is_kept_would_be_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    write(path, range(3, 4), first_step=2)
    assert steps_in(path) == [1, 3]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 2))
    assert steps_in(path) == [1]


def test_progress_off_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture) -> None:
    progress = Progress("train mine", 3, "steps", done=1)
    progress.advance(loss="0.5")
    progress.advance(loss="0.25")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "train mine  3/3 steps  loss 0.25  0 s left\n"  # no bar, no carriage return


def test_progress_tells_every_now_and_then(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("mixlora.metrics.time.monotonic", lambda: clock[0])
    progress = Progress("evaluate", 100, "rows")
    for _ in range(10):
        clock[0] += 4.0
        progress.advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["15/100", "30/100", "45/100"]
    assert lines[0].endswith("68 s left")  # 15 rows in 12 s, 85 to go


def test_routing_is_summed_over_layers_and_forwards() -> None:
    """Two micro-batches, of 2 and 1 tokens: shares count tokens, not micro-batches."""

    def route(*logits: list[float]):
        return topk_router(torch.tensor(logits), 1)

    certain, even = [60.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    second = [0.0, 60.0, 0.0, 0.0]
    metrics = routing_metrics(
        [[route(certain, certain), route(second, certain)], [route(second), route(even)]]
    )
    assert metrics["expert_load"] == [[0.66667, 0.33333, 0.0, 0.0], [0.66667, 0.33333, 0.0, 0.0]]
    assert metrics["router_entropy"] == pytest.approx([0.0, math.log(4) / 3], abs=1e-5)


def test_without_a_router_there_is_nothing_to_tell() -> None:
    nothing = {"expert_load": [], "router_entropy": [], "dropped_tokens": []}
    assert routing_metrics([[], []]) == nothing
