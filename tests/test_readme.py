"""Every command of the README works. Training is cut short; make's targets are run dry."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import generate
import train

README = Path("README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
QUICKSTART = Path("data/quickstart/model")
SHORT = ["train.steps=2", "eval.max_rows=4", "data.max_samples=40"]


def test_the_readme_has_commands_of_every_kind() -> None:
    assert [c for c in COMMANDS if c.startswith("make")] == [
        "make demo",
        "make test",
        "make kernels",
        "make gpu-check",
        "make gpu-bench",
    ]
    for script in ("train.py", "evaluate.py", "generate.py", "data/prepare.py"):
        assert any(command.startswith(f"python {script}") for command in COMMANDS), script


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "quickstart"
    command = next(c for c in COMMANDS if "configs/quickstart.yaml" in c)
    assert train.main([*shlex.split(command)[2:], *SHORT, f"run.dir={folder}"]) == 0
    return folder


def test_the_quickstart(quickstart_run: Path) -> None:
    assert (quickstart_run / "summary.png").is_file()
    assert (quickstart_run / "mixlora" / "adapter" / "adapter_model.safetensors").is_file()


def test_evaluate(quickstart_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = next(c for c in COMMANDS if "evaluate.py" in c)
    command = command.replace("runs/quickstart", str(quickstart_run))
    assert evaluate.main([*shlex.split(command)[2:], "--max-rows", "8"]) == 0
    assert "majority" in capsys.readouterr().out


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    command = next(c for c in COMMANDS if "generate.py" in c)
    assert generate.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.startswith("3 + 4 =")


def test_the_engine_as_it_is_described(
    quickstart_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/serving.md").read_text(), re.DOTALL)
    exec(code.replace("runs/quickstart", str(quickstart_run)), {})
    first, second = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert len(first) == len(second) == 8


def test_prepare_then_train_on_ones_own_model_then_resume(
    tmp_path: Path, quickstart_run: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "id": f"row {i}",
            "question": f"what is {i} plus 1",
            "choices": {"text": [str(i), str(i + 1)], "label": ["A", "B"]},
            "answerKey": "B",
        }
        for i in range(8)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "arc-easy-train.parquet")
    prepare, begin, resume = (
        shlex.split(command)
        for command in COMMANDS
        if "data/prepare.py" in command or "stories260k" in command or "--resume" in command
    )
    here = {
        "arc-easy-train.parquet": str(tmp_path / "arc-easy-train.parquet"),
        "data": str(tmp_path / "data"),
        "data.dir=data": f"data.dir={tmp_path / 'data'}",
        "model.base=path/to/llama": f"model.base={QUICKSTART}",
        "run.dir=runs/mine": f"run.dir={tmp_path / 'run'}",
        "runs/mine/config.yaml": str(tmp_path / "run" / "config.yaml"),
    }
    done = subprocess.run(
        [sys.executable, *(here.get(word, word) for word in prepare[1:])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    arguments = ["data.tasks=[arc-e]", "eval.tasks=[]", "train.steps=2", "run.plot=false"]
    arguments.append("train.max_seq_len=256")  # what the quickstart model reads
    assert train.main([*(here.get(word, word) for word in begin[2:]), *arguments]) == 0
    assert train.main([here.get(word, word) for word in resume[2:]]) == 0


def test_train_on_ones_own_rows_then_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"{i} plus 1?", "output": str(i + 1)} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin, speak = (command for command in COMMANDS if "runs/instructions" in command)
    begin = begin.replace("mine.jsonl", str(tmp_path / "mine.jsonl"))
    begin, speak = (
        shlex.split(command.replace("runs/instructions", str(tmp_path / "run")))[2:]
        for command in (begin, speak)
    )
    assert train.main([*begin, *SHORT[:2], "run.plot=false"]) == 0
    assert "8 samples, 8 in an epoch, 0 truncated, 0 skipped" in capsys.readouterr().out
    assert generate.main([*speak, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("Sum up.\n")


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, {})
    assert "experts" in capsys.readouterr().out


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and [link for link in links if not Path(link).exists()] == []
