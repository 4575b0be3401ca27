"""Adapters around a model: add, remove, switch off, count, freeze in part, merge."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mixlora.adapter_config import ALL_LINEAR, AdapterConfig
from mixlora.errors import InputError, did_you_mean
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.layers.lora import Linear, Lora
from mixlora.layers.lora_mixture import LoraMixture
from mixlora.layers.milora import MiLora, PromptRouting
from mixlora.layers.mixlora_ffn import PROJECTIONS, FeedForward, MixLora
from mixlora.layers.router import Router

ADAPTED = re.compile(r"\.(adapters|mixtures)\.")  # in the names of adapters' parameters
PARTS = ("routers", "experts", "lora")  # of an adapter's parameters


def check_adapter(model: AdaptedModel, config: AdapterConfig, name: str = "default") -> None:
    """Whether `add_adapter` would take it: an error if not, no change in any case."""
    if name in model.adapter_configs:
        raise InputError(f"the model already has an adapter named {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter's name is letters, digits, _ and -, got {name!r}")
    if config.capacity_factor is not None and config.capacity_seq_len is None:
        raise InputError("capacity_factor needs capacity_seq_len, the tokens of a sequence")
    sites = _sites(model)
    if isinstance(config.target_modules, list):
        for target in config.target_modules:
            if not any(_ends_in(path, target) for path in sites):
                hint = did_you_mean(target, {path.rpartition(".")[2] for path in sites})
                raise InputError(f"target_modules: the model has no projection {target!r}{hint}")
    elif not any(_is_target(path, config) for path in sites):
        raise InputError(
            f"target_modules: {config.target_modules!r} fits none of the model's projections, "
            f"such as {next(iter(sites))}"
        )
    for routing, paths in _routed(model, config).items() if config.routes_prompts else ():
        if config.top_k > len(paths):
            raise InputError(
                f"top_k must be at most the number of a layer's targets, {len(paths)} in layer "
                f"{routing.layer}, got {config.top_k}"
            )


def add_adapter(
    model: AdaptedModel,
    config: AdapterConfig,
    name: str = "default",
    device: torch.device | None = None,
) -> None:
    """Put a fresh adapter around the model and make it the active one, on the model's device.

    A is drawn from torch's generator, B is zero: the model computes what it did before.
    """
    check_adapter(model, config, name)
    device = device or next(model.parameters()).device
    targets = {path: x for path, x in _sites(model).items() if _is_target(path, config)}
    ffns = {path: x for path, x in model.named_modules() if isinstance(x, FeedForward)}
    of_ffn = {f"{path}.{projection}" for path in ffns for projection in PROJECTIONS}
    kind, lora, experts = config.peft_type, config.lora_arguments(), config.lora_arguments(True)

    def router(base: Linear) -> nn.Module:
        return config.router(base.weight.shape[1], **config.router_arguments())

    for path, base in targets.items():
        if kind == "MOLA" or (kind == "LORAMOE" and path in of_ffn):
            adapter = LoraMixture(base, router(base), **experts)
        elif kind == "MILORA" or (kind == "MIXLORA" and path in of_ffn):
            continue
        else:
            adapter = Lora(base, **lora)
        base.adapters[name] = adapter.to(device)
    for path, ffn in ffns.items() if kind == "MIXLORA" else ():
        projections = tuple(p for p in PROJECTIONS if f"{path}.{p}" in targets)
        if projections or of_ffn.isdisjoint(targets):  # then, as upstream, routers alone
            gate = router(ffn.gate_proj)
            mixture = MixLora(
                *(ffn, gate),
                projections=projections,
                act_fn=config.act_fn,
                dropout_masks=config.dropout_masks,
                **experts,
            )
            ffn.mixtures[name] = mixture.to(device)
    for routing, paths in _routed(model, config).items() if kind == "MILORA" else ():
        gate = config.router(routing.hidden_size, len(paths), **config.router_arguments())
        routing.adapters[name] = gate.to(device)
        for module, path in enumerate(paths):
            adapter = MiLora(targets[path], routing.layer, module, **lora)
            targets[path].adapters[name] = adapter.to(device)
    model.adapter_configs[name] = config
    model.active_adapter = name
    model.train(model.training)


def remove_adapter(model: AdaptedModel, name: str = "default") -> None:
    config_of(model, name)
    for module in model.modules():
        for holder in (getattr(module, "adapters", None), getattr(module, "mixtures", None)):
            if holder is not None and name in holder:
                del holder[name]
    del model.adapter_configs[name]
    model.generators.pop(name, None)
    if model.active_adapter == name:
        model.active_adapter = None


@contextlib.contextmanager
def disable_adapters(model: AdaptedModel) -> Iterator[None]:
    """Within it, the base model."""
    active, model.active_adapter = model.active_adapter, None
    try:
        yield
    finally:
        model.active_adapter = active


def adapter_parameters(model: AdaptedModel, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their names in the model."""
    config_of(model, name)
    owned = re.compile(rf"\.(adapters|mixtures)\.{re.escape(name)}\.")
    return {key: p for key, p in model.named_parameters() if owned.search(key)}


def trained_parameters(model: AdaptedModel, name: str = "default") -> dict[str, nn.Parameter]:
    """Those that are not frozen."""
    return {k: p for k, p in adapter_parameters(model, name).items() if p.requires_grad}


