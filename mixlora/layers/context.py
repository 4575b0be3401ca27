"""What every layer is told about the batch that a forward computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixlora.layers.kv_cache import KvCache
from mixlora.ops import Plan, moe_sort


class Member(NamedTuple):
    """A row's adapter as one of a stack's (layers/stack.py)."""

    stack: str
    index: int


class Span(NamedTuple):
    """Adjacent rows of the batch that share an adapter.

    None is the base model, with the stacks around it that the rows' adapters are members of.
    """

    name: str | None
    start: int
    end: int

    def rows(self, x_BS: Tensor) -> Tensor:
        """These rows of a tensor: the tensor itself where they are all of it."""
        return x_BS if self.end - self.start == len(x_BS) else x_BS[self.start : self.end]


class StackedRows(NamedTuple):
    """Which of a span's tokens belong to members of a stack."""

    is_all: bool
    member_T: Tensor  # int32; -1 = to none
    plan: Plan  # the member as the one expert of a token


@dataclass
class ForwardContext:
    """One forward's rows and routing. Made anew for each; a recomputed block is handed it again."""

    spans: tuple[Span, ...]  # in order, every row in one
    mask_BS: Tensor | None = None  # True = real token; None = all are
    segments_BS: Tensor | None = None  # documents of packed rows; None = a row is one
    cache: KvCache | None = None  # what the rows have seen before
    recompute_ffn: bool = False  # feed-forwards keep their input alone for backward
    stacked: dict[tuple[Span, str], StackedRows] = field(default_factory=dict)
    # (span, layer) -> its Routing: a block that is computed again finds its experts here
    routing: dict[tuple[Span, Any], Any] = field(default_factory=dict)

    def adapters_of(self, span: Span) -> list[str]:
        """The names under which layers may hold something for a span's rows."""
        if span.name is not None:
            return [span.name]
        return [name for stacked, name in self.stacked if stacked == span]

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
            key = self.layer, chosen_TE.shape[1]
            seen_BE = cache.state(key)
            if seen_BE is None:
                seen_BE = place_BSE.new_zeros(cache.num_rows, chosen_TE.shape[1])
            place_BSE = place_BSE + self.span.rows(seen_BE)[:, None]
            seen_BE = seen_BE.clone()
            self.span.rows(seen_BE).copy_(place_BSE[:, -1])
            cache.set_state(key, seen_BE)
        return place_BSE.flatten(0, 1)


def spans_of(names: Sequence[str | Member | None]) -> tuple[Span, ...]:
    """["a", "a", None, "b"] -> (Span("a", 0, 2), Span(None, 2, 3), Span("b", 3, 4))"""
    spans: list[Span] = []
    for row, name in enumerate(names):
        name = None if isinstance(name, Member) else name
        if spans and spans[-1].name == name:
            spans[-1] = spans[-1]._replace(end=row + 1)
        else:
            spans.append(Span(name, row, row + 1))
    return tuple(spans) or (Span(None, 0, 0),)


def stacked_rows(
    spans: Sequence[Span], names: Sequence[str | Member | None], sizes: dict[str, int], x_BS: Tensor
) -> dict[tuple[Span, str], StackedRows]:
    """What the base's spans have of every stack (name -> its size), token by token of x_BS."""
    stacked = {}
    for span in spans:
        row_names = [] if span.name is not None else names[span.start : span.end]
        for stack in dict.fromkeys(x.stack for x in row_names if isinstance(x, Member)):
            index_B = [
                x.index if isinstance(x, Member) and x.stack == stack else -1 for x in row_names
            ]
            member_B = torch.tensor(index_B, dtype=torch.int32)
            member_T = member_B.repeat_interleave(x_BS.shape[1]).to(x_BS.device)
            plan = moe_sort(member_T[:, None], sizes[stack])
            stacked[span, stack] = StackedRows(-1 not in index_B, member_T, plan)
    return stacked
