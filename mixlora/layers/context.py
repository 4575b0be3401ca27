"""What every layer is told about the batch that a forward computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    # (span, feed-forward) -> its Routing: a block that is computed again finds its experts here
    routing: dict[tuple[Span, Any], Any] = field(default_factory=dict)


def spans_of(names: Sequence[str | None]) -> tuple[Span, ...]:
    """["a", "a", None, "b"] -> (Span("a", 0, 2), Span(None, 2, 3), Span("b", 3, 4))"""
    spans: list[Span] = []
    for row, name in enumerate(names):
        if spans and spans[-1].name == name:
            spans[-1] = spans[-1]._replace(end=row + 1)
        else:
            spans.append(Span(name, row, row + 1))
    return tuple(spans)
