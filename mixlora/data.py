"""Training data: texts -> token sequences -> batches, in an order that is a pure function.

Which samples a step trains on depends on (seed, step) alone: a run can be taken up anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixlora.errors import InputError
from mixlora.sources import Source, Text, load_source
from mixlora.tasks import load_examples
from mixlora.templates import Span
from mixlora.tokenizer import Tokenizer

NO_LABEL = -100
GROUPED_BATCHES = 50  # with group_by_length: as many batches are sorted together


@dataclass
class DataConfig:
    tasks: list[str] = field(default_factory=list)  # several are joined and shuffled together
    dir: str = "data"  # holds <task>/train.jsonl
    max_samples: int | None = None  # of each task, from its beginning; None = all
    files: list[Source] = field(default_factory=list)  # joined with the tasks, each by its weight
    loss_on: Literal["answer", "text", "padded_text"] = "answer"  # the latter two as published
    append_eos: bool = True
    truncate: Literal["prompt_start", "end"] = "prompt_start"  # what a long sample loses
    reshuffle: bool = True  # false: the first epoch's order in every epoch
    group_by_length: bool = False  # samples of a batch have similar lengths: less padding
    packing: bool = False  # a step's samples share rows of max_seq_len: nearly none

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"max_samples must be >= 1, got {self.max_samples}")
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"tasks must name each task once, got {', '.join(self.tasks)}")
        if self.packing and self.loss_on == "padded_text":
            raise InputError("packing leaves no padding to learn: loss_on must be answer or text")


class Sample(NamedTuple):
    tokens: list[int]
    labels: list[int]  # the token itself, or NO_LABEL; the first token never has one


class PackedRow(NamedTuple):
    """Samples one behind the other."""

    tokens: list[int]
    labels: list[int]
    lengths: list[int]  # of the samples


class Part(NamedTuple):
    """Neighbours in a dataset that come of one task or file."""

    num_samples: int
    weight: float = 1.0

    @property
    def num_drawn(self) -> int:
        return round(self.weight * self.num_samples)


class Dataset(NamedTuple):
    samples: list[Sample]
    parts: list[Part]
    num_truncated: int  # samples that lost tokens to max_seq_len
    num_skipped: int  # samples without a label, or whose answer does not fit into max_seq_len
    pad_id: int | None = None  # padding is this token and learned; None: masked, without a label


class Batch(NamedTuple):
    """Rows padded on the right. mask True = real token; labels -100 = no loss."""

    tokens_BS: Tensor
    mask_BS: Tensor
    labels_BS: Tensor
    num_labels: int
    positions_BS: Tensor | None = None  # None: of the real tokens
    segments_BS: Tensor | None = None  # of packed rows: their samples from 0, padding -1


def load_dataset(config: DataConfig, tokenizer: Tokenizer, max_seq_len: int) -> Dataset:
    """The train splits of all tasks and all files as samples: BOS, prompt, answer, EOS."""
    if not (config.tasks or config.files):
        raise InputError("data.tasks or data.files must name something to train on")
    samples: list[Sample] = []
    parts, num_truncated, num_skipped = [], 0, 0
    for name, weight, texts in load_texts(config, tokenizer):
        before = len(samples)
        for text in texts:
            whole = tokenize(text, tokenizer, config.append_eos)
            if text.is_document:
                fitting = chunks(whole, max_seq_len)
            else:
                fitting = fit(whole, max_seq_len, config, tokenizer.bos_id)
                num_truncated += bool(fitting) and len(whole.tokens) > max_seq_len
            num_skipped += not fitting
            samples += fitting
        parts.append(Part(len(samples) - before, weight))
        if parts[-1].num_samples and not parts[-1].num_drawn:
            num_samples = parts[-1].num_samples
            raise InputError(f"{name}: weight {weight} draws none of its {num_samples} samples")
    if not samples:
        raise InputError(
            f"all {num_skipped} samples are without an answer, or it is longer than "
            f"train.max_seq_len {max_seq_len}"
        )
    pad_id = tokenizer.pad_id if config.loss_on == "padded_text" else None
    return Dataset(samples, parts, num_truncated, num_skipped, pad_id)


def load_texts(config: DataConfig, tokenizer: Tokenizer) -> Iterator[tuple[str, float, list[Text]]]:
    """(name, weight, texts) of every task and file."""
    for task in config.tasks:
        examples = load_examples(config.dir, task, "train")[: config.max_samples]
        yield task, 1.0, [Text([Span(e.prompt, False), Span(e.answer, True)]) for e in examples]
    for source in config.files:
        yield source.path, source.weight, load_source(source, tokenizer)


def tokenize(text: Text, tokenizer: Tokenizer, append_eos: bool) -> Sample:
    """All of a text; its answers and their EOS are labelled."""
    parts = tokenizer.split([span.text for span in text.spans], text.adds_special_tokens)
    tokens: list[int] = []
    labels: list[int] = []
    for span, part in zip(text.spans, parts, strict=True):
        tokens += part
        labels += part if span.is_answer else [NO_LABEL] * len(part)
    if append_eos and text.adds_special_tokens:
        tokens.append(tokenizer.eos_id)
        labels.append(tokenizer.eos_id)
    labels[:1] = [NO_LABEL] * len(labels[:1])
    return Sample(tokens, labels)


def chunks(document: Sample, length: int) -> list[Sample]:
    """A document as sequences of at most `length` tokens: each begins with the last token of the
    one before it, so that every token but the first is learned exactly once."""
    tokens, labels = document
    if length < 2:
        return []
    starts = range(0, len(tokens) - 1, length - 1)
    return [Sample(tokens[i : i + length], [NO_LABEL, *labels[i + 1 : i + length]]) for i in starts]


def fit(sample: Sample, length: int, config: DataConfig, bos_id: int | None) -> list[Sample]:
    """The sample with at most `length` tokens and the labels of `loss_on`; [] if it has none.

    prompt_start keeps BOS and the end of the sample. An answer that would lose its beginning loses
    its labels instead; the last one stays whole or the sample is skipped.
    """
    tokens, labels = sample
    if config.truncate == "end":
        tokens, labels = tokens[:length], labels[:length]
    elif len(tokens) > length:
        num_kept = int(tokens[0] == bos_id)
        cut = len(tokens) - length + num_kept
        before = labels[cut - 1] if num_kept else labels[cut]
        tokens = truncate(tokens, length, num_kept)
        labels = truncate(labels, length, num_kept)
        for i in range(num_kept, length):
            if before == NO_LABEL or labels[i] == NO_LABEL:
                break
            labels[i] = NO_LABEL
    if config.truncate == "prompt_start" and labels.count(NO_LABEL) == len(labels):
        return []
    if config.loss_on != "answer":
        labels = [NO_LABEL, *tokens[1:]]
    return [Sample(tokens, labels)] if labels.count(NO_LABEL) < len(labels) else []


def truncate(tokens: list[int], length: int, num_kept: int = 1) -> list[int]:
    """The BOS and the end of a prompt: what is nearest to the answer stays."""
    return tokens[:num_kept] + tokens[len(tokens) - length + num_kept :]


class Order:
    """The samples of every optimizer step. An epoch draws from each part of the dataset
    round(weight * n) of its n samples: whole copies, and a fresh random subset for the rest."""

    def __init__(self, dataset: Dataset, config: DataConfig, batch_size: int, seed: int) -> None:
        self.parts, self.config = dataset.parts, config
        self.batch_size, self.seed = batch_size, seed
        self.lengths = [len(sample.tokens) for sample in dataset.samples]
        self.samples_per_epoch = sum(part.num_drawn for part in self.parts)
        self.steps_per_epoch = -(-self.samples_per_epoch // batch_size)  # the last may be short
        self._last: tuple[int, list[int]] = (-1, [])

    def samples(self, step: int) -> list[int]:
        """Indices of the samples of the 0-based step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def epoch(self, number: int) -> list[int]:
        number = number if self.config.reshuffle else 0
        if self._last[0] != number:
            self._last = number, self._epoch(number)
        return self._last[1]

    def _epoch(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        drawn: list[int] = []
        start = 0
        for part in self.parts:
            whole, rest = divmod(part.num_drawn, part.num_samples or 1)
            drawn += [*range(start, start + part.num_samples)] * whole
            if rest:
                chosen = torch.randperm(part.num_samples, generator=generator)[:rest]
                drawn += [start + i for i in chosen.tolist()]
            start += part.num_samples
        order = [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]
        return self._grouped(order, generator) if self.config.group_by_length else order

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Sorted by length within every GROUPED_BATCHES batches; then the batches are shuffled."""
        size = self.batch_size
        window = size * GROUPED_BATCHES
        ordered: list[int] = []
        for i in range(0, len(order), window):
            ordered += sorted(order[i : i + window], key=lambda i: -self.lengths[i])
        num_whole = len(ordered) // size
        batches = torch.randperm(num_whole, generator=generator).tolist()
        shuffled = [i for batch in batches for i in ordered[batch * size : (batch + 1) * size]]
        return shuffled + ordered[num_whole * size :]


def collate(
    samples: list[Sample] | list[PackedRow],
    device: str | torch.device = "cpu",
    pad_id: int | None = None,
) -> Batch:
    """A row each. With `pad_id` as the published training does it: padding is learned, and every
    token that is like it is hidden from attention, wherever it stands."""
    B, S = len(samples), max(len(sample.tokens) for sample in samples)
    tokens_BS = torch.full((B, S), pad_id or 0)
    mask_BS = torch.zeros(B, S, dtype=torch.bool)
    labels_BS = torch.full((B, S), NO_LABEL if pad_id is None else pad_id)
    for b, (tokens, labels, *_) in enumerate(samples):
        tokens_BS[b, : len(tokens)] = torch.tensor(tokens)
        mask_BS[b, : len(tokens)] = True
        labels_BS[b, : len(tokens)] = torch.tensor(labels)
    positions_BS = None
    if pad_id is not None:
        mask_BS = tokens_BS != pad_id
        positions_BS = torch.arange(S).expand(B, S).to(device)
    num_labels = int((labels_BS[:, 1:] != NO_LABEL).sum())
    segments_BS = None
    if isinstance(samples[0], PackedRow):
        segments_BS = torch.full((B, S), -1)
        for b, row in enumerate(samples):
            segments = torch.arange(len(row.lengths))
            segments = segments.repeat_interleave(torch.tensor(row.lengths))
            segments_BS[b, : len(segments)] = segments
        segments_BS = segments_BS.to(device)
    tensors = (x.to(device) for x in (tokens_BS, mask_BS, labels_BS))
    return Batch(*tensors, num_labels, positions_BS, segments_BS)
