"""Compile the CUDA kernels for every architecture, which takes nvcc and no GPU.

python tools/kernels_check.py             compare with csrc/kernels.txt
python tools/kernels_check.py --update    write it

Warnings, registers spilled to memory, more than 96 KiB of shared memory, and whatever differs from
the table are errors. What another release of nvcc makes is shown and not compared.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc/kernels.txt"
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")  # setup.py's
MAX_SHARED_BYTES = 96 * 1024  # csrc/common/cuda.cuh, which checks what a launch asks for
FLAGS = (
    "-std=c++17 -O3 -lineinfo -Icsrc -Werror all-warnings -Xptxas -v -cubin -o /dev/null".split()
)


class Resources(NamedTuple):
    registers: int
    shared: int
    stack: int
    spilled: int

    def __str__(self) -> str:
        extra = [f"+{n} {name}" for n, name in zip(self[1:], self._fields[1:], strict=True) if n]
        return " ".join([str(self.registers), *extra])


def readable(symbols: list[str]) -> list[str]:
    """gather_kernel<float, 4>, without namespaces and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = said.stdout.splitlines()
    names = [re.sub(r"mixlora::|\(anonymous namespace\)::|^void ", "", name) for name in names]
    return [re.sub(r"\((\w+)\)(\d+)", r"\2", name).partition("(")[0] for name in names]


def compile_for(nvcc: str, source: Path, arch: str) -> dict[str, Resources]:
    command = [nvcc, *FLAGS, f"-arch={arch}", str(source.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{said}")
    found = {}
    for part in said.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found[symbol] = Resources(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    return dict(zip(readable(list(found)), found.values(), strict=True))


def make_table(nvcc: str, release: str) -> tuple[str, list[str]]:
    """And what is wrong."""
    sources = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_for(nvcc, *job), jobs))
    by_job = dict(zip(jobs, results, strict=True))
    rows, wrong = [("kernel", *ARCHS)], []
    for source in sources:
        op = source.parent.name
        for kernel in sorted(by_job[source, ARCHS[0]]):
            all_archs = [by_job[source, arch][kernel] for arch in ARCHS]
            rows.append((f"{op}: {kernel}", *map(str, all_archs)))
            for arch, used in zip(ARCHS, all_archs, strict=True):
                if used.spilled:
                    wrong.append(f"{arch}: {op}: {kernel} spills {used.spilled} bytes")
                if used.shared > MAX_SHARED_BYTES:
                    wrong.append(f"{arch}: {op}: {kernel} has {used.shared} bytes of shared memory")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    head = f"# Registers of a thread, and what else a kernel takes, in bytes. {release}\n"
    return head + "".join(line.rstrip() + "\n" for line in lines), wrong


def main(update: bool) -> int:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not nvcc:
        count = len(list(ROOT.glob("csrc/*/*_cuda.cu")))
        print(f"kernels-check: {count} CUDA sources skipped, nvcc is not found")
        return 0
    said = subprocess.check_output([nvcc, "--version"], text=True)
    release = "nvcc " + re.search(r"release ([\d.]+)", said)[1]
    table, wrong = make_table(nvcc, release)
    print(table)
    if update:
        TABLE.write_text(table)
    elif release not in TABLE.read_text().partition("\n")[0]:
        print(f"not compared: {TABLE.relative_to(ROOT)} is of another release of nvcc")
    elif table != TABLE.read_text():
        old, new = (set(text.splitlines()) for text in (TABLE.read_text(), table))
        wrong += [f"no longer: {line}" for line in sorted(old - new)]
        wrong += [f"instead:   {line}" for line in sorted(new - old)]
        wrong.append("if that is right: python tools/kernels_check.py --update")
    print("\n".join(wrong) or f"{len(ARCHS)} architectures, nothing spilled")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--update"]):
        sys.exit(__doc__)
    sys.exit(main(update=bool(sys.argv[1:])))
