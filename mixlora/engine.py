"""Generation over token ids, batched, with a KV cache. Knows no tokenizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixlora.errors import InputError
from mixlora.layers.adapted_model import AdaptedModel


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

    Every row draws from a generator of its own, seeded by `sampling.seed` and its place: what a
    row samples does not depend on its company. `on_token(row, token)` hears of each as it comes; a
    row for which it says True ends with that token.
    """
    sampling = sampling or Sampling()
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
    device = next(model.parameters()).device
    B = len(prompts)
    tokens_BS = torch.zeros(B, longest, dtype=torch.long)
    mask_BS = torch.zeros(B, longest, dtype=torch.bool)
    for b, prompt in enumerate(prompts):  # padded on the left: all rows end together
        tokens_BS[b, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BS[b, longest - len(prompt) :] = True
    last_BS = torch.zeros_like(mask_BS)
    last_BS[:, -1] = True

    cache = model.new_cache(B, longest + max_new_tokens)
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + b) for b in range(B)]
    outputs: list[list[int]] = [[] for _ in range(B)]
    running = [True] * B
    inputs = {"mask_BS": mask_BS.to(device), "select_BS": last_BS.to(device)}
    with model.evaluating():
        for step in range(max_new_tokens):
            logits_BV = model(tokens_BS.to(device), cache=cache, adapters=adapters, **inputs)
            new_B = _choose(logits_BV.float().cpu(), sampling, generators)
            for b, token in enumerate(new_B.tolist()):
                running[b] = running[b] and token not in stop_tokens
                if running[b]:
                    outputs[b].append(token)
                    running[b] = not on_token(b, token)
            if not any(running) or step + 1 == max_new_tokens:
                break
            tokens_BS = new_B[:, None]
            inputs = {"select_BS": torch.ones(B, 1, dtype=torch.bool, device=device)}
    return outputs


def _choose(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    prob_BV, token_BV = (logits_BV / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    before_BV = prob_BV.cumsum(-1) - prob_BV  # what the likelier tokens already reach
    prob_BV[before_BV >= sampling.top_p] = 0
    draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(prob_BV, generators, strict=True)]
    return token_BV.gather(1, torch.stack(draws))[:, 0]
