"""Each protocol, from a real row to the prediction, against what is worked out here by hand."""

import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
import models
from mixlora import evaluation
from mixlora.errors import InputError
from mixlora.evaluation import PROTOCOLS, Row, generate_text, load_questions, score_last_tokens
from mixlora.evaluation import evaluate as run_protocol
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.tasks import TASKS
from mixlora.tasks.choice import Example
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
REAL = SHARED / "tasks"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")

# MixLoRA's prompts once more, from its paper's code alone: a format string for each task.
LISTED = "Please choose the correct answer to the question: {question}{options}\nAnswer:"
FORMATS = {
    "arc-e": LISTED,
    "arc-c": LISTED,
    "obqa": LISTED.replace("{question}", "{question_stem}"),
    "boolq": "Please answer the following question with true or false: {question}?\nAnswer:",
    "piqa": "Below is a common task along with two possible solutions labeled (A) and (B). Please "
    "select the appropriate solution to achieve the task:\n{goal}\n\n(A) {sol1}\n(B) {sol2}\n\n"
    "Correct solution:",
    "siqa": "Please choose the correct answer to the question.\nQuestion: {context} {question}\n"
    "(A) {answerA}\n(B) {answerB}\n(C) {answerC}\nAnswer:",
    "hellaswag": "Please choose the correct ending to complete the given sentence.\n"
    "Sentence: {activity_label}. {ctx}\n(A) {endings[0]}\n(B) {endings[1]}\n(C) {endings[2]}\n"
    "(D) {endings[3]}\nAnswer:",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence.\nSentence: {sentence}\n(A) {option1}\n(B) {option2}\nAnswer:",
}
LABELS = {
    "arc-e": "1 2 3 4 A B C D E",
    "arc-c": "1 2 3 4 A B C D E",
    "obqa": "A B C D",
    "boolq": "true false",
    "piqa": "A B",
    "siqa": "A B C",
    "hellaswag": "A B C D",
    "winogrande": "A B",
}
GOLD = {
    "arc-e": lambda row: row["answerKey"],
    "arc-c": lambda row: row["answerKey"],
    "obqa": lambda row: row["answerKey"],
    "boolq": lambda row: str(row["answer"]).lower(),
    "piqa": lambda row: "AB"[int(row["label"])],
    "siqa": lambda row: " ABC"[int(row["label"])],
    "hellaswag": lambda row: "ABCD"[int(row["label"])],
    "winogrande": lambda row: " AB"[int(row["answer"])],
}


def real_rows(task: str) -> list[dict]:
    path = REAL / task / f"{TASKS[task].split}.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@needs_data
@pytest.mark.parametrize("task", FORMATS)
def test_prompts_labels_and_answers_of_every_real_row(task: str) -> None:
    published = load_questions("mixlora", REAL, [task])[task]
    fixed = load_questions("mixlora-fixed", REAL, [task])[task]
    for row, example, own in zip(real_rows(task), published, fixed, strict=True):
        options = ""
        if "choices" in row:
            pairs = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
            options = "".join(f" ({label}) {text}" for label, text in pairs)
        assert example.prompt == FORMATS[task].format(**row, options=options)
        assert example.labels == tuple(LABELS[task].split())
        assert own.prompt == example.prompt
        assert own.right == example.right == GOLD[task](row)
        if "choices" in row:
            assert own.labels == tuple(row["choices"]["label"])


