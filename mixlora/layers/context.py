"""What every layer is told about the batch that a forward computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    prompt_BS: Tensor | None = None  # True = token that a prompt router pools, never padding
    continues: bool = False  # the cache holds tokens of these rows: their prompts are behind them
    # (span, layer) -> for each of its modules, which of the span's tokens it changes
    gates: dict[tuple[Span, int], list[Any]] = field(default_factory=dict)

    def sequences(self, span: Span, layer: Any) -> "Sequences":
        return Sequences(self, span, layer)

    @cached_property
    def document_BS(self) -> Tensor:
        """Which document of its row each token of packed rows belongs to, from 0."""
        return starts(self.segments_BS).cumsum(1) - 1

    @cached_property
    def prompts_BQS(self) -> Tensor:
        """The tokens of the prompt of each row's q-th document; Q is 1 but in packed rows."""
        if self.segments_BS is None:
            return self.prompt_BS[:, None]
        num_documents = int(self.document_BS.max()) + 1 if self.document_BS.numel() else 1
        document_Q1 = torch.arange(num_documents, device=self.prompt_BS.device)[:, None]
        return self.prompt_BS[:, None] & (self.document_BS[:, None] == document_Q1)


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
    def prompts_BQS(self) -> Tensor:
        return self.span.rows(self.context.prompts_BQS)

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
        segments_BS = None if segments_BS is None else self.span.rows(segments_BS)
        place_BSE = counted(chosen_TE.unflatten(0, (B, -1)), segments_BS)
        if cache is not None:
            shape = len(cache.real_BL), chosen_TE.shape[1]
            router = self.span.name, self.layer
            with torch.inference_mode(False):  # the next tokens may come outside of it
                seen_BE = cache.counts.setdefault(router, place_BSE.new_zeros(shape))
            place_BSE = place_BSE + self.span.rows(seen_BE)[:, None]
            self.span.rows(seen_BE).copy_(place_BSE[:, -1])
        return place_BSE.flatten(0, 1)


def starts(segments_BS: Tensor) -> Tensor:
    """True at the first token of every document of packed rows."""
    starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    return starts_BS


def counted(count_BSE: Tensor, segments_BS: Tensor | None) -> Tensor:
    """Running sums along the row, from 0 in every document."""
    sum_BSE = count_BSE.cumsum(1)
    if segments_BS is None:
        return sum_BSE
    before_BSE = (sum_BSE - count_BSE) * starts(segments_BS)[..., None]
    return sum_BSE - before_BSE.cummax(1).values


def before_labels(labels_BS: Tensor, segments_BS: Tensor | None) -> Tensor:
    """True at the tokens of a document before its first label (-100 = none).

    Its first token is always one of them: nothing predicts it, whatever its label.
    """
    is_label_BS = labels_BS != -100
    if segments_BS is None:
        is_label_BS[:, :1] = False
    else:
        is_label_BS &= ~starts(segments_BS)
    return counted(is_label_BS[..., None].long(), segments_BS)[..., 0] == 0


def spans_of(names: Sequence[str | None]) -> tuple[Span, ...]:
    """["a", "a", None, "b"] -> (Span("a", 0, 2), Span(None, 2, 3), Span("b", 3, 4))"""
    spans: list[Span] = []
    for row, name in enumerate(names):
        if spans and spans[-1].name == name:
            spans[-1] = spans[-1]._replace(end=row + 1)
        else:
            spans.append(Span(name, row, row + 1))
    return tuple(spans) or (Span(None, 0, 0),)
