"""Processes as torchrun starts them, without its seconds: forked from one that has imported all."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

import train

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.several", "torch.distributed.fsdp", "torch._dynamo"])


def train_rank(*argv: str) -> int:
    return train.main(list(argv))


def enter(rank: int, environment: dict[str, str], output: str, work: Callable, *args: Any) -> None:
    os.environ |= environment
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(work(*args))


@contextmanager
def started(
    world_size: int, folder: Path, work: Callable[..., int], *args: Any
) -> Iterator[list[BaseProcess]]:
    """`work(*args)` in every process, with torchrun's environment; the store is the caller's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("rank.*"):
        path.unlink()
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        process = FORKS.Process(
            target=enter, args=(rank, environment, str(folder / "rank"), work, *args)
        )
        process.start()
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(
    world_size: int, folder: Path, work: Callable[..., int], *args: Any, seconds: float = 120
) -> tuple[list[int], list[str], list[str]]:
    """Their exit codes, and what each wrote on stdout and stderr; all must end in time."""
    with started(world_size, folder, work, *args) as processes:
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    outputs, errors = (
        [(folder / f"rank.{rank}.{stream}").read_text() for rank in range(world_size)]
        for stream in ("out", "err")
    )
    assert None not in codes, (codes, errors)
    return codes, outputs, errors
