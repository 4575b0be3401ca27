"""Memory that does not suffice: how it is known, and what held it, in a file."""

import contextlib
import gc
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mixlora.errors import InputError
from mixlora.files import to_json, write_bytes

MOST = 50  # kinds of tensors that are listed
WORDS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",  # of CUDA itself, and of its libraries
    "CUBLAS_STATUS_ALLOC_FAILED",
)
# where our operators ask torch for memory, through an interface that loses the reason
IN_AN_OPERATOR = re.compile(r'"aten::(new_empty|empty_like|contiguous|to)".* API call failed', re.S)


def is_out_of_memory(error: BaseException) -> bool:
    """The CPU's allocator raises a plain RuntimeError, and so does a kernel."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if IN_AN_OPERATOR.search(str(error)):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises what a kernel did before: it fails all that follows
        return True
    return any(word in str(error) for word in WORDS)


def reason_of(error: BaseException) -> str:
    """Of one that is out of memory, without what a GPU's allocator adds."""
    if IN_AN_OPERATOR.search(str(error)):
        return "an operator found none for what it returns"
    return str(error).partition(" Of the allocated memory")[0].strip() or type(error).__name__


@contextlib.contextmanager
def memory_for_loading(path: Path, weights_bytes: int) -> Iterator[None]:
    """A failed allocation becomes one error, which says how much the weights of `path` take."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory ({reason_of(error)}) in loading {path}: its weights take "
            f"{weights_bytes / 2**30:.3f} GiB. Less is needed in bfloat16, quantized, or, in "
            "training, sharded over several processes (dtype, quantize, model.shard)"
        ) from None


class Snapshot:
    """Of what holds memory when it is made. It is made of a failure, and what fails in its making
    or its writing is told beside that one, not in its place."""

    def __init__(self, model: nn.Module) -> None:
        self.failure: str | None = None
        try:
            self.held = {**resident(), "tensors": largest_tensors(model)}
            self.blocks: bytes | None = None  # of CUDA's allocator
            device = device_of(model)
            if device.type == "cuda":
                self.held["cuda"] = dict(torch.cuda.memory_stats(device))
                # what torch's _dump_snapshot writes, which is not whole or not at all
                self.blocks = pickle.dumps(torch.cuda.memory._snapshot())
        except Exception as error:
            self.failure = _reason(error)

    def write(self, path: Path, **about: object) -> str:
        """As JSON, with what it is `about`; CUDA's blocks beside it, as .pickle. Says where they
        are, or why they are not."""
        if self.failure is not None:
            return f"what held memory cannot be told: {self.failure}"
        contents = {path: lambda: to_json({**about, **self.held})}
        if self.blocks is not None:
            contents[path.with_suffix(".pickle")] = lambda: self.blocks
        said = []
        for file, content in contents.items():
            try:
                write_bytes(file, content())
                said.append(f"what held memory is in {file}")
            except Exception as error:
                said.append(f"what held memory cannot be written to {file}: {_reason(error)}")
        return "; ".join(said)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _reason(error: Exception) -> str:
    """Not the error itself: its traceback would keep what was being computed."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def resident() -> dict[str, int]:
    """Bytes of the process's physical memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    now, most = (1024 * int(found[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return {"resident_bytes": now, "peak_bytes": most}


def largest_tensors(model: nn.Module) -> dict:
    """Of all tensors that Python knows the bytes, and the kinds that have most of them; as JSON.

    Each storage counts once, as the largest tensor that lies in it; alike in shape, dtype, device
    and name are of a kind. Names have the model's parameters and buffers, and their gradients.
    """
    held: dict[int, Tensor] = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor) and _has_data(x):  # isinstance would ask lazy modules
            other = held.setdefault(_storage(x), x)
            if other.numel() < x.numel() and x.nbytes <= x.untyped_storage().nbytes():
                held[_storage(x)] = x
    names = {}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        names[_storage(x)] = name
        if x.grad is not None:
            names[_storage(x.grad)] = f"{name}.grad"
    kinds: dict[tuple, list[int]] = {}
    for key, x in held.items():
        kind = tuple(x.shape), str(x.dtype), str(x.device), names.get(key)
        kinds.setdefault(kind, []).append(x.untyped_storage().nbytes())
    largest = sorted(kinds.items(), key=lambda item: sum(item[1]), reverse=True)
    return {
        "bytes": sum(map(sum, kinds.values())),
        "storages": len(held),
        "largest": [
            {
                "bytes": sum(sizes),
                "count": len(sizes),
                "shape": list(shape),
                "dtype": dtype.removeprefix("torch."),
                "device": device,
                "name": name,
            }
            for (shape, dtype, device, name), sizes in largest[:MOST]
        ],
    }


def _has_data(x: Tensor) -> bool:
    """Of a sharded tensor, the part that is here has; the whole is a name for it."""
    return x.layout == torch.strided and not x.is_meta and not hasattr(x, "to_local")


def _storage(x: Tensor) -> int:
    own = x.to_local() if hasattr(x, "to_local") else x
    return own.untyped_storage()._cdata
