"""What a run tells while it works: a line of JSON per step, and progress a person can read."""

import collections
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mixlora import processes
from mixlora.errors import InputError
from mixlora.files import write_bytes
from mixlora.ops import Routing

WINDOW = 50  # steps in which an expert must be selected at least once, or it counts as dead


class MetricsLog:
    """metrics.jsonl: one object per line, flushed as it is written.

    A run that goes on from step n drops the lines after n, so that every step stands there once.
    A step's `expert_load` becomes `dead_experts`, of the steps so far, beside it. Of several
    processes the first writes.
    """

    def __init__(self, path: Path, first_step: int = 0, tensorboard: bool = False) -> None:
        text = path.read_text(errors="replace") if path.exists() and first_step else ""
        lines = text.splitlines(keepends=True)
        kept = [*itertools.takewhile(lambda line: _is_of_step(line, first_step), lines)]
        steps = [json.loads(line) for line in kept]
        self.num_skipped = sum("skipped" in step for step in steps)
        is_first = processes.is_first()
        if is_first:
            write_bytes(path, "".join(kept).encode())
        self._file = open(path if is_first else os.devnull, "a", encoding="utf-8")
        loads = (step.get("expert_load") for step in steps[-WINDOW:])
        self._loads = collections.deque(filter(None, loads), WINDOW)
        folder = path.parent / "tensorboard"
        self._board = board(folder, first_step) if tensorboard and is_first else None

    def write(self, **values: Any) -> None:
        if values.get("expert_load"):
            self._loads.append(values["expert_load"])
            values["dead_experts"] = dead_experts(self._loads)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in scalars(values):
                self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def dead_experts(loads: Iterable[list[list[float]]]) -> list[int]:
    """Of each layer: how many experts no token has selected in these steps."""
    return [
        sum(not any(shares) for shares in zip(*layer, strict=True))
        for layer in zip(*loads, strict=True)
    ]


def require_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError(
            "run.tensorboard needs tensorboard: pip install tensorboard, or set "
            "run.tensorboard=false"
        ) from None


def board(folder: Path, first_step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers under their names, a layer's under name/layer; of its experts' the largest."""
    for name, value in values.items():
        if isinstance(value, (int, float)):
            yield name, value
        for layer, of_layer in enumerate(value if isinstance(value, list) else []):
            largest = max(of_layer) if isinstance(of_layer, list) else of_layer
            yield f"{name}/{layer:02}", largest


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
    """Per layer, over a step's forwards in all processes: each expert's share of the selections,
    the router's mean entropy in nats, and the share of the tokens that were dropped."""
    layers, load, entropy, dropped = [], [], [], []
    for layer in zip(*forwards, strict=True):
        sums = [
            torch.cat([r.count_E, torch.stack([r.entropy, r.num_tokens, num_dropped(r)])])
            for r in layer
        ]
        layers.append(torch.stack(sums).sum(0).tolist())  # a GPU is waited for once
    for layer in zip(*processes.gathered([layers] if forwards else []), strict=True):
        *counts, total, num_tokens, num_lost = map(sum, zip(*layer, strict=True))
        selections = max(1, sum(counts))
        load.append([round(count / selections, 5) for count in counts])
        entropy.append(round(total / max(1, num_tokens), 5))
        dropped.append(round(num_lost / max(1, num_tokens), 5))
    return {"expert_load": load, "router_entropy": entropy, "dropped_tokens": dropped}


def num_dropped(routing: Routing) -> torch.Tensor:
    none = torch.zeros_like(routing.num_tokens)
    return none if routing.num_dropped is None else routing.num_dropped.to(none)
