"""run.deterministic, where there is no GPU; what it is for is tested in tests/test_gpu.py."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import train
from mixlora.determinism import REPEATABLE, WORKSPACE
from tests.runs import run
from tests.test_resume import assert_same_runs


def test_a_run_is_the_same_and_leaves_torch_as_it_was(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run(settings, tmp_path), tmp_path / "whole")
    settings["run"] |= {"deterministic": True, "overwrite": True}
    real, seen = train.AdapterTraining.end_step, []

    def end_step(self: train.AdapterTraining) -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ[WORKSPACE]))
        real(self)

    monkeypatch.setattr(train.AdapterTraining, "end_step", end_step)
    monkeypatch.setenv(WORKSPACE, "")  # what the run sets goes away with this
    monkeypatch.delenv(WORKSPACE)
    assert_same_runs(run(settings, tmp_path), tmp_path / "whole")
    assert seen == [(True, ":4096:8")] * 6
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("begun, given", [(True, None), (True, ":0:0"), (False, ":0:0")])
def test_too_late_or_otherwise(
    settings: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    begun: bool,
    given: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    monkeypatch.setenv(WORKSPACE, given or "")
    if given is None:
        monkeypatch.delenv(WORKSPACE)
    settings["run"]["deterministic"] = True
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(config)]) == 2
    said = f"before the first work on a GPU, got {given}\n"
    assert capsys.readouterr().err == (
        f"error: run.deterministic needs {WORKSPACE}={' or '.join(REPEATABLE)} in the environment "
        + said
    )
    assert not Path(settings["run"]["dir"]).exists()
