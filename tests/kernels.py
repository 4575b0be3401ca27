"""What every kernel is put through."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixlora import _C

ROOT = Path(__file__).resolve().parents[1]
only_cpu = pytest.mark.only_cpu
slow_cuda = pytest.mark.slow_cuda


def every_instruction_set(test: Callable) -> Callable:
    """But the one that this process, and with it all other tests, runs with."""
    info = _C.build_info()
    others = [isa for isa in info["instruction_sets"] if isa != info["instruction_set"]]
    return pytest.mark.parametrize("isa", others)(only_cpu(test))


# Programs come one by one, as JSON; so does what they print.
SERVER = """
import contextlib, io, json, sys, traceback
import torch
from mixlora import _C
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print(_C.build_info()["instruction_set"])
        try:
            exec(json.loads(line), {})
        except Exception:
            traceback.print_exc(file=said)
    print(json.dumps(said.getvalue()), flush=True)
"""


@cache
def process_with(isa: str) -> subprocess.Popen:
    environment = {**os.environ, "MIXLORA_ISA": isa}
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    atexit.register(process.kill)
    return process


def said_with(isa: str, program: str) -> str:
    """What the Python program prints where the kernels run with this instruction set."""
    built = _C.build_info()["instruction_sets"]
    if built.index(isa) > built.index(_C.build_info()["instruction_set"]):
        pytest.skip(f"this processor has no {isa}")
    process = process_with(isa)
    process.stdin.write(json.dumps(program) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def assert_same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def assert_any_number_of_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        assert_same_bits(run(), one)
        torch.set_num_threads(2)
        for _ in range(3):
            assert_same_bits(run(), one)
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_compiles(function: Callable[..., Tensor], *arguments: Tensor) -> None:
    """In one graph, with the same value and gradients; the function returns a scalar."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, found = function(*arguments), compiled(*arguments)
    assert_same_bits((found,), (wanted,))
    assert_same_bits(torch.autograd.grad(found, arguments), torch.autograd.grad(wanted, arguments))
