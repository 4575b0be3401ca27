"""`train.py --profile N`: what N optimizer steps spend their time on, by torch.profiler.

Two steps come before them, to warm up. The run's folder then has `profile.json.gz`, a trace for
chrome://tracing or ui.perfetto.dev, and `profile.txt`, the table that is printed too.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, schedule

from mixlora.files import write_bytes
from mixlora.metrics import tell

WARM_UP = 2
ROWS = 25


def whole_number(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


@contextlib.contextmanager
def profiled(folder: Path, num_steps: int) -> Iterator[None]:
    done = []

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / "profile.json.gz"))
        key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS)
        write_bytes(folder / "profile.txt", table.encode())
        tell(table)
        tell(f"the trace is {folder / 'profile.json.gz'}")
        done.append(table)

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * torch.cuda.is_available()
    steps = schedule(wait=WARM_UP - 1, warmup=1, active=num_steps, repeat=1)
    profiler = profile(activities=activities, schedule=steps, on_trace_ready=write)
    with profiler:
        hook = register_optimizer_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            hook.remove()
    if not done:
        tell(f"--profile: the run had no more than the {WARM_UP} steps of warm-up")
