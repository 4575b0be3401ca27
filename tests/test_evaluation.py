"""Scores equal log-probabilities computed label by label; files and table tell the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_rows

import evaluate
import models
from mixlora.evaluation import Row, score, summarize
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.tasks import load_examples
from mixlora.tasks.choice import Example
from mixlora.tokenizer import Tokenizer

LETTERS = Example("the cat sat on\nAnswer:", ("A", "B", "C"), 1)
DIGITS = Example("ten dogs ran\nAnswer:", ("1", "2", "3"), 0)
WORDS = Example("is a big cat far\nAnswer:", ("true", "false"), 0)
# One label's tokens begin another's; labels that share some tokens and not others.
NESTED = Example("by old logs\nAnswer:", ("the", "the cat", "the cat sat"), 2)
MIXED = Example("red hens\nAnswer:", ("A", "1", "12", "true", "truth"), 3)
EXAMPLES = [LETTERS, DIGITS, WORDS, NESTED, MIXED]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> AdaptedModel:
    return models.load(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def label_log_prob(
    model: AdaptedModel, tokenizer: Tokenizer, prompt: str, label: str, max_seq_len: int = 512
) -> float:
    """One sequence alone, through the logits: the sum over what the label adds to the prompt."""
    before = tokenizer.encode(prompt)
    whole = tokenizer.encode(f"{prompt} {label}")
    assert whole[: len(before)] == before
    answer = whole[len(before) :]
    with torch.no_grad():
        log_prob_SV = model(torch.tensor([whole])).double().log_softmax(-1)[0]
    return sum(
        log_prob_SV[len(before) + i - 1, token].item() for i, token in enumerate(answer)
    )  # the logits at s are for the token at s + 1


@pytest.mark.parametrize("example", EXAMPLES, ids=["letters", "digits", "words", "nested", "mixed"])
def test_scores_are_the_labels_log_probabilities(
    model: AdaptedModel, tokenizer: Tokenizer, example: Example
) -> None:
    ((row,), num_truncated) = score(model, tokenizer, [example], 8, 192)
    direct = [label_log_prob(model, tokenizer, example.prompt, label) for label in example.labels]
    assert row.log_probs == pytest.approx(direct, abs=1e-4, rel=1e-5)
    assert len(set(direct)) == len(direct)
    assert num_truncated == 0


def test_labels_of_one_token_cost_one_forward(
    model: AdaptedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits too: their first token, a lone space, is common to all of them."""
    run = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, tokens_BS, **kw: (run.append(len(tokens_BS)), forward(self, tokens_BS, **kw))[
            1
        ],
    )
    for example, sequences in ((LETTERS, 1), (DIGITS, 1), (WORDS, 2)):
        run.clear()
        score(model, tokenizer, [example], 8, 192)
        assert sum(run) == sequences


@pytest.mark.parametrize("batch_size", [8, 64])
def test_the_batch_size_changes_nothing(
    model: AdaptedModel, tokenizer: Tokenizer, task_folder: Path, batch_size: int
) -> None:
    examples = EXAMPLES + load_examples(task_folder, "arc-e") + load_examples(task_folder, "boolq")
    alone, _ = score(model, tokenizer, examples, 1, 192)
    together, _ = score(model, tokenizer, examples, batch_size, 192)
    for a, b in zip(alone, together, strict=True):
        assert a.example is b.example
        assert b.log_probs == pytest.approx(a.log_probs, abs=1e-5)
    close = [
        row
        for row in alone
        if len(row.log_probs) > 1 and sorted(row.log_probs)[-1] - sorted(row.log_probs)[-2] < 1e-4
    ]
    assert not close  # else a prediction could differ by rounding alone
    assert [row.prediction for row in alone] == [row.prediction for row in together]
    assert len({row.prediction for row in alone}) > 1


def test_training_mode_and_dropout_are_off_and_come_back(
    model: AdaptedModel, tokenizer: Tokenizer
) -> None:
    model.train()
    rows, _ = score(model, tokenizer, EXAMPLES, 4, 192)
    assert model.training
    model.eval()
    assert [row.log_probs for row in score(model, tokenizer, EXAMPLES, 4, 192)[0]] == [
        row.log_probs for row in rows
    ]


