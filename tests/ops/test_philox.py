import pytest
import torch
from torch import Tensor

from mixlora.ops.philox import keep_mask, philox

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)

# Known answers of Random123's philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ("0" * 32, "0" * 16, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("f" * 32, "f" * 16, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    digits = text.replace(" ", "")
    return [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]


def seed_of(low: int, high: int) -> Tensor:
    value = high << 32 | low
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


@pytest.mark.parametrize("counter, key, wanted", KNOWN)
def test_known_answers(counter: str, key: str, wanted: str) -> None:
    counter = [torch.tensor([word]) for word in words(counter)]
    assert [int(word) for word in philox(counter, seed_of(*words(key)))] == words(wanted)


@pytest.mark.parametrize("counter, key, wanted", KNOWN[:1])
def test_elements_of_a_mask_are_words_of_the_stream(counter: str, key: str, wanted: str) -> None:
    """Column f of row 0 is word f mod 4 of counter (f div 4, 0, 0, 0)."""
    rate = [word / 2**32 for word in words(wanted)]
    for column, p in enumerate(rate):
        row_N = torch.zeros(1, dtype=torch.int32)
        assert keep_mask(seed_of(0, 0), row_N, 4, p - 1e-6)[0, column]
        assert not keep_mask(seed_of(0, 0), row_N, 4, p + 1e-6)[0, column]


def test_row_and_column_are_the_counter() -> None:
    row, column = 5 + (3 << 32), 4 * 7 + 2
    expected = philox([torch.tensor(x) for x in (7, 0, 5, 3)], SEED)[2] / 2**32
    row_N = torch.tensor([row])
    assert keep_mask(SEED, row_N, 40, expected - 1e-6)[0, column]
    assert not keep_mask(SEED, row_N, 40, expected + 1e-6)[0, column]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    mask_NF = keep_mask(SEED, torch.arange(1000), 999, p).double()
    sigma = (p * (1 - p) / mask_NF.numel()) ** 0.5
    assert abs(mask_NF.mean() - (1 - p)) < 5 * sigma
    for dim, count in ((0, 1000), (1, 999)):
        spread = mask_NF.mean(dim).std() / (p * (1 - p) / count) ** 0.5
        assert 0.85 < spread < 1.15  # as of independent draws


def test_extreme_rates() -> None:
    assert keep_mask(SEED, torch.arange(50), 50, 0.0).all()
    assert not keep_mask(SEED, torch.arange(50), 50, 1 - 2**-32).any()


def test_a_row_does_not_depend_on_its_company() -> None:
    whole_NF = keep_mask(SEED, torch.arange(64), 37, 0.3)
    some_N = torch.tensor([63, 0, 7, 7])
    assert torch.equal(keep_mask(SEED, some_N, 37, 0.3), whole_NF[some_N])
    assert torch.equal(keep_mask(SEED, some_N.int(), 8, 0.3), whole_NF[some_N, :8])


def test_masks_of_other_rows_and_seeds_differ() -> None:
    mask_NF = keep_mask(SEED, torch.arange(100), 64, 0.5)
    assert len({tuple(row.tolist()) for row in mask_NF}) == 100
    for other in (SEED + 1, SEED ^ 1 << 40, -SEED):
        agree = (keep_mask(other, torch.arange(100), 64, 0.5) == mask_NF).double().mean()
        assert 0.45 < agree < 0.55


@pytest.mark.parametrize("num_rows, num_columns", [(0, 5), (3, 0), (3, 1), (3, 5)])
def test_shape(num_rows: int, num_columns: int) -> None:
    mask_NF = keep_mask(SEED, torch.arange(num_rows), num_columns, 0.5)
    assert mask_NF.shape == (num_rows, num_columns)
    assert mask_NF.dtype == torch.bool
