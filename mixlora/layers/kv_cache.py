"""Preallocated keys and values of the tokens that a batch has seen."""

from typing import Any

import torch
from torch import Tensor

from mixlora.errors import InputError


class KvCache:
    """Slots in order of arrival, the same for all rows. A padded slot stays in its place, masked,
    so prompts may be padded on either side.

    Two rows, prompts of 3 and 2 tokens padded on the left, then one token each:
    real_BL = [[1 1 1 1], [0 1 1 1]], next_position_B = [4, 3].
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, max_len, head_dim)
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.real_BL = torch.zeros(batch_size, max_len, dtype=torch.bool, device=device)
        self.next_position_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.counts: dict[Any, Tensor] = {}  # a router -> how often a row chose each expert [B, E]
        # (adapter, layer) -> what was decided for each row at its prompt; the first dimension is B
        self.rows_state: dict[Any, Tensor] = {}
        self.gates: dict[Any, Any] = {}  # what layers/milora.py worked out of it
        self.length = 0

    def advance(self, batch_size: int, num_new: int, mask_BS: Tensor | None) -> Tensor:
        """Take `num_new` slots for the tokens of this forward; returns their positions [B, S]."""
        B, max_len = self.real_BL.shape
        if batch_size != B:
            raise InputError(f"the cache was made for {B} rows, got {batch_size}")
        if self.length + num_new > max_len:
            raise InputError(
                f"the cache holds {max_len} tokens: {self.length} are taken, {num_new} do not fit"
            )
        self.length += num_new
        new_BS = self.real_BL[:, self.length - num_new : self.length]
        new_BS.copy_(torch.ones_like(new_BS) if mask_BS is None else mask_BS)
        positions_BS = self.next_position_B[:, None] + new_BS.cumsum(1) - 1
        self.next_position_B += new_BS.sum(1)
        return positions_BS.clamp_min(0)

    def append(self, layer: int, key_BGSC: Tensor, value_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of the new slots; returns all so far [B, G, L, C]."""
        new = slice(self.length - key_BGSC.shape[2], self.length)
        self.key[layer, :, :, new] = key_BGSC
        self.value[layer, :, :, new] = value_BGSC
        return self.key[layer, :, :, : self.length], self.value[layer, :, :, : self.length]
