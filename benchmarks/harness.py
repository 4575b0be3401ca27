"""Two ways to the same result, timed side by side; a function alone; and tables of what was found.

The steps of both take turns in one process, so that a machine that slows down slows both; the ratio
printed is the median of the ratios of neighbouring steps. A GPU's time is its own, by events.
"""

import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mixlora import _C

STEP_SECONDS = 2e-3  # a fast function is repeated for so long, or the clock would count too
CACHE_BYTES = 512 << 20  # more than a GPU caches, and as long to write as some calls take to launch
Rows = list[dict[str, Any]]


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    cpu = model[1] if model else platform.processor()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    kernels = f"kernels {_C.build_info()['instruction_set']}"
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"


def print_header() -> None:
    print("machine", machine())
    print("command", shlex.join(["python", *sys.orig_argv[1:]]))


def step_time(function: Callable[[], object], repeats: int = 1, device: str = "cpu") -> float:
    """Seconds of a call, the mean of so many."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def alone(function: Callable[[], object], device: str, seconds: float = 0.2) -> float:
    """Seconds of a call, the median; on a GPU with nothing of its data in the cache."""
    cache = torch.empty(0 if device == "cpu" else CACHE_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(3):
        function()  # warm-up
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        cache.zero_()
        times.append(step_time(function, device=device))
    return median(times)


def compare(
    what: str, seconds: float = 2, device: str = "cpu", **sides: Callable[[], object]
) -> float:
    """Print the median time of the two sides, given as name=function, and return the median ratio
    second / first. `what` tells op, shape and dtype."""
    first_us, second_us, ratio, num_pairs = compared(*sides.values(), seconds, device)
    first_name, second_name = sides
    print(
        f"{what:40} {first_name} {first_us:9.1f} us   {second_name} {second_us:9.1f} us   "
        f"{second_name}/{first_name} {ratio:.3f} ({num_pairs} pairs)"
    )
    return ratio


def compared(
    first: Callable[[], object], second: Callable[[], object], seconds: float, device: str
) -> tuple[float, float, float, int]:
    """Microseconds of each, the median ratio second / first, and the number of pairs."""
    repeats = {}
    for function in (first, second):
        function()  # warm-up
        repeats[function] = max(1, round(STEP_SECONDS / step_time(function, 3, device)))

    pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        pairs.append([step_time(side, repeats[side], device) for side in (first, second)])
    first_us, second_us = (median(times) * 1e6 for times in zip(*pairs, strict=True))
    return first_us, second_us, median(b / a for a, b in pairs), len(pairs)


def table(rows: Rows) -> str:
    """In Markdown, its columns aligned: the first row's, without those that are empty."""

    def cell(value: float | str | None) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        return "" if value is None else str(value)

    if not rows:
        return "(nothing)"
    columns = [key for key in rows[0] if any(row.get(key) is not None for row in rows)]
    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)
