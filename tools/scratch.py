"""A copy of the kernels and their tests, to build in other ways and to break."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
ISA_FLAGS = {  # setup.py's
    "default": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": AVX512 + " -mavx512bf16",
}
COPIED = "benchmarks csrc mixlora models tests setup.py train.py pyproject.toml README.md".split()


def files(folder: Path) -> set[Path]:
    """Relative paths of what is copied; what was built is not."""
    found = [path for name in COPIED for path in (folder / name, *(folder / name).rglob("*"))]
    return {
        path.relative_to(folder)
        for path in found
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }


def copy_tree(to: Path) -> None:
    """What is the same already stays, so that ninja rebuilds little."""
    for path in files(to) - files(ROOT):
        (to / path).unlink()
    for path in files(ROOT):
        copy = to / path
        if not copy.exists() or copy.read_bytes() != (ROOT / path).read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy)


def best_isa() -> str:
    cpu = Path("/proc/cpuinfo").read_text() if os.uname().machine == "x86_64" else ""
    options = {"-m" + flag.replace("_", "") for flag in cpu.split()}
    return [isa for isa, flags in ISA_FLAGS.items() if set(flags.split()) <= options][-1]


def build(tree: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Of one instruction set, and as little optimised as a short build asks."""
    environment = {
        **os.environ,
        "MIXLORA_ONLY_ISA": best_isa(),
        "MIXLORA_CXXFLAGS": " ".join(("-O1", *flags)),
        **environment,
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def find(text: str, wanted: str) -> re.Match | None:
    """Where `wanted` stands, however its lines are broken; it must stand there once."""
    pattern = r"\s+".join(map(re.escape, wanted.split()))
    found = list(re.finditer(pattern, text))
    return found[0] if len(found) == 1 else None


class Planted:
    """While it lasts, a file of the tree has the new text for the old."""

    def __init__(self, tree: Path, file: str, old: str, new: str) -> None:
        self.path = tree / file
        self.right = self.path.read_text()
        found = find(self.right, old)
        if not found:
            raise ValueError(f"{file} must have once: {old}")
        self.wrong = self.right[: found.start()] + new + self.right[found.end() :]

    def __enter__(self) -> None:
        self.path.write_text(self.wrong)

    def __exit__(self, *_: object) -> None:
        self.path.write_text(self.right)
