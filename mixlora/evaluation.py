"""Protocols: how the rows of a task are asked, and how a model's answers are taken and scored.

`mixlora-fixed`   MixLoRA's prompts. A row's own labels are compared by the log-probability of all
                  their tokens after the prompt. GSM8K and AQuA are answered by generation.
`mixlora`         as published: the same prompts, but the task's labels in every row, each by its
                  last token, in the logits right after the prompt.
`llm-adapters`    its prompts; the answer is generated and read by a regular expression.

docs/evaluation.md says each exactly, and how it differs from the code it follows.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mixlora import processes
from mixlora.data import truncate
from mixlora.engine import generate
from mixlora.errors import InputError, did_you_mean
from mixlora.faults import in_batches
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import Progress
from mixlora.tasks import TASKS, Read, Task, find_task, load_examples
from mixlora.tasks.choice import Example
from mixlora.tasks.generation import Problem
from mixlora.tokenizer import Tokenizer

Question = Example | Problem
Advance = Callable[[int], object]  # hears how many more rows are done
PUBLISHED_MAX_TOKENS = 512  # of a prompt in MixLoRA's evaluation


@dataclass
class Row:
    """One scored row: `log_probs` of the labels, or a `generation` and what was read in it."""

    prompt: str
    labels: tuple[str, ...]
    gold: str
    truncated: bool  # the prompt was too long, and cut
    prediction: str | None  # None: no answer could be read
    log_probs: list[float] | None = None
    generation: str | None = None
    strictly_right: bool | None = None  # whether the answer, read in training's form only, is right


@dataclass
class TaskResult:
    task: str
    num_rows: int
    accuracy: float
    stderr: float  # of the accuracy, from the number of rows
    strict_accuracy: float | None  # of a generation: only answers in training's form count
    majority: float  # accuracy of always giving the commonest right answer
    predictions: dict[str, int]  # how often each answer was predicted
    num_unparsable: int  # generations in which no answer could be read: they are wrong
    num_truncated: int  # prompts that were too long, and cut
    prompt_sha256: str  # of all prompts and labels, in order


def load_questions(
    protocol: str, folder: str | Path, tasks: Sequence[str], max_rows: int | None = None
) -> dict[str, list[Question]]:
    """What the protocol asks in the evaluated split of each task."""
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}{did_you_mean(protocol, PROTOCOLS)}")
    reader = PROTOCOLS[protocol].reader
    return {
        task: load_examples(folder, task, None, reader(find_task(folder, task)))[:max_rows]
        for task in tasks
    }


def evaluate(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    questions: dict[str, Sequence[Question]],
    batch_size: int,
    protocol: str = "mixlora-fixed",
) -> tuple[dict[str, TaskResult], dict[str, list[Row]]]:
    """Every task's result and scored rows, with progress; each process answers its share."""
    results, rows = {}, {}
    for task in questions:
        mine = processes.share(questions[task])
        progress = Progress(f"evaluate {task}", len(mine), "rows")
        answer = PROTOCOLS[protocol].answer
        answers = answer(model, tokenizer, mine, batch_size, progress.advance) if mine else []
        processes.follow(model, trains=False)
        values = processes.gathered([vars(row) for row in answers])
        rows[task] = [Row(**{**row, "labels": tuple(row["labels"])}) for row in values]
        progress.close()
        results[task] = summarize(task, rows[task])
    return results, rows


def summarize(task: str, rows: Sequence[Row]) -> TaskResult:
    n = len(rows)
    accuracy = sum(row.prediction == row.gold for row in rows) / n
    strict = [row.strictly_right for row in rows if row.strictly_right is not None]
    predictions = Counter(row.prediction for row in rows if row.prediction is not None)
    asked = json.dumps([[row.prompt, list(row.labels)] for row in rows])
    return TaskResult(
        task=task,
        num_rows=n,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / n),
        strict_accuracy=sum(strict) / n if strict else None,
        majority=max(Counter(row.gold for row in rows).values()) / n,
        predictions=dict(sorted(predictions.items())),
        num_unparsable=sum(row.prediction is None for row in rows),
        num_truncated=sum(row.truncated for row in rows),
        prompt_sha256=hashlib.sha256(asked.encode()).hexdigest(),
    )


