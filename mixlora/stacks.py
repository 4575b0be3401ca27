"""Which adapters of a model stand in which stack (layers/stack.py)."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from mixlora.adapters import adapter_parameters, config_of
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.context import Member
from mixlora.layers.lora import Linear, Lora
from mixlora.layers.milora import MiLora
from mixlora.layers.mixlora_ffn import FeedForward, MixLora
from mixlora.layers.stack import LoraStack, MiLoraStack, MixLoraStack

RANK_STEP = 8  # ranks of a stack are padded to a multiple of it
FIRST_SIZE = 4  # a full stack is made anew, twice as large
STACKS = {Lora: LoraStack, MiLora: MiLoraStack}  # of the adapters of a projection


@dataclass
class Stack:
    name: str
    size: int
    members: dict[str, int] = field(default_factory=dict)  # adapter -> its place


class Stacks:
    """Adapters of equal shape share a stack. What is stacked is a copy, made when it is first asked
    for, and again when the adapter has changed."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.stacks: dict[Hashable, Stack] = {}  # by the shape of their members
        self.state_of: dict[str, Any] = {}  # adapter -> what it was when it was stacked

    def member(self, name: str | None) -> Member | str | None:
        """What to call an adapter in a forward: itself where nothing like it can be stacked."""
        if name is None:
            return None
        config = config_of(self.model, name)
        parameters = adapter_parameters(self.model, name).values()
        state = id(config), *((p.data_ptr(), p._version) for p in parameters)
        if self.state_of.get(name) != state:
            with torch.inference_mode(False), torch.no_grad():  # stacks may outlive it
                self.drop(name)
                self._put(name)
            self.state_of[name] = state
        for stack in self.stacks.values():
            if name in stack.members:
                return Member(stack.name, stack.members[name])
        return name

    def drop(self, name: str) -> None:
        """Its place is free for another."""
        self.state_of.pop(name, None)
        for stack in self.stacks.values():
            index = stack.members.pop(name, None)
            if index is not None:
                for holder in _holders(self.model):
                    if stack.name in holder:
                        holder[stack.name].clear(index)

    def close(self) -> None:
        """Take all stacks away from the model."""
        for stack in self.stacks.values():
            self._remove(stack)
        self.stacks, self.state_of = {}, {}

    def _put(self, name: str) -> None:
        sites = _sites(self.model, name)
        if sites is None:
            return
        shape = _shape(self.model, name, sites)
        if shape not in self.stacks:
            number = next(n for n in count() if f"stack:{n}" not in self.model.stack_sizes)
            self.stacks[shape] = Stack(f"stack:{number}", FIRST_SIZE)
            self._build(self.stacks[shape], name)
        stack = self.stacks[shape]
        if len(stack.members) == stack.size:
            self._remove(stack)
            stack.size *= 2
            self._build(stack, name)
            for other, index in stack.members.items():
                self._fill(stack, other, index)
        free = set(range(stack.size)) - set(stack.members.values())
        stack.members[name] = min(free)
        self._fill(stack, name, stack.members[name])

    def _build(self, stack: Stack, name: str) -> None:
        """Around all that the adapter is around."""
        for site in _sites(self.model, name).values():
            if isinstance(site, Linear):
                pair = site.adapters[name]
                new = STACKS[type(pair)](stack.name, pair, site, stack.size, _rank(pair))
                site.adapters[stack.name] = new.eval()
            else:
                mixture = site.mixtures[name]
                rank = max(map(_rank, _pairs(mixture)), default=0)
                new = MixLoraStack(stack.name, mixture, site, stack.size, rank)
                site.mixtures[stack.name] = new.eval()
        self.model.stack_sizes[stack.name] = stack.size

    def _fill(self, stack: Stack, name: str, index: int) -> None:
        for site in _sites(self.model, name).values():
            holder = site.adapters if isinstance(site, Linear) else site.mixtures
            holder[stack.name].put(index, holder[name], site)

    def _remove(self, stack: Stack) -> None:
        for holder in _holders(self.model):
            if stack.name in holder:
                del holder[stack.name]
        del self.model.stack_sizes[stack.name]


def _holders(model: AdaptedModel) -> list[torch.nn.ModuleDict]:
    return [
        x.adapters if isinstance(x, Linear) else x.mixtures
        for x in model.modules()
        if isinstance(x, (Linear, FeedForward))
    ]


def _sites(model: AdaptedModel, name: str) -> dict[str, Linear | FeedForward] | None:
    """Where an adapter is, by path; None where it is of a kind that has no stack."""
    sites: dict[str, Linear | FeedForward] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and name in module.adapters:
            if type(module.adapters[name]) not in STACKS:
                return None
            sites[path] = module
        elif isinstance(module, FeedForward) and name in module.mixtures:
            sites[path] = module
    return sites


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
