"""Several processes train one run: `torchrun --nproc-per-node N train.py ...`, one for each GPU.

Of a step's micro-batches every process takes each N-th, whole: what one computes, its dropout and
its router losses too, does not depend on the number of processes. Gradients are summed once, at the
step's end, so that the weights stay the same everywhere. The first process alone writes and tells.
Alone, a process has all there is, and every function here hands back what it was given.

GPUs exchange gradients and sharded weights by NCCL; all else goes through the host, by gloo.
docs/running-several.md
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixlora.errors import InputError, command
from mixlora.layers.adapted_model import AdaptedModel

SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=10)  # that a process waits for one that lives, but does not come
BUCKET = 1 << 23  # elements that are summed at once: 32 MiB


def together(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A script's `main(argv)` in every process that torchrun started: where it fails in one, all
    end, and the first that failed says why; of several none returns. Below `errors.command`."""

    @functools.wraps(main)
    def joined(argv: list[str]) -> int:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return main(argv)
        begin()
        try:
            code = main(argv)
            wait()
        except BaseException as error:
            end_all(error)
        dist.destroy_process_group()
        leave(code)

    return joined


def begin() -> None:
    for name in SET_BY_TORCHRUN:
        if name not in os.environ:
            raise InputError(f"WORLD_SIZE is set, but not {name}: torchrun sets them all")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT
    )
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def end_all(error: BaseException) -> NoReturn:
    """The others learn of it as their next exchange fails; torchrun ends those that wait on."""
    try:
        speaks = dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store is gone with its process; torchrun's is not
        speaks = True
    sys.stderr = sys.__stderr__ if speaks else open(os.devnull, "w")
    where = f"in process {rank()} of {world_size()}"

    def fail(argv: list[str]) -> int:
        if isinstance(error, (InputError, OSError)):
            raise InputError(f"{error} ({where})")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).splitlines()[0]
            raise InputError(f"lost another process, which may have told why: {reason} ({where})")
        raise error

    try:
        code = command(fail)([])
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exception(error)
        code = 1
    leave(code)  # what else is left would wait for processes that are no more


def leave(code: int) -> NoReturn:
    """Without the interpreter's end: torch keeps the group, and its threads, of a sharded model, or
    where an optimizer's first step imported the rest of torch; they abort if they then ask for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """The one that writes files."""
    return rank() == 0


def device(name: str) -> torch.device:
    """Of `auto`, `cpu` or `cuda`: each of several processes has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and name != "cpu":
        if name != "cuda":
            raise InputError(f"with several processes the device is auto, cpu or cuda, got {name}")
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise InputError(f"{index + 1} processes or more on a machine with {count} GPUs")
        name = f"cuda:{index}"
        torch.cuda.set_device(name)
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name}: {str(error).splitlines()[0]}") from None


def wait() -> None:
    """Until all are here."""
    anyone(False)


def anyone(flag: bool) -> bool:
    """Whether it is true in any process."""
    if world_size() == 1:
        return flag
    found = torch.tensor(flag, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def share(items: Sequence) -> Sequence:
    """This process's neighbours among items: `gathered` puts them together again."""
    n, r, W = len(items), rank(), world_size()
    return items[n * r // W : n * (r + 1) // W]


def rounds(items: Sequence) -> list:
    """What this process does in each round, in which every process does one of the items, in their
    order, or in the last one None."""
    r, W = rank(), world_size()
    return [items[i + r] if i + r < len(items) else None for i in range(0, len(items), W)]


def gathered(values: list) -> list:
    """The lists of all processes, one after the other; of what JSON knows."""
    if world_size() == 1:
        return values
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    lengths = list(torch.zeros(world_size(), 1, dtype=torch.long))
    dist.all_gather(lengths, torch.tensor([len(text)]))
    texts = list(torch.zeros(world_size(), int(max(lengths)), dtype=torch.uint8))
    dist.all_gather(texts, nn.functional.pad(text, (0, len(texts[0]) - len(text))))
    parts = [bytes(x[:n].tolist()) for x, n in zip(texts, lengths, strict=True)]
    return [value for part in parts for value in json.loads(part)]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    if world_size() > 1:
        for x in tensors:
            dist.broadcast(x.detach(), 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Over all processes. A parameter that has a gradient in none is left without: the optimizer
    passes over it, as it does in one process."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[nn.Parameter] = []
    for parameter in (p for p, is_used in zip(parameters, used.tolist(), strict=True) if is_used):
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            sum_bucket(bucket)
            bucket = []
        bucket.append(parameter)
    if bucket:
        sum_bucket(bucket)


def sum_bucket(parameters: list[nn.Parameter]) -> None:
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def shard(model: AdaptedModel, device: torch.device) -> None:
    """Keep a part of the frozen base in each process, on `device`; a block is whole while it
    computes. Its vectors stay whole, they are small; adapters that come later do too.

    The model is best loaded on the CPU: its blocks go to the device one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    vectors = {p for p in model.parameters() if p.dim() < 2}
    for p in vectors:
        p.data = p.data.to(device)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=vectors)
    fully_shard(model, mesh=mesh, ignored_params=vectors)
    # Backward gathers a block's weights where it passes through: in each process through all.
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, x_BSD: x_BSD.requires_grad_(torch.is_grad_enabled())
    )
    model.register_forward_pre_hook(announce, prepend=True)
    model.is_sharded = True


def announce(model: AdaptedModel, inputs: object) -> None:
    if not model.follows:
        anyone(True)


def follow(model: AdaptedModel, trains: bool) -> None:
    """Processes may have run different numbers of forwards, each with its backward if it `trains`.
    A sharded model's weights come from all: one that is done computes a token along, until all are.
    """
    if not model.is_sharded:
        return
    token_BS = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    model.follows = True
    while anyone(False):
        with contextlib.nullcontext() if trains else model.evaluating():
            logits = model(token_BS, adapters=[None])
        if trains:
            logits.sum().backward()
    model.follows = False
