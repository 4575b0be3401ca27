"""Rows of the datasets become prompts and answers, byte for byte; answers are read in any text."""

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
EXPECTED += [
    (
        "csqa",
        {**ARC, "question_concept": "heat"},
        "Please choose the correct answer to the question: Which is hot? (A) ice (B) fire (C) snow"
        "\nAnswer:",
        ("A", "B", "C"),
        1,
    ),
    (
        "pubmedqa",
        {
            "question": "Does it work?",
            "context": {"contexts": ["We tried.", "It did."], "labels": ["AIM", "RESULTS"]},
            "long_answer": "It works\nwell.",
            "final_decision": "maybe",
        },
        "Instruction:\nPlease answer the following question with yes or no based on your medical "
        "knowledge and the following context.\nQuestion:\nDoes it work?\nContext:\n"
        "(AIM) We tried.\n(RESULTS) It did.\nAnswer:",
        ("yes", "no", "maybe"),
        2,
    ),
]
GSM8K = {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005.0\n"}
AQUA = {
    "question": "What is 2 + 3?",
    "options": ["A)4", "B) 5"],
    "rationale": "2 + 3 = 5\n",
    "correct": "B",
}
ROWS = {task: row for task, row, *_ in EXPECTED} | {"gsm8k": GSM8K, "aqua": AQUA}


@pytest.mark.parametrize("task, row, prompt, labels, gold", EXPECTED, ids=list(ROWS)[:-2])
def test_prompt_labels_and_answer(
    task: str, row: dict, prompt: str, labels: tuple[str, ...], gold: int
) -> None:
    example = example_of(TASKS[task], row, "here")
    assert example.prompt == prompt
    assert (example.labels, example.gold) == (labels, gold)
    assert (example.right, example.answer) == (labels[gold], " " + labels[gold])


def test_gsm8k_is_answered_in_full() -> None:
    problem = example_of(TASKS["gsm8k"], GSM8K, "here")
    assert problem.prompt == "Question: What is 2 + 3?\nAnswer:"
    assert problem.answer == " 2 + 3 = <<2+3=5>>5\n#### 1,005.0"
    assert (problem.right, problem.labels) == ("1005", ())
    assert problem.generation[:2] == (448, ("Question:",))


def test_aqua_is_answered_in_full() -> None:
    problem = example_of(TASKS["aqua"], AQUA, "here")
    assert problem.prompt == "Question: What is 2 + 3?\nOptions: (A) 4 (B) 5\nAnswer:"
    assert problem.answer == " 2 + 3 = 5\nThe answer is B."
    assert (problem.right, problem.labels) == ("B", ("A", "B"))
    assert problem.generation[:2] == (384, ("Question:",))


def test_pubmedqa_shows_the_long_answer_in_training_alone(tmp_path: Path) -> None:
    (tmp_path / "pubmedqa").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"pubmedqa/{split}.jsonl").write_text(json.dumps(ROWS["pubmedqa"]))
    (train,) = load_examples(tmp_path, "pubmedqa", "train")
    (test,) = load_examples(tmp_path, "pubmedqa")
    before, between, after = test.prompt.partition("Answer:")
    assert train.prompt == f"{before}Long Answer:\nIt works\nwell.\nAnswer:"
    assert (between, after, train.answer, test.answer) == ("Answer:", "", " maybe", " maybe")


@pytest.mark.parametrize(
    "text, flexible, strict",
    [
        ("5", "5", None),
        ("so she has $1,234.50 left.", "1234.5", None),
        ("#### 18", "18", "18"),
        ("16 - 3 = 13\n#### 13.", "13", "13"),
        ("#### $70,000\nand 3 more", "3", "70000"),
        ("####-4", "-4", "-4"),
        ("it is -4", "-4", None),
        ("10-4", "4", None),
        ("(-4)", "-4", None),
        ("1,2,3", "3", None),
        ("12,000,000", "12000000", None),
        ("18.00", "18", None),
        ("1e5 or 0.5", "0.5", None),
        ("100", "100", None),
        ("-0", "0", None),
        ("007", "7", None),
        ("#### none", None, None),
        ("", None, None),
    ],
)
def test_numbers_are_read(text: str, flexible: str | None, strict: str | None) -> None:
    generation = example_of(TASKS["gsm8k"], GSM8K, "here").generation
    assert generation.read(text, ()) == flexible
    assert generation.read_strictly(text, ()) == strict


def test_a_number_of_any_length_is_read() -> None:
    assert len(example_of(TASKS["gsm8k"], GSM8K, "").generation.read("7" * 5000, ())) == 5000


@pytest.mark.parametrize(
    "text, flexible, strict",
    [
        ("2 + 3 = 5\nThe answer is B.", "B", "B"),
        ("the answer is (C)", "C", "C"),
        ("The answer is Beth. A", "A", None),
        ("The answer is A. B", "A", "A"),
        ("A car and Bob. Answer : C", "C", None),
        ("A's share", None, None),
        ("E", None, None),
        ("", None, None),
    ],
)
def test_letters_are_read(text: str, flexible: str | None, strict: str | None) -> None:
    generation = example_of(TASKS["aqua"], AQUA, "here").generation
    assert generation.read(text, tuple("ABCD")) == flexible
    assert generation.read_strictly(text, tuple("ABCD")) == strict


