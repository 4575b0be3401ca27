"""A system of bench_train_step, in a process of its own: it needs torch and nothing of ours.

The first line of stdin is a JSON object; each line after it is answered by one line of JSON:

    step     a training step: forward, loss, backward, clipping, AdamW
             {"loss": 8.3, "seconds": 0.7}
    saved    a forward alone     {"saved_bytes": what autograd keeps for backward}
    peak     {"peak_bytes": the most memory since the beginning, beyond "held_bytes", of then}
"""

import gc
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Trainee(NamedTuple):
    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]  # those that train


class Trainer:
    """What answers; on the options' device."""

    def __init__(self, make: Callable[[dict[str, Any]], Trainee], options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.on_gpu = options.get("device", "cpu") != "cpu"
        self.trainee = make(options)
        self.optimizer = torch.optim.AdamW(self.trainee.parameters, lr=2e-4)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        self.held_bytes = self.memory()

    def answer(self, what: str) -> dict[str, float]:
        if what == "saved":
            return {"saved_bytes": saved_bytes(self.trainee.loss)}
        if what == "peak":
            beyond = self.memory(at_most=True) - self.held_bytes
            return {"peak_bytes": beyond, "held_bytes": self.held_bytes}
        start = time.perf_counter()
        loss = step(self.trainee, self.optimizer)  # a number: what ran on a GPU has ended
        return {"loss": loss, "seconds": time.perf_counter() - start}

    def memory(self, at_most: bool = False) -> int:
        if self.on_gpu:
            return (torch.cuda.max_memory_allocated if at_most else torch.cuda.memory_allocated)()
        return resident("VmHWM" if at_most else "VmRSS")


def serve(make: Callable[[dict[str, Any]], Trainee]) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    trainer = Trainer(make, json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(trainer.answer(line.strip())), file=answers, flush=True)


def step(trainee: Trainee, optimizer: torch.optim.Optimizer) -> float:
    loss = trainee.loss()
    loss.backward()
    nn.utils.clip_grad_norm_(trainee.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Each storage that autograd keeps once, without the parameters."""
    known = {storage_of(x) for x in gc.get_objects() if type(x) is nn.Parameter}
    packed: list[weakref.ref[Tensor]] = []  # what a function let go again is not kept

    def pack(x: Tensor) -> Tensor:
        packed.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = loss()
    kept = [x for x in (reference() for reference in packed) if x is not None]
    sizes = {storage_of(x): x.untyped_storage().nbytes() for x in kept}
    del result
    return sum(size for storage, size in sizes.items() if storage not in known)


def storage_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def resident(key: str) -> int:
    """Bytes of physical memory: VmRSS, of now; VmHWM, at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(key)).split()[1])
