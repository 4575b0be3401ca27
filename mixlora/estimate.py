"""What a training step holds in memory, counted without a weight: `train.py --estimate`.

The step itself is run, by a model on torch's meta device, whose tensors have shapes and no data.
What is counted is the bytes of the storages that are alive, so that no formula has to follow the
code. Where the code asks for data, it is answered for the most memory that a batch of this shape
may need: every token is real and a label, and no two rows' prompts choose the same modules.

Not in it: what kernels hold while they run, the CUDA context, the allocator's gaps, evaluation.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixlora.adapters import adapter_parameters, trained_parameters
from mixlora.batches import alike, joined
from mixlora.data import Batch
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.optim import state_bytes
from mixlora.train_config import AdapterRun

GIB = 1 << 30
CARDS = (24, 48, 80)  # GiB
RESERVED = 1.5 * GIB  # of a card: CUDA's context, the libraries' workspaces, the allocator's gaps

LIBRARY_ATTENTION = F.scaled_dot_product_attention
aten = torch.ops.aten


@dataclass(frozen=True)
class Estimate:
    """Bytes."""

    base: int  # frozen weights
    adapters: int
    gradients: int
    optimizer: int  # its state
    saved: int  # kept for backward by the micro-batch that keeps most
    loss: int  # beyond saved, while the loss is computed
    backward: int  # beyond saved, while backward runs: a block's, and gradients that are new
    update: int  # beyond the first four, in the optimizer's step
    peak: int
    checkpoint: int  # one, on disk

    def fits(self, card: int) -> bool:
        return self.peak + RESERVED <= card * GIB

    def table(self) -> str:
        rows = {
            "base weights": self.base,
            "adapters": self.adapters,
            "gradients": self.gradients,
            "optimizer's state": self.optimizer,
            "kept for backward": self.saved,
            "beyond it, in the loss": self.loss,
            "beyond it, in backward": self.backward,
            "beyond the state, in the optimizer's step": self.update,
            "at most": self.peak,
            "a checkpoint, on disk": self.checkpoint,
        }
        size, unit = (GIB, "GiB") if self.peak >= GIB else (GIB >> 10, "MiB")
        lines = [f"{name:<42}{number / size:10.3f} {unit}" for name, number in rows.items()]
        cards = (f"{card} GB {'yes' if self.fits(card) else 'no'}" for card in CARDS)
        fits = f"fits a card of: {', '.join(cards)} ({RESERVED / GIB} GiB left for all else)"
        return "\n".join([*lines, fits])


def estimate(model: AdaptedModel, runs: list[AdapterRun], device: str = "cuda") -> Estimate:
    """Of a model on the meta device that holds these runs' adapters, which train together.

    `device` chooses the attention kernel, which decides what attention saves.
    """
    held = Held(model, runs)
    resting = sum(sizes_of([*model.parameters(), *model.buffers()]).values())
    trained = {run.name: trained_parameters(model, run.name) for run in runs}
    learned = [p for parameters in trained.values() for p in parameters.values()]
    adapters = [p for run in runs for p in adapter_parameters(model, run.name).values()]
    size = sum(sizes_of(adapters).values())
    gradients = sum(sizes_of(learned).values())
    optimizer = sum(state_bytes(trained[run.name].values(), run.optim) for run in runs)
    batches = {run.name: full_batch(run) for run in runs}
    accumulates = any(run.train.batch_size > rows_of(run) for run in runs)
    steps = []
    with held, attention_of(device):
        for parameter in learned if accumulates else ():  # by earlier micro-batches
            parameter.grad = torch.empty_like(parameter)
        for group in alike(batches):
            chosen = [run for run in runs if run.name in group]
            steps.append(micro_batch(model, chosen, group, held))
    step_peak = resting + optimizer + max(step.peak for step in steps)
    update = gradients  # torch's AdamW for many tensors at once: a root of each second moment
    saved = max(step.saved for step in steps)
    return Estimate(
        base=resting - size,
        adapters=size,
        gradients=gradients,
        optimizer=optimizer,
        saved=saved,
        loss=max(step.loss for step in steps),
        backward=max(step.backward for step in steps),
        update=update,
        peak=max(step_peak, resting + gradients + optimizer + update),
        checkpoint=size + optimizer,
    )


@dataclass(frozen=True)
class Step:
    saved: int
    loss: int
    backward: int
    peak: int  # beyond what rests, gradients from before included


def micro_batch(
    model: AdaptedModel, runs: list[AdapterRun], batches: dict[str, Batch], held: "Held"
) -> Step:
    """A forward and a backward as train.py makes them."""
    settings = [run.train for run in runs]
    model.train()
    model.gradient_checkpointing = any(x.gradient_checkpointing for x in settings)
    model.recompute_ffn = any(x.activation == "recompute" for x in settings)
    batch, spans = joined(batches)
    before = held.now
    held.turn()
    peaks: list[int] = []
    hook = model.model["layers"][-1].register_forward_hook(lambda *_: peaks.append(held.turn()))
    loss_B, _ = model(
        batch.tokens_BS,
        mask_BS=batch.mask_BS,
        positions_BS=batch.positions_BS,
        adapters=spans,
        labels_BS=batch.labels_BS,
        by_row=True,
    )
    hook.remove()
    loss = loss_B.sum() + model.router_loss()
    peaks.append(held.turn())
    kept = held.now
    loss.backward()
    peaks.append(held.turn())
    _, in_loss, in_backward = peaks
    return Step(kept - before, in_loss - kept, in_backward - kept, max(peaks))


def rows_of(run: AdapterRun) -> int:
    return min(run.train.micro_batch_size or run.train.batch_size, run.train.batch_size)


def full_batch(run: AdapterRun) -> Batch:
    """The largest micro-batch that the run may have."""
    B, S = rows_of(run), run.train.max_seq_len
    tokens_BS = torch.empty(B, S, dtype=torch.int64, device="meta")
    mask_BS = torch.empty(B, S, dtype=torch.bool, device="meta")
    positions_BS = torch.empty_like(tokens_BS) if run.data.loss_on == "padded_text" else None
    return Batch(tokens_BS, mask_BS, tokens_BS, B * (S - 1), positions_BS)


def sizes_of(tensors: list[Tensor]) -> dict[int, int]:
    """Each storage's bytes once."""
    storages = (x.untyped_storage() for x in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


class Held(TorchDispatchMode):
    """Counts the bytes that tensors made within it hold, beyond the model's; answers for data."""

    def __init__(self, model: AdaptedModel, runs: list[AdapterRun]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = set(sizes_of([*model.parameters(), *model.buffers()]))
        self.device = next(model.parameters()).device
        prompts = [run for run in runs if run.adapter.routes_prompts]
        self.num_active = max((run.adapter.top_k for run in prompts), default=0)
        self.num_prompts = max(map(rows_of, prompts), default=0)

    def turn(self) -> int:
        """The most since the last turn."""
        most, self.most = self.most, self.now
        return most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        is_asked = self.device.type == "meta" and func in ANSWERS and args[0].is_meta
        result = ANSWERS[func](self, *args) if is_asked else func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device == self.device:
                self.count(x.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def scalar(self, x: Tensor) -> Any:
        return torch.zeros((), dtype=x.dtype).item()

    def nonzero(self, x: Tensor) -> Tensor:
        """Of a mask all; of the prompts' weights [E, T] those of the modules they choose."""
        count = x.numel()
        if x.is_floating_point():
            count = count * self.num_active // len(x)
        return torch.empty(count, x.dim(), dtype=torch.int64, device="meta")

    def bincount(self, x: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
        """One prompt chooses for all tokens, several for some of every module's."""
        if self.num_prompts == 1:
            num_idle = minlength - self.num_active
            return torch.tensor([0] * num_idle + [len(x) // self.num_active] * self.num_active)
        share, rest = divmod(len(x), minlength)
        return torch.tensor([share + (e < rest) for e in range(minlength)])

    def index(self, x: Tensor, indices: list[Tensor | None]) -> Tensor:
        return aten.index.Tensor(x, self.of_masks(indices))

    def index_put(self, x: Tensor, indices: list, values: Tensor, accumulate: bool = False):
        return aten.index_put.default(x, self.of_masks(indices), values, accumulate)

    def index_put_(self, x: Tensor, indices: list, values: Tensor, *options: bool) -> Tensor:
        return x

    def of_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            found += self.nonzero(index).unbind(1) if is_mask else [index]
        return found

    def masked_scatter_backward(self, dy: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
        return dy.new_empty(sizes)


ANSWERS = {
    aten._local_scalar_dense.default: Held.scalar,
    aten.nonzero.default: Held.nonzero,
    aten.bincount.default: Held.bincount,
    aten.index.Tensor: Held.index,
    aten.index_put.default: Held.index_put,
    aten.index_put_.default: Held.index_put_,
    aten._index_put_impl_.default: Held.index_put_,
    aten.masked_scatter_backward.default: Held.masked_scatter_backward,
}


@contextlib.contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Within it, attention on the meta device is that of a CPU or of a GPU. (As a mode of torch
    functions it would not reach what backward computes again.)"""
    on_meta = cpu_attention if torch.device(device).type == "cpu" else gpu_attention

    def attention(q: Tensor, *inputs: Any, **options: Any) -> Tensor:
        return (on_meta if q.is_meta else LIBRARY_ATTENTION)(q, *inputs, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = LIBRARY_ATTENTION


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, **options: Any
) -> Tensor:
    run = aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k, v, 0.0, is_causal, attn_mask=added(mask, q))[0]


def gpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, **options: Any
) -> Tensor:
    """Flash attention where there is no mask, the memory-efficient one with a mask if keys have as
    many heads as queries; else the probabilities are formed, S x S for every head."""
    if mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if q.shape[1] == k.shape[1]:
        bias = added(mask, q)
        bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        run = aten._scaled_dot_product_efficient_attention
        return run(q, k, v, bias, True, 0.0, is_causal)[0]
    return LIBRARY_ATTENTION(q, k, v, mask, is_causal=is_causal, **options)


def added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores: as the library makes it of a mask."""
    return None if mask is None else torch.empty_like(mask, dtype=q.dtype)
