"""What the paper's settings need of a GPU's memory, by `train.py --estimate` (docs/memory.md).

    python -m benchmarks.bench_memory [--rows 8] [--tokens 512] [--models 7b,13b]

Batches of 16 samples, in micro-batches of `rows`. No weights are needed, nor a GPU.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import mixlora
import models
from benchmarks.harness import table
from mixlora.errors import ArgumentParser, command
from mixlora.estimate import CARDS, GIB, Estimate, estimate
from mixlora.train_config import AdapterRun, LoopConfig

COMMON = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
SIZES = {  # D, F, layers, heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
NAMES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
MIXTURE = {"routing_strategy": "mixlora", "r": 16, "num_experts": 8, "top_k": 2}
ADAPTERS = {
    "MixLoRA r 16": {**MIXTURE, "lora_dropout": 0.05},
    "LoRA r 80": {"r": 80, "lora_dropout": 0.05},
}


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Memory of the paper's settings.")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--models", default="7b,13b")
    options = parser.parse_args(argv)
    rows = []
    for model in options.models.split(","):
        for name, adapter in ADAPTERS.items():
            for quantize in ("none", "nf4"):
                for again in (False, True):
                    loop = LoopConfig(
                        steps=1,
                        batch_size=16,
                        micro_batch_size=options.rows,
                        max_seq_len=options.tokens,
                        gradient_checkpointing=again,
                    )
                    run = AdapterRun("default", loop, mixlora.AdapterConfig(**adapter))
                    found = estimated(model, run, quantize)
                    rows.append(
                        {
                            "model": model,
                            "adapter": name,
                            "base": "bf16" if quantize == "none" else quantize,
                            "checkpointing": "yes" if again else "no",
                            "base GiB": found.base / GIB,
                            "adapter, its gradients and optimizer": (
                                found.adapters + found.gradients + found.optimizer
                            )
                            / GIB,
                            "kept for backward": found.saved / GIB,
                            "at most": found.peak / GIB,
                            "checkpoint": found.checkpoint / GIB,
                            "fits": ", ".join(f"{card} GB" for card in CARDS if found.fits(card)),
                        }
                    )
    print(table(rows))
    return 0


def estimated(model: str, run: AdapterRun, quantize: str) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        config = COMMON | dict(zip(NAMES, SIZES[model], strict=True))
        (Path(folder) / "config.json").write_text(json.dumps(config))
        base = models.without_data(folder, torch.bfloat16, quantize)
    with torch.device("meta"):
        mixlora.add_adapter(base, run.adapter)
    return estimate(base, [run])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
