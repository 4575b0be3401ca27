"""What every layer is told about the batch that a forward computes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.errors import InputError
from mixlora.layers.kv_cache import KvCache
from mixlora.ops import Plan, moe_sort
from mixlora.ops.philox import draw_seed


class Member(NamedTuple):
    """A row's adapter as one of a stack's (layers/stack.py)."""

    stack: str
    index: int


class Span(NamedTuple):
    """Adjacent rows of the batch that share an adapter.

    None is the base model, with the stacks around it that the rows' adapters are members of. Of
    rows that others made longer, the adapter computes the first `length` tokens: with them its
    shapes, and so its dropout and its sums, are those it has alone.
    """

    name: str | None
    start: int
    end: int
    length: int | None = None  # None: all

    def rows(self, x_BS: Tensor) -> Tensor:
        """Its part of a tensor: the tensor itself where that is all of it."""
        x_BS = x_BS if self.end - self.start == len(x_BS) else x_BS[self.start : self.end]
        return x_BS if self.length in (None, x_BS.shape[1]) else x_BS[:, : self.length]


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
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)  # others: torch's
    stacked: dict[tuple[Span, str], StackedRows] = field(default_factory=dict)
    # (span, layer) -> its Routing: a block that is computed again finds its experts here
    routing: dict[tuple[Span, Any], Any] = field(default_factory=dict)
    seeds: dict[tuple[Span, Any, int], int] = field(default_factory=dict)  # and its dropout here
    prompt_BS: Tensor | None = None  # True = token that a prompt router pools, never padding
    continues_B: Sequence[bool] = ()  # the cache holds tokens of a row: its prompt is behind it
    # (span, layer) -> for each of its modules, which of the span's tokens it changes
    gates: dict[tuple[Span, int], list[Any]] = field(default_factory=dict)

    def adapters_of(self, span: Span) -> list[str]:
        """The names under which layers may hold something for a span's rows."""
        if span.name is not None:
            return [span.name]
        return [name for stacked, name in self.stacked if stacked == span]

    def continues(self, span: Span) -> bool:
        return any(self.continues_B[span.start : span.end])

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


# A sharded model's blocks would be handed copies of a dataclass; what they share is one object.
del ForwardContext.__dataclass_fields__


@dataclass
class Sequences:
    """What `layer` may know of a span's tokens besides their hidden states, and its randomness."""

    context: ForwardContext
    span: Span
    layer: Any
    num_drawn: int = 0

    def seed(self) -> int:
        """Of the layer's next random numbers: from its adapter's own generator, whoever shares the
        batch, and as before where a block is computed again."""
        key, seeds = (self.span, self.layer, self.num_drawn), self.context.seeds
        self.num_drawn += 1
        if key not in seeds:
            seeds[key] = draw_seed(self.context.generators.get(self.span.name))
        return seeds[key]

    @property
    def mask_T(self) -> Tensor | None:
        mask_BS = self.context.mask_BS
        return None if mask_BS is None else self.span.rows(mask_BS).flatten()

    @property
    def prompts_BQS(self) -> Tensor:
        return self.span.rows(self.context.prompts_BQS.mT).mT

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
            key = self.layer, chosen_TE.shape[1]
            seen_BE = cache.state(key)
            if seen_BE is None:
                seen_BE = place_BSE.new_zeros(cache.num_rows, chosen_TE.shape[1])
            place_BSE = place_BSE + self.span.rows(seen_BE)[:, None]
            seen_BE = seen_BE.clone()
            self.span.rows(seen_BE).copy_(place_BSE[:, -1])
            cache.set_state(key, seen_BE)
        return place_BSE.flatten(0, 1)


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Neighbouring rows of x, which may be overwritten; backward joins them in one step, where
    slices would be a step each, and each as large as x."""
    return [x] if len(sizes) == 1 else torch.unsafe_split_with_sizes(x, sizes)


def rows_of(spans: Sequence[Span], x_BS: Tensor) -> list[Tensor]:
    """Each span's part of a tensor."""
    parts = split(x_BS, [span.end - span.start for span in spans])
    return [
        part if span.length in (None, part.shape[1]) else part[:, : span.length]
        for span, part in zip(spans, parts, strict=True)
    ]


def put_together(parts: Sequence[Tensor], S: int) -> Tensor:
    """Spans' rows [B, S or less, D], one below the other: [B, S, D], zero where one has none."""
    parts = [x if x.shape[1] == S else F.pad(x, (0, 0, 0, S - x.shape[1])) for x in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def check_spans(spans: Sequence[Span], B: int, S: int) -> tuple[Span, ...]:
    """They cover the batch's rows in order, each at most S tokens long."""
    ends = [0, *(span.end for span in spans)]
    rising = all(start < end for start, end in itertools.pairwise(ends))
    if [span.start for span in spans] != ends[:-1] or ends[-1] != B or not rising:
        raise InputError(f"spans must cover rows 0 to {B} in order, got {list(map(tuple, spans))}")
    for span in spans:
        if span.length is not None and not 0 < span.length <= S:
            raise InputError(f"a span's length must be in [1, {S}], got {span.length}")
    return tuple(spans)
