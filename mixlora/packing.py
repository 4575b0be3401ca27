"""Samples packed into rows: the same samples and the same losses with hardly any padding.

The samples of an optimizer step are those it has without packing. They are laid into as few rows of
at most max_seq_len tokens as this finds, and evenly, since a batch is as long as its longest row:

    lengths 7, 5, 4, 3, 1 in rows of at most 10:   [7, 3] [5, 4, 1]

A row's samples do not see each other (`segments_BS` of the models), and each begins at position 0.
"""

from collections.abc import Sequence

from mixlora.data import PackedRow, Sample


def packed(samples: Sequence[Sample], max_seq_len: int) -> list[PackedRow]:
    """Rows of all samples, none of which is longer than max_seq_len."""
    num_rows = -(-sum(len(sample.tokens) for sample in samples) // max_seq_len)
    while True:
        rows = evenly(samples, num_rows)
        if all(sum(len(sample.tokens) for sample in row) <= max_seq_len for row in rows):
            return [joined(row) for row in rows]
        num_rows += 1


def evenly(samples: Sequence[Sample], num_rows: int) -> list[list[Sample]]:
    """Each, the longest first, to the row with the fewest tokens."""
    rows: list[list[Sample]] = [[] for _ in range(num_rows)]
    num_tokens = [0] * num_rows
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        row = num_tokens.index(min(num_tokens))
        rows[row].append(sample)
        num_tokens[row] += len(sample.tokens)
    return rows


def joined(row: Sequence[Sample]) -> PackedRow:
    tokens = [token for sample in row for token in sample.tokens]
    labels = [label for sample in row for label in sample.labels]
    return PackedRow(tokens, labels, [len(sample.tokens) for sample in row])