@needs_data
def test_a_real_row_of_each_task_written_out() -> None:
    """The first row whose prompt is short; nothing here is put together by a program."""
    prompts = {
        "arc-e": "Please choose the correct answer to the question: Which piece of safety "
        "equipment is used to keep mold spores from entering the respiratory system? (A) safety "
        "goggles (B) breathing mask (C) rubber gloves (D) lead apron\nAnswer:",
        "boolq": "Please answer the following question with true or false: does ethanol take more "
        "energy make that produces?\nAnswer:",
        "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
        "sentence.\nSentence: Sarah was a much better surgeon than Maria so _ always got the "
        "easier cases.\n(A) Sarah\n(B) Maria\nAnswer:",
    }
    for task, prompt in prompts.items():
        assert prompt in [q.prompt for q in load_questions("mixlora", REAL, [task], 3)[task]]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> AdaptedModel:
    return models.load(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def answers(
    protocol: str,
    model: AdaptedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *tasks: str,
    batch_size: int = 5,
) -> list[Row]:
    questions = load_questions(protocol, folder, tasks)
    _, rows = run_protocol(model, tokenizer, questions, batch_size, protocol)
    return [row for task in tasks for row in rows[task]]


def log_prob_SV(model: AdaptedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0].double().log_softmax(-1)


def test_mixlora_by_hand(model: AdaptedModel, tokenizer: Tokenizer, task_folder: Path) -> None:
    rows = answers("mixlora", model, tokenizer, task_folder, "arc-e", "boolq")
    assert [row.labels for row in rows] == [tuple("1234ABCDE")] * 12 + [("true", "false")] * 12
    num_digits = 0
    for row in rows:
        prompt = tokenizer.encode(row.prompt)
        last = log_prob_SV(model, prompt)[len(prompt) - 1]
        direct = [last[tokenizer.encode(f" {label}")[-1]].item() for label in row.labels]
        assert row.log_probs == pytest.approx(direct, abs=1e-4)
        assert row.prediction == row.labels[direct.index(max(direct))]
        if row.gold in "123":  # the digit itself is scored, though a space would come before it
            num_digits += 1
            (space, digit) = tokenizer.continuation(row.prompt, f" {row.gold}")[1]
            place = row.labels.index(row.gold)
            assert row.log_probs[place] == pytest.approx(last[digit].item(), abs=1e-4)
            assert last[space] != last[digit]
    assert num_digits == 4


def test_mixlora_looks_labels_up_after_a_space(
    model: AdaptedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which LLaMA-2's tokenizer adds by itself, and LLaMA-3's does not."""
    asked, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: (asked.append(text), encode(text))[1])
    score_last_tokens(model, tokenizer, [Example("the cat", ("A", "1"), 0)], 1)
    assert asked == ["the cat", " A", " 1"]


def test_mixlora_fixed_by_hand(
    model: AdaptedModel, tokenizer: Tokenizer, task_folder: Path
) -> None:
    rows = answers("mixlora-fixed", model, tokenizer, task_folder, "arc-e", "boolq")
    assert {row.labels for row in rows} == {tuple("123"), tuple("ABC"), ("true", "false")}
    for row in rows:
        direct = []
        for label in row.labels:
            before, answer = tokenizer.continuation(row.prompt, f" {label}")
            whole = log_prob_SV(model, before + answer)
            direct.append(
                sum(whole[len(before) + i - 1, token].item() for i, token in enumerate(answer))
            )
        assert row.log_probs == pytest.approx(direct, abs=1e-4)
        assert row.prediction == row.labels[direct.index(max(direct))]


def greedy(
    model: AdaptedModel, tokenizer: Tokenizer, prompt: list[int], count: int, *stop: str
) -> str:
    """One row, without a cache, token by token, up to EOS or a stop string."""
    tokens: list[int] = []
    while len(tokens) < count:
        token = log_prob_SV(model, prompt + tokens)[-1].argmax().item()
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
        if any(word in tokenizer.decode(tokens) for word in stop):
            break
    text = tokenizer.decode(tokens)
    return re.split("|".join(map(re.escape, stop)), text)[0] if stop else text


def test_llm_adapters_by_hand(model: AdaptedModel, tokenizer: Tokenizer, task_folder: Path) -> None:
    rows = answers("llm-adapters", model, tokenizer, task_folder, "mine", "boolq")
    room = model.config.max_position_embeddings - 32
    assert {row.truncated for row in rows} == {True, False} or all(row.truncated for row in rows)
    for row in rows:
        prompt = tokenizer.encode(row.prompt)
        assert row.truncated == (len(prompt) > room)
        kept = [prompt[0], *prompt[len(prompt) - room + 1 :]] if row.truncated else prompt
        assert row.generation == greedy(model, tokenizer, kept, 32, "### Response:")
        found = [word for word in row.labels if word in row.generation]
        assert row.prediction == (min(found, key=row.generation.index) if found else None)


QUESTIONS = [f"q{i} {'the ' * (6 - i)}" for i in range(1, 7)]  # the last is the shortest
ROWS = {
    "gsm8k": [{"question": q, "answer": f"a\n#### {q[1]},000"} for q in QUESTIONS],
    "aqua": [
        {"question": q, "options": ["A)1", "B)2", "C)3"], "rationale": "r", "correct": "C"}
        for q in QUESTIONS
    ],
    "boolq": [{"question": q, "answer": int(q[1]) % 2 == 0} for q in QUESTIONS],
}
# task: (protocol, what the model says to each row, the predictions, accuracy, strict accuracy)
SAID = {
    "gsm8k": (
        "mixlora-fixed",
        ["#### 1000", "so $2,000.00.", "#### 3,000\nno, 4", "4", "none", "#### 6000 "],
        ["1000", "2000", "4", "4", None, "6000"],
        3 / 6,
        3 / 6,
    ),
    "aqua": (
        "mixlora-fixed",
        ["The answer is C.", "C", "the answer is (C)", "The answer is B. C", "D", ""],
        ["C", "C", "C", "B", None, None],
        3 / 6,
        2 / 6,
    ),
    "boolq": (
        "llm-adapters",
        ["the correct answer is false", "true", "False", "untrue", "yes", "falsetrue"],
        ["false", "true", None, "true", None, "false"],
        3 / 6,
        None,
    ),
}


@pytest.mark.parametrize("task", SAID)
def test_generations_by_hand(
    task: str,
    model: AdaptedModel,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    protocol, said, predictions, accuracy, strict = SAID[task]
    write_rows(tmp_path / task / f"{TASKS[task].split}.jsonl", ROWS[task])

    def say(model: object, tokenizer: Tokenizer, prompts: list[list[int]], *how: object) -> list:
        texts = map(tokenizer.decode, prompts)
        return [said[int(re.search(r"\bq([1-6])\b", text)[1]) - 1] for text in texts]

    monkeypatch.setattr(evaluation, "generate_text", say)
    questions = load_questions(protocol, tmp_path, [task])
    results, rows = run_protocol(model, tokenizer, questions, 4, protocol)
    assert [row.prediction for row in rows[task]] == predictions
    assert [row.generation for row in rows[task]] == said
    result = results[task]
    assert (result.accuracy, result.strict_accuracy) == (accuracy, strict)
    assert result.num_unparsable == predictions.count(None)


def test_text_ends_before_a_stop_string(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    """Wherever its letters fall among the tokens; the rest is not generated."""
    prompts = [tokenizer.encode(text) for text in ("the cat", "ten dogs ran far", "A")]
    whole = generate_text(model, tokenizer, prompts, 24, [])
    assert whole == [greedy(model, tokenizer, prompt, 24) for prompt in prompts]
    calls = []
    forward = type(model).forward
    counted = pytest.MonkeyPatch()
    counted.setattr(
        type(model), "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    for text, prompt in zip(whole, prompts, strict=True):
        for length in (1, 2, 5):
            for start in range(1, 10, 2):
                stop = text[start : start + length]
                calls.clear()
                (cut,) = generate_text(model, tokenizer, [prompt], 24, ["never", stop])
                assert cut == text[: text.index(stop)]
                assert start > 6 or len(calls) < 24
                if length > 1:  # the first of two that are complete at once
                    (cut,) = generate_text(model, tokenizer, [prompt], 24, [stop[1:], stop])
                    assert cut == text[: min(text.index(stop), text.index(stop[1:]))]
    counted.undo()


def test_a_stop_ends_its_row_alone(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("the cat", "ten dogs ran far", "A")]
    texts = generate_text(model, tokenizer, prompts, 24, [])
    stops = [
        next(word for word in text.split() if sum(word in t for t in texts) == 1) for text in texts
    ]
    for stop in stops:
        cut = generate_text(model, tokenizer, prompts, 24, [stop])
        assert cut == [other.partition(stop)[0] for other in texts]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [8, 64])
def test_the_batch_size_changes_nothing(
    protocol: str, batch_size: int, model: AdaptedModel, tokenizer: Tokenizer, task_folder: Path
) -> None:
    alone, together = (
        answers(protocol, model, tokenizer, task_folder, "arc-e", "boolq", batch_size=size)
        for size in (1, batch_size)
    )
    for a, b in zip(alone, together, strict=True):
        assert (a.prompt, a.prediction, a.generation) == (b.prompt, b.prediction, b.generation)
        if a.log_probs:
            assert b.log_probs == pytest.approx(a.log_probs, abs=1e-5)
            best = sorted(set(a.log_probs))[-2:]  # two labels may have the same last token
            assert len(best) == 1 or best[1] - best[0] > 1e-4
    assert len({row.prediction or row.generation for row in alone}) > 2


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_batch_size_changes_nothing_on_real_rows(protocol: str) -> None:
    base = SHARED / "models/stories260K"
    model, tokenizer = models.load(base), Tokenizer(base)
    tasks = ["arc-c", "boolq"]
    questions = load_questions(protocol, REAL, tasks, 80)
    rows = {}
    for size in (1, 8, 64):
        _, by_task = run_protocol(model, tokenizer, questions, size, protocol)
        rows[size] = [(row.prediction, row.generation) for task in tasks for row in by_task[task]]
    assert rows[1] == rows[8] == rows[64]


def test_a_prompt_too_long_to_generate_after_is_cut_and_counted(
    model: AdaptedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"question": "the cat " * n, "answer": "#### 1"} for n in (1, 300)]
    write_rows(tmp_path / "gsm8k/test.jsonl", rows)
    (short, long) = answers("mixlora-fixed", model, tokenizer, tmp_path, "gsm8k")
    assert (short.truncated, long.truncated) == (False, True)
    room = model.config.max_position_embeddings // 2
    prompt = tokenizer.encode(long.prompt)
    kept = [prompt[0], *prompt[len(prompt) - room + 1 :]]
    assert long.generation == greedy(model, tokenizer, kept, room, "Question:")


def test_mixlora_cuts_the_end_of_a_long_prompt(
    model: AdaptedModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"question": "the cat " * n, "answer": True} for n in (1, 300)]
    write_rows(tmp_path / "boolq/validation.jsonl", rows)
    (short, long) = answers("mixlora", model, tokenizer, tmp_path, "boolq")
    assert (short.truncated, long.truncated) == (False, True)
    kept = tokenizer.encode(long.prompt)[: model.config.max_position_embeddings]
    last = log_prob_SV(model, kept)[-1]
    direct = [last[tokenizer.encode(f" {label}")[-1]].item() for label in ("true", "false")]
    assert long.log_probs == pytest.approx(direct, abs=1e-4)


def test_rows_of_a_generation_as_json(
    checkpoint: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--base", str(checkpoint), "--data", str(task_folder), "--tasks", "boolq"]
    arguments += ["--protocol", "llm-adapters", "--rows", str(tmp_path / "rows.jsonl")]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "out.json")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(
        row.keys() == set("task prompt labels gold truncated prediction generation".split())
        for row in rows
    )
    result = json.loads((tmp_path / "out.json").read_text())["tasks"]["boolq"]
    assert result["num_unparsable"] == sum(row["prediction"] is None for row in rows) > 0
    assert f"unparsable:{result['num_unparsable']}" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["mixlora", "llm-adapters"])
def test_a_row_whose_answer_the_protocol_does_not_compare(protocol: str, tmp_path: Path) -> None:
    choices = {"label": ["A", "F"], "text": ["ice", "fire"]}
    row = {"question": "Which is hot?", "choices": choices, "answerKey": "F"}
    write_rows(tmp_path / "arc-e/test.jsonl", [row])
    if protocol == "mixlora":
        with pytest.raises(
            InputError, match=r"test\.jsonl:1: .* compares 1 2 3 .*, the answer is F"
        ):
            load_questions(protocol, tmp_path, ["arc-e"])
    else:
        assert load_questions(protocol, tmp_path, ["arc-e"])["arc-e"][0].right == "answer2"


def test_the_command_that_counts_digits(
    checkpoint: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """docs/evaluation.md makes its table with it."""
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    evaluation_line, program = re.search(
        r"```sh\npython evaluate.py (--base D/[^\n]+)\npython -c '([^']+)'\n```", page
    ).groups()
    here = {"D/models/stories260K": checkpoint, "D/tasks": task_folder, "P": "mixlora"}
    here |= {"rows.jsonl": tmp_path / "rows.jsonl", "arc-e,arc-c": "arc-e,mine"}
    assert evaluate.main([str(here.get(word, word)) for word in evaluation_line.split()]) == 0
    capsys.readouterr()
    program = program.replace("rows.jsonl", str(here["rows.jsonl"])).replace("arc-c", "mine")
    exec(program, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["arc-e", "12", "4"], ["mine", "6", "2"]]