def part_of(key: str, model: AdaptedModel) -> str:
    """Which of PARTS an adapter's parameter belongs to."""
    owner = model.get_submodule(key.rpartition(".")[0])
    if isinstance(owner, Router):
        return "routers"
    return "lora" if isinstance(owner, Lora) else "experts"


def freeze_but(model: AdaptedModel, name: str, parts: Sequence[str]) -> None:
    """Let only these parts of an adapter train: routers, experts, lora (projections without)."""
    trained = {key: part_of(key, model) in parts for key in adapter_parameters(model, name)}
    if not any(trained.values()):
        has = sorted({part_of(key, model) for key in trained})
        raise InputError(f"of {', '.join(parts)} the adapter has none: it has {', '.join(has)}")
    for key, parameter in adapter_parameters(model, name).items():
        parameter.requires_grad_(trained[key])


def print_trainable_parameters(model: AdaptedModel, name: str | None = None) -> None:
    """Of one adapter, or of all."""
    base = sum(p.numel() for key, p in model.named_parameters() if not ADAPTED.search(key))
    names = [name] if name else model.adapter_configs
    for name in names:
        groups = dict.fromkeys(PARTS, 0)
        parameters = adapter_parameters(model, name)
        for key, parameter in parameters.items():
            groups[part_of(key, model)] += parameter.numel() * parameter.requires_grad
        size = base + sum(p.numel() for p in parameters.values())
        total = sum(groups.values())
        parts = ", ".join(f"{group} {count:,}" for group, count in groups.items() if count)
        print(
            f"{name}: {total:,} of {size:,} parameters train ({100 * total / size:.2f} %): {parts}"
        )


@torch.no_grad()
def merge(model: AdaptedModel, name: str = "default") -> float:
    """Fold an adapter's LoRA and DoRA into the base weights, in place; print and return the
    largest difference that this makes to the logits of 64 random tokens.

    Experts cannot be folded in: a mixture stays, as an adapter of the feed-forward alone.
    """
    config = config_of(model, name)
    for other in model.adapter_configs.keys() - {name}:
        raise InputError(f"merge: the model also has the adapter {other!r}, made for the base")
    merged = [
        (path, base)
        for path, base in _sites(model).items()
        if name in base.adapters and isinstance(base.adapters[name], Lora)
    ]
    if not merged:
        raise InputError(f"merge: {name} has experts only, which no base weight can hold")
    if any(base.quantized is not None for _, base in merged):
        raise InputError("merge: the base is quantised: load it without quantize")
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
    tokens_BS = tokens_BS[:, : model.config.max_position_embeddings]
    tokens_BS = tokens_BS.to(next(model.parameters()).device)
    active, model.active_adapter = model.active_adapter, name
    with model.evaluating():
        before = model(tokens_BS)
    for _, base in merged:
        base.weight.copy_(base.adapters[name].merged(base))
        del base.adapters[name]
    kept = {path for path in _sites(model) if _is_target(path, config)} - dict(merged).keys()
    if kept:
        ends = sorted({path.rpartition(".")[2] for path in kept})
        is_short = all(path in kept for path in _sites(model) if path.rpartition(".")[2] in ends)
        values = {**config.to_dict(), "target_modules": ends if is_short else sorted(kept)}
        del values["base_model_name_or_path"]  # what it is made for is the merged base
        model.adapter_configs[name] = AdapterConfig.from_dict(values)
    else:  # with it go routers of no experts: the difference below is what that makes, too
        remove_adapter(model, name)
    with model.evaluating():
        after = model(tokens_BS)
    model.active_adapter = active if kept else None
    difference = (after - before).abs().max().item()
    largest = before.abs().max().item()
    print(f"merged {name}: logits differ by at most {difference:.2g}, they reach {largest:.3g}")
    return difference


def config_of(model: AdaptedModel, name: str) -> AdapterConfig:
    if name not in model.adapter_configs:
        hint = did_you_mean(name, model.adapter_configs)
        raise InputError(f"the model has no adapter named {name!r}{hint}")
    return model.adapter_configs[name]


def _sites(model: AdaptedModel) -> dict[str, Linear]:
    """Every projection that an adapter may go around, by its path in the model."""
    return {path: x for path, x in model.named_modules() if isinstance(x, Linear)}


def _routed(model: AdaptedModel, config: AdapterConfig) -> dict[PromptRouting, list[str]]:
    """The targets of every block that has some, in the model's order, by its prompt routing."""
    blocks = {
        path.rpartition(".")[0]: x
        for path, x in model.named_modules()
        if isinstance(x, PromptRouting)
    }
    routed: dict[PromptRouting, list[str]] = {}
    for path in filter(lambda path: _is_target(path, config), _sites(model)):
        (routing,) = (x for block, x in blocks.items() if path.startswith(f"{block}."))
        routed.setdefault(routing, []).append(path)
    return routed


def _ends_in(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _is_target(path: str, config: AdapterConfig) -> bool:
    if isinstance(config.target_modules, list):
        return any(_ends_in(path, target) for target in config.target_modules)
    return config.target_modules == ALL_LINEAR or bool(re.fullmatch(config.target_modules, path))