def _own(task: Task) -> Read:
    return task.example


def _with_the_tasks_labels(task: Task) -> Read:
    if not task.labels:
        usable = ", ".join(name for name in TASKS if TASKS[name].labels)
        raise InputError(f"protocol mixlora compares labels: {task.name} has none (use {usable})")

    def read(row: dict) -> Example:
        example = task.example(row)
        if example.right not in task.labels:
            wanted = " ".join(task.labels)
            raise ValueError(f"protocol mixlora compares {wanted}, the answer is {example.right}")
        return example._replace(labels=task.labels, gold=task.labels.index(example.right))

    return read


def _as_llm_adapters(task: Task) -> Read:
    if task.llm_adapters is None:
        usable = ", ".join(name for name in TASKS if TASKS[name].llm_adapters)
        raise InputError(f"protocol llm-adapters has no prompt for {task.name} (use {usable})")
    return task.llm_adapters


def score_labels(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    batch_size: int,
    advance: Advance = lambda rows: None,
    max_seq_len: int | None = None,
) -> list[Row]:
    """A row's labels by the sum of the log-probabilities of all their tokens after the prompt."""
    limit = max_seq_len or model.config.max_position_embeddings
    rows = [_scored(example, [0.0] * len(example.labels)) for example in examples]
    queries: list[_Query] = []
    for i, example in enumerate(examples):
        new, rows[i].truncated = _queries(i, example, tokenizer, limit)
        queries += new
    runs = [(query.tokens, query.first) for query in queries]
    for i, log_prob_PV in log_probs_after(model, runs, batch_size):
        for row, label, tokens in queries[i].wanted:
            rows[row].log_probs[label] = sum(log_prob_PV[range(len(tokens)), tokens].tolist())
        advance(queries[i].wanted[0][1] == 0)  # the row's first label
    for row in rows:
        row.prediction = _likeliest(row)
    return rows


def score_last_tokens(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    batch_size: int,
    advance: Advance = lambda rows: None,
) -> list[Row]:
    """Each label by the last token of " " + label, in the logits after the prompt's last token.

    Where a label is more than one token after the prompt (LLaMA-2's "1" is a space, then "1"), that
    is a token too early. A prompt that is too long loses its end, the words "Answer:" with it.
    """
    limit = min(PUBLISHED_MAX_TOKENS, model.config.max_position_embeddings)
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    runs = [(prompt[:limit], len(prompt[:limit]) - 1) for prompt in prompts]
    rows = [_scored(example, []) for example in examples]
    for i, log_prob_PV in log_probs_after(model, runs, batch_size):
        label_tokens = [tokenizer.encode(f" {label}")[-1] for label in rows[i].labels]
        rows[i].log_probs = log_prob_PV[0, label_tokens].tolist()
        rows[i].prediction = _likeliest(rows[i])
        rows[i].truncated = len(prompts[i]) > limit
        advance(1)
    return rows


