"""The batches of several adapters as one batch of the base model."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.data import NO_LABEL, Batch
from mixlora.layers.context import Span

MAX_PADDING = 1.25  # of a row's length by its neighbours; beyond it they had better go alone


def alike(batches: dict[str, Batch]) -> list[dict[str, Batch]]:
    """Batches by adapter, in groups of similar lengths, which are worth joining."""
    groups: list[dict[str, Batch]] = []
    longest = 0
    for name, batch in sorted(batches.items(), key=lambda item: -item[1].tokens_BS.shape[1]):
        S = batch.tokens_BS.shape[1]
        if groups and longest <= MAX_PADDING * S:
            groups[-1][name] = batch
        else:
            groups.append({name: batch})
            longest = S
    return groups


def joined(batches: dict[str, Batch]) -> tuple[Batch, list[Span]]:
    """Their rows, one below the other, and whose they are. What is added on the right is masked
    and has no label, even where an adapter learns its own padding."""
    S = max(batch.tokens_BS.shape[1] for batch in batches.values())

    def rows(parts: list[Tensor], filler: int) -> Tensor:
        return torch.cat([F.pad(x_BS, (0, S - x_BS.shape[1]), value=filler) for x_BS in parts])

    tokens, masks, labels, num_labels, positions, segments = zip(*batches.values(), strict=True)
    tokens_BS = rows(tokens, 0)
    positions_BS = segments_BS = None
    if any(x_BS is not None for x_BS in segments):  # a row that is not packed is one segment
        one = [torch.zeros_like(x_BS) for x_BS in tokens]
        segments_BS = rows(
            [x if x is not None else y for x, y in zip(segments, one, strict=True)], -1
        )
    elif any(x_BS is not None for x_BS in positions):  # the same where it is not given
        positions_BS = torch.arange(S, device=tokens_BS.device).expand_as(tokens_BS)
    batch = Batch(
        *(tokens_BS, rows(masks, False), rows(labels, NO_LABEL)),
        *(sum(num_labels), positions_BS, segments_BS),
    )
    ends = itertools.accumulate(map(len, tokens), initial=0)
    spans = [
        Span(name, start, end, x_BS.shape[1])
        for name, x_BS, (start, end) in zip(batches, tokens, itertools.pairwise(ends), strict=True)
    ]
    return batch, spans
