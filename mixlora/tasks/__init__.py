"""Tasks: how a dataset's row becomes a prompt and the right answer to it.

    <dir>/<task>/{train,validation,test}.jsonl

in the dataset's Hugging Face schema. A folder of one's own follows the schema of a task known
here, which its `task.json` names: {"like": "arc-e"}.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixlora.errors import InputError, did_you_mean
from mixlora.files import read_json
from mixlora.tasks import choice, generation, llm_adapters
from mixlora.tasks.choice import Example
from mixlora.tasks.generation import Problem

Read = Callable[[dict], Example | Problem]


@dataclass(frozen=True)
class Task:
    """`example` reads a row, `split` is the one with public labels."""

    name: str
    example: Read
    split: str
    labels: tuple[str, ...] = ()  # what MixLoRA's evaluation compares in every row
    llm_adapters: Read | None = None  # a row as LLM-Adapters asks it
    train_example: Read | None = None  # where training has another text than evaluation


ARC_LABELS = ("1", "2", "3", "4", "A", "B", "C", "D", "E")
TASKS = {
    task.name: task
    for task in (
        Task("arc-e", choice.arc, "test", ARC_LABELS, llm_adapters.arc),
        Task("arc-c", choice.arc, "test", ARC_LABELS, llm_adapters.arc),
        Task("boolq", choice.boolq, "validation", ("true", "false"), llm_adapters.boolq),
        Task("obqa", choice.obqa, "test", tuple("ABCD"), llm_adapters.obqa),
        Task("piqa", choice.piqa, "validation", tuple("AB"), llm_adapters.piqa),
        Task("siqa", choice.siqa, "validation", tuple("ABC"), llm_adapters.siqa),
        Task("hellaswag", choice.hellaswag, "validation", tuple("ABCD"), llm_adapters.hellaswag),
        Task("winogrande", choice.winogrande, "validation", tuple("AB"), llm_adapters.winogrande),
        Task("csqa", choice.arc, "validation", tuple("ABCDE")),
        Task(
            "pubmedqa",
            choice.pubmedqa,
            "test",
            ("yes", "no", "maybe"),
            train_example=choice.pubmedqa_training,
        ),
        Task("gsm8k", generation.gsm8k, "test"),
        Task("aqua", generation.aqua, "test"),
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
    return dataclasses.replace(TASKS[like], name=name, split="test")


def data_file(folder: str | Path, name: str, split: str | None = None) -> Path:
    """Where the rows of a split are (None: of the one that is evaluated)."""
    path = Path(folder) / name / f"{split or find_task(folder, name).split}.jsonl"
    if not path.is_file():
        raise InputError(f"task {name}: {path}: no such file")
    return path


def load_examples(
    folder: str | Path, name: str, split: str | None = None, read: Read | None = None
) -> list[Example | Problem]:
    """All rows of a split (None: the one that is evaluated); each fault names file and line.

    `read` makes an example of a row; None is the task's own way, for training or evaluation.
    """
    task = find_task(folder, name)
    path = data_file(folder, name, split)
    if read is None:
        read = (split == "train" and task.train_example) or task.example
    examples = []
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    examples.append(example_of(task, parse_row(line, where), where, read))
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


def example_of(task: Task, row: object, where: str, read: Read | None = None) -> Example | Problem:
    """The row as an example; a wrong row is an error that names where it was written."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    try:
        example = (read or task.example)(row)
        (example.prompt + example.answer).encode()  # half a surrogate pair is no text
        return example
    except KeyError as error:
        raise InputError(f"{where}: the row has no key {error} (schema of {task.name})") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{where}: not a row of {task.name}: {error}") from None
