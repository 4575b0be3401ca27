"""Training data: examples -> token sequences -> batches, in an order that is a pure function.

Which samples a step trains on depends on (seed, step) alone: a run can be taken up anywhere.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mixlora.errors import InputError
from mixlora.tasks import load_examples
from mixlora.tokenizer import Tokenizer

NO_LABEL = -100


@dataclass
class DataConfig:
    tasks: list[str] = field(default_factory=list)  # several are joined and shuffled together
    dir: str = "data"  # holds <task>/train.jsonl
    max_samples: int | None = None  # of each task, from its beginning; None = all

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise InputError(f"max_samples must be >= 1, got {self.max_samples}")
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"tasks must name each task once, got {', '.join(self.tasks)}")


class Sample(NamedTuple):
    tokens: list[int]
    num_prompt: int  # the first tokens are the prompt: they carry no label


class Batch(NamedTuple):
    """Rows padded on the right. mask True = real token; labels -100 = no loss."""

    tokens_BS: Tensor
    mask_BS: Tensor
    labels_BS: Tensor


class Dataset(NamedTuple):
    samples: list[Sample]
    num_truncated: int  # prompts that lost their beginning to max_seq_len
    num_skipped: int  # samples whose answer alone is longer than max_seq_len


def load_dataset(config: DataConfig, tokenizer: Tokenizer, max_seq_len: int) -> Dataset:
    """The train splits of all tasks as samples: BOS, prompt, answer, EOS.

    A sample that is too long loses the beginning of its prompt, never its answer.
    """
    if not config.tasks:
        raise InputError("data.tasks must name at least one task")
    samples, num_truncated, num_skipped = [], 0, 0
    for task in config.tasks:
        for example in load_examples(config.dir, task, "train")[: config.max_samples]:
            answer = " " + example.labels[example.gold]
            prompt, answer = tokenizer.continuation(example.prompt, answer)
            answer.append(tokenizer.eos_id)
            room = max_seq_len - len(answer)
            if room < 1:
                num_skipped += 1
                continue
            if len(prompt) > room:
                num_truncated += 1
                prompt = truncate(prompt, room)
            samples.append(Sample(prompt + answer, len(prompt)))
    if not samples:
        raise InputError(
            f"all {num_skipped} samples are longer than train.max_seq_len {max_seq_len}"
        )
    return Dataset(samples, num_truncated, num_skipped)


def truncate(prompt: list[int], length: int) -> list[int]:
    """The BOS and the end of a prompt: what is nearest to the answer stays."""
    return prompt[:1] + prompt[len(prompt) - length + 1 :]


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    return (num_samples + batch_size - 1) // batch_size  # the last batch may be short


def samples_of_step(step: int, num_samples: int, batch_size: int, seed: int) -> list[int]:
    """Indices of the samples of the 0-based optimizer step; every epoch has an order of its own."""
    epoch, batch = divmod(step, steps_per_epoch(num_samples, batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_samples, generator=generator)
    return order[batch * batch_size : (batch + 1) * batch_size].tolist()


def collate(samples: list[Sample], device: str | torch.device = "cpu") -> Batch:
    B, S = len(samples), max(len(sample.tokens) for sample in samples)
    tokens_BS = torch.zeros(B, S, dtype=torch.long)
    mask_BS = torch.zeros(B, S, dtype=torch.bool)
    labels_BS = torch.full((B, S), NO_LABEL)
    for b, (tokens, num_prompt) in enumerate(samples):
        tokens_BS[b, : len(tokens)] = torch.tensor(tokens)
        mask_BS[b, : len(tokens)] = True
        labels_BS[b, num_prompt : len(tokens)] = torch.tensor(tokens[num_prompt:])
    return Batch(tokens_BS.to(device), mask_BS.to(device), labels_BS.to(device))
