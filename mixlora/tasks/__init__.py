"""Tasks: how a dataset's row becomes a prompt, its possible answers and the right one.

    <dir>/<task>/{train,validation,test}.jsonl

in the dataset's Hugging Face schema. A folder of one's own follows the schema of a task known
here, which its `task.json` names: {"like": "arc-e"}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixlora.errors import InputError, did_you_mean
from mixlora.files import read_json
from mixlora.tasks import choice


@dataclass(frozen=True)
class Task:
    """`example` turns a row into a choice.Example; `split` is the one with public labels."""

    name: str
    example: Callable[[dict], choice.Example]
    split: str


# The rows and prompts of MixLoRA's evaluation (MoE-PEFT); all are multiple choice.
TASKS = {
    task.name: task
    for task in (
        Task("arc-e", choice.arc, "test"),
        Task("arc-c", choice.arc, "test"),
        Task("boolq", choice.boolq, "validation"),
        Task("obqa", choice.obqa, "test"),
        Task("piqa", choice.piqa, "validation"),
        Task("siqa", choice.siqa, "validation"),
        Task("hellaswag", choice.hellaswag, "validation"),
        Task("winogrande", choice.winogrande, "validation"),
    )
}


def find_task(folder: str | Path, name: str) -> Task:
    """The task of that name, or the one that `<folder>/<name>/task.json` says it is like."""
    if name in TASKS:
        return TASKS[name]
    description = Path(folder) / name / "task.json"
    if not description.is_file():
        hint = did_you_mean(name, TASKS)
        raise InputError(f"unknown task {name!r}{hint}; {description} is not there either")
    like = read_json(description).get("like")
    if not isinstance(like, str) or like not in TASKS:
        hint = did_you_mean(str(like), TASKS)
        raise InputError(f"{description}: like = {like!r} is no known task{hint}")
    return Task(name, TASKS[like].example, "test")


def load_examples(folder: str | Path, name: str, split: str | None = None) -> list[choice.Example]:
    """All examples of a split (None: the one that is evaluated); each fault names file and line."""
    task = find_task(folder, name)
    path = Path(folder) / name / f"{split or task.split}.jsonl"
    if not path.is_file():
        raise InputError(f"task {name}: {path}: no such file")
    examples = []
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    examples.append(example_of(task, parse_row(line, where), where))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8: {error}") from None
    if not examples:
        raise InputError(f"task {name}: {path} is empty")
    return examples


def parse_row(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise InputError(f"{where}: not JSON: {error}") from None


def example_of(task: Task, row: object, where: str) -> choice.Example:
    """The row as an example; a wrong row is an error that names where it was written."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    try:
        example = task.example(row)
        example.prompt.encode()  # half a surrogate pair is no text
        return example
    except KeyError as error:
        raise InputError(f"{where}: the row has no key {error} (schema of {task.name})") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: not a row of {task.name}: {error}") from None
