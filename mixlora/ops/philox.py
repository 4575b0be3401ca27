"""Dropout masks as a pure function of a seed: Philox4x32-10 (Salmon et al., SC 2011).

    keep[i, f] = word(f mod 4) of philox(counter = (f div 4, row_i), key = seed)  >=  p * 2^32

A mask is never stored: forward, backward and recompute ask for it again. The words of an element
depend on its row's number and its column alone, whatever rows it is computed with.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def draw_seed(generator: torch.Generator | None = None) -> int:
    """From a generator of the host, torch's where none is given; the same for every device."""
    return int(torch.randint(2**62, (), generator=generator))


def seeded(seed: int, device: torch.device) -> torch.Generator | None:
    """A generator of the device's own; the meta device, which has no data, has none."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def seed_tensor(seed: int, device: torch.device) -> Tensor:
    """As the operators take it: written by the device, which is not waited for."""
    return torch.full((), seed, device=device)


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Four random 32-bit words (in int64) for each counter of four 32-bit words (in int64)."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps: the 64 bits are right
        c0, c1 = ((product1 >> 32) & LOW) ^ c1 ^ key0, product1 & LOW
        c2, c3 = ((product0 >> 32) & LOW) ^ c3 ^ key1, product0 & LOW
        key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor, row_N: Tensor, num_columns: int, p: float) -> Tensor:
    """bool [N, num_columns], true with probability 1 - p; `seed` is an int64 scalar tensor."""
    row = row_N.long()[:, None]
    column = torch.arange((num_columns + 3) // 4, device=row.device)[None]
    zero = torch.zeros_like(row + column)
    words = philox([zero + column, zero, zero + (row & LOW), zero + (row >> 32)], seed)
    return torch.stack(words, dim=-1).flatten(1)[:, :num_columns] >= int(p * 2**32)
