"""Samples, their order and their batches."""

from pathlib import Path

import pytest
import torch
from conftest import ARC_ROWS, make_tokenizer, write_rows

from mixlora.data import (
    DataConfig,
    Sample,
    collate,
    load_dataset,
    samples_of_step,
    steps_per_epoch,
    truncate,
)
from mixlora.errors import InputError
from mixlora.tasks import load_examples
from mixlora.tokenizer import Tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared/data"
LLAMA = REAL / "tokenizers/llama2.model"


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


@pytest.mark.parametrize("label, pieces", [("A", 1), ("1", 2), ("true", 4)])
def test_an_answer_is_what_it_adds_to_the_prompt(
    tokenizer: Tokenizer, label: str, pieces: int
) -> None:
    prompt = "the cat sat\nAnswer:"
    before, added = tokenizer.continuation(prompt, f" {label}")
    assert before == tokenizer.encode(prompt) and before[0] == tokenizer.bos_id
    assert before + added == tokenizer.encode(f"{prompt} {label}")
    assert len(added) == pieces
    assert tokenizer.decode(added) == label


def test_a_piece_that_spans_the_boundary_belongs_to_the_answer(tokenizer: Tokenizer) -> None:
    """`the ca` + `t`: alone it ends in other pieces than before the t."""
    before, added = tokenizer.continuation("the ca", "t")
    assert before + added == tokenizer.encode("the cat")
    assert len(before) < len(tokenizer.encode("the ca")) and added
    assert tokenizer.continuation("the ca", "") == (tokenizer.encode("the ca"), [])


