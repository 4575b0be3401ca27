"""Two ways to the same result, timed side by side.

The steps of both take turns in one process, so that a machine that slows down slows both; the ratio
printed is the median of the ratios of neighbouring steps.
"""

import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from mixlora import _C

STEP_SECONDS = 2e-3  # a fast function is repeated for so long, or the clock would count too


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


def step_time(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def compare(what: str, seconds: float = 2, **sides: Callable[[], object]) -> float:
    """Print the median time of the two sides, given as name=function, and return the median ratio
    second / first. `what` tells op, shape and dtype."""
    (first_name, first), (second_name, second) = sides.items()
    repeats = {}
    for function in (first, second):
        function()  # warm-up
        repeats[function] = max(1, round(STEP_SECONDS / step_time(function, repeats=3)))

    pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        pairs.append((step_time(first, repeats[first]), step_time(second, repeats[second])))
    first_us, second_us = (median(times) * 1e6 for times in zip(*pairs, strict=True))
    ratio = median(b / a for a, b in pairs)
    print(
        f"{what:40} {first_name} {first_us:9.1f} us   {second_name} {second_us:9.1f} us   "
        f"{second_name}/{first_name} {ratio:.3f} ({len(pairs)} pairs)"
    )
    return ratio
