"""Decoding: tokens per second of a batch, one new token a row at each step.

    python -m benchmarks.bench_decode [--device cuda] [--model 7b] [--layers 32] [--batches 1 8 64]
           [--dtype bfloat16] [--systems base,LoRA,MixLoRA,"peft LoRA"] [--steps 32]

Random weights, prompts of 64 tokens. "of a copy" is the rate at which the base's weights are read,
which every step must do once, as a share of the rate of a copy on the same device.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

import mixlora
import models
from benchmarks.bench_ops import SHAPES, ceilings, num_bytes
from benchmarks.bench_train_step import MODELS, SYSTEMS, chosen
from benchmarks.harness import Rows, print_header, step_time, table
from benchmarks.modes import MODES
from benchmarks.train_step_worker import autocast, made_there
from mixlora.errors import ArgumentParser, command

USUAL = ["base", "LoRA", "MixLoRA", "MixLoRA paper", "MixLoRA vanilla", "peft LoRA"]
PROMPT = 64
Step = Callable[[Tensor], Tensor]  # tokens [B, S] -> the logits behind their last [B, V]


def our_systems(names: list[str], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, its model, begin): begin(B, max_len) gives a Step. One base serves all adapters."""
    with made_there(options):
        model = models.new({"model_type": "llama", **options["sizes"]})
    blocks = model.model["layers"]
    usual = type(blocks[0].mlp)
    for name in names:
        made_with, adapter = SYSTEMS[name]
        if adapter is not None:
            mixlora.add_adapter(model, mixlora.AdapterConfig(**adapter))
        for block in blocks:
            block.mlp.__class__ = MODES.get(made_with, usual)

        def begin(B: int, max_len: int) -> Step:
            cache = model.new_cache(B, max_len)
            return lambda tokens_BS: model(tokens_BS, cache=cache)[:, -1]

        yield name, model, begin
        if adapter is not None:
            mixlora.remove_adapter(model, "default")


def peft_system(name: str, options: dict[str, Any]) -> tuple[str, Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    with made_there(options):
        base = LlamaForCausalLM(LlamaConfig(**options["sizes"]))
    config = LoraConfig(**SYSTEMS[name][1], target_modules="all-linear")
    model = get_peft_model(base, config).eval()

    def begin(B: int, max_len: int) -> Step:
        cache = DynamicCache()

        def step(tokens_BS: Tensor) -> Tensor:
            with autocast(options):
                return model(tokens_BS, past_key_values=cache, logits_to_keep=1).logits[:, -1]

        return step

    return name, model, begin


def run(
    names: list[str],
    device: str,
    model: str,
    dtype: str,
    num_layers: int,
    batches: list[int],
    num_steps: int,
    prompt: int = PROMPT,
) -> Rows:
    sizes = {**MODELS[model], "num_hidden_layers": num_layers}
    options = {"sizes": sizes, "dtype": dtype, "device": device}
    best, _ = ceilings(getattr(torch, dtype), device, SHAPES[device])
    of_peft = [name for name in names if SYSTEMS[name][0] == "peft"]

    def systems() -> Iterator[tuple[str, Any, Any]]:
        yield from our_systems([name for name in names if name not in of_peft], options)
        for name in of_peft:
            if find_spec("peft"):
                yield peft_system(name, options)
            else:
                print(f"{name}: left out, it is not installed")

    rows = []
    for name, network, begin in systems():
        base = num_bytes([p for p in network.parameters() if not p.requires_grad])
        for B in batches:
            time = median(step_times(begin, B, prompt, num_steps, sizes["vocab_size"], device))
            rows.append(
                {
                    "system": name,
                    "batch": B,
                    "ms a step": 1e3 * time,
                    "tokens/s": B / time,
                    "GB/s of weights": base / time / 1e9,
                    "of a copy": base / time / best,
                }
            )
    return rows


@torch.inference_mode()
def step_times(
    begin: Callable[[int, int], Step], B: int, prompt: int, num_steps: int, V: int, device: str
) -> list[float]:
    step = begin(B, prompt + num_steps + 1)
    new_B1 = step(torch.randint(V, (B, prompt), device=device)).argmax(-1, keepdim=True)
    times = []
    for _ in range(num_steps + 1):
        times.append(step_time(lambda: step(new_B1), device=device))
    return times[1:]


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Tokens per second of decoding.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--systems", default=",".join(USUAL), help="names, by commas")
    options = parser.parse_args(argv)
    print_header()
    rows = run(
        chosen(options.systems),
        *(options.device, options.model, options.dtype),
        *(options.layers, options.batches, options.steps),
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
