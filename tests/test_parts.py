"""Every op has all its parts, and each part carries the op's name."""

import inspect
import re
from pathlib import Path

import pytest

from mixlora import ops
from tests.cuda_on_cpu import KERNELS_OF, OPS

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
KERNELS = [name for name in SCHEMAS if (ROOT / "csrc" / name).is_dir()]  # others lie beside one
PUBLIC = [
    name
    for name in ops.__all__
    if inspect.isfunction(getattr(ops, name))
    and not name.endswith("_ref")
    and name not in ("reference", "use_reference")
]


def missing(parts: dict[str, str]) -> list[str]:
    """`parts` is path -> the text it must hold."""
    return [
        f"{path}: {text or 'the file'} is missing"
        for path, text in parts.items()
        if not (ROOT / path).exists() or text not in (ROOT / path).read_text()
    ]


def test_there_are_ops() -> None:
    assert "moe_sort" in KERNELS and "moe_sort" in PUBLIC


@pytest.mark.parametrize("op", KERNELS)
def test_every_kernel_has_its_parts(op: str) -> None:
    parts = {
        f"mixlora/ops/{op}.py": f'register_fake("mixlora::{op}")',
        f"csrc/{op}/{op}.h": f"{op}_cpu",
        f"csrc/{op}/{op}.cpp": f'm.impl("{op}"',
        f"csrc/{op}/{op}_cpu.cpp": f"{op}_cpu",
        f"benchmarks/bench_{op}.py": f"ops.{op}",
    }
    assert not missing(parts), "\n".join(missing(parts))
    assert f"\n[{op}/{op}_cpu.cpp]\n" in (ROOT / "tools/faults.txt").read_text()
    assert op in PUBLIC, f"mixlora/ops/__init__.py does not export {op}"


@pytest.mark.parametrize("kernel", SCHEMAS)
def test_every_kernel_is_registered(kernel: str) -> None:
    for pattern, text in {
        "csrc/*/*.cpp": f'm.impl("{kernel}"',
        "mixlora/ops/*.py": f'register_fake("mixlora::{kernel}")',
    }.items():
        assert any(text in path.read_text() for path in ROOT.glob(pattern)), text


@pytest.mark.parametrize("kernel", SCHEMAS)
def test_every_kernel_runs_under_the_sanitizer_of_threads(kernel: str) -> None:
    assert not missing({"tests/threads.cpp": f"RUN({kernel},"})


@pytest.mark.parametrize("op", OPS)
def test_cuda_kernels_have_their_parts(op: str) -> None:
    files = ROOT.glob(f"csrc/{op}/*_cuda.cu")
    source = "".join(path.read_text() for path in files)
    assert all(f"void {kernel}_cuda(" in source for kernel in KERNELS_OF[op])
    assert not re.search(r"#include <(torch|ATen|c10)|<<<|__shared__|asm", source)
    assert not missing({f"csrc/{op}/{op}.cpp": "REGISTER_KERNELS"})
    if "__global__" in source:  # else it launches another op's
        assert not missing({"csrc/kernels.txt": f"{op}: "})
    assert not missing({"docs/kernels.md": f"## {op}"})


@pytest.mark.parametrize("op", PUBLIC)
def test_every_public_op_has_a_spec_a_reference_and_a_test(op: str) -> None:
    module = inspect.getmodule(getattr(ops, op))
    stem = module.__name__.split(".")[-1]
    assert module.__doc__, f"mixlora/ops/{stem}.py has no spec"
    assert hasattr(ops, f"{op}_ref"), f"mixlora/ops/__init__.py does not export {op}_ref"
    test = {f"tests/ops/test_{stem}.py": op}
    assert not missing(test), "\n".join(missing(test))
