"""What every kernel is put through."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mixlora import _C

only_cpu = pytest.mark.only_cpu


def every_instruction_set(test: Callable) -> Callable:
    """But the one that this process, and with it all other tests, runs with."""
    info = _C.build_info()
    others = [isa for isa in info["instruction_sets"] if isa != info["instruction_set"]]
    return pytest.mark.parametrize("isa", others)(only_cpu(test))


def said_with(isa: str, program: str) -> str:
    """What the Python program prints where the kernels run with this instruction set."""
    built = _C.build_info()["instruction_sets"]
    if built.index(isa) > built.index(_C.build_info()["instruction_set"]):
        pytest.skip(f"this processor has no {isa}")
    environment = {**os.environ, "MIXLORA_ISA": isa}
    program = f"from mixlora import _C; print(_C.build_info()['instruction_set'])\n{program}"
    return subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)


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
