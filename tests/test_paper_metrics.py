import re
from pathlib import Path

import yaml

from benchmarks import paper_metrics


def test_every_side_has_its_numbers(checkpoint: Path, tmp_path: Path, capsys) -> None:
    paths = []
    for name, adapter in {
        "lora": {"r": 4, "lora_alpha": 8},
        "mixlora": {"routing_strategy": "mixlora", "r": 2, "num_experts": 3},
    }.items():
        values = {"adapter": adapter, "train": {"steps": 1}, "run": {"dir": "none"}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"model": {"base": str(checkpoint)}, **values}))
        paths.append(str(path))
    assert paper_metrics.main([*paths, "--rows", "2", "--tokens", "16", "--runs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(r"(mix)?lora( x2)? +\d", line)]
    assert [row.split("  ")[0] for row in rows] == ["lora", "lora x2", "mixlora", "mixlora x2"]
    for row in rows:
        numbers = [float(x) for x in re.findall(r"\d+\.\d+", row)]
        assert len(numbers) == 8 and all(x >= 0 for x in numbers)
        assert numbers[4] > numbers[4] / 2 > 0  # memory
    assert rows[0].count("100%") == 3


def test_wrong_calls(checkpoint: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.yaml"
    values = {"model": {"base": str(checkpoint)}, "train": {"steps": 1}, "run": {"dir": "none"}}
    path.write_text(yaml.safe_dump(values))
    for arguments, said in (
        (["model.base=x"], "give at least one config"),
        ([str(path), "--rows", "3"], "--rows must be even"),
        ([str(path), "--runs", "1"], "--runs >= 2"),
        ([str(path), "modell.base=3"], "unknown key 'modell'"),
    ):
        assert paper_metrics.main(arguments) == 2
        assert said in capsys.readouterr().err
