"""Plant the faults of tools/faults.txt in copies of the kernels, and see that the tests notice.

python tools/plant_faults.py            all of them: an hour on two cores
python tools/plant_faults.py DoRA mma   those whose file, operator or name has one of these in it
python tools/plant_faults.py --check    only see that the table fits the source
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from scratch import ROOT, Planted, build, copy_tree, find

TABLE = ROOT / "tools/faults.txt"
MAY_SURVIVE = 2
PROCESSES = 2
BATCH = 6
NOT_BUILT = "does not compile"


class Fault(NamedTuple):
    file: str
    op: str
    name: str
    old: str
    new: str

    @property
    def cuda(self) -> bool:
        return self.file.endswith((".cu", ".cuh"))


def read_faults(text: str) -> list[Fault]:
    faults, file, op = [], "", ""
    for paragraph in re.split(r"\n{2,}", text):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        if lines[0].startswith("["):
            file, _, op = lines[0].strip("[]").partition(": ")
            op = op or file.partition("/")[0]
            continue
        name, *changes = lines
        old, new = ("\n".join(x[2:] for x in changes if x.startswith(sign)) for sign in "-+")
        faults.append(Fault(f"csrc/{file}", op, name, old, new))
    return faults


def run_tests(tree: Path, op: str, cuda: bool = False) -> tuple[bool, str]:
    """Whether they pass, and which of them failed. CUDA kernels are built by their tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "random"] if cuda else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, f"tests/ops/test_{op}.py"],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return False, "(no end)"
    if done.returncode == 0:
        return True, ""
    failed = re.search(r"^FAILED .*?::(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode < 0:  # a signal
        return False, "(crash)"
    if "ninja: build stopped" in done.stdout:
        return False, NOT_BUILT
    if not failed:
        sys.exit(f"the tests of {op} do not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return False, failed[1]


def try_fault(tree: Path, fault: Fault) -> tuple[str, str]:
    with Planted(tree, fault.file, fault.old, fault.new):
        if not fault.cuda and build(tree).returncode:
            return NOT_BUILT, ""
        passes, test = run_tests(tree, fault.op, fault.cuda)
    if test == NOT_BUILT:
        return NOT_BUILT, ""
    return ("SURVIVED", "") if passes else ("caught", test)


def batches(faults: list[Fault]) -> list[list[Fault]]:
    """Of one file each, so that ninja rebuilds little, and short enough to keep all trees busy."""
    files = [list(group) for _, group in groupby(faults, key=lambda fault: fault.file)]
    return [file[i : i + BATCH] for file in files for i in range(0, len(file), BATCH)]


def try_faults(trees: Queue, faults: list[Fault]) -> list[tuple[str, str]]:
    """One after the other, in one tree."""
    tree, results = trees.get(), []
    try:
        for fault in faults:
            results.append(try_fault(tree, fault))
            print(f"{results[-1][0]:10}{fault.file}: {fault.name}", flush=True)
    finally:
        trees.put(tree)
    return results


def main(words: list[str], only_check: bool) -> int:
    faults = [
        x
        for x in read_faults(TABLE.read_text())
        if any(word in f"{x.file} {x.op} {x.name}" for word in words)
    ]
    lost = [x for x in faults if not find((ROOT / x.file).read_text(), x.old)]
    for fault in lost:
        print(f"{fault.file} has no longer, or not only once: {fault.name}\n{fault.old}")
    if lost or only_check or not faults:
        print(f"{len(faults)} faults, {len(lost)} of them no longer fit")
        return 1 if lost or not faults else 0

    with tempfile.TemporaryDirectory() as folder:
        trees = Queue()
        first = Path(folder, "0")
        copy_tree(first)
        if (done := build(first)).returncode:
            sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        for op, cuda in sorted({(fault.op, fault.cuda) for fault in faults}):
            if not run_tests(first, op, cuda)[0]:
                sys.exit(f"the tests of {op} fail without a fault")
        print(f"{len(faults)} faults, one at a time:", flush=True)
        trees.put(first)
        for i in range(1, PROCESSES):
            trees.put(shutil.copytree(first, Path(folder, str(i))))
        with ThreadPoolExecutor(PROCESSES) as pool:
            results = sum(pool.map(lambda batch: try_faults(trees, batch), batches(faults)), [])

    print()
    for fault, (result, test) in zip(faults, results, strict=True):
        print(f"{result:18}{fault.file.removeprefix('csrc/'):38}{fault.name:54}{test}")
    caught = sum(result == "caught" for result, _ in results)
    print(f"\n{caught} of {len(faults)} faults caught, at most {MAY_SURVIVE} may survive")
    return 0 if caught >= len(faults) - MAY_SURVIVE else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "words", nargs="*", default=[""], help="of the fault's file, operator or name"
    )
    parser.add_argument("--check", action="store_true", help="build nothing")
    arguments = parser.parse_args()
    sys.exit(main(arguments.words, arguments.check))
