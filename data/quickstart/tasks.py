"""Four small computations as multiple-choice tasks, each in the JSONL schema of a real one.

    python data/quickstart/tasks.py     writes data/quickstart/tasks/<name>/, same bytes each time

| name    | schema and prompt of | the computation                                  | answers    |
|---------|----------------------|--------------------------------------------------|------------|
| sum     | arc-e                | add two digits                                   | A B C D    |
| compare | boolq                | which of two numbers is greater                  | true false |
| order   | piqa                 | sort four letters                                | A B        |
| who     | winogrande           | follow things that people give and take          | A B        |

No row occurs twice in a task, so no row of the test split has been seen in training. In every split
each answer is right equally often.
`tasks/<name>/task.json` names the real task whose schema and prompt the folder follows.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

SPLITS = {"train": 2000, "validation": 200, "test": 400}
LETTERS = "abcdefghijkl"
NAMES = ("ann", "ben", "dan", "eve", "kim", "max", "sue", "tom")
THINGS = ("bag", "book", "cup", "hat", "key", "pen")

Row = dict[str, object]


def place(right: str, wrong: list[str], label: int) -> list[str]:
    """The answers in order, with the right one at position `label`."""
    return wrong[:label] + [right] + wrong[label:]


def make_sum(rng: random.Random, label: int) -> tuple[str, Row]:
    # The sum first: no number is right more often than another, the largest answer neither.
    total, *wrong = rng.sample(range(10), 4)
    a = rng.randint(0, total)
    question = f"what is {a} + {total - a}?"
    choices = {"text": place(str(total), [str(n) for n in wrong], label), "label": list("ABCD")}
    row = {"question": question, "choices": choices, "answerKey": "ABCD"[label]}
    return f"{question} {choices}", row


def make_compare(rng: random.Random, label: int) -> tuple[str, Row]:
    a = rng.randint(1, 99)
    # Half of the pairs are close, so that the units have to be read too.
    b = rng.choice([rng.randint(1, 99), a // 10 * 10 + rng.randint(0, 9)])
    if a == b:
        b = a + 1
    greater = rng.random() < 0.5
    if ((a > b) == greater) != bool(label):
        a, b = b, a
    question = f"is {a} {'greater' if greater else 'less'} than {b}"
    return question, {"question": question, "answer": bool(label)}


def make_order(rng: random.Random, label: int) -> tuple[str, Row]:
    letters = rng.sample(LETTERS, 4)
    right, wrong = sorted(letters), sorted(letters)
    i = rng.randrange(3)
    wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
    goal = f"sort the letters {' '.join(letters)}"
    sol1, sol2 = place(" ".join(right), [" ".join(wrong)], label)
    return goal, {"goal": goal, "sol1": sol1, "sol2": sol2, "label": label}


def make_who(rng: random.Random, label: int) -> tuple[str, Row]:
    people, things = rng.sample(NAMES, 4), rng.sample(THINGS, 2)
    events = []
    for (first, second), thing in zip((people[:2], people[2:]), things, strict=True):
        gave = rng.random() < 0.5
        verb, preposition = ("gave", "to") if gave else ("took", "from")
        text = f"{first} {verb} the {thing} {preposition} {second}"
        events.append((text, thing, *((second, first) if gave else (first, second))))
    _, thing, owner, other = rng.choice(events)
    sentence = f"{events[0][0]} and {events[1][0]} so now _ has the {thing}."
    option1, option2 = place(owner, [other], label)
    row = {"sentence": sentence, "option1": option1, "option2": option2, "answer": str(label + 1)}
    return sentence, row


# name: (the real task it is like, its id field, number of labels, generator)
TASKS: dict[str, tuple[str, str | None, int, Callable[[random.Random, int], tuple[str, Row]]]] = {
    "sum": ("arc-e", "id", 4, make_sum),
    "compare": ("boolq", None, 2, make_compare),
    "order": ("piqa", None, 2, make_order),
    "who": ("winogrande", "qID", 2, make_who),
}


def make_splits(name: str) -> dict[str, list[Row]]:
    _, id_field, num_labels, make = TASKS[name]
    rng = random.Random(f"quickstart {name}")
    seen: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split, size in SPLITS.items():
        rows: list[Row] = []
        while len(rows) < size:
            identity, row = make(rng, len(rows) % num_labels)
            if identity not in seen:
                seen.add(identity)
                rows.append(({id_field: f"{name}-{len(seen)}"} if id_field else {}) | row)
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def main() -> None:
    for name, (like, *_) in TASKS.items():
        folder = Path(__file__).parent / "tasks" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "task.json").write_text(json.dumps({"like": like}) + "\n")
        for split, rows in make_splits(name).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
