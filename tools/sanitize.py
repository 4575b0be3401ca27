"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer.

All is built and run in build/sanitize: the installed extension stays as it is. A fault is planted
for each sanitizer, which must report it; without the fault none may report anything.

python tools/sanitize.py            all
python tools/sanitize.py memory     the tests of the kernels, under the first two
python tools/sanitize.py cuda       of them those of the CUDA kernels, executed on the CPU
python tools/sanitize.py threads    tests/threads.cpp, under the last: the CPU's kernels, and the
                                    CUDA kernels, each of whose threads it takes for one
"""

import os
import subprocess
import sys

from scratch import ISA_FLAGS, ROOT, Planted, best_isa, build, copy_tree

TREE = ROOT / "build/sanitize"
CXX = os.environ.get("CXX", "g++")
# AddressSanitizer sees what the checks that are left out are for, and they build for minutes.
MEMORY_FLAGS = (
    "-g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,alignment "
    "-fno-sanitize-recover=all"
)
# What torch does with an operator's schema takes long here and runs no kernel in a new way.
TESTS = ["tests/ops", "tests/layers", "-k", "not opcheck and not compile and not random"]
CUDA_TESTS = ["tests/test_cuda_on_cpu.py", "tests/ops", "-k", "(random and not opcheck) or edges"]
NINJA = """builddir = {folder}
rule compile
  command = {cxx} -std=c++20 -g -MMD -MF $out.d -Icsrc -Itests {flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -fsanitize=thread $in -o $out
"""

# (file, what it has, what it gets, what must be reported)
OUT_OF_BOUNDS = (
    "csrc/moe_gather/moe_gather_cpu.cpp",
    "p.x_TD + slot / p.K * p.row_bytes",
    "p.x_TD + (slot / p.K + 1) * p.row_bytes",
    "AddressSanitizer: heap-buffer-overflow",
)
CUDA_OUT_OF_BOUNDS = (
    "csrc/moe_gather/moe_gather_cuda.cu",
    "if (slot >= 0 && first + i * kLanes < num_words)",
    "if (slot >= 0 && first + i * kLanes <= num_words)",
    "AddressSanitizer: heap-buffer-overflow",
)
CUDA_SHARED_OUT_OF_BOUNDS = (
    "csrc/moe_sort/moe_sort_cuda.cu",
    "kWarps + 1, sorts, num_sorts",
    "kWarps, sorts, num_sorts",
    "AddressSanitizer: use-after-poison",
)
OVERFLOW = (
    "csrc/moe_gather/moe_gather_cpu.cpp",
    "const int64_t slot = p.row_slot_N[n];",
    "const int64_t slot = p.row_slot_N[n] + (INT32_MAX + int32_t(end - n) == 1);",
    "runtime error: signed integer overflow",
)
RACE = (
    "csrc/topk_router/topk_router_cpu.cpp",
    "chunk_sums + begin / kChunk * num_sums",
    "chunk_sums",
    "ThreadSanitizer: data race",
)
CUDA_RACE = (
    "csrc/moe_sort/moe_sort_cuda.cu",
    "place += count; } } __syncthreads();",
    "place += count; } }",
    "ThreadSanitizer: data race",
)
CUDA_RACE_OF_COPIES = (
    "csrc/grouped_shrink/tiles.cuh",
    "__syncthreads();  // all see this step's tiles, and have read those that are overwritten now",
    "",
    "ThreadSanitizer: data race",
)


def run(command: list[str], show: bool = False, **environment: str) -> tuple[int, str]:
    """Its exit status and all that it said."""
    process = subprocess.Popen(
        command,
        cwd=TREE,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        print(line if show else "", end="", flush=True)
    return process.wait(), said


def library(name: str) -> str:
    return subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()


def run_tests(tests: list[str], show: bool = False) -> tuple[int, str]:
    """The interpreter has the runtime of the sanitizers, and need not give all memory back."""
    environment = {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "MIXLORA_CUDA_ON_CPU_FLAGS": MEMORY_FLAGS,
        "OMP_NUM_THREADS": "2",
    }
    done = build(TREE, MEMORY_FLAGS, **environment)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    return run([*pytest, *tests], show, **environment)


def run_threads(show: bool = False, cuda: bool = False) -> tuple[int, str]:
    isa = best_isa()
    flags = f"{ISA_FLAGS[isa]} -DMIXLORA_ISA=cpu_{isa} '-DMIXLORA_ONLY_ISA=\"{isa}\"'"
    flags += " -DMIXLORA_CUDA_ON_CPU" if cuda else ""
    seen = [TREE / "tests/threads.cpp", *TREE.glob(f"csrc/*/*_{'cuda.cu' if cuda else 'cpu.cpp'}")]
    jobs = {source: "-O1 -fsanitize=thread -xc++" for source in seen}
    if cuda:  # what it does for the threads is not theirs
        jobs[TREE / "tests/cuda_on_cpu.cpp"] = "-O2 -DON_CPU_TSAN"
    folder = f"build/threads_{'cuda' if cuda else 'cpu'}"
    text = NINJA.format(folder=folder, cxx=CXX, flags=flags)
    for source, more in jobs.items():
        text += f"build {folder}/{source.stem}.o: compile {source.relative_to(TREE)}\n"
        text += f" flags = {more}\n"
    text += f"build {folder}/all: link {' '.join(f'{folder}/{x.stem}.o' for x in jobs)}\n"
    (TREE / folder).mkdir(parents=True, exist_ok=True)
    (TREE / folder / "build.ninja").write_text(text)
    status, said = run([sys.executable, "-m", "ninja", "-f", f"{folder}/build.ninja"])
    if status:
        sys.exit(said[-4000:])
    return run([f"{folder}/all"], show, TSAN_OPTIONS="halt_on_error=1")


def must_report(fault: tuple[str, str, str, str], run_with_it) -> None:
    *planted, report = fault
    with Planted(TREE, *planted):
        status, said = run_with_it()
    if status == 0 or report not in said:
        sys.exit(f"a planted fault was not reported ({report}):\n{said[-4000:]}")
    print("reported where planted:", report, flush=True)


def must_be_silent(what: str, result: tuple[int, str]) -> None:
    status, said = result
    if status or "Sanitizer" in said or "runtime error" in said:
        sys.exit(f"{what}: not clean")
    print(f"{what}: no report", flush=True)


def main(kinds: list[str]) -> None:
    copy_tree(TREE)
    if "threads" in kinds:
        must_report(RACE, run_threads)
        must_be_silent("ThreadSanitizer", run_threads(show=True))
        for fault in (CUDA_RACE, CUDA_RACE_OF_COPIES):
            must_report(fault, lambda: run_threads(cuda=True))
        must_be_silent("ThreadSanitizer, CUDA kernels", run_threads(show=True, cuda=True))
    if "cuda" in kinds:
        for fault in (CUDA_OUT_OF_BOUNDS, CUDA_SHARED_OUT_OF_BOUNDS):
            op = fault[0].split("/")[1]
            tests = [f"tests/ops/test_{op}.py", "-k", "random"]
            must_report(fault, lambda tests=tests: run_tests(tests))
        result = run_tests(CUDA_TESTS, show=True)
        must_be_silent("AddressSanitizer, UndefinedBehaviorSanitizer, CUDA kernels", result)
    if "memory" in kinds:
        for fault in (OUT_OF_BOUNDS, OVERFLOW):
            must_report(fault, lambda: run_tests(["tests/ops/test_moe_gather.py"]))
        result = run_tests(TESTS, show=True)
        must_be_silent("AddressSanitizer, UndefinedBehaviorSanitizer", result)


if __name__ == "__main__":
    kinds = sys.argv[1:] or ["threads", "cuda", "memory"]
    if not set(kinds) <= {"threads", "cuda", "memory"}:
        sys.exit(__doc__)
    main(kinds)