# The wrapper's lines are indented by 16 spaces, the instruction's own are not.
WRAPPED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request. \n\n                ### Instruction:\n                {}\n\n"
    "                ### Response:\n                "
)
CHOOSE = "Please choose the correct answer to the question: "
LLM_ADAPTERS = {
    "arc-e": (
        f"{CHOOSE}Which is hot?\n\nAnswer1: ice Answer2: fire Answer3: snow\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "arc-c": (
        f"{CHOOSE}Which is hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2",
        "answer2",
    ),
    "obqa": (
        f"{CHOOSE}The sun is a\n\nAnswer1: star Answer2: moon\n\nAnswer format: answer1/answer2",
        "answer1",
    ),
    "boolq": (
        "Please answer the following question with true or false, question: is the sky blue?\n\n"
        "Answer format: true/false",
        "false",
    ),
    "piqa": (
        "Please choose the correct solution to the question: To open a can\n\n"
        "Solution1: use a {key}.\n\nSolution2: sing.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "siqa": (
        f"{CHOOSE}Kim slept. Why?\n\nAnswer1: tired Answer2: angry Answer3: awake\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Pole vault: A man runs. "
        "he\n\nEnding1: sleeps. Ending2: jumps. Ending3: eats. Ending4: sings.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The _ fell.\n\nOption1: cup Option2: sky Answer format: option1/option2",
        "option1",
    ),
}


@pytest.mark.parametrize("task", LLM_ADAPTERS)
def test_prompts_of_llm_adapters(task: str) -> None:
    instruction, right = LLM_ADAPTERS[task]
    problem = example_of(TASKS[task], ROWS[task], "here", TASKS[task].llm_adapters)
    assert problem.prompt == WRAPPED.replace("{}", instruction)
    assert (problem.right, problem.answer) == (right, f"the correct answer is {right}")
    assert right in problem.labels
    assert problem.generation[:2] == (32, ("### Response:",))
    read = problem.generation.read
    assert read(f"  the correct answer is {right}", problem.labels) == right
    assert read("None of them, I think.", problem.labels) is None
    assert read(problem.answer.replace("the", "un").upper(), problem.labels) is None


def test_llm_adapters_reads_the_first_match_anywhere() -> None:
    read = {
        task: example_of(TASKS[task], ROWS[task], "", TASKS[task].llm_adapters)
        for task in LLM_ADAPTERS
    }
    boolq, siqa = read["boolq"], read["siqa"]
    assert boolq.generation.read("untrue, so false", boolq.labels) == "true"
    assert siqa.generation.read("answer5 or answer1", siqa.labels) == "answer5"  # has but three
    assert siqa.generation.read("answer12", siqa.labels) == "answer1"
    assert read["piqa"].generation.read("solution3 solution2", read["piqa"].labels) == "solution2"


def test_every_task_has_its_expected_prompt() -> None:
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", ROWS)
def test_every_column_that_is_read_must_be_there_and_right(task: str) -> None:
    read = ROWS[task].keys() - {"id", "passage", "question_concept", "long_answer"}
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
        (
            "pubmedqa",
            {"final_decision": "no?"},
            "final_decision must be one of yes, no, maybe, got",
        ),
        ("pubmedqa", {"context": {"contexts": ["a"], "labels": []}}, "0 labels for 1 contexts"),
        ("pubmedqa", {"context": "text"}, "context must hold labels and contexts, got 'text'"),
        ("gsm8k", {"answer": "It is 5."}, "answer must end in '#### ' and a number"),
        ("gsm8k", {"answer": "5\n#### five"}, "answer must end in '#### ' and a number"),
        ("gsm8k", {"answer": "\udc80\n#### 5"}, "surrogates not allowed"),
        ("aqua", {"options": ["4", "5"]}, "options must begin with A), B), ... in turn, got '4'"),
        ("aqua", {"options": ["B)4", "A)5"]}, "options must begin with A), B), ... in turn"),
        ("aqua", {"correct": "C"}, "correct must be one of A, B, got 'C'"),
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
    known = TASKS["winogrande"]
    assert (task.labels, task.llm_adapters) == (known.labels, known.llm_adapters)
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
    "gsm8k": {"train": 7473, "test": 1319},
}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("task", COUNTS)
def test_every_real_row_is_read(task: str) -> None:
    for split, count in COUNTS[task].items():
        examples = load_examples(DATA, task, split)
        assert len(examples) == count
        assert all(example.prompt.endswith((" solution:", "\nAnswer:")) for example in examples)
        if task == "gsm8k":
            for read in examples[0].generation[2:]:
                assert all(read(e.answer, ()) == e.right for e in examples)
            continue
        assert all(0 <= example.gold < len(example.labels) for example in examples)
    assert TASKS[task].split in COUNTS[task]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_answers_are_read_in_every_real_row_of_aqua() -> None:
    for split in ("dev", "test"):
        rows = (DATA / f"aqua/{split}.json").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, rows):
            problem = example_of(TASKS["aqua"], row, split)
            for read in problem.generation[2:]:
                assert read(problem.answer, problem.labels) == row["correct"]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_arc_has_rows_with_digits_for_labels() -> None:
    kinds = {example.labels for example in load_examples(DATA, "arc-e", "test")}
    assert {("A", "B", "C", "D"), ("1", "2", "3", "4")} <= kinds
