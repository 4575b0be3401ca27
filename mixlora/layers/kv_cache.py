"""Preallocated keys and values of the tokens that a batch has seen, and what else is kept of rows.

A row's tokens lie one behind the other: padding takes no place, so prompts may be padded on either
side, and rows of different lengths stand in one batch. A part of the rows can be continued alone:

    cache = model.new_cache(3, 64)
    model(prompt_1S, cache=cache.rows(slice(1, 2)))       the second row's prompt
    model(new_B1, cache=cache)                            a token for every row
"""

import copy
from typing import Any

import torch
from torch import Tensor

from mixlora.errors import InputError


class KvCache:
    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # behind a row's last place there is one for padding; zeros, since NaN would spread from it
        shape = (num_layers, num_rows, num_kv_heads, max_len + 1, head_dim)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.seen_B = torch.zeros(num_rows, dtype=torch.long)  # tokens, on the host
        self.states: dict[Any, Tensor] = {}  # what layers keep of the rows, by their own keys
        self.memo: dict[Any, Any] = {}  # what layers worked out of the states
        self.selected: slice | Tensor = slice(0, num_rows)

    def rows(self, selected: slice | Tensor) -> "KvCache":
        """Some of the rows, as a cache of their own: adjacent ones, or those of an index tensor."""
        part = copy.copy(self)
        part.selected = selected
        return part

    @property
    def num_rows(self) -> int:
        return len(self.seen_B[self.selected])

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return int(self.seen_B[self.selected].max()) if self.num_rows else 0

    @property
    def num_bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def advance(self, batch_size: int, num_new: int, mask_BS: Tensor | None) -> Tensor:
        """Take places for the tokens of this forward; returns them, which are their positions
        [B, S]. Padding has 0."""
        if batch_size != self.num_rows:
            raise InputError(f"the cache was made for {self.num_rows} rows, got {batch_size}")
        seen_B1 = self.seen_B[self.selected][:, None]
        new_BS = torch.ones(batch_size, num_new, dtype=torch.bool)
        new_BS = new_BS if mask_BS is None else mask_BS.cpu()
        taken_B = (seen_B1 + new_BS.sum(1, keepdim=True))[:, 0]
        if batch_size and int(taken_B.max()) > self.max_len:
            row = int(taken_B.argmax())
            before, more = int(seen_B1[row]), int(taken_B[row] - seen_B1[row])
            raise InputError(
                f"the cache holds {self.max_len} tokens: {before} are taken, {more} do not fit"
            )
        device = self.key.device
        place_BS = seen_B1 + new_BS.cumsum(1) - 1
        self.is_even = mask_BS is None and bool((seen_B1 == seen_B1[:1]).all())
        self.is_first = mask_BS is None and not seen_B1.any()
        self.place_BS = place_BS.where(new_BS, 0).to(device)
        self._write_BS = place_BS.where(new_BS, self.max_len).to(device)
        self.seen_B[self.selected] = taken_B
        self._length = self.length
        return self.place_BS

    def append(self, layer: int, key_BGSC: Tensor, value_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of the new tokens; returns all so far [B, G, L, C]."""
        new, L, S = (key_BGSC, value_BGSC), self._length, key_BGSC.shape[2]
        stored = []
        for all_BGLC, x_BGSC in zip((self.key[layer], self.value[layer]), new, strict=True):
            if self.is_even and isinstance(self.selected, slice):
                all_BGLC[self.selected, :, L - S : L] = x_BGSC
            else:
                all_BGLC[self._row_B1, :, self._write_BS] = x_BGSC.transpose(1, 2)
            stored.append(all_BGLC[:, :, :L][self.selected])
        return stored[0], stored[1]

    @property
    def _row_B1(self) -> Tensor:
        row_B = torch.arange(len(self.seen_B), device=self.key.device)
        return row_B[self.selected][:, None]

    def state(self, key: Any) -> Tensor | None:
        """What was stored of these rows under a key; None before."""
        return self.states[key][self.selected] if key in self.states else None

    def set_state(self, key: Any, x_B: Tensor) -> None:
        """Rows of which nothing was stored have 0."""
        with torch.inference_mode(False):  # the next tokens may come outside of it
            if key not in self.states:
                self.states[key] = x_B.new_zeros(len(self.seen_B), *x_B.shape[1:])
            self.states[key][self.selected] = x_B.clone()

    def clear(self, row: int) -> None:
        self.seen_B[row] = 0
        with torch.inference_mode(False):  # as above
            for state in self.states.values():
                state[row] = 0

    def move(self, source: int, target: int) -> None:
        """Give a row the place of another, whose content is lost; the source is cleared."""
        seen = int(self.seen_B[source])
        for store in (self.key, self.value):
            store[:, target, :, :seen] = store[:, source, :, :seen]
        with torch.inference_mode(False):
            for state in self.states.values():
                state[target] = state[source]
        self.seen_B[target] = seen
        self.clear(source)
