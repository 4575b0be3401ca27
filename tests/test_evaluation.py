"""Answers of each protocol equal those worked out by hand; files and table tell the same."""

import dataclasses
import hashlib
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate
import models
from mixlora import evaluation
from mixlora.evaluation import (
    Row,
    load_questions,
    score_labels,
    score_last_tokens,
    summarize,
)
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.report import accuracy_table, averages, code_commit
from mixlora.tasks import load_examples
from mixlora.tasks.choice import Example
from mixlora.tokenizer import Tokenizer
from tests.conftest import write_rows
from tests.tiny import add_filled

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


def test_a_prompt_router_sees_no_label(checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = models.load(checkpoint)
    add_filled(model, routing_strategy="milora", top_k=2)
    for example, row in zip(EXAMPLES, score_labels(model, tokenizer, EXAMPLES, 3), strict=True):
        before = tokenizer.encode(example.prompt)
        for label, found in zip(example.labels, row.log_probs, strict=True):
            whole = tokenizer.encode(f"{example.prompt} {label}")
            tokens_BS = torch.tensor([whole])
            prompt_BS = (torch.arange(len(whole)) < len(before))[None]
            with torch.no_grad():
                log_prob_SV = model(tokens_BS, prompt_BS=prompt_BS)[0].log_softmax(-1)
            places = range(len(before), len(whole))
            wanted = sum(log_prob_SV[i - 1, whole[i]].item() for i in places)
            assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("example", EXAMPLES, ids=["letters", "digits", "words", "nested", "mixed"])
def test_scores_are_the_labels_log_probabilities(
    model: AdaptedModel, tokenizer: Tokenizer, example: Example
) -> None:
    (row,) = score_labels(model, tokenizer, [example], 8)
    direct = [label_log_prob(model, tokenizer, example.prompt, label) for label in example.labels]
    assert row.log_probs == pytest.approx(direct, abs=1e-4, rel=1e-5)
    assert len(set(direct)) == len(direct)
    assert row.prediction == example.labels[direct.index(max(direct))]
    assert (row.prompt, row.labels, row.gold) == (example.prompt, example.labels, example.right)
    assert not row.truncated


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
        score_labels(model, tokenizer, [example], 8)
        assert sum(run) == sequences


def test_training_mode_and_dropout_are_off_and_come_back(
    model: AdaptedModel, tokenizer: Tokenizer
) -> None:
    model.train()
    rows = score_labels(model, tokenizer, EXAMPLES, 4)
    assert model.training
    model.eval()
    assert score_labels(model, tokenizer, EXAMPLES, 4) == rows


@pytest.mark.parametrize("example", [LETTERS, WORDS], ids=["letters", "words"])
def test_a_long_prompt_loses_its_beginning_and_is_counted(
    model: AdaptedModel, tokenizer: Tokenizer, example: Example
) -> None:
    """All labels of a row are scored after the same prompt: what the longest leaves room for."""
    limit = 40
    long = example._replace(prompt="a red mat " * 30 + example.prompt)
    rows = score_labels(model, tokenizer, [example, long, long], 8, max_seq_len=limit)
    assert [row.truncated for row in rows] == [False, True, True]
    prompt = tokenizer.encode(long.prompt)
    answers = [tokenizer.continuation(long.prompt, f" {label}")[1] for label in long.labels]
    room = limit + 1 - max(map(len, answers))  # the last token is predicted, not read
    kept = [prompt[0], *prompt[len(prompt) - room + 1 :]]
    for answer, got in zip(answers, rows[1].log_probs, strict=True):
        with torch.no_grad():
            log_prob_SV = model(torch.tensor([kept + answer])).double().log_softmax(-1)[0]
        places = range(room - 1, room - 1 + len(answer))
        assert got == pytest.approx(log_prob_SV[places, answer].sum().item(), abs=1e-4)
    (whole,) = score_labels(model, tokenizer, [example], 8)
    assert rows[0].log_probs == pytest.approx(whole.log_probs, abs=1e-5)


def test_a_prompt_that_just_fits_is_whole(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(LETTERS.prompt))
    for limit, truncated in ((length, False), (length - 1, True)):
        (row,) = score_labels(model, tokenizer, [LETTERS], 8, max_seq_len=limit)
        assert row.truncated == truncated


def test_progress_counts_rows(model: AdaptedModel, tokenizer: Tokenizer) -> None:
    for answer in (score_labels, score_last_tokens):
        heard: list[int] = []
        answer(model, tokenizer, EXAMPLES, 2, heard.append)
        assert sum(heard) == len(EXAMPLES)


def make_rows(golds: str, predictions: str, labels: str = "ABC") -> list[Row]:
    return [
        Row(
            f"{labels}?",
            tuple(labels),
            gold,
            gold == "C",
            None if prediction == "?" else prediction,
        )
        for gold, prediction in zip(golds, predictions, strict=True)
    ]


def test_the_summary_of_a_case_made_by_hand() -> None:
    result = summarize("mine", make_rows("AABBBBCC", "AABBAACA"))
    assert (result.task, result.num_rows, result.num_truncated) == ("mine", 8, 2)
    assert result.accuracy == 5 / 8
    assert result.majority == 4 / 8
    assert result.stderr == math.sqrt(5 / 8 * 3 / 8 / 8)
    assert result.predictions == {"A": 5, "B": 2, "C": 1}
    assert (result.num_unparsable, result.strict_accuracy) == (0, None)


def test_an_answer_that_cannot_be_read_is_wrong_and_counted() -> None:
    result = summarize("mine", make_rows("AABB", "A??B"))
    assert (result.accuracy, result.num_unparsable) == (0.5, 2)
    assert result.predictions == {"A": 1, "B": 1}


def test_the_strict_accuracy_counts_rows_that_are_not_in_form_as_wrong() -> None:
    rows = make_rows("AABB", "AAB?")
    for row, strict in zip(rows, (True, False, False, False), strict=True):
        row.strictly_right = strict
    assert summarize("mine", rows).strict_accuracy == 0.25
    for row in rows:
        row.strictly_right = False
    assert summarize("mine", rows).strict_accuracy == 0


def test_the_prompts_hash_is_of_prompts_and_labels_in_order() -> None:
    rows = make_rows("AB", "AB")
    asked = '[["ABC?", ["A", "B", "C"]], ["ABC?", ["A", "B", "C"]]]'
    assert summarize("", rows).prompt_sha256 == hashlib.sha256(asked.encode()).hexdigest()
    hashes = {summarize("", [*rows, row]).prompt_sha256 for row in make_rows("11", "12", "12")}
    assert len(hashes) == 1  # whatever is predicted
    for change in ({"prompt": "ABC ?"}, {"labels": ("A", "C", "B")}):
        changed = [rows[0], dataclasses.replace(rows[1], **change)]
        assert summarize("", changed).prompt_sha256 != summarize("", rows).prompt_sha256
        assert summarize("", changed[::-1]).prompt_sha256 != summarize("", changed).prompt_sha256


def test_a_row_alone_and_a_tie() -> None:
    result = summarize("mine", make_rows("B", "B"))
    assert (result.accuracy, result.stderr, result.majority) == (1.0, 0.0, 1.0)
    row = Row("", ("A", "B", "C"), "A", False, None, [-1.0, -0.5, -0.5])
    assert evaluation._likeliest(row) == "B"  # the first of the likeliest


def test_the_summary_counts_labels_not_places() -> None:
    rows = make_rows("AB", "AB") + make_rows("12", "12", labels="123")
    assert summarize("mine", rows).predictions == {"1": 1, "2": 1, "A": 1, "B": 1}


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
    assert (results["batch_size"], results["seed"]) == (32, None)
    assert results["versions"]["torch"] == torch.__version__
    first, second = (result["accuracy"] for result in results["tasks"].values())
    assert results["average"] == {
        "macro": (first + second) / 2,
        "weighted": (first + second) / 2,
        "geometric": pytest.approx(math.sqrt(first * second)),
    }
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
        asked = json.dumps([[row["prompt"], row["labels"]] for row in own]).encode()
        assert result["prompt_sha256"] == hashlib.sha256(asked).hexdigest()
        content = (task_folder / task / Path(results["data"][task]["file"]).name).read_bytes()
        assert results["data"][task]["sha256"] == hashlib.sha256(content).hexdigest()
        assert results["data"][task]["num_rows"] == 12
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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_scored(
    kind: str, checkpoint: Path, task_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    scores = {}
    for quantize in (kind, "none"):
        rows = tmp_path / "rows.jsonl"
        arguments = ["--base", str(checkpoint), "--data", str(task_folder), "--tasks", "arc-e"]
        assert evaluate.main([*arguments, "--quantize", quantize, "--rows", str(rows)]) == 0
        lines = map(json.loads, rows.read_text().splitlines())
        scores[quantize] = torch.tensor([line["log_probs"] for line in lines])
    model = models.load(checkpoint, quantize=kind)
    tokenizer = Tokenizer(model.folder, model.config.vocab_size)
    questions = load_questions("mixlora-fixed", task_folder, ["arc-e"])
    _, rows = evaluation.evaluate(model, tokenizer, questions, 32)
    expected = torch.tensor([row.log_probs for row in rows["arc-e"]])
    torch.testing.assert_close(scores[kind], expected)
    assert not torch.equal(scores[kind], scores["none"])


def test_the_table_says_how_many_prompts_were_cut(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"question": "is it " + "a cat " * n, "answer": True} for n in (1, 200, 300)]
    write_rows(tmp_path / "boolq/validation.jsonl", rows)
    arguments = ["--base", str(checkpoint), "--data", str(tmp_path), "--tasks", "boolq"]
    assert evaluate.main(arguments) == 0
    assert "boolq: 2 prompts were too long" in capsys.readouterr().out


def test_the_commit_is_of_the_file_and_says_whether_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("1")
    assert code_commit(file) == "unknown"

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    assert code_commit(file) == "unknown"  # it lies in a repository, but is not of it
    git("add", "code.py")
    git("commit", "-m", "m")
    commit = git("rev-parse", "HEAD")
    assert code_commit(file) == commit
    git("tag", "v1")
    (tmp_path / "other").write_text("not of the repository")
    assert (code_commit(file), code_commit(tmp_path / "other")) == (commit, "unknown")
    file.write_text("2")
    assert code_commit(file) == f"{commit}-dirty"


def test_averages_by_hand() -> None:
    results = {
        "a": summarize("a", make_rows("AB", "AA")),
        "b": summarize("b", make_rows("AABBBBCC", "AABBBBCC")),
    }
    assert averages(results) == {
        "macro": 0.75,
        "weighted": 0.9,
        "geometric": pytest.approx(math.sqrt(0.5)),
    }


def test_the_table_of_a_task_of_numbers_is_short() -> None:
    result = summarize("gsm8k", make_rows("A" * 13, "ABCDEFGHIJKL?", "ABCDEFGHIJKL"))
    result.strict_accuracy = 0.25
    lines = accuracy_table({"base": {"gsm8k": result}}).splitlines()
    assert (
        lines[-2] == "  base: gsm8k A:1 B:1 C:1 D:1 E:1 F:1 G:1 H:1 I:1 J:1 (2 more) unparsable:1"
    )
    assert lines[-1] == "  gsm8k, base: 25.0 where only training's form counts"
