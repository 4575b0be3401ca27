"""What a run tells while it works: a line of JSON per step, and progress a person can read."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixlora.files import write_bytes
from mixlora.ops import Routing


class MetricsLog:
    """metrics.jsonl: one object per line, flushed as it is written.

    A run that goes on from step n drops the lines after n, so that every step stands there once.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        text = path.read_text(errors="replace") if path.exists() and first_step else ""
        lines = text.splitlines(keepends=True)
        kept = itertools.takewhile(lambda line: _is_of_step(line, first_step), lines)
        write_bytes(path, "".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _is_of_step(line: str, last: int) -> bool:
    """Whether it is the whole line of a step up to `last`, and nothing that a crash left."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= last
    except (ValueError, TypeError, KeyError):
        return False


def tell(text: str) -> None:
    """A line on stderr, above the bars."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """A bar on a terminal, below those that are there; elsewhere a plain line every now and then.
    Goes to stderr."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._began, self._told, self._first = time.monotonic(), time.monotonic(), done
        terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=title, total=total, initial=done, unit=unit) if terminal else None

    def advance(self, count: int = 1, **values: str) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._told >= self.SECONDS_BETWEEN_LINES or self._done == self._total:
            self._told = now
            rate = (self._done - self._first) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            text = "  ".join(f"{key} {value}" for key, value in values.items())
            done = f"{self._done}/{self._total} {self._unit}"
            print(f"{self._title}  {done}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def routing_metrics(forwards: Sequence[Sequence[Routing]]) -> dict[str, list]:
    """Per layer, over a step's forwards: each expert's share of the selections, and the router's
    mean entropy in nats."""
    load, entropy = [], []
    for layer in zip(*forwards, strict=True):
        sums = [torch.cat([r.count_E, r.entropy[None], r.num_tokens[None]]) for r in layer]
        *counts, total, num_tokens = torch.stack(sums).sum(0).tolist()  # a GPU is waited for once
        selections = max(1, sum(counts))
        load.append([round(count / selections, 5) for count in counts])
        entropy.append(round(total / max(1, num_tokens), 5))
    return {"expert_load": load, "router_entropy": entropy}
