"""Build mixlora._C from csrc/ with ninja.

csrc/**/*.cpp       bindings and op entries: once, on torch's stable ABI (torch >= 2.11)
csrc/*/*_cpu.cpp    CPU kernels: once per instruction set (csrc/common/isa.h)
csrc/*/*_cuda.cu    CUDA kernels: by nvcc, where torch is a CUDA build and nvcc is found

MIXLORA_ONLY_ISA    of the instruction sets this one alone, which builds sooner
MIXLORA_CXXFLAGS    options of the compiler and the linker, after all others (tools/sanitize.py)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from shlex import quote

try:
    import ninja  # noqa: F401
    import pybind11
    import torch
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError as error:
    sys.exit(f"setup.py: {error.name} is not installed: run `make kernels`")

BUILD = "build/kernels"
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
TORCH = Path(torch.__file__).parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
if not CUDA_HOME.exists() and shutil.which("nvcc"):
    CUDA_HOME = Path(shutil.which("nvcc")).resolve().parents[1]
CUDA_ARCHS = ["80", "86", "89", "90"]  # where no GPU says which
ISA_FLAGS = {"default": ""}
if os.uname().machine == "x86_64":
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    ISA_FLAGS["avx512_bf16"] = ISA_FLAGS["avx512"] + " -mavx512bf16"
if only := os.environ.get("MIXLORA_ONLY_ISA"):
    if only not in ISA_FLAGS:
        sys.exit(f"setup.py: MIXLORA_ONLY_ISA must be one of {', '.join(ISA_FLAGS)}, got {only}")
    ISA_FLAGS = {only: ISA_FLAGS[only]}
MORE_FLAGS = os.environ.get("MIXLORA_CXXFLAGS", "")


def version(tool: str, word: str = "") -> str:
    said = subprocess.check_output([tool, "--version"], text=True)
    return next(line for line in said.splitlines() if word in line)


def cuda_archs() -> list[str]:
    """Of the GPUs here, else all that the kernels are for."""
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(here) if major >= 8] or CUDA_ARCHS


def find_cuda(nvcc: str | None) -> str:
    """What will be built for a GPU, and why, in one line."""
    if not torch.version.cuda or not nvcc:
        return "no kernels: " + (
            "nvcc is not found" if torch.version.cuda else "torch is a CPU build"
        )
    archs = " ".join(f"sm_{arch}" for arch in cuda_archs())
    why = "of the GPUs here" if torch.cuda.is_available() else "torch sees no GPU: all"
    return f"{nvcc}, {version(nvcc, 'release')}, for {archs} and PTX ({why})"


def ninja_file(cxx: str, nvcc: str | None, output: str) -> str:
    """ninja repeats a command when it, or a file it read, headers included, has changed."""
    sources = sorted(Path("csrc").rglob("*.cpp"))
    kernels = [source for source in sources if source.stem.endswith("_cpu")]
    cuda = sorted(Path("csrc").rglob("*.cu")) if nvcc and torch.version.cuda else []
    archs = cuda_archs() if cuda else []
    macros = {"COMPILER": version(cxx), "TORCH": torch.__version__, "CUDA_ARCHS": " ".join(archs)}
    # pybind11 of its own package first: torch brings one that refuses the stable ABI
    includes = [pybind11.get_include(), f"{TORCH}/include", sysconfig.get_path("include")]
    flags = "-O3 -MMD -Icsrc " + " ".join(f"-isystem {quote(path)}" for path in includes)
    flags += "".join(" " + quote(f'-DMIXLORA_{name}="{text}"') for name, text in macros.items())
    if len(ISA_FLAGS) == 1:  # csrc/common/isa.h
        (only,) = ISA_FLAGS
        flags += " " + quote(f'-DMIXLORA_ONLY_ISA="{only}"') + f" -DMIXLORA_ISA=cpu_{only}"
    cpp = f"{cxx} -std=c++20 -Wall -fPIC -fvisibility=hidden {flags} {MORE_FLAGS}"
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes += [
        f"-gencode arch=compute_{arch},code=compute_{arch}" for arch in archs[-1:]
    ]  # later GPUs

    # (command, source, object) in link order. The default instruction set goes before the others:
    # of an inline function that several objects hold, the linker keeps the first copy, and that
    # one must run on every processor. at::vec heeds the CPU_CAPABILITY macros, not the flags.
    entry = f"{cpp} {ABI} -DMIXLORA_CUDA" if cuda else f"{cpp} {ABI}"
    jobs = [(entry, s, f"{BUILD}/{s.stem}.o") for s in sources if s not in kernels]
    for isa, isa_flags in ISA_FLAGS.items():
        capability = f"-DCPU_CAPABILITY={isa.upper()} -DCPU_CAPABILITY_{isa.upper()}"
        command = f"{cpp} {isa_flags} {capability} -DMIXLORA_ISA=cpu_{isa}"
        jobs += [(command, s, f"{BUILD}/{s.stem}.{isa}.o") for s in kernels]
    command = f"{nvcc} -std=c++17 -O3 -lineinfo -MMD -Icsrc --threads 0 {' '.join(codes)}"
    command += " -Xcompiler -fPIC,-fvisibility=hidden"
    jobs += [(command, s, f"{BUILD}/{s.stem}.o") for s in cuda]
    libraries = f"-L{quote(f'{TORCH}/lib')} -ltorch_cpu"
    if cuda:  # of libtorch only weak symbols are used, for which the linker would drop it
        libraries += (
            f" -Wl,--no-as-needed -ltorch -L{quote(f'{CUDA_HOME}/lib64')} -lcudart_static -ldl -lrt"
        )
    text = f"""builddir = {BUILD}
rule compile
  command = $run -MF $out.d -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out {libraries} {MORE_FLAGS}
  description = $out
"""
    text += "".join(f"build {o}: compile {s}\n run = {command}\n" for command, s, o in jobs)
    return text + f"build {output}: link {' '.join(o for _, _, o in jobs)}\n"


class BuildKernels(build_ext):
    def run(self) -> None:
        start = time.perf_counter()
        cxx = os.environ.get("CXX") or next(filter(shutil.which, ["g++", "clang++"]), "g++")
        nvcc = shutil.which("nvcc", path=CUDA_HOME / "bin") or shutil.which("nvcc")
        if not shutil.which(cxx):
            sys.exit(f"setup.py: a C++20 compiler is needed, {cxx} is not found (set CXX)")
        print("compiler         ", version(cxx))
        print("torch            ", torch.__version__)
        print("CUDA             ", find_cuda(nvcc))

        output = os.path.relpath(self.get_ext_fullpath("mixlora._C"))
        os.makedirs(BUILD, exist_ok=True)
        Path(BUILD, "build.ninja").write_text(ninja_file(cxx, nvcc, output))
        if subprocess.call([sys.executable, "-m", "ninja", "-f", f"{BUILD}/build.ninja"]):
            sys.exit("setup.py: the build failed, the compiler's message is above")

        # Loading the result is the proof that it loads, and tells what it will use here.
        module = module_from_spec(spec := spec_from_file_location("mixlora._C", output))
        spec.loader.exec_module(module)
        info = module.build_info()
        print("instruction sets ", *info["instruction_sets"], f"(here: {info['instruction_set']})")
        print(f"built             {output} in {time.perf_counter() - start:.1f} s")


os.chdir(Path(__file__).resolve().parent)
setup(ext_modules=[Extension("mixlora._C", sources=[])], cmdclass={"build_ext": BuildKernels})