@pytest.mark.parametrize("example", [LETTERS, WORDS], ids=["letters", "words"])
def test_a_long_prompt_loses_its_beginning_and_is_counted(
    model: AdaptedModel, tokenizer: Tokenizer, example: Example
) -> None:
    """All labels of a row are scored after the same prompt: what the longest leaves room for."""
    limit = 40
    long = example._replace(prompt="a red mat " * 30 + example.prompt)
    rows, num_truncated = score(model, tokenizer, [example, long, long], 8, limit)
    assert num_truncated == 2
    prompt = tokenizer.encode(long.prompt)
    answers = [tokenizer.continuation(long.prompt, f" {label}")[1] for label in long.labels]
    room = limit + 1 - max(map(len, answers))  # the last token is predicted, not read
    kept = [prompt[0], *prompt[len(prompt) - room + 1 :]]
    for answer, got in zip(answers, rows[1].log_probs, strict=True):
        with torch.no_grad():
            log_prob_SV = model(torch.tensor([kept + answer])).double().log_softmax(-1)[0]
        places = range(room - 1, room - 1 + len(answer))
        assert got == pytest.approx(log_prob_SV[places, answer].sum().item(), abs=1e-4)
    (whole,), num_truncated = score(model, tokenizer, [example], 8, 192)
    assert rows[0].log_probs == pytest.approx(whole.log_probs, abs=1e-5)


def test_a_prompt_that_just_fits_is_whole(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(LETTERS.prompt))
    assert score(model, tokenizer, [LETTERS], 8, length)[1] == 0
    assert score(model, tokenizer, [LETTERS], 8, length - 1)[1] == 1


def test_progress_counts_rows(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    heard: list[int] = []
    score(model, tokenizer, EXAMPLES, 2, 192, heard.append)
    assert sum(heard) == len(EXAMPLES)


def make_rows(golds: str, predictions: str, labels: str = "ABC") -> list[Row]:
    return [
        Row(
            Example("", tuple(labels), labels.index(gold)),
            [0.0 if label == prediction else -1.0 for label in labels],
        )
        for gold, prediction in zip(golds, predictions, strict=True)
    ]


def test_the_summary_of_a_case_made_by_hand() -> None:
    result = summarize("mine", make_rows("AABBBBCC", "AABBAACA"), 3)
    assert (result.task, result.num_rows, result.num_truncated) == ("mine", 8, 3)
    assert result.accuracy == 5 / 8
    assert result.majority == 4 / 8
    assert result.stderr == math.sqrt(5 / 8 * 3 / 8 / 8)
    assert result.predictions == {"A": 5, "B": 2, "C": 1}


def test_a_row_alone_and_a_tie() -> None:
    result = summarize("mine", make_rows("B", "B"), 0)
    assert (result.accuracy, result.stderr, result.majority) == (1.0, 0.0, 1.0)
    assert Row(LETTERS, [-1.0, -1.0, -2.0]).prediction == 0  # the first of the likeliest


def test_the_summary_counts_labels_not_places() -> None:
    rows = make_rows("AB", "AB") + make_rows("12", "12", labels="123")
    assert summarize("mine", rows, 0).predictions == {"1": 1, "2": 1, "A": 1, "B": 1}


def test_files_and_table_tell_the_same(
    checkpoint: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, rows_file = tmp_path / "results.json", tmp_path / "rows.jsonl"
    arguments = ["--base", str(checkpoint), "--data", str(task_folder), "--tasks", "arc-e,boolq"]
    files = ["--output", str(output), "--rows", str(rows_file)]
    assert evaluate.main([*arguments, *files, "--max-rows", "10"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert (results["base"], results["adapter"]) == (str(checkpoint), None)
    assert (results["protocol"], results["dtype"]) == ("mixlora-fixed", "float32")
    assert list(results["tasks"]) == ["arc-e", "boolq"]
    for task, result in results["tasks"].items():
        own = [row for row in rows if row["task"] == task]
        examples = load_examples(task_folder, task)[:10]
        assert [row["prompt"] for row in own] == [example.prompt for example in examples]
        assert [row["gold"] for row in own] == [e.labels[e.gold] for e in examples]
        for row in own:
            best = max(range(len(row["labels"])), key=row["log_probs"].__getitem__)
            assert row["prediction"] == row["labels"][best]
        right = sum(row["prediction"] == row["gold"] for row in own)
        assert result["num_rows"] == len(own) == 10
        assert result["accuracy"] == right / 10
        counts = {label: [r["prediction"] for r in own].count(label) for label in "A B C".split()}
        assert {k: v for k, v in result["predictions"].items() if k in counts} == {
            k: v for k, v in counts.items() if v
        }
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{task} ")]
        accuracy, stderr = 100 * result["accuracy"], 100 * result["stderr"]
        assert line.split()[1:3] == ["10", f"{100 * result['majority']:.1f}"]
        assert line.endswith(f"{accuracy:.1f} ± {stderr:.1f}")
        histogram = " ".join(f"{label}:{n}" for label, n in result["predictions"].items())
        assert f"{task} {histogram}" in printed


def test_the_table_says_how_many_prompts_were_cut(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"question": "is it " + "a cat " * n, "answer": True} for n in (1, 200, 300)]
    write_rows(tmp_path / "boolq/validation.jsonl", rows)
    arguments = ["--base", str(checkpoint), "--data", str(tmp_path), "--tasks", "boolq"]
    assert evaluate.main(arguments) == 0
    assert "boolq: 2 prompts lost their beginning" in capsys.readouterr().out
