"""A system of bench_train_step, in a process of its own: it needs torch and nothing of ours.

The first line of stdin is a JSON object; each line after it is answered by one line of JSON:

    step     a training step: forward, loss, backward, clipping, AdamW    {"loss": 8.3}
    saved    a forward alone     {"saved_bytes": what autograd keeps for backward}
    peak     {"peak_bytes": the most memory since the beginning, beyond what was there then}
"""

import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Trainee(NamedTuple):
    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]  # those that train


def serve(make: Callable[[dict[str, Any]], Trainee]) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    torch.manual_seed(0)
    trainee = make(json.loads(sys.stdin.readline()))
    optimizer = torch.optim.AdamW(trainee.parameters, lr=2e-4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    for line in sys.stdin:
        if line.strip() == "saved":
            answer = {"saved_bytes": saved_bytes(trainee.loss)}
        elif line.strip() == "peak":
            answer = {"peak_bytes": resident("VmHWM") - before}
        else:
            answer = {"loss": step(trainee, optimizer)}
        print(json.dumps(answer), file=answers, flush=True)


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
