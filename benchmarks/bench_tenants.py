"""Decoding for tenants: a batch whose rows have adapters of their own, through the engine.

    python -m benchmarks.bench_tenants [--device cuda] [--model 7b] [--layers 4] [--dtype bfloat16]
           [--tokens 48] [--tenants 16] [--output F]

Random weights, prompts of 64 tokens. The first table takes a step of every system in turn; each
ratio is the median over the rounds. "bound" is what the bytes of a step allow, relative to the base
alone: (base + cache) / (base + cache + active adapters); "of it" is the measured ratio over it. The
second compares whole generations: one batch of all tenants against one tenant after the other, and
against `peft` on `transformers` with `adapter_names`, where they are installed.
"""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import nn

import mixlora
import models
from benchmarks.bench_train_step import MODELS
from benchmarks.harness import Rows, print_header, table
from benchmarks.train_step_worker import made_there
from mixlora.adapters import adapter_parameters
from mixlora.engine import Engine, Request
from mixlora.errors import ArgumentParser, command
from mixlora.files import write_json

PROMPT = 64
LORA = {"r": 16, "lora_alpha": 32}
KINDS = {
    "LoRA": LORA,
    "MixLoRA": {**LORA, "routing_strategy": "mixlora", "num_experts": 8, "top_k": 2},
    "MiLoRA": {"r": 32, "routing_strategy": "milora", "top_k": 3},
    # rank 32 as 8 experts of rank 4 in every projection, 4 of them for each token (MiLoRA, 4.2)
    "MOELoRA": {"r": 4, "lora_alpha": 8, "routing_strategy": "mola", "num_experts": 8, "top_k": 4},
}


def new_model(sizes: dict, dtype: str, device: str, kinds: list[str], tenants: int) -> nn.Module:
    with made_there({"sizes": sizes, "dtype": dtype, "device": device}):
        model = models.new({"model_type": "llama", **sizes})
    for kind in kinds:
        for i in range(tenants):
            mixlora.add_adapter(model, mixlora.AdapterConfig(**KINDS[kind]), name_of(kind, i))
            for key, parameter in adapter_parameters(model, name_of(kind, i)).items():
                if key.endswith("lora_B"):
                    nn.init.normal_(parameter, std=0.02)
    return model


def name_of(kind: str, tenant: int) -> str | None:
    return None if kind == "base" else f"{kind}-{tenant}"