def generate_answers(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    batch_size: int,
    advance: Advance = lambda rows: None,
) -> list[Row]:
    """The likeliest text, token by token, up to a stop; prompts of like length together.

    New tokens get at most half of the model's length; a prompt too long for the rest loses its
    beginning.
    """
    limit = model.config.max_position_embeddings
    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    rows: dict[int, Row] = {}
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))

    def answer(batch: Sequence[int]) -> list[tuple[str, bool]]:
        how = problems[batch[0]].generation
        max_new_tokens = min(how.max_new_tokens, limit // 2)
        room = limit - max_new_tokens
        cut = [truncate(prompts[i], room) if len(prompts[i]) > room else prompts[i] for i in batch]
        texts = generate_text(model, tokenizer, cut, max_new_tokens, how.stop)
        return [(text, len(prompts[i]) > room) for i, text in zip(batch, texts, strict=True)]

    for batch, answers in in_batches(order, batch_size, answer, model.is_sharded):
        for i, (text, is_cut) in zip(batch, answers, strict=True):
            prompt, labels, right, _, how = problems[i]
            row = Row(prompt, labels, right, is_cut, how.read(text, labels))
            row.generation = text
            if how.read_strictly:
                row.strictly_right = how.read_strictly(text, labels) == right
            rows[i] = row
        advance(len(batch))
    return [rows[i] for i in range(len(problems))]


def generate_text(
    model: AdaptedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
) -> list[str]:
    """Greedy text after each prompt, before the first of the stop strings or EOS."""
    outputs: list[list[int]] = [[] for _ in prompts]
    longest = max((len(word.encode()) for word in stop), default=0)

    def has_stopped(row: int, token: int) -> bool:
        outputs[row].append(token)
        tail = tokenizer.decode(outputs[row][-longest - 1 :])  # a token is a byte or more
        return any(word in tail for word in stop)

    ends = [tokenizer.eos_id]
    generate(model, prompts, max_new_tokens, stop_tokens=ends, on_token=has_stopped)
    texts = []
    for output in outputs:
        text = tokenizer.decode(output)
        texts.append(text[: min((text.find(word) for word in stop if word in text), default=None)])
    return texts


def _labels_or_generation(
    model: AdaptedModel, tokenizer: Tokenizer, questions: Sequence[Question], *more: object
) -> list[Row]:
    answer = score_labels if isinstance(questions[0], Example) else generate_answers
    return answer(model, tokenizer, questions, *more)


class Protocol(NamedTuple):
    reader: Callable[[Task], Read]  # how a task's rows are asked; InputError where they cannot be
    answer: Callable[..., list[Row]]  # (model, tokenizer, questions of one task, batch_size, ...)


PROTOCOLS = {
    "mixlora-fixed": Protocol(_own, _labels_or_generation),
    "mixlora": Protocol(_with_the_tasks_labels, score_last_tokens),
    "llm-adapters": Protocol(_as_llm_adapters, generate_answers),
}


def log_probs_after(
    model: AdaptedModel, sequences: Sequence[tuple[list[int], int]], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """For each (tokens, first): its index, and the log-probabilities [P, V] of the next token at
    each position from `first` on; the tokens up to it are the prompt. Short sequences come first:
    little padding."""
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))

    def log_probs(batch: Sequence[int]) -> Sequence[Tensor]:
        B, S = len(batch), len(sequences[batch[-1]][0])
        tokens_BS = torch.zeros(B, S, dtype=torch.long)
        mask_BS, select_BS, prompt_BS = torch.zeros(3, B, S, dtype=torch.bool)
        for b, (tokens, first) in enumerate(sequences[i] for i in batch):
            tokens_BS[b, : len(tokens)] = torch.tensor(tokens)
            mask_BS[b, : len(tokens)] = True
            select_BS[b, first : len(tokens)] = True
            prompt_BS[b, : first + 1] = True
        inputs = {"mask_BS": mask_BS, "select_BS": select_BS, "prompt_BS": prompt_BS}
        inputs = {key: x.to(device) for key, x in inputs.items()}
        with model.evaluating():
            logits = model(tokens_BS.to(device), **inputs).float().log_softmax(-1).cpu()
        return logits.split(select_BS.sum(1).tolist())

    for batch, log_prob_PV in in_batches(order, batch_size, log_probs, model.is_sharded):
        yield from zip(batch, log_prob_PV, strict=True)


class _Query(NamedTuple):
    """A sequence to run, and which labels its last tokens' logits score."""

    tokens: list[int]
    first: int  # logits from this position on are wanted
    wanted: list[tuple[int, int, list[int]]]  # (row, label, the label's tokens)


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


def _scored(example: Example, log_probs: list[float]) -> Row:
    return Row(example.prompt, example.labels, example.right, False, None, log_probs)


def _likeliest(row: Row) -> str:
    """The first of the likeliest labels."""
    return row.labels[max(range(len(row.labels)), key=row.log_probs.__getitem__)]
