"""Samples, their order and their batches."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import models
from mixlora.data import (
    GROUPED_BATCHES,
    NO_LABEL,
    DataConfig,
    Dataset,
    Order,
    Part,
    Sample,
    chunks,
    collate,
    fit,
    load_dataset,
    truncate,
)
from mixlora.errors import InputError
from mixlora.tasks import load_examples
from mixlora.tokenizer import Tokenizer
from tests.conftest import ARC_ROWS, make_tokenizer, write_rows

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


def num_prompt(sample: Sample) -> int:
    """Labels are the tokens themselves, from the first label on."""
    count = next(i for i, label in enumerate(sample.labels) if label != NO_LABEL)
    assert sample.labels == [NO_LABEL] * count + sample.tokens[count:]
    return count


def test_a_sample_is_bos_prompt_answer_eos(tokenizer: Tokenizer, task_folder: Path) -> None:
    dataset = load_dataset(DataConfig(["arc-e", "boolq"], str(task_folder)), tokenizer, 512)
    assert (len(dataset.samples), dataset.num_truncated, dataset.num_skipped) == (24, 0, 0)
    examples = load_examples(task_folder, "arc-e", "train")
    examples += load_examples(task_folder, "boolq", "train")
    for example, sample in zip(examples, dataset.samples, strict=True):
        answer = f" {example.labels[example.gold]}"
        assert sample.tokens == [*tokenizer.encode(example.prompt + answer), tokenizer.eos_id]
        assert sample.tokens[: num_prompt(sample)] == tokenizer.encode(example.prompt)


def test_without_eos(tokenizer: Tokenizer, task_folder: Path) -> None:
    whole, without = (
        load_dataset(DataConfig(["boolq"], str(task_folder), append_eos=on), tokenizer, 512).samples
        for on in (True, False)
    )
    assert [(s.tokens[:-1], s.labels[:-1]) for s in whole] == without
    assert {s.tokens[-1] for s in whole} == {s.labels[-1] for s in whole} == {tokenizer.eos_id}


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
    cut, _, num_truncated, num_skipped, _ = load_dataset(config, tokenizer, max_seq_len)
    answers = [sample.tokens[num_prompt(sample) :] for sample in whole]
    kept = [i for i, answer in enumerate(answers) if len(answer) < max_seq_len]
    assert (num_truncated, num_skipped) == (len(kept), len(whole) - len(kept))
    for i, sample in zip(kept, cut, strict=True):
        count, tokens = num_prompt(sample), sample.tokens
        assert len(tokens) == max_seq_len
        assert tokens[0] == tokenizer.bos_id
        assert tokens[count:] == answers[i]
        prompt = whole[i].tokens[: num_prompt(whole[i])]
        assert tokens[1:count] == prompt[len(prompt) - count + 1 :]


@pytest.mark.parametrize("max_seq_len", [3, 20, 60, 70])
def test_the_published_truncation_cuts_the_end(
    tokenizer: Tokenizer, task_folder: Path, max_seq_len: int
) -> None:
    config = DataConfig(["arc-e"], str(task_folder), truncate="end")
    whole = load_dataset(DataConfig(["arc-e"], str(task_folder)), tokenizer, 512).samples
    left = [s for s in whole if num_prompt(s) < max_seq_len]
    if not left:
        with pytest.raises(InputError, match="all 12 samples"):
            load_dataset(config, tokenizer, max_seq_len)
        return
    cut = load_dataset(config, tokenizer, max_seq_len)
    assert cut.samples == [(s.tokens[:max_seq_len], s.labels[:max_seq_len]) for s in left]
    assert cut.num_skipped == len(whole) - len(left)
    assert cut.num_truncated == sum(len(s.tokens) > max_seq_len for s in left)


# BOS 1; tokens of answers are from 20 on.
TALK = [1, 10, 11, 20, 21, 2, 12, 13, 22, 23, 2, 14]
TALK_LABELS = [-100, -100, -100, 20, 21, 2, -100, -100, 22, 23, 2, -100]


@pytest.mark.parametrize(
    "length, tokens, labels",
    [
        (12, TALK, TALK_LABELS),
        (11, [1, *TALK[2:]], [-100, *TALK_LABELS[2:]]),
        (10, [1, *TALK[3:]], [-100, *TALK_LABELS[3:]]),  # BOS and the whole first answer
        (9, [1, *TALK[4:]], [-100] * 5 + TALK_LABELS[8:]),  # which loses its beginning
        (7, [1, *TALK[6:]], [-100, *TALK_LABELS[6:]]),
        (5, [1, *TALK[8:]], [-100, *TALK_LABELS[8:]]),
        (4, None, None),  # the last answer is never cut
    ],
)
def test_a_conversation_loses_its_beginning(
    length: int, tokens: list[int] | None, labels: list[int]
) -> None:
    fitting = fit(Sample(TALK, TALK_LABELS), length, DataConfig(), bos_id=1)
    assert fitting == ([Sample(tokens, labels)] if tokens else [])


def test_without_bos_the_first_token_is_context_too() -> None:
    sample = Sample([10, 11, 20, 2], [-100, -100, 20, 2])
    assert fit(sample, 3, DataConfig(), bos_id=None) == [([11, 20, 2], [-100, 20, 2])]
    assert fit(sample, 2, DataConfig(), bos_id=None) == []


def test_the_published_loss_is_on_the_prompt_too() -> None:
    sample, text = Sample(TALK, TALK_LABELS), DataConfig(loss_on="text")
    assert fit(sample, 99, text, 1) == [(TALK, [-100, *TALK[1:]])]
    assert fit(sample, 9, text, 1) == [([1, *TALK[4:]], [-100, *TALK[4:]])]
    assert fit(sample, 4, text, 1) == []
    end = DataConfig(loss_on="text", truncate="end")
    assert fit(sample, 3, end, 1) == [([1, 10, 11], [-100, 10, 11])]
    assert fit(sample, 3, DataConfig(truncate="end"), 1) == []


@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("length", [2, 3, 4, 100])
def test_a_document_is_cut_and_nothing_lost(num_tokens: int, length: int) -> None:
    tokens = list(range(10, 10 + num_tokens))
    parts = chunks(Sample(tokens, [-100, *tokens[1:]]), length)
    assert all(2 <= len(part.tokens) <= length for part in parts)
    assert all(len(part.tokens) == length for part in parts[:-1])
    learned = [label for part in parts for label in part.labels if label != -100]
    assert learned == tokens[1:]
    for tokens, labels in parts:
        assert labels == [-100, *tokens[1:]]


def test_a_sample_that_just_fits_is_whole(tokenizer: Tokenizer, task_folder: Path) -> None:
    config = DataConfig(["boolq"], str(task_folder), max_samples=1)
    ((tokens, _),) = load_dataset(config, tokenizer, 512).samples
    assert load_dataset(config, tokenizer, len(tokens)).samples[0].tokens == tokens
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


def make_order(
    parts: list[tuple[int, float]], batch_size: int, seed: int = 5, **config: object
) -> Order:
    parts = [Part(*part) for part in parts]
    rng = random.Random(0)
    lengths = [rng.randint(1, 200) for _ in range(sum(part.num_samples for part in parts))]
    samples = [Sample([7] * length, [7] * length) for length in lengths]
    return Order(Dataset(samples, parts, 0, 0), DataConfig(**config), batch_size, seed)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("num_samples, batch_size", [(1, 1), (7, 3), (12, 4), (5, 8), (1000, 6)])
def test_an_epoch_has_every_sample_once(num_samples: int, batch_size: int, grouped: bool) -> None:
    order = make_order([(num_samples, 1.0)], batch_size, group_by_length=grouped)
    steps = order.steps_per_epoch
    assert steps == -(-num_samples // batch_size)
    epochs = []
    for epoch in range(3):
        batches = [order.samples(epoch * steps + step) for step in range(steps)]
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
        assert len(batches[-1]) == num_samples - (steps - 1) * batch_size  # may be short
        epochs.append(sum(batches, []))
        assert sorted(epochs[-1]) == list(range(num_samples))
    if num_samples >= 12:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != list(range(num_samples))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_is_a_function_of_seed_and_step(grouped: bool) -> None:
    def order(seed: int = 1) -> Order:
        return make_order([(30, 1.0), (40, 0.5)], 8, seed, group_by_length=grouped)

    steps = [17, 3, 0, 3, 40]
    before = [order().samples(step) for step in steps]
    torch.manual_seed(99)
    torch.rand(5)
    once = order()
    assert [once.samples(step) for step in steps] == before
    assert before[1] == before[3]
    assert len({tuple(order(seed).samples(0)) for seed in range(20)}) == 20


def test_the_same_order_in_every_epoch() -> None:
    again = make_order([(20, 0.5), (30, 1.0)], 7, reshuffle=False)
    fresh = make_order([(20, 0.5), (30, 1.0)], 7)
    assert again.epoch(0) == again.epoch(1) == again.epoch(5) == fresh.epoch(0) != fresh.epoch(1)


def test_weights() -> None:
    """Of 10 samples at 0.3: 3, others every time; of 6 at 2.5: two whole copies and 3 more."""
    order = make_order([(10, 0.3), (0, 1.0), (6, 2.5), (4, 1.0)], 3)
    assert order.samples_per_epoch == 3 + 15 + 4
    few = Counter()
    for epoch in range(200):
        counts = Counter(order.epoch(epoch))
        assert sum(counts[i] for i in range(10)) == 3 == sum(i in counts for i in range(10))
        assert sorted(counts[i] for i in range(10, 16)) == [2, 2, 2, 3, 3, 3]
        assert [counts[i] for i in range(16, 20)] == [1] * 4
        few.update(i for i in range(10) if i in counts)
    assert all(30 <= few[i] <= 90 for i in range(10))  # 60 on average


def test_a_batch_has_similar_lengths() -> None:
    plain, grouped = (make_order([(1000, 1.0)], 8, group_by_length=on) for on in (False, True))

    def padding(order: Order) -> int:
        lengths = [
            [order.lengths[i] for i in order.samples(s)] for s in range(order.steps_per_epoch)
        ]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)

    assert padding(grouped) < 0.1 * padding(plain)
    assert 1000 > 8 * GROUPED_BATCHES  # else only one sort is tested
    longest = [max(grouped.lengths[i] for i in grouped.samples(step)) for step in range(125)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    before = max(grouped.epoch(0).index(i) for i in plain.epoch(0)[:400])
    assert before >= 400  # batches are shuffled over the whole epoch


def test_a_batch_is_padded_on_the_right_and_labels_the_answer() -> None:
    samples = [Sample([1, 10, 11, 20, 2], [-100, -100, -100, 20, 2]), Sample([1, 2], [-100, 2])]
    batch = collate(samples)
    assert batch.tokens_BS.tolist() == [[1, 10, 11, 20, 2], [1, 2, 0, 0, 0]]
    assert batch.mask_BS.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.labels_BS.tolist() == [[-100, -100, -100, 20, 2], [-100, 2, -100, -100, -100]]
    assert (batch.tokens_BS.dtype, batch.labels_BS.dtype) == (torch.int64, torch.int64)
    assert batch.mask_BS.dtype == torch.bool
    assert batch.num_labels == 3 and batch.positions_BS is None


def test_the_published_padding_is_learned(checkpoint: Path) -> None:
    """The mean of the cross-entropy over all B * (S - 1) positions, as MoE-PEFT computes it."""
    from torch.nn.functional import cross_entropy

    samples = [Sample([1, 10, 11, 0, 2], [-100, 10, 11, 0, 2]), Sample([1, 2], [-100, 2])]
    batch = collate(samples, pad_id=0)
    assert batch.labels_BS.tolist() == [[-100, 10, 11, 0, 2], [-100, 2, 0, 0, 0]]
    assert batch.mask_BS.tolist() == [[True, True, True, False, True], [True] * 2 + [False] * 3]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.num_labels == 2 * 4
    model = models.load(checkpoint)
    tokens, mask, labels, _, positions, _ = batch
    logits = model(tokens, mask_BS=mask, positions_BS=positions)
    loss, num_labels = model(tokens, mask_BS=mask, positions_BS=positions, labels_BS=labels)
    published = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss / num_labels, published)
    assert num_labels == batch.num_labels
