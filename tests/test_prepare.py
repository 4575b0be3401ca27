"""data/prepare.py: rows of parquet, JSON and JSON lines files become task folders, or nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mixlora.tasks import TASKS, example_of, load_examples

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/tasks"
SPEC = importlib.util.spec_from_file_location("prepare", ROOT / "data/prepare.py")
prepare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare)

# Two rows of each task, with a column that is not of its schema.
QUESTION = {"id": "x1", "question": "Which is hot?", "extra": 1.5, "answerKey": "B"}
CHOICES = {"text": ["ice", "fire"], "label": ["A", "B"]}
ROWS = {
    "arc-e": {**QUESTION, "choices": CHOICES},
    "arc-c": {**QUESTION, "choices": {"text": ["ice", "fire"], "label": ["B", "2"]}},
    "obqa": {"question_stem": "The sun", "choices": CHOICES, "answerKey": "A", "fact1": "f"},
    "boolq": {"passage": "The sky.", "question": "is it blue", "answer": True, "idx": 3},
    "piqa": {"goal": "To open", "sol1": "pull", "sol2": "sing", "label": 1, "i": 0},
    "siqa": {
        "context": "Kim slept.",
        "question": "Why?",
        "answerA": "tired",
        "answerB": "ill",
        "answerC": "awake",
        "label": "3",
        "split": "train",
    },
    "hellaswag": {
        "ind": 24,
        "activity_label": "Pole vault",
        "ctx": "A man",
        "endings": ["runs", "eats", "sits", "lies"],
        "label": "0",
        "x": None,
    },
    "winogrande": {"sentence": "_", "option1": "a", "option2": "b", "answer": "2", "x": "y"},
    "gsm8k": {"question": "2 + 3?", "answer": "It is 5.\n#### 5", "x": "y"},
    "aqua": {
        "question": "2 + 3?",
        "options": ["A)4", "B)5"],
        "rationale": "It is 5.",
        "correct": "B",
        "x": "y",
    },
}
ROWS["csqa"] = {**ROWS["arc-e"], "question_concept": "heat"}
ROWS["pubmedqa"] = {
    "pubid": 1,
    "question": "Does it work?",
    "context": {"contexts": ["We tried."], "labels": ["AIM"]},
    "long_answer": "Yes.",
    "final_decision": "yes",
    "x": "y",
}
FOREIGN = {"extra", "question_concept", "fact1", "idx", "i", "x"}


def rows_of(task: str) -> list[dict]:
    row = ROWS[task]
    key = next(k for k in ("question", "question_stem", "goal", "ctx", "sentence") if k in row)
    return [row, {**row, key: f"{row[key]} é\u2028"}]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
        path.write_text("\ufeff" + text, encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl"])
@pytest.mark.parametrize("task", ROWS)
def test_the_columns_of_the_schema_are_kept(
    task: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = rows_of(task)
    source = write(tmp_path / f"a=b/rows.{kind}", rows)  # not a column a, as in a partitioned table
    assert run("--task", task, "--split", "train", "--input", source, "--out", tmp_path) == 0
    path = tmp_path / task / "train.jsonl"
    assert capsys.readouterr() == (f"{path}: 2 rows\n", "")
    foreign = FOREIGN | ({"split"} if task == "siqa" else set())
    assert read(path) == [{k: v for k, v in row.items() if k not in foreign} for row in rows]
    assert read(path)[0].keys() < rows[0].keys()
    assert len(load_examples(tmp_path, task, "train")) == 2
    assert list((tmp_path / task).iterdir()) == [path]


def test_every_task_is_tried() -> None:
    assert ROWS.keys() == prepare.SOURCES.keys() == TASKS.keys()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("task", ["arc-c", "obqa", "boolq", "hellaswag", "gsm8k", "aqua"])
def test_real_rows_stay_what_they_are(task: str, tmp_path: Path) -> None:
    source = sorted((REAL / task).iterdir())[-1]  # aqua's is called .json and holds JSON lines
    rows = read(source)[:200]
    parquet = write(tmp_path / "rows.parquet", rows)
    for path in (source, parquet):
        assert run("--task", task, "--split", "test", "--input", path, "--out", tmp_path) == 0
        assert read(tmp_path / task / "test.jsonl")[:200] == rows


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    first, second = rows_of("piqa")
    a, b = write(tmp_path / "a.parquet", [first]), write(tmp_path / "b.json", [second])
    c = write(tmp_path / "c.jsonl", [first])
    inputs = ("--input", b, a, "--input", c)
    assert run("--task", "piqa", "--split", "test", *inputs, "--out", tmp_path) == 0
    assert [row["goal"] for row in read(tmp_path / "piqa/test.jsonl")] == [
        row["goal"] for row in (second, first, first)
    ]


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("arc-e", {"answerKey": "E"}, "not a row of arc-e: answerKey must be one of A, B, got 'E'"),
        ("boolq", {"answer": 1}, "not a row of boolq: answer must be true or false, got 1"),
        ("winogrande", {"answer": ""}, "answer must be a whole number, got ''"),
        ("hellaswag", {"endings": "runs"}, "endings must be a list of texts, got 'runs'"),
        ("gsm8k", {"answer": "It is 5."}, "not a row of gsm8k: answer must end in '#### '"),
        ("gsm8k", {"question": None}, "question must be text, got None"),
        ("aqua", {"correct": "C"}, "not a row of aqua: correct must be one of A, B, got 'C'"),
        ("aqua", {"rationale": 3}, "rationale must be text, got 3"),
        ("pubmedqa", {"long_answer": None}, "long_answer must be text, got None"),
    ],
)
@pytest.mark.parametrize("kind, place", [("json", ": row 3: "), ("jsonl", ":3: ")])
def test_a_wrong_row_is_named_and_nothing_is_written(
    task: str,
    changes: dict,
    message: str,
    kind: str,
    place: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    row = ROWS[task]
    source = write(tmp_path / f"rows.{kind}", [row, row, {**row, **changes}])
    arguments = ("--task", task, "--split", "train", "--out", tmp_path / "out", "--input")
    error = refused(capsys, *arguments, source)
    assert f"rows.{kind}{place}" in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_wrong_row_of_a_parquet_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    row = ROWS["arc-e"]
    source = write(tmp_path / "rows.parquet", [row, row, {**row, "question": None}])
    error = refused(capsys, "--task", "arc-e", "--split", "train", "--input", source)
    assert "rows.parquet: row 3: not a row of arc-e: question must be text, got None" in error


def test_a_missing_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for kind, place in (("parquet", "rows.parquet: row 1"), ("jsonl", "rows.jsonl:1")):
        source = write(tmp_path / f"rows.{kind}", [{"goal": "g", "sol1": "a", "sol2": "b"}])
        error = refused(capsys, "--task", "piqa", "--split", "train", "--input", source)
        assert f"{place}: the row has no key 'label' (schema of piqa)" in error


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.parquet", None, "none.parquet: not a whole parquet file"),
        ("none.jsonl", None, "none.jsonl: cannot be read"),
        ("cut.parquet", b"PAR1xxxx", "cut.parquet: not a whole parquet file"),
        ("empty.parquet", b"", "empty.parquet: not a whole parquet file"),
        ("empty.jsonl", b"\n \n", "empty.jsonl: no rows for train"),
        ("empty.json", b"[]", "empty.json: no rows for train"),
        ("list.json", b"[1]", "list.json: row 1: a row must be a JSON object, got int"),
        ("cut.json", b'[\n{"goal": 1},\n', "cut.json: not JSON"),
        ("cut.jsonl", b'\n\n{"goal":', "cut.jsonl:3: not JSON"),
        ("latin.jsonl", b'{"goal": "\xe9"}', "latin.jsonl: cannot be read"),
    ],
)
def test_a_wrong_file(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    arguments = ("--task", "piqa", "--split", "train", "--input", path, "--out", tmp_path)
    assert message in refused(capsys, *arguments)
    assert not (tmp_path / "piqa").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--task", "arce"), "unknown task 'arce' (did you mean 'arc-e'?)"),
        (("--task", "piqa", "--input", "x.jsonl"), "--input needs --split"),
        (("--task", "piqa", "--split", "dev", "--input", "x.jsonl"), "--split"),
        (("--split", "train"), "--task"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str, capsys: pytest.CaptureFixture) -> None:
    assert message in refused(capsys, *arguments)


def test_what_is_there_stays_when_a_row_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = rows_of("piqa"), [*rows_of("piqa"), {"goal": "g"}]
    path = tmp_path / "piqa/train.jsonl"
    arguments = ("--task", "piqa", "--split", "train", "--out", tmp_path, "--input")
    assert run(*arguments, write(tmp_path / "a.jsonl", right)) == 0
    before = path.read_bytes()
    capsys.readouterr()
    refused(capsys, *arguments, write(tmp_path / "b.jsonl", wrong))
    refused(capsys, *arguments, write(tmp_path / "a.jsonl", right), tmp_path / "b.jsonl")
    assert path.read_bytes() == before

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shorter = write(tmp_path / "a.jsonl", right[:1])
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            assert "No space left" in refused(capsys, *arguments, shorter)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    assert run(*arguments, shorter) == 0
    assert len(read(path)) == 1 and list(path.parent.iterdir()) == [path]


def test_parquet_without_pyarrow(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.parquet", rows_of("piqa"))
    lines = write(tmp_path / "rows.jsonl", rows_of("piqa"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ("--task", "piqa", "--split", "train", "--out", tmp_path, "--input")
    error = refused(capsys, *arguments, source)
    assert "rows.parquet: a parquet file needs pyarrow: pip install pyarrow" in error
    assert run(*arguments, lines) == 0


class Hub(types.ModuleType):
    """huggingface_hub with one dataset, the parquet files of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []

    def list_repo_files(self, repo: str, *, repo_type: str, revision: str) -> list[str]:
        self.asked.append((repo, repo_type, revision))
        names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.parquet")]
        return [".gitattributes", *names]

    def hf_hub_download(self, repo: str, name: str, *, repo_type: str, revision: str) -> str:
        return str(self.folder / name)


