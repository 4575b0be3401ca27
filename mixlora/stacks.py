"""Which adapters of a model stand in which stack (layers/stack.py)."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from mixlora.adapters import config_of
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.context import Member
from mixlora.layers.lora import Linear, Lora
from mixlora.layers.milora import MiLora
from mixlora.layers.mixlora_ffn import FeedForward, MixLora
from mixlora.layers.stack import LoraStack, MiLoraStack, MixLoraStack

RANK_STEP = 8  # ranks of a stack are padded to a multiple of it
STACKS = {Lora: LoraStack, MiLora: MiLoraStack}  # of the adapters of a projection


@dataclass
class Stack:
    name: str
    size: int = 0  # a power of two; a full stack is made anew, larger
    members: dict[str, int] = field(default_factory=dict)  # adapter -> its place


class Stacks:
    """Adapters of equal shape share a stack. What is stacked is a copy, made when it is first asked
    for, and again when the adapter has changed."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.places = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, (Linear, FeedForward))
        }
        self.stacks: dict[Hashable, Stack] = {}  # by the shape of their members
        self.state_of: dict[str, Any] = {}  # adapter -> what it was when it was stacked

    def members(
        self, names: Iterable[str | None], room: int = 0
    ) -> dict[str | None, Member | str | None]:
        """What to call adapters in a forward: themselves where nothing like them can be stacked.

        A stack that must be made has places for `room`.
        """
        states = {name: self._state(name) for name in names if name is not None}
        changed = [name for name, state in states.items() if self.state_of.get(name) != state]
        with torch.inference_mode(False), torch.no_grad():  # stacks may outlive it
            for name in changed:
                self.drop(name)
            self._put(changed, room)
        self.state_of |= states
        called: dict[str | None, Member | str | None] = {None: None, **{x: x for x in states}}
        for stack in self.stacks.values():
            for name in states.keys() & stack.members.keys():
                called[name] = Member(stack.name, stack.members[name])
        return called

    def drop(self, name: str) -> None:
        """Its place is free for another."""
        self.state_of.pop(name, None)
        for stack in self.stacks.values():
            index = stack.members.pop(name, None)
            if index is not None:
                for holder in map(holder_of, self.places.values()):
                    if stack.name in holder:
                        holder[stack.name].clear(index)

    def close(self) -> None:
        """Take all stacks away from the model."""
        for stack in self.stacks.values():
            self._remove(stack)
        self.stacks, self.state_of = {}, {}

    def _state(self, name: str) -> Any:
        config = config_of(self.model, name)
        modules = [holder_of(site)[name] for site in self._sites(name).values()]
        parameters = [p for module in modules for p in module.parameters()]
        return id(config), *((p.data_ptr(), p._version) for p in parameters)

    def _sites(self, name: str) -> dict[str, Linear | FeedForward]:
        """Where an adapter is, by path."""
        return {path: site for path, site in self.places.items() if name in holder_of(site)}

    def _put(self, names: Sequence[str], room: int) -> None:
        alike: dict[Hashable, list[str]] = {}
        for name in names:
            sites = self._sites(name)
            pairs = [x.adapters[name] for x in sites.values() if isinstance(x, Linear)]
            if all(type(pair) in STACKS for pair in pairs):
                alike.setdefault(_shape(self.model, name, sites), []).append(name)
        for shape, new in alike.items():
            if shape not in self.stacks:
                number = next(n for n in count() if f"stack:{n}" not in self.model.stack_sizes)
                self.stacks[shape] = Stack(f"stack:{number}")
            stack = self.stacks[shape]
            needed = len(stack.members) + len(new)
            if needed > stack.size:
                self._remove(stack)
                stack.size = 1 << (max(needed, room) - 1).bit_length()
                self._build(stack, new[0])
                for name, index in stack.members.items():
                    self._fill(stack, name, index)
            free = sorted(set(range(stack.size)) - set(stack.members.values()))
            for name, index in zip(new, free, strict=False):
                stack.members[name] = index
                self._fill(stack, name, index)

    def _build(self, stack: Stack, name: str) -> None:
        """Around all that the adapter is around."""
        for site in self._sites(name).values():
            own = holder_of(site)[name]
            if isinstance(site, Linear):
                new = STACKS[type(own)](stack.name, own, site, stack.size, _rank(own))
            else:
                rank = max(map(_rank, _pairs(own)), default=0)
                new = MixLoraStack(stack.name, own, site, stack.size, rank)
            holder_of(site)[stack.name] = new.eval()
        self.model.stack_sizes[stack.name] = stack.size

    def _fill(self, stack: Stack, name: str, index: int) -> None:
        for site in self._sites(name).values():
            holder_of(site)[stack.name].put(index, holder_of(site)[name], site)

    def _remove(self, stack: Stack) -> None:
        for holder in map(holder_of, self.places.values()):
            if stack.name in holder:
                del holder[stack.name]
        self.model.stack_sizes.pop(stack.name, None)


def holder_of(site: Linear | FeedForward) -> torch.nn.ModuleDict:
    """What is around it, by adapter name."""
    return site.adapters if isinstance(site, Linear) else site.mixtures


def _shape(model: AdaptedModel, name: str, sites: dict[str, Linear | FeedForward]) -> Hashable:
    """Equal for adapters that fit into one stack."""
    config = config_of(model, name)
    parts = []
    for path, site in sites.items():
        if isinstance(site, Linear):
            pair = site.adapters[name]
            module = getattr(pair, "module", None)
            parts.append((path, _rank(pair), pair.lora_magnitude_vector is not None, module))
        else:
            mixture = site.mixtures[name]
            pairs = tuple((_rank(x), x.lora_magnitude_vector is None) for x in _pairs(mixture))
            projections = tuple(x is None for x in _projections(mixture))
            parts.append((path, mixture.act, mixture.num_experts, projections, pairs))
    router = tuple(sorted(config.router_arguments().items())) if config.router else ()
    return config.routing_strategy, router, tuple(parts)


def _projections(mixture: MixLora) -> list:
    return [mixture.gate_proj, mixture.up_proj, mixture.down_proj]


def _pairs(mixture: MixLora) -> list:
    return [pair for pair in _projections(mixture) if pair is not None]


def _rank(pair: torch.nn.Module) -> int:
    return -(-pair.lora_A.shape[-2] // RANK_STEP) * RANK_STEP
