"""What is told and kept when a step fails: numbers that are not finite, memory that does not
suffice."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from mixlora.data import Sample
from mixlora.errors import InputError
from mixlora.memory import Snapshot, is_out_of_memory, reason_of
from mixlora.metrics import tell

Item = TypeVar("Item")
Result = TypeVar("Result")


def non_finite_report(
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[tuple[int, Sample]],
    losses: Sequence[Sequence[float]],
) -> dict:
    """As JSON: the step's samples by their index in the dataset, the loss of every row of its
    micro-batches, and norms of each trained tensor and of its gradient."""
    return {
        "row_losses": [[_number(x) for x in loss_B] for loss_B in losses],
        "tensors": {
            name: {
                "weight_norm": _norm(parameter),
                "gradient_norm": None if parameter.grad is None else _norm(parameter.grad),
                "gradient_not_finite": None
                if parameter.grad is None
                else int((~parameter.grad.isfinite()).sum()),
            }
            for name, parameter in parameters.items()
        },
        "samples": [{"index": i, **sample._asdict()} for i, sample in samples],
    }


def _norm(x: Tensor) -> float | str:
    return _number(x.detach().double().norm().item())


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)  # JSON has no nan


@contextlib.contextmanager
def memory_for_training(
    model: nn.Module,
    state: Callable[[], str],
    estimated: Callable[[], Mapping[str, int]],
    snapshot: Callable[[], Path],
) -> Iterator[None]:
    """A failed allocation becomes one error, which says `state()`, the `peak` of the bytes that are
    `estimated()`, and what would need less. What held memory is written to the file `snapshot()`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = reason_of(error)
        held = Snapshot(model)
        error.__traceback__ = None  # its frames hold what was being computed
        where, needed = state(), estimated()
        written = held.write(snapshot(), error=said, state=where, estimated_bytes=dict(needed))
        raise InputError(
            f"out of memory ({said}) in {where}; {written}. By --estimate it takes up to "
            f"{needed['peak'] / 2**30:.3f} GiB without what kernels and libraries take for "
            "themselves. Less is needed with train.gradient_checkpointing=true or "
            "train.activation=recompute, with which --resume goes on to the same bits; or, with "
            "--allow-changes, with a smaller train.micro_batch_size or train.max_seq_len"
        ) from None


def in_batches(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Result], is_sharded: bool
) -> Iterator[tuple[Sequence[Item], Result]]:
    """(batch, work(batch)) for all items in order, `size` at a time, or half as many as often as
    memory does not suffice. Of a sharded model that is an error: the other processes are in the
    midst of the same forward, and would wait for its end."""
    start, wanted = 0, size
    while start < len(items):
        batch = items[start : start + size]
        try:
            done = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise InputError("out of memory in a batch of 1: none is smaller") from None
            if is_sharded:
                raise InputError(
                    f"out of memory in a batch of {len(batch)}: with model.shard no process can "
                    "halve its batch alone, eval.batch_size must be smaller for all"
                ) from None
            size = len(batch) // 2
        else:
            if size < wanted:
                tell(f"memory does not suffice for {wanted} rows at once, but for {size}")
                wanted = size
            yield batch, done
            start += len(batch)
