"""What every layer is told about the batch that a forward computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixlora.layers.kv_cache import KvCache


class Span(NamedTuple):
    """Adjacent rows of the batch that share an adapter; None is the base model."""

    name: str | None
    start: int
    end: int

    def rows(self, x_BS: Tensor) -> Tensor:
        """These rows of a tensor: the tensor itself where they are all of it."""
        return x_BS if self.end - self.start == len(x_BS) else x_BS[self.start : self.end]


@dataclass
class ForwardContext:
    """One forward's rows and routing. Made anew for each; a recomputed block is handed it again."""

    spans: tuple[Span, ...]  # in order, every row in one
    mask_BS: Tensor | None = None  # True = real token; None = all are
    segments_BS: Tensor | None = None  # documents of packed rows; None = a row is one
    cache: KvCache | None = None  # what the rows have seen before
    recompute_ffn: bool = False  # feed-forwards keep their input alone for backward
    # (span, layer) -> its Routing: a block that is computed again finds its experts here
    routing: dict[tuple[Span, Any], Any] = field(default_factory=dict)

    def sequences(self, span: Span, layer: Any) -> "Sequences":
        return Sequences(self, span, layer)


@dataclass
class Sequences:
    """What a router of `layer` may know of a span's tokens besides their hidden states."""

    context: ForwardContext
    span: Span
    layer: Any

    @property
    def mask_T(self) -> Tensor | None:
        mask_BS = self.context.mask_BS
        return None if mask_BS is None else self.span.rows(mask_BS).flatten()

    @property
    def chosen_TK(self) -> Tensor | None:
        """The experts chosen before, where a block is computed again in backward."""
        routing = self.context.routing.get((self.span, self.layer))
        return None if routing is None else routing.expert_TK

    def places(self, chosen_TE: Tensor) -> Tensor:
        """How many tokens of its sequence up to each one chose each expert, itself included [T, E].

        A sequence is a document of a packed row, else a row, with what the cache has seen of it.
        Padding counts nothing.
        """
        if not len(chosen_TE):
            return chosen_TE
        B = self.span.end - self.span.start
        mask_T, segments_BS, cache = self.mask_T, self.context.segments_BS, self.context.cache
        chosen_TE = chosen_TE if mask_T is None else chosen_TE * mask_T[:, None]
        chosen_BSE = chosen_TE.unflatten(0, (B, -1))
        place_BSE = chosen_BSE.cumsum(1)
        if segments_BS is not None:  # what was counted before a document's first token
            segments_BS = self.span.rows(segments_BS)
            starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
            starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
            before_BSE = (place_BSE - chosen_BSE) * starts_BS[..., None]
            place_BSE = place_BSE - before_BSE.cummax(1).values
        if cache is not None:
            shape = len(cache.real_BL), chosen_TE.shape[1]
            router = self.span.name, self.layer
            with torch.inference_mode(False):  # the next tokens may come outside of it
                seen_BE = cache.counts.setdefault(router, place_BSE.new_zeros(shape))
            place_BSE = place_BSE + self.span.rows(seen_BE)[:, None]
            self.span.rows(seen_BE).copy_(place_BSE[:, -1])
        return place_BSE.flatten(0, 1)


def spans_of(names: Sequence[str | None]) -> tuple[Span, ...]:
    """["a", "a", None, "b"] -> (Span("a", 0, 2), Span(None, 2, 3), Span("b", 3, 4))"""
    spans: list[Span] = []
    for row, name in enumerate(names):
        if spans and spans[-1].name == name:
            spans[-1] = spans[-1]._replace(end=row + 1)
        else:
            spans.append(Span(name, row, row + 1))
    return tuple(spans) or (Span(None, 0, 0),)