def test_from_the_hub_every_split_with_public_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    first, second = rows_of("winogrande")
    for config in ("winogrande_debiased", "winogrande_xl"):
        answer = "1" if config.endswith("xl") else "2"
        for name in ("train/0001", "train/0000", "validation/0000", "test/0000"):
            write(hub.folder / config / f"{name}.parquet", [{**first, "answer": answer}, second])
    assert run("--task", "winogrande", "--out", tmp_path / "out") == 0
    assert set(hub.asked) == {("allenai/winogrande", "dataset", "refs/convert/parquet")}
    files = sorted((tmp_path / "out/winogrande").iterdir())
    assert [path.name for path in files] == ["train.jsonl", "validation.jsonl"]
    assert [len(read(path)) for path in files] == [4, 2]
    assert read(files[0])[0]["answer"] == "2"
    assert capsys.readouterr().out == f"{files[0]}: 4 rows\n{files[1]}: 2 rows\n"


def test_from_the_hub_a_dataset_whose_splits_are_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for config, answer in (("artificial", "no"), ("labeled", "maybe"), ("unlabeled", "yes")):
        row = {**ROWS["pubmedqa"], "final_decision": answer}
        write(hub.folder / f"pqa_{config}/train/0000.parquet", [row])
    assert run("--task", "pubmedqa", "--out", tmp_path) == 0
    (train,), (test,) = (read(tmp_path / f"pubmedqa/{split}.jsonl") for split in ("train", "test"))
    assert (train["final_decision"], test["final_decision"]) == ("no", "maybe")