def submit(model: nn.Module, engine: Engine, names: list[str | None], new: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    shape = len(names), PROMPT
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    return [
        engine.submit(prompt, new, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]


def active_bytes(model: nn.Module, kind: str, rows: int, tenants: int) -> float:
    """Of adapters, that a step must read. Rows of one mixture share experts as they happen to."""
    if kind == "base":
        return 0.0
    of_experts = of_others = 0
    width = torch.finfo(next(model.parameters()).dtype).bits // 8
    for key, parameter in adapter_parameters(model, name_of(kind, 0)).items():
        if parameter.dim() == 3:
            of_experts += parameter.numel() * width
        elif kind == "MiLoRA" and "prompt" in key:
            continue
        else:
            of_others += parameter.numel() * width
    config = model.adapter_configs[name_of(kind, 0)]
    each = rows // tenants
    if kind == "MiLoRA":
        return of_others * tenants * min(1, each * config.top_k / 7)
    experts = config.num_experts or 1
    used = experts * (1 - (1 - (config.top_k or 0) / experts) ** each)
    return tenants * (of_others + of_experts * used / experts)


def steps(model: nn.Module, cases: list[tuple[str, int, int]], rounds: int) -> Rows:
    """(kind, rows, tenants) each a step in turn."""
    engines, base = {}, 0
    for key, parameter in model.named_parameters():
        if not any(part in key for part in (".adapters.", ".mixtures.", "embed_tokens")):
            base += parameter.nbytes
    for case in cases:
        kind, rows, tenants = case
        engines[case] = Engine(model, rows, PROMPT + rounds + 8)
        names = [name_of(kind, row % tenants) for row in range(rows)]
        submit(model, engines[case], names, rounds + 6)
        engines[case].step()
        engines[case].step()
    times: dict = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            began = time.perf_counter()
            engines[case].step()
            if next(model.parameters()).is_cuda:
                torch.cuda.synchronize()
            times[case].append(time.perf_counter() - began)
    result = []
    for case in cases:
        kind, rows, tenants = case
        config = model.config
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        width = torch.finfo(next(model.parameters()).dtype).bits // 8
        cache = rows * per_token * (PROMPT + rounds / 2) * width
        alone = times["base", rows, 1]
        ratio = median(a / b for a, b in zip(alone, times[case], strict=True))
        bound = (base + cache) / (base + cache + active_bytes(model, kind, rows, tenants))
        result.append(
            {
                "system": kind if tenants == 1 else f"{kind}, {tenants} tenants",
                "batch": rows,
                "ms a step": 1e3 * median(times[case]),
                "tokens/s": rows / median(times[case]),
                "of the base": ratio,
                "bound": bound,
                "of it": ratio / bound,
            }
        )
    return result


def generation(model: nn.Module, names: list[str | None], new: int, rows: int) -> tuple:
    """(seconds, tokens of each), `rows` at a time."""
    engine = Engine(model, rows, PROMPT + new)
    began = time.perf_counter()
    requests = submit(model, engine, names, new)
    engine.run()
    seconds = time.perf_counter() - began
    engine.close()
    return seconds, [request.tokens for request in requests]


def peft_generation(model: nn.Module, names: list[str], new: int) -> tuple:
    """The same requests by `peft` on `transformers`, all in one batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    sizes = {key: getattr(config, key) for key in MODELS["small"]}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=config.num_hidden_layers))
    state = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    theirs.load_state_dict({k: v for k, v in state.items() if ".mixtures." not in k}, strict=False)
    theirs.generation_config.eos_token_id = None
    settings = LoraConfig(r=LORA["r"], lora_alpha=LORA["lora_alpha"], target_modules="all-linear")
    for i, name in enumerate(names):
        if i == 0:
            theirs = get_peft_model(theirs, settings, adapter_name=name)
        else:
            theirs.add_adapter(name, settings)
    own = theirs.state_dict()
    for name in names:
        for key, parameter in adapter_parameters(model, name).items():
            path, _, part = key.partition(f".adapters.{name}.")
            own[f"base_model.model.{path}.{part}.{name}.weight"].copy_(parameter)
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    prompts_BS = torch.randint(config.vocab_size, (len(names), PROMPT), generator=generator)
    with torch.inference_mode():
        began = time.perf_counter()
        tokens_BS = theirs.generate(
            input_ids=prompts_BS,
            attention_mask=torch.ones_like(prompts_BS),
            adapter_names=names,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        seconds = time.perf_counter() - began
    return seconds, tokens_BS[:, PROMPT:].tolist()


def compare(model: nn.Module, tenants: int, new: int) -> Rows:
    names = [name_of("LoRA", i) for i in range(tenants)]
    together, tokens = generation(model, names, new, tenants)
    one_by_one, same = generation(model, names, new, 1)
    count = tenants * new
    rows = [
        {"system": f"{tenants} tenants, one batch", "tokens/s": count / together, "equal": ""},
        {
            "system": "one after the other",
            "tokens/s": count / one_by_one,
            "equal": f"{sum(a == b for a, b in zip(tokens, same, strict=True))} of {tenants}",
        },
    ]
    if find_spec("peft") and next(model.parameters()).device.type == "cpu":
        seconds, theirs = peft_generation(model, names, new)
        equal = sum(a == b for a, b in zip(tokens, theirs, strict=True))
        name = "peft on transformers, one batch"
        rows.append({"system": name, "tokens/s": count / seconds, "equal": f"{equal} of {tenants}"})
    else:
        print("peft on transformers: left out, it is not installed, or this is not a CPU")
    for row in rows:
        row["the first is"] = f"{rows[0]['tokens/s'] / row['tokens/s']:.2f} x"
    return rows


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Decoding for tenants with adapters of their own.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of each generation; rounds")
    parser.add_argument("--output", type=Path, help="write the tables here, as JSON")
    options = parser.parse_args(argv)
    print_header()
    sizes = {**MODELS[options.model], "num_hidden_layers": options.layers}
    sizes["max_position_embeddings"] = 2 * (PROMPT + options.tokens)
    model = new_model(sizes, options.dtype, options.device, list(KINDS), options.tenants)
    T = options.tenants
    cases = [(kind, rows, 1) for rows in (1, 8) for kind in ("base", *KINDS)]
    cases += [("base", T, 1), *((kind, T, T) for kind in ("LoRA", "MixLoRA", "MiLoRA"))]
    tables = {"steps": steps(model, cases, options.tokens)}
    print(table(tables["steps"]))
    rates = {row["system"]: row["tokens/s"] for row in tables["steps"] if row["batch"] == 1}
    print(f"MiLoRA / MOELoRA, batch 1: {rates['MiLoRA'] / rates['MOELoRA']:.2f}")
    if options.dtype == "float32":
        tables["generations"] = compare(model, T, options.tokens)
        print(table(tables["generations"]))
    if options.output:
        write_json(options.output, json.loads(json.dumps(tables)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
