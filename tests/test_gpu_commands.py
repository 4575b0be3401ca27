"""make gpu-check and make gpu-bench, as far as they go without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tools import gpu_check


@pytest.mark.slow
def test_every_part_of_the_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("cpu-*.json")
    found = json.loads(written.read_text())
    text = written.with_suffix(".md").read_text()
    said = capsys.readouterr().out
    for title in gpu.tiny_parts("cpu"):
        assert f"## {title}\n" in text and title in said
        assert all(type(row) is dict and len(row) > 4 for row in found[title])
    titles = [title.partition(",")[0] for title in gpu.parts_for("cuda")]
    assert {title.partition(",")[0] for title in gpu.tiny_parts("cpu")} == set(titles)


def test_a_part_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"bad": lambda: [{"a": 1}["b"]], "good": lambda: [{"a": 1}]}
    monkeypatch.setattr(gpu, "tiny_parts", lambda device: parts)
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 1
    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert "## bad\n\nFAILED: KeyError: 'b'\n" in text and "| a |" in text


def test_what_takes_too_long_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "--minutes", "0"])
    assert capsys.readouterr().out.count("left out: 0 s had passed") == len(gpu.tiny_parts("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    for main in (gpu_check.main, gpu.main):
        assert main([]) == 2
        (line,) = "".join(capfd.readouterr()).splitlines()
        assert "torch sees no GPU (--device cpu" in line


def test_the_steps_of_the_check() -> None:
    names = [name for name, *_ in gpu_check.steps("cuda")]
    assert names == ["build", "tests", "memcheck", "racecheck"]
    assert len(list(gpu_check.steps("cpu"))) == 3


@pytest.mark.slow
def test_the_check_where_there_is_no_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu"]) == 0
    assert "left out: without a GPU" in capfd.readouterr().out
