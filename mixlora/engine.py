"""Generation over token ids: requests with adapters and settings of their own share one batch.

    engine = Engine(model, max_rows=16, max_len=2048)
    request = engine.submit([1, 2, 3], max_new_tokens=64, adapter="a")
    engine.run()                                           or step by step: while engine.step(): ...
    request.tokens

A step is one forward for the prompts that have just come, and one that gives every running request
its next token. Requests come and go between steps. What a request generates depends on itself
alone: in fp32, greedy tokens are those of a lone run but where two logits are closer than rounding.
Knows no tokenizer.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mixlora.adapters import config_of, remove_adapter
from mixlora.errors import InputError
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.context import Member
from mixlora.stacks import Stacks

MAX_ROWS = 64


@dataclass
class Sampling:
    """temperature 0 is greedy; top_p < 1 keeps the likeliest tokens that together reach it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must be in [0, 2^32), got {self.seed}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(eq=False)
class Request:
    """`tokens` are those generated so far, up to and without a stop token."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    adapter: str | None
    stop_tokens: frozenset[int]
    on_token: Callable[[int], bool | None]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False
    row: int | None = None  # of the cache, while it has one
    num_prefilled: int = 0  # tokens of the prompt that the cache holds
    last: int | None = None  # the token that the next step reads
    member: Member | str | None = None  # what its adapter is called beside others


class Engine:
    """Continuous batching over `max_rows` rows of `max_len` tokens of cache, all taken at once.

    Prompts enter in the order of their coming, `prefill_tokens` at a step; longer ones in pieces.
    """

    def __init__(
        self,
        model: AdaptedModel,
        max_rows: int = MAX_ROWS,
        max_len: int | None = None,
        prefill_tokens: int = 512,
    ) -> None:
        limit = model.config.max_position_embeddings
        max_len = limit if max_len is None else max_len
        for name, value in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if not 1 <= max_len <= limit:
            raise InputError(
                f"max_len must be in [1, max_position_embeddings = {limit}], got {max_len}"
            )
        self.model, self.prefill_tokens = model, prefill_tokens
        self.device = next(model.parameters()).device
        self.cache = model.new_cache(max_rows, max_len)
        self.stacks = Stacks(model)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request | None] = [None] * max_rows

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        stop_tokens: Sequence[int] = (),
        on_token: Callable[[int], bool | None] = lambda token: None,
        draw: int = 0,
    ) -> Request:
        """`on_token` hears of each token as it comes; where it says True, that was the last.

        `draw` tells requests of one seed apart: each draws from a generator of its own.
        """
        if not prompt:
            raise InputError("every prompt must have at least one token")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
        if len(prompt) + max_new_tokens > self.cache.max_len:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed the "
                f"{self.cache.max_len} tokens of a row"
            )
        if adapter is not None:
            config_of(self.model, adapter)
        sampling = sampling or Sampling()
        generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + draw)
        request = Request(
            *(list(prompt), max_new_tokens, sampling, adapter),
            *(frozenset(stop_tokens), on_token, generator),
        )
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """It ends with the tokens that it has."""
        if request in self.waiting:
            self.waiting.remove(request)
        self._finish(request)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter from the model, once no request uses it."""
        if any(x is not None and x.adapter == name for x in (*self.rows, *self.waiting)):
            raise InputError(f"adapter {name!r} has requests that are not done")
        remove_adapter(self.model, name)
        self.stacks.drop(name)

    def run(self) -> None:
        """Until all are done."""
        while self.step():
            pass

    def close(self) -> None:
        """Leave the model as it was."""
        self.stacks.close()

    def step(self) -> bool:
        """One piece of the prompts, one token for each running request; False: nothing is left."""
        with self.model.evaluating():
            self._prefill()
            self._close_ranks()
            self._decode()
        return bool(self.waiting) or any(self.rows)

    def _prefill(self) -> None:
        """One forward over what comes next of the prompts, its first S tokens being those that the
        longest has in it."""
        parts: list[tuple[Request, int]] = []
        begun = [x for x in self.rows if x is not None and x.last is None]
        free = [row for row, x in enumerate(self.rows) if x is None]
        while begun or (self.waiting and free):
            request = begun[0] if begun else self.waiting[0]
            left, longest = (
                len(request.prompt) - request.num_prefilled,
                max((n for _, n in parts), default=0),
            )
            room = self.prefill_tokens // (len(parts) + 1)
            num_new = left if self._is_whole(request) else min(left, room)
            if parts and max(longest, num_new) > room:
                break
            parts.append((request, num_new))
            if begun:
                begun.pop(0)
            else:
                request.row = free.pop(0)
                self.rows[request.row] = self.waiting.popleft()
        if not parts:
            return
        S = max(n for _, n in parts)
        tokens_BS = torch.zeros(len(parts), S, dtype=torch.long)
        mask_BS, last_BS = torch.zeros(2, len(parts), S, dtype=torch.bool)
        for b, (request, n) in enumerate(parts):
            first = request.num_prefilled
            tokens_BS[b, :n] = torch.tensor(request.prompt[first : first + n])
            mask_BS[b, :n] = True
            request.num_prefilled += n
            last_BS[b, n - 1] = request.num_prefilled == len(request.prompt)
        row_B = torch.tensor([request.row for request, _ in parts], device=self.device)
        logits_NV = self.model(
            tokens_BS.to(self.device),
            mask_BS=None if mask_BS.all() else mask_BS.to(self.device),
            select_BS=last_BS.to(self.device),
            cache=self.cache.rows(row_B),
            adapters=self._called([request for request, _ in parts]),
        )
        ready = [request for request, _ in parts if request.num_prefilled == len(request.prompt)]
        self._accept(ready, logits_NV)

    def _is_whole(self, request: Request) -> bool:
        """Whether its prompt must not be cut."""
        if request.adapter is None:
            return False
        return self.model.adapter_configs[request.adapter].routes_prompts

    def _close_ranks(self) -> None:
        """Rows in use are the first ones: a forward computes all up to the last."""
        while True:
            used = [row for row, x in enumerate(self.rows) if x is not None]
            if not used or used[-1] + 1 == len(used):
                return
            hole = self.rows.index(None)
            request = self.rows[used[-1]]
            self.cache.move(used[-1], hole)
            self.rows[hole], self.rows[used[-1]], request.row = request, None, hole

    def _decode(self) -> None:
        """The token after the last, for all whose prompt is in the cache."""
        batch = self.rows[: sum(x is not None for x in self.rows)]
        running = [x is not None and x.last is not None for x in batch]
        if not any(running):
            return
        tokens_B = [x.last if is_on else 0 for x, is_on in zip(batch, running, strict=True)]
        running_B1 = torch.tensor(running, device=self.device)[:, None]
        logits_NV = self.model(
            torch.tensor(tokens_B, device=self.device)[:, None],
            mask_BS=None if all(running) else running_B1,
            select_BS=running_B1,
            cache=self.cache.rows(slice(0, len(batch))),
            adapters=self._called(batch),
        )
        self._accept([x for x, is_on in zip(batch, running, strict=True) if is_on], logits_NV)

    def _called(self, requests: Sequence[Request]) -> list[Member | str | None]:
        """Their adapters in one forward: a single one by its name, several as members of stacks."""
        names = [x.adapter for x in requests]
        if len(set(names)) == 1:
            return names
        if any(x.member is None for x in requests if x.adapter is not None):
            soon = (*self.rows, *itertools.islice(self.waiting, len(self.rows)))
            room = len({x.adapter for x in soon if x is not None})
            called = self.stacks.members(set(names), room)
            for request in requests:
                request.member = called[request.adapter]
        # what a prompt router chooses is its adapter's own; behind the prompt, the cache has it
        return [x.adapter if x.last is None and self._is_whole(x) else x.member for x in requests]

    def _accept(self, requests: list[Request], logits_NV: Tensor) -> None:
        """Each takes a token of its logits."""
        for request, token in zip(requests, choose(logits_NV, requests), strict=True):
            request.last = token
            if token not in request.stop_tokens:
                request.tokens.append(token)
                is_last = len(request.tokens) == request.max_new_tokens
                if not request.on_token(token) and not is_last:
                    continue
            self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.row is not None:
            self.cache.clear(request.row)
            self.rows[request.row] = request.row = None
        request.is_done = True


