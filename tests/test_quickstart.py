"""The shipped tasks are what their script makes, balanced, and no test row is in train."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from mixlora.tasks import load_examples

FOLDER = Path(__file__).resolve().parents[1] / "data/quickstart"
NAMES = ["sum", "compare", "order", "who"]


def make_splits(name: str) -> dict[str, list[dict]]:
    spec = importlib.util.spec_from_file_location("quickstart_tasks", FOLDER / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_splits(name)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_rows_are_what_the_script_makes(name: str) -> None:
    for split, rows in make_splits(name).items():
        lines = (FOLDER / "tasks" / name / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_balanced_and_disjoint(name: str) -> None:
    train, test = (load_examples(FOLDER / "tasks", name, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2000, 400)
    for examples in (train, test):
        counts = Counter(example.gold for example in examples)
        assert max(counts.values()) == min(counts.values())
    assert {example.prompt for example in train}.isdisjoint(example.prompt for example in test)
