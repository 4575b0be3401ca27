"""Rows of the eight datasets become MixLoRA's prompts, byte for byte."""

import json
from pathlib import Path

import pytest

from mixlora.errors import InputError
from mixlora.tasks import TASKS, example_of, find_task, load_examples

DATA = Path(__file__).resolve().parents[2] / "shared/data/tasks"

ARC = {
    "id": "x",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
OBQA = {
    "id": "x",
    "question_stem": "The sun is a",
    "choices": {"text": ["star", "moon"], "label": ["A", "B"]},
    "answerKey": "A",
}
HELLASWAG = {
    "activity_label": "Pole vault",
    "ctx": "A man runs. he",
    "endings": ["sleeps.", "jumps.", "eats.", "sings."],
    "label": "1",
}
# task, row, prompt, labels, gold
EXPECTED = [
    (
        "arc-e",
        ARC,
        "Please choose the correct answer to the question: Which is hot? (A) ice (B) fire (C) snow"
        "\nAnswer:",
        ("A", "B", "C"),
        1,
    ),
    (
        "arc-c",
        {**ARC, "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Which is hot? (1) ice (2) fire\nAnswer:",
        ("1", "2"),
        1,
    ),
    (
        "obqa",
        OBQA,
        "Please choose the correct answer to the question: The sun is a (A) star (B) moon\nAnswer:",
        ("A", "B"),
        0,
    ),
    (
        "boolq",
        {"question": "is the sky blue", "answer": False, "passage": "The sky."},
        "Please answer the following question with true or false: is the sky blue?\nAnswer:",
        ("true", "false"),
        1,
    ),
    (
        "piqa",
        {"goal": "To open a can", "sol1": "use a {key}.", "sol2": "sing.", "label": 0},
        "Below is a common task along with two possible solutions labeled (A) and (B). Please "
        "select the appropriate solution to achieve the task:\nTo open a can\n\n(A) use a {key}.\n"
        "(B) sing.\n\nCorrect solution:",
        ("A", "B"),
        0,
    ),
    (
        "siqa",
        {
            "context": "Kim slept.",
            "question": "Why?",
            "answerA": "tired",
            "answerB": "angry",
            "answerC": "awake",
            "label": "3",
        },
        "Please choose the correct answer to the question.\nQuestion: Kim slept. Why?\n(A) tired\n"
        "(B) angry\n(C) awake\nAnswer:",
        ("A", "B", "C"),
        2,
    ),
    (
        "hellaswag",
        HELLASWAG,
        "Please choose the correct ending to complete the given sentence.\nSentence: Pole vault. "
        "A man runs. he\n(A) sleeps.\n(B) jumps.\n(C) eats.\n(D) sings.\nAnswer:",
        ("A", "B", "C", "D"),
        1,
    ),
    (
        "winogrande",
        {"sentence": "The _ fell.", "option1": "cup", "option2": "sky", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        "Sentence: The _ fell.\n(A) cup\n(B) sky\nAnswer:",
        ("A", "B"),
        0,
    ),
]
ROWS = {task: row for task, row, *_ in EXPECTED}


@pytest.mark.parametrize("task, row, prompt, labels, gold", EXPECTED, ids=list(ROWS))
def test_prompt_labels_and_answer(
    task: str, row: dict, prompt: str, labels: tuple[str, ...], gold: int
) -> None:
    example = example_of(TASKS[task], row, "here")
    assert example.prompt == prompt
    assert (example.labels, example.gold) == (labels, gold)


def test_every_task_has_its_expected_prompt() -> None:
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", ROWS)
def test_every_column_that_is_read_must_be_there_and_right(task: str) -> None:
    read = ROWS[task].keys() - {"id", "passage"}
    for key in read:
        row = {k: v for k, v in ROWS[task].items() if k != key}
        with pytest.raises(InputError, match=rf"^here: the row has no key '{key}' \(schema of"):
            example_of(TASKS[task], row, "here")
        for wrong in (None, 1.5, ["a"], {}, {"label": "AB", "text": "ab"}):
            with pytest.raises(InputError, match=f"^here: not a row of {task}: |^here: the row"):
                example_of(TASKS[task], {**row, key: wrong}, "here")


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("arc-e", {"answerKey": "D"}, "answerKey must be one of A, B, C, got 'D'"),
        ("arc-e", {"answerKey": "1"}, "answerKey must be one of A, B, C, got '1'"),
        ("arc-e", {"choices": {"text": [], "label": []}}, "answerKey must be one of"),
        ("obqa", {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "label of its own"),
        ("obqa", {"choices": {"text": ["a", "b"], "label": ["A", ""]}}, "label of its own"),
        ("obqa", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "label of its own"),
        ("boolq", {"answer": "true"}, "answer must be true or false, got 'true'"),
        ("boolq", {"answer": 1}, "answer must be true or false, got 1"),
        ("piqa", {"label": 2}, "one of 2 options, got option 3"),
        ("piqa", {"label": -1}, "label must be a whole number, got -1"),
        ("piqa", {"label": True}, "label must be a whole number, got True"),
        ("siqa", {"label": "0"}, "one of 3 options, got option 0"),
        ("siqa", {"label": "4"}, "one of 3 options, got option 4"),
        ("hellaswag", {"label": ""}, "label must be a whole number, got ''"),
        ("hellaswag", {"endings": ["a"] * 9}, "at most 8 options"),
        ("winogrande", {"answer": ""}, "answer must be a whole number, got ''"),
        ("winogrande", {"sentence": "\udc80"}, "surrogates not allowed"),
    ],
)
def test_a_wrong_row(task: str, changes: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        example_of(TASKS[task], {**ROWS[task], **changes}, "here:7")
    assert str(error.value).startswith(f"here:7: not a row of {task}: ")
    assert message in str(error.value)


def test_lines_end_as_they_like(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, a last line without an end, other line separators."""
    (tmp_path / "boolq").mkdir()
    rows = [{"question": question, "answer": True} for question in ("a\u2028b", "👩‍🚀 ש", "c\x85d")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\ufeff" + lines[0] + "\r\n\r\n  \n" + lines[1] + "\n" + lines[2]
    (tmp_path / "boolq/test.jsonl").write_bytes(text.encode())
    examples = load_examples(tmp_path, "boolq", "test")
    assert [e.prompt.split(": ")[1].split("?")[0] for e in examples] == [
        row["question"] for row in rows
    ]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/validation.jsonl").write_text("\n\n{}\n")
    with pytest.raises(InputError, match=r"validation\.jsonl:3: the row has no key 'question'"):
        load_examples(tmp_path, "boolq")


def test_a_folder_of_ones_own_is_like_a_known_task(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/task.json").write_text('{"like": "winogrande"}')
    (tmp_path / "mine/test.jsonl").write_text(json.dumps(ROWS["winogrande"]))
    task = find_task(tmp_path, "mine")
    assert (task.name, task.split) == ("mine", "test")
    assert load_examples(tmp_path, "mine") == [
        example_of(TASKS["winogrande"], ROWS["winogrande"], "")
    ]


COUNTS = {
    "arc-e": {"train": 2251, "validation": 570, "test": 2376},
    "arc-c": {"train": 1119, "validation": 299, "test": 1172},
    "obqa": {"train": 4957, "validation": 500, "test": 500},
    "boolq": {"train": 9427, "validation": 3270},
    "piqa": {"train": 16113, "validation": 1838},
    "siqa": {"train": 33410, "validation": 1954},
    "winogrande": {"train": 9248, "validation": 1267},
    "hellaswag": {"validation": 1000},
}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("task", COUNTS)
def test_every_real_row_is_read(task: str) -> None:
    for split, count in COUNTS[task].items():
        examples = load_examples(DATA, task, split)
        assert len(examples) == count
        assert all(0 <= example.gold < len(example.labels) for example in examples)
        assert all(example.prompt.endswith((" solution:", "\nAnswer:")) for example in examples)
    assert TASKS[task].split in COUNTS[task]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_arc_has_rows_with_digits_for_labels() -> None:
    kinds = {example.labels for example in load_examples(DATA, "arc-e", "test")}
    assert {("A", "B", "C", "D"), ("1", "2", "3", "4")} <= kinds
