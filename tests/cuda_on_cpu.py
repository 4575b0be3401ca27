"""The CUDA kernels in place of the CPU's, executed on the CPU by tests/cuda_on_cpu.cpp.

with cuda_on_cpu("descending"):
    ops.moe_gather(x_TD, plan)          the tensors are the CPU's, the kernel is the .cu file's

The threads of a block run as far as they can in this order, the lowest first, the highest first, or
any; blocks follow each other in it.

with cuda_on_gpu():                     the same, on a GPU: what an op is given goes there and back
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mixlora import ops  # noqa: F401  loads torch.ops.mixlora

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = os.environ.get("MIXLORA_CUDA_ON_CPU_FLAGS", "")  # tools/sanitize.py
CXX = os.environ.get("CXX", "g++")
ORDERS = ("ascending", "descending", "random")
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
OPS = sorted({path.parent.name for path in SOURCES})
KERNELS_OF = {
    op: re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/{op}/{op}.cpp").read_text()) for op in OPS
}
TORCH = Path(torch.__file__).parent
FLAGS = "-std=c++20 -Wall -Wno-unknown-pragmas -fPIC -fvisibility=hidden -MMD -Icsrc -Itests -g1"
NINJA = """rule compile
  command = {cxx} {flags} $flags -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out {more_flags} -L{torch}/lib -ltorch_cpu
"""

# Why the kernels cannot be executed here, if so.
MISSING = (
    f"{CXX} is not found"
    if not shutil.which(CXX)
    else ""
    if os.uname().machine == "x86_64"
    else "this is no x86-64"
)


def build(folder: Path) -> Path:
    """Only what has changed. What -fsanitize=thread calls is in tests/cuda_on_cpu.cpp, which sees
    nothing where another sanitizer takes its place."""
    more_flags = SANITIZER
    kernel_flags = "-O1" if SANITIZER else "-O1 -fsanitize=thread"
    entry = f"-O1 -DMIXLORA_CUDA_ON_CPU -DTORCH_TARGET_VERSION=0x020b000000000000 -I{TORCH}/include"
    jobs = [("tests/cuda_on_cpu.cpp", "-O2")]
    jobs += [(str(path.relative_to(ROOT)), f"{kernel_flags} -x c++") for path in SOURCES]
    jobs += [(f"csrc/{op}/{op}.cpp", entry) for op in OPS]
    text = NINJA.format(cxx=CXX, flags=f"{FLAGS} {more_flags}", more_flags=more_flags, torch=TORCH)
    objects = [folder / f"{Path(source).name}.o" for source, _ in jobs]
    for (source, flags), output in zip(jobs, objects, strict=True):
        text += f"build {output}: compile {source}\n flags = {flags}\n"
    library = folder / "cuda_on_cpu.so"
    text += f"build {library}: link {' '.join(map(str, objects))}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(f"builddir = {folder}\n{text}")
    command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return library


@cache
def load() -> ctypes.CDLL | str:
    """The runtime, or why there is none. The kernels are registered then, for a key of the
    dispatcher that nothing else uses."""
    try:
        path = build(ROOT / "build/cuda_on_cpu")
    except subprocess.CalledProcessError as error:
        return error.stdout[-4000:]
    library = ctypes.CDLL(str(path))
    library.on_cpu_counts.restype = ctypes.c_char_p
    return library


def runtime() -> ctypes.CDLL:
    library = load()
    assert not isinstance(library, str), library
    return library


def redispatch(kernel: str, key: torch._C.DispatchKey, *arguments: object) -> object:
    keys = torch._C.DispatchKeySet(key)
    return getattr(torch.ops.mixlora, kernel).default.redispatch(keys, *arguments)


def call_on_cpu(kernel: str, *arguments: object) -> object:
    return redispatch(kernel, torch._C.DispatchKey.PrivateUse1, *arguments)


def call_on_gpu(kernel: str, *arguments: object) -> object:
    moved = tree_map_only(Tensor, with_memory_on_gpu, arguments)
    results = redispatch(kernel, torch._C.DispatchKey.CUDA, *moved)
    return tree_map_only(Tensor, Tensor.cpu, results)


def with_memory_on_gpu(x: Tensor) -> Tensor:
    """With its strides, its offset, and what lies between its elements."""
    memory = x.untyped_storage().cuda()
    place = x.storage_offset(), x.size(), x.stride()
    return torch.empty(0, dtype=x.dtype, device=memory.device).set_(memory, *place)


@contextmanager
def cuda_on_cpu(order: str = "ascending") -> Iterator[None]:
    runtime().on_cpu_set_order(ORDERS.index(order), 0)
    with in_place_of_the_cpus(call_on_cpu):
        yield


@contextmanager
def cuda_on_gpu() -> Iterator[None]:
    with in_place_of_the_cpus(call_on_gpu):
        yield


@contextmanager
def in_place_of_the_cpus(call: Callable[..., object]) -> Iterator[None]:
    library = torch.library.Library("mixlora", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for kernel in chain(*KERNELS_OF.values()):
                library.impl(kernel, partial(call, kernel), "CPU")
        yield
    finally:
        library._destroy()


class Count(NamedTuple):
    launches: int
    read_bytes: int
    written_bytes: int
    mmas: int  # of a warp, 16 x 8 x 16 multiplications each


def counts() -> dict[str, Count]:
    """By kernel, since the last call: of global memory, each byte once for each block."""
    lines = runtime().on_cpu_counts().decode().splitlines()
    rows = [line.split("\t") for line in lines]
    return {kernel: Count(*map(int, numbers)) for kernel, *numbers in rows}


if __name__ == "__main__":  # so that the tests, which would build it too, begin at once
    library = MISSING or load()
    print("CUDA on the CPU  ", library if MISSING else "built, for the tests")
    sys.exit(library if isinstance(library, str) and not MISSING else 0)