def test_text_that_no_piece_covers_goes_by_bytes(tokenizer: Tokenizer) -> None:
    for text in ("字", "👩‍🚀", "שלום", "a\0b", "\u2028", "", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text


def test_text_that_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not Unicode"):
        tokenizer.encode("a \ud800")


def test_a_tokenizer_must_have_bos_and_eos(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.model", bos_id=-1, eos_id=1)
    with pytest.raises(InputError, match=r"tokenizer\.model: .* no BOS"):
        Tokenizer(tmp_path)


@pytest.mark.skipif(not LLAMA.is_file(), reason="needs ../shared/data")
def test_answers_under_the_tokenizer_of_llama_2(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(LLAMA)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    prompt = tokenizer.encode("Answer:")
    # The pieces, as tokens of LLaMA 2: A = 319, true = 1565, a lone space = 29871, 1 = 29896.
    for label, tokens in {"A": [319], "true": [1565], "1": [29871, 29896]}.items():
        assert tokenizer.continuation("Answer:", f" {label}") == (prompt, tokens)


def test_a_sample_is_bos_prompt_answer_eos(tokenizer: Tokenizer, task_folder: Path) -> None:
    dataset = load_dataset(DataConfig(["arc-e", "boolq"], str(task_folder)), tokenizer, 512)
    assert (len(dataset.samples), dataset.num_truncated, dataset.num_skipped) == (24, 0, 0)
    examples = load_examples(task_folder, "arc-e", "train")
    examples += load_examples(task_folder, "boolq", "train")
    for example, (tokens, num_prompt) in zip(examples, dataset.samples, strict=True):
        answer = f" {example.labels[example.gold]}"
        assert tokens == [*tokenizer.encode(example.prompt + answer), tokenizer.eos_id]
        assert tokens[:num_prompt] == tokenizer.encode(example.prompt)


def test_max_samples_are_of_each_task(tokenizer: Tokenizer, task_folder: Path) -> None:
    config = DataConfig(["arc-e", "boolq"], str(task_folder), max_samples=5)
    every = load_dataset(DataConfig(config.tasks, config.dir), tokenizer, 512).samples
    assert load_dataset(config, tokenizer, 512).samples == every[:5] + every[12:17]


@pytest.mark.parametrize("max_seq_len", [3, 4, 20, 50])
def test_a_long_prompt_loses_its_beginning_and_is_counted(
    tokenizer: Tokenizer, task_folder: Path, max_seq_len: int
) -> None:
    config = DataConfig(["arc-e"], str(task_folder))
    whole = load_dataset(config, tokenizer, 512).samples
    cut, num_truncated, num_skipped = load_dataset(config, tokenizer, max_seq_len)
    answers = [sample.tokens[sample.num_prompt :] for sample in whole]
    kept = [i for i, answer in enumerate(answers) if len(answer) < max_seq_len]
    assert (num_truncated, num_skipped) == (len(kept), len(whole) - len(kept))
    for i, (tokens, num_prompt) in zip(kept, cut, strict=True):
        assert len(tokens) == max_seq_len
        assert tokens[0] == tokenizer.bos_id
        assert tokens[num_prompt:] == answers[i]
        prompt = whole[i].tokens[: whole[i].num_prompt]
        assert tokens[1:num_prompt] == prompt[len(prompt) - num_prompt + 1 :]


def test_a_sample_that_just_fits_is_whole(tokenizer: Tokenizer, task_folder: Path) -> None:
    config = DataConfig(["boolq"], str(task_folder), max_samples=1)
    ((tokens, _),) = load_dataset(config, tokenizer, 512).samples
    assert load_dataset(config, tokenizer, len(tokens)).num_truncated == 0
    assert load_dataset(config, tokenizer, len(tokens) - 1).num_truncated == 1


def test_answers_that_do_not_fit_are_skipped_and_counted(
    tokenizer: Tokenizer, task_folder: Path, tmp_path: Path
) -> None:
    """Of arc-e every third answer is a digit: with EOS three tokens, a letter two."""
    dataset = load_dataset(DataConfig(["arc-e"], str(task_folder)), tokenizer, 3)
    assert (len(dataset.samples), dataset.num_skipped) == (8, 4)
    digits = [row for row in ARC_ROWS if row["answerKey"].isdecimal()]
    write_rows(tmp_path / "arc-e/train.jsonl", digits)
    with pytest.raises(InputError, match=r"all 4 samples .* train\.max_seq_len 3"):
        load_dataset(DataConfig(["arc-e"], str(tmp_path)), tokenizer, 3)


def test_truncate() -> None:
    assert truncate([1, 10, 11, 12, 13], 3) == [1, 12, 13]
    assert truncate([1, 10, 11], 3) == [1, 10, 11]
    assert truncate([1, 10, 11], 1) == [1]


@pytest.mark.parametrize("num_samples, batch_size", [(1, 1), (7, 3), (12, 4), (5, 8), (100, 16)])
def test_an_epoch_has_every_sample_once(num_samples: int, batch_size: int) -> None:
    steps = steps_per_epoch(num_samples, batch_size)
    assert steps == -(-num_samples // batch_size)
    epochs = []
    for epoch in range(3):
        batches = [
            samples_of_step(epoch * steps + step, num_samples, batch_size, seed=5)
            for step in range(steps)
        ]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
        assert len(batches[-1]) == num_samples - (steps - 1) * batch_size  # may be short
        epochs.append(sum(batches, []))
        assert sorted(epochs[-1]) == list(range(num_samples))
    if num_samples >= 12:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != list(range(num_samples))


def test_the_order_is_a_function_of_seed_and_step() -> None:
    steps = [17, 3, 0, 3, 40]
    before = [samples_of_step(step, 50, 8, seed=1) for step in steps]
    torch.manual_seed(99)
    torch.rand(5)
    assert [samples_of_step(step, 50, 8, seed=1) for step in steps] == before
    assert before[1] == before[3]
    others = [samples_of_step(0, 50, 8, seed) for seed in range(20)]
    assert len({tuple(indices) for indices in others}) == 20


def test_a_batch_is_padded_on_the_right_and_labels_the_answer() -> None:
    samples = [Sample([1, 10, 11, 20, 2], 3), Sample([1, 2], 1)]
    batch = collate(samples)
    assert batch.tokens_BS.tolist() == [[1, 10, 11, 20, 2], [1, 2, 0, 0, 0]]
    assert batch.mask_BS.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.labels_BS.tolist() == [[-100, -100, -100, 20, 2], [-100, 2, -100, -100, -100]]
    assert (batch.tokens_BS.dtype, batch.labels_BS.dtype) == (torch.int64, torch.int64)
    assert batch.mask_BS.dtype == torch.bool