def test_from_the_hub_a_dataset_whose_config_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    arguments = ("--task", "piqa", "--split", "train", "--out", tmp_path)
    assert "baber/piqa: one folder must hold the split train, found none" in refused(
        capsys, *arguments
    )
    write(hub.folder / "plain_text/train/0000.parquet", rows_of("piqa"))
    assert run(*arguments) == 0
    capsys.readouterr()
    write(hub.folder / "other/train/0000.parquet", rows_of("piqa"))
    assert "found other/train/0000.parquet, plain_text" in refused(capsys, *arguments)


def test_from_the_hub_without_a_network_or_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    hub = Hub(tmp_path)
    monkeypatch.setattr(hub, "list_repo_files", offline)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    arguments = ("--task", "arc-e", "--out", tmp_path / "out")
    assert "allenai/ai2_arc: cannot be fetched from the hub: no network" in refused(
        capsys, *arguments
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_as_a_program_from_anywhere(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of("boolq"))
    command = [sys.executable, ROOT / "data/prepare.py", "--task", "boolq", "--split", "train"]
    done = subprocess.run(
        [*command, "--input", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "data/boolq/train.jsonl: 2 rows\n"), done.stderr
    assert len(read(tmp_path / "data/boolq/train.jsonl")) == 2


def test_the_example_rows_of_the_readme_are_rows(tmp_path: Path) -> None:
    text = (ROOT / "data/README.md").read_text()
    found = re.findall(r"^\| ([a-z0-9-]+(?:, [a-z0-9-]+)*) \| \w+ \| `(\{.*?\})`", text, re.M)
    tasks = {task: json.loads(row) for names, row in found for task in names.split(", ")}
    assert tasks.keys() == prepare.SOURCES.keys()
    for task, row in tasks.items():
        example_of(TASKS[task], row, "data/README.md")
        assert row.keys() <= set(prepare.SOURCES[task].columns.split())
        split = re.search(rf"\b{task}\b.* \| (\w+) \| `", text)[1]
        assert TASKS[task].split == split
