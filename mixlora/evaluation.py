"""Scoring multiple-choice tasks by the log-probability of each row's own labels.

Protocol `mixlora-fixed`: MixLoRA's prompts, and for every label of the row the sum of the
log-probabilities of all its tokens after the prompt; the highest is the prediction. (The published
evaluation compares the label's last token only, among a fixed set for all rows.)
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixlora.data import truncate
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import Progress
from mixlora.tasks.choice import Example
from mixlora.tokenizer import Tokenizer

PROTOCOLS = ("mixlora-fixed",)


@dataclass
class Row:
    """One scored example; `log_probs` in the order of its labels."""

    example: Example
    log_probs: list[float]

    @property
    def prediction(self) -> int:
        return max(range(len(self.log_probs)), key=self.log_probs.__getitem__)


@dataclass
class TaskResult:
    task: str
    num_rows: int
    accuracy: float
    stderr: float  # of the accuracy, from the number of rows
    majority: float  # accuracy of always giving the commonest right label
    predictions: dict[str, int]  # how often each label was predicted
    num_truncated: int  # prompts that lost their beginning to the model's length


class _Query(NamedTuple):
    """A sequence to run, and which labels its last tokens' logits score."""

    tokens: list[int]
    first: int  # logits from this position on are wanted
    wanted: list[tuple[int, int, list[int]]]  # (example, label, the label's tokens)


def evaluate(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    examples: dict[str, Sequence[Example]],
    batch_size: int,
) -> tuple[dict[str, TaskResult], dict[str, list[Row]]]:
    """Every task's result and scored rows, with progress."""
    results, rows = {}, {}
    for task in examples:
        progress = Progress(f"evaluate {task}", len(examples[task]), "rows")
        limit = model.config.max_position_embeddings
        rows[task], num_truncated = score(
            model, tokenizer, examples[task], batch_size, limit, progress.advance
        )
        progress.close()
        results[task] = summarize(task, rows[task], num_truncated)
    return results, rows


def score(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    batch_size: int,
    max_seq_len: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[list[Row], int]:
    """Every example's label scores, and how many prompts were truncated."""
    queries: list[_Query] = []
    num_truncated = 0
    for i, example in enumerate(examples):
        new, truncated = _queries(i, example, tokenizer, max_seq_len)
        queries += new
        num_truncated += truncated
    queries.sort(key=lambda query: len(query.tokens))  # little padding
    rows = [Row(example, [0.0] * len(example.labels)) for example in examples]
    device = next(model.parameters()).device
    with model.evaluating():
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            log_probs = _last_log_probs(model, batch, device)
            for query, log_prob_PV in zip(batch, log_probs, strict=True):
                for example, label, tokens in query.wanted:
                    places = range(len(tokens))
                    rows[example].log_probs[label] = sum(log_prob_PV[places, tokens].tolist())
            advance(sum(query.wanted[0][1] == 0 for query in batch))  # an example's first label
    return rows, num_truncated


def summarize(task: str, rows: Sequence[Row], num_truncated: int) -> TaskResult:
    n = len(rows)
    accuracy = sum(row.prediction == row.example.gold for row in rows) / n
    gold = Counter(row.example.labels[row.example.gold] for row in rows)
    predictions = Counter(row.example.labels[row.prediction] for row in rows)
    return TaskResult(
        task,
        n,
        accuracy,
        math.sqrt(accuracy * (1 - accuracy) / n),
        max(gold.values()) / n,
        dict(sorted(predictions.items())),
        num_truncated,
    )


def _queries(
    index: int, example: Example, tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[_Query], bool]:
    """The sequences that score an example: one, where all its labels are a single token."""
    splits = [tokenizer.continuation(example.prompt, " " + label) for label in example.labels]
    whole = [prompt + answer for prompt, answer in splits]
    common = min(len(prompt) for prompt, _ in splits)  # each is a beginning of the prompt alone
    longest = max(len(tokens) - common for tokens in whole)
    truncated = common + longest - 1 > max_seq_len
    prefix = whole[0][:common]
    if truncated:
        prefix = truncate(prefix, max(1, max_seq_len - longest + 1))
    queries: dict[tuple[int, ...], _Query] = {}
    for label, tokens in enumerate(whole):
        scored = tokens[common:]
        run = prefix + scored[:-1]
        query = queries.setdefault(tuple(run), _Query(run, len(prefix) - 1, []))
        query.wanted.append((index, label, scored))
    return list(queries.values()), truncated


def _last_log_probs(
    model: AdaptedModel, queries: Sequence[_Query], device: torch.device
) -> Sequence[Tensor]:
    """For each query the log-probabilities from its first wanted position on [P, V]."""
    B, S = len(queries), max(len(query.tokens) for query in queries)
    tokens_BS = torch.zeros(B, S, dtype=torch.long)
    mask_BS, select_BS = torch.zeros(2, B, S, dtype=torch.bool)
    for b, query in enumerate(queries):
        end = len(query.tokens)
        tokens_BS[b, :end] = torch.tensor(query.tokens)
        mask_BS[b, :end] = True
        select_BS[b, query.first : end] = True
    inputs = (x.to(device) for x in (tokens_BS, mask_BS, select_BS))
    tokens_BS, mask_BS, select_BS = inputs
    logits = model(tokens_BS, mask_BS=mask_BS, select_BS=select_BS)
    return logits.float().log_softmax(-1).cpu().split(select_BS.sum(1).tolist())