def choose(logits_NV: Tensor, requests: Sequence[Request]) -> list[int]:
    """A token for each request, by its settings."""
    tokens = logits_NV.argmax(-1).tolist()
    for n, request in enumerate(requests):
        if request.sampling.temperature > 0:
            logits_V = logits_NV[n].float().cpu() / request.sampling.temperature
            prob_V, token_V = logits_V.softmax(-1).sort(descending=True)
            before_V = prob_V.cumsum(-1) - prob_V  # what the likelier tokens already reach
            prob_V[before_V >= request.sampling.top_p] = 0
            tokens[n] = int(token_V[torch.multinomial(prob_V, 1, generator=request.generator)])
    return tokens


def generate(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    on_token: Callable[[int, int], bool | None] = lambda row, token: None,
    adapters: Sequence[str | None] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, in order, up to and without a stop token.

    `adapters` names each prompt's; None = the active one for all. Every prompt draws from a
    generator of its own, seeded by `sampling.seed` and its place: what it samples does not depend
    on its company. `on_token(place, token)` hears of each as it comes; a prompt for which it says
    True ends with that token.
    """
    if not prompts or not all(prompts):
        raise InputError("every prompt must have at least one token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    limit, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's "
            f"max_position_embeddings {limit}"
        )
    names = [model.active_adapter] * len(prompts) if adapters is None else adapters
    if len(names) != len(prompts):
        raise InputError(f"adapters must be {len(prompts)} names, got {len(names)}")
    engine = Engine(model, min(len(prompts), MAX_ROWS), longest + max_new_tokens)
    requests = [
        engine.submit(
            *(prompt, max_new_tokens, sampling, name, stop_tokens, partial(on_token, place), place)
        )
        for place, (prompt, name) in enumerate(zip(prompts, names, strict=True))
    ]
    engine.run()
    engine.close()
    return [request.tokens for request in requests]
