"""A checkpoint and task folders that are small enough to make anew for every run of the tests."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch

import models
from mixlora.files import write_json, write_tensors
from tests.runs import tiny_settings

WORDS = (
    "the cat sat on a mat and ten dogs ran far from big red hens who dug mud by old logs".split()
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
}
ARC_ROWS = [
    {
        "id": f"q{i}",
        "question": f"what is {i} and {i}?",
        "choices": {"text": ["red", "ten", "far"], "label": list("123" if i % 3 == 2 else "ABC")},
        "answerKey": "123"[i % 3] if i % 3 == 2 else "ABC"[i % 3],
    }
    for i in range(12)
]
LEFT_OUT = pytest.StashKey[int]()
BOOLQ_ROWS = [{"question": f"is {i} a big cat", "answer": i % 3 == 0} for i in range(12)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are counted, not run."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests are of a GPU, and torch sees none: left out")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(path: Path, **options: object) -> None:
    """LLaMA's kind of sentencepiece: BPE, byte fallback, single digits, a space before the text."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) + " Answer: A B C 1 2 3" for _ in range(300)]
    settings = {"vocab_size": CONFIG["vocab_size"], "bos_id": 1, "eos_id": 2, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())


def make_checkpoint(folder: Path, **changes: object) -> Path:
    """A random model in the Hugging Face layout: config.json, model.safetensors, tokenizer.model.

    Its weights are large enough that its answers differ from prompt to prompt.
    """
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True)
    model = models.new(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", config)
    make_tokenizer(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: copy it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arc-e with letters and digits as labels, boolq, and `mine`, which is like arc-e."""
    folder = tmp_path_factory.mktemp("tasks")
    for split in ("train", "validation", "test"):
        write_rows(folder / "arc-e" / f"{split}.jsonl", ARC_ROWS)
        write_rows(folder / "mine" / f"{split}.jsonl", ARC_ROWS[:6])
        write_rows(folder / "boolq" / f"{split}.jsonl", BOOLQ_ROWS)
    write_json(folder / "mine" / "task.json", {"like": "arc-e"})
    return folder


@pytest.fixture
def settings(checkpoint: Path, task_folder: Path, tmp_path: Path) -> dict:
    return tiny_settings(checkpoint, task_folder, tmp_path / "run")


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of train.py are in it."""
    load = models.load
    monkeypatch.setattr(models, "load", lambda base, *_: load(base).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
