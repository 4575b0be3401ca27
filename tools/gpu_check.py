"""All that can only be checked on a GPU: `make gpu-check`. Needs a CUDA build of torch, nvcc and
pytest, and no network.

python tools/gpu_check.py                 build; the tests that are marked gpu; compute-sanitizer
python tools/gpu_check.py --device cpu    what of this runs without a GPU

It ends with 0 where all passed, with 1 where not, with 2 where there is no GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Each allocation by the driver, so that what lies beside a tensor is nobody's.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OUR_KERNELS = "--kernel-name kernel_substring=mixlora --report-api-errors no".split()
SECONDS = 450  # for all of it


def steps(device: str) -> Iterator[tuple[str, list[str] | str, dict[str, str]]]:
    """(name, command or why there is none, environment)."""
    build = [sys.executable, "-u", "setup.py", "-q", "build_ext", "--inplace"]
    yield "build", build, {}
    if device == "cpu":
        yield "tests of the tests", [*PYTEST, "tests/test_gpu.py"], {}
        yield "compute-sanitizer", "without a GPU", {}
        return
    yield "tests", [*PYTEST, "-m", "gpu", "tests/ops", "tests/test_gpu.py"], {}
    for tool, tests in (("memcheck", "test_edges"), ("racecheck", "test_edges and (65 or 257)")):
        path = [CUDA_HOME / "bin", CUDA_HOME / "compute-sanitizer", os.environ["PATH"]]
        sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, path)))
        command = "compute-sanitizer is not found"
        if sanitizer:
            command = [sanitizer, "--tool", tool, *OUR_KERNELS, "--error-exitcode", "9", *PYTEST]
            command += ["-m", "gpu", "-k", tests, "tests/test_gpu.py"]
        yield tool, command, NO_CACHE


def run(name: str, command: list[str], environment: dict[str, str], seconds: float) -> str:
    print(f"\n--- {name}: {' '.join(command)}", flush=True)
    # The library's products repeat to the bit, on any stream.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **environment}
    begun = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: not done when the {SECONDS} s for all were over"
    passed = f"passed in {time.perf_counter() - begun:.0f} s"
    return f"FAILED with status {status}" if status else passed


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="All that can only be checked on a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args(argv).device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU (--device cpu runs what does not need one)")
        return 2
    where = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    print(f"{where}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    summary, end = {}, time.perf_counter() + SECONDS
    for name, command, environment in steps(device):
        if isinstance(command, str):
            summary[name] = f"left out: {command}"
            continue
        summary[name] = run(name, command, environment, end - time.perf_counter())
        if name == "build" and "FAILED" in summary[name]:
            break
    print("\nsummary, " + where)
    for name, text in summary.items():
        print(f"  {name:20} {text}")
    return 1 if any("FAILED" in text for text in summary.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
