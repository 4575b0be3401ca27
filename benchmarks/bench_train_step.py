"""A whole training step (forward, loss, backward, clipping, AdamW), several systems in one run.

    python -m benchmarks.bench_train_step [--dtype float32] [--layers 4] [--rows 4] [--tokens 256]
           [--seconds 60] [--output FILE.json]

D 1024, F 2816, 16 heads, vocabulary 4096. The systems take turns step by step, so that a machine
that slows down slows all; a ratio is the median of the ratios of neighbouring steps. The floor is
the frozen model with gradients of its embeddings. "Saved" are the bytes that autograd keeps for
backward, each storage once, without parameters.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

import mixlora
import models
from benchmarks.harness import machine, print_header
from mixlora.adapters import trained_parameters
from mixlora.errors import ArgumentParser, command
from mixlora.optim import OptimConfig, make_optimizer

SIZES = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}
MIXTURE = {"routing_strategy": "mixlora", "r": 16, "lora_alpha": 32, "num_experts": 8, "top_k": 2}
SYSTEMS = {
    "base": None,
    "LoRA": {"r": 80, "lora_alpha": 160},
    "DoRA": {"r": 80, "lora_alpha": 160, "use_dora": True},
    "MixLoRA": MIXTURE,
    "MixDoRA": {**MIXTURE, "use_dora": True},
    "peft LoRA": {"r": 80, "lora_alpha": 160},
}


class System:
    def __init__(self, name: str, num_layers: int, dtype: torch.dtype) -> None:
        self.name = name
        self.times: list[float] = []
        make = peft_model if name.startswith("peft") else our_model
        self.parameters, self.loss = make(SYSTEMS[name], num_layers, dtype)
        self.optimizer = make_optimizer(self.parameters, OptimConfig(), 1.0)

    def step(self, tokens_BS: torch.Tensor) -> None:
        self.loss(tokens_BS).backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self, tokens_BS: torch.Tensor) -> int:
        kept: dict[int, int] = {}
        known = {p.untyped_storage().data_ptr() for p in self.all_parameters}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in known:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.loss(tokens_BS)
        del loss
        return sum(kept.values())

    @property
    def all_parameters(self) -> list[torch.Tensor]:
        return list(self.loss.__self__.model.parameters())


class Loss:
    """The mean cross-entropy of a model's next tokens, router losses added."""

    def __init__(self, model: nn.Module, is_ours: bool) -> None:
        self.model, self.is_ours = model, is_ours

    def of(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        if self.is_ours:
            loss, num_labels = self.model(tokens_BS, labels_BS=tokens_BS)
            return loss / num_labels + self.model.router_loss()
        return self.model(tokens_BS, labels=tokens_BS).loss


def our_model(config: dict | None, num_layers: int, dtype: torch.dtype) -> tuple:
    model = models.new({**SIZES, "num_hidden_layers": num_layers}).to(dtype).train()
    if config is None:
        weight = model.model["embed_tokens"].weight.requires_grad_()
        return {"embed_tokens": weight}, Loss(model, True).of
    mixlora.add_adapter(model, mixlora.AdapterConfig(**config))
    return trained_parameters(model), Loss(model, True).of


def peft_model(config: dict, num_layers: int, dtype: torch.dtype) -> tuple:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {key: value for key, value in SIZES.items() if key != "model_type"}
    hf_model = LlamaForCausalLM(LlamaConfig(**values, num_hidden_layers=num_layers)).to(dtype)
    model = get_peft_model(hf_model, LoraConfig(**config, target_modules="all-linear")).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters, Loss(model, False).of


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Training steps of several systems, side by side.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", help="write the table here, as JSON")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    systems = available(options.layers, getattr(torch, options.dtype))
    tokens_BS = torch.randint(SIZES["vocab_size"], (options.rows, options.tokens))
    saved = {system.name: system.saved_bytes(tokens_BS) for system in systems}
    for system in systems:
        system.step(tokens_BS)  # warm-up
    end = time.perf_counter() + options.seconds
    while len(systems[0].times) < 5 or time.perf_counter() < end:
        for system in systems:
            start = time.perf_counter()
            system.step(tokens_BS)
            system.times.append(time.perf_counter() - start)
    rows = [row_of(system, systems, saved) for system in systems]
    print_header()
    print(f"{options.dtype}, {options.layers} layers, {options.rows} x {options.tokens} tokens")
    print_table(rows)
    if options.output:
        settings = {**vars(options), "machine": machine()}
        Path(options.output).write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
    return 0


def available(num_layers: int, dtype: torch.dtype) -> list[System]:
    systems = []
    for name in SYSTEMS:
        try:
            systems.append(System(name, num_layers, dtype))
        except ImportError as error:
            print(f"{name}: left out, {error.name} is not installed")
    return systems


def row_of(system: System, systems: list[System], saved: dict[str, int]) -> dict:
    def ratio(name: str) -> float | None:
        other = next((s for s in systems if s.name == name), None)
        pairs = zip(system.times, other.times, strict=True) if other else []
        values = [a / b for a, b in pairs]
        return median(values) if values else None

    return {
        "system": system.name,
        "trained": sum(p.numel() for p in system.parameters.values()),
        "milliseconds": 1e3 * median(system.times),
        "of base": ratio("base"),
        "of LoRA": ratio("LoRA"),
        "of peft LoRA": ratio("peft LoRA"),
        "saved MB": saved[system.name] / 1e6,
        "steps": len(system.times),
    }


def print_table(rows: list[dict]) -> None:
    def cell(value: float | int | str | None) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.rjust, line, widths)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
