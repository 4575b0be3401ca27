"""A whole training step (forward, loss, backward, clipping, AdamW), several systems in one run.

    python -m benchmarks.bench_train_step [--dtype float32] [--layers 4] [--rows 4] [--tokens 256]
           [--systems base,LoRA,...] [--moe-peft PYTHON] [--rounds 15] [--output FILE.json]
    python -m benchmarks.bench_train_step --systems LoRA,DoRA,MixDoRA,"peft DoRA"
    python -m benchmarks.bench_train_step --systems MixLoRA,"MixLoRA paper","MixLoRA vanilla"

D 1024, F 2816, 16 heads, vocabulary 4096. Every system is a process; they take turns step by step,
so that a machine that slows down slows all, and a ratio is the median of the ratios of steps of the
same round. The floor, base, is the frozen model with gradients of its embeddings. "Saved" are the
bytes that autograd keeps for backward, each storage once, without parameters; "peak" is the most
memory of the first step beyond what the model holds. A system takes 1 to 4 GB all the while.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import machine, print_header
from benchmarks.modes import MODES
from mixlora.errors import ArgumentParser, InputError, command, did_you_mean

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}
PLAIN = {"r": 80, "lora_alpha": 160}
DORA = {**PLAIN, "use_dora": True}
MIXTURE = {"routing_strategy": "mixlora", "r": 16, "lora_alpha": 32, "num_experts": 8, "top_k": 2}
DROPOUT = {**MIXTURE, "lora_dropout": 0.05}  # MoE-PEFT refuses 0
SYSTEMS: dict[str, tuple[str, dict[str, Any] | None]] = {  # name: (made with, adapter)
    "base": ("mixlora", None),
    "LoRA": ("mixlora", PLAIN),
    "MixLoRA": ("mixlora", MIXTURE),
    "MixLoRA paper": ("paper", MIXTURE),
    "MixLoRA vanilla": ("vanilla", MIXTURE),
    "DoRA": ("mixlora", DORA),
    "MixDoRA": ("mixlora", {**MIXTURE, "use_dora": True}),
    "MixLoRA dropout": ("mixlora", DROPOUT),
    "peft LoRA": ("peft", PLAIN),
    "peft DoRA": ("peft", DORA),
    "MoE-PEFT MixLoRA": ("moe_peft", DROPOUT),
    "MoE-PEFT whole": ("moe_peft", DROPOUT),  # its other mode
}
USUAL = ["base", "LoRA", "MixLoRA", "MixLoRA dropout", "peft LoRA", "MoE-PEFT MixLoRA"]
REFERENCES = ("base", "LoRA", "DoRA", "peft LoRA", "MoE-PEFT MixLoRA")


class System:
    def __init__(self, name: str, python: str, settings: dict[str, Any]) -> None:
        self.name = name
        made_with, adapter = SYSTEMS[name]
        worker = "moe_peft_worker" if made_with == "moe_peft" else "train_step_worker"
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        if name == "MoE-PEFT whole":
            environment["MOE_PEFT_EVALUATE_MODE"] = "1"
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.{worker}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._send(json.dumps({**settings, "with": made_with, "adapter": adapter}))
        self.ask("step")
        self.peak_bytes = self.ask("peak")["peak_bytes"]
        self.saved_bytes = self.ask("saved")["saved_bytes"]
        self.times: list[float] = []

    def ask(self, what: str) -> dict[str, Any]:
        self._send(what)
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"{self.name}: its process has ended, its message is above")
        return json.loads(line)

    def step(self) -> None:
        start = time.perf_counter()
        self.ask("step")
        self.times.append(time.perf_counter() - start)

    def _send(self, line: str) -> None:
        print(line, file=self.process.stdin, flush=True)


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Training steps of several systems, side by side.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--systems", help=f"names, by commas, of {', '.join(SYSTEMS)}")
    parser.add_argument("--moe-peft", help="python of the environment of tools/foreign.sh")
    parser.add_argument("--output", help="write the table here, as JSON")
    parser.add_argument("--plot", help="draw it here, as PNG; needs base among the systems")
    options = parser.parse_args(argv)
    tokens_BS = torch.randint(SIZES["vocab_size"], (options.rows, options.tokens)).tolist()
    settings = {
        "sizes": {**SIZES, "num_hidden_layers": options.layers},
        "dtype": options.dtype,
        "tokens_BS": tokens_BS,
    }
    print_header()
    print(f"{options.dtype}, {options.layers} layers, {options.rows} x {options.tokens} tokens")
    pythons = {"moe_peft": options.moe_peft, "peft": sys.executable if find_spec("peft") else None}
    systems = []
    for name in chosen(options.systems):
        python = pythons.get(SYSTEMS[name][0], sys.executable)
        if python is None:
            print(f"{name}: left out, it is not installed")
        else:
            systems.append(System(name, python, settings))
    for _ in range(options.rounds):
        for system in systems:
            system.step()
    shape = options.layers, options.rows, options.tokens
    rows = [row_of(system, systems, shape) for system in systems]
    print_table(rows)
    if options.plot:
        plot(rows, f"{options.dtype}, {machine()}", options.plot)
    if options.output:
        settings = {**vars(options), "machine": machine()}
        Path(options.output).write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
    return 0


def chosen(names: str | None) -> list[str]:
    names = USUAL if names is None else names.split(",")
    for name in names:
        if name not in SYSTEMS:
            raise InputError(f"there is no system {name!r}{did_you_mean(name, SYSTEMS)}")
    return names


def flops(name: str, num_layers: int, num_rows: int, S: int) -> float:
    """What a step must at least compute: of frozen weights the forward and the gradient of the
    input, of low ranks the weights' gradients too. A token's K experts alone, in gate and up once
    more in backward; in a DoRA also W A^T, whatever the number of tokens."""
    D, F, V = (SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    made_with, adapter = SYSTEMS[name]
    T = num_rows * S
    whole = 4 * D * D + 3 * D * F  # weights of a layer
    attention = 7 * S * D  # 2 products in forward, 5 in backward, half of each behind the mask
    per_token = 4 * (num_layers * whole + V * D) + num_layers * attention
    if adapter is None:
        return per_token * T
    R = adapter["r"]
    attention_lora, ffn_lora = 6 * R * 4 * 2 * D, 6 * R * 3 * (D + F)
    if "num_experts" not in adapter:
        per_token += num_layers * (attention_lora + ffn_lora)
    else:
        K = adapter["top_k"]
        is_dora = adapter.get("use_dora", False)
        again = 2 * 2 * R * F
        times_w1_w3 = K if made_with == "vanilla" else 1
        times_w2 = K if is_dora or made_with in MODES else 1
        frozen_more = 4 * ((times_w1_w3 - 1) * 2 + times_w2 - 1) * D * F
        per_token += num_layers * (attention_lora + K * (ffn_lora + again) + frozen_more)
    total = per_token * T
    if adapter.get("use_dora"):
        total += num_layers * 2 * R * adapter.get("num_experts", 1) * whole
    return total


def row_of(system: System, systems: list[System], shape: tuple[int, int, int]) -> dict[str, Any]:
    def ratio(name: str) -> float | None:
        other = next((s for s in systems if s.name == name), None)
        pairs = zip(system.times, other.times, strict=True) if other else []
        values = [a / b for a, b in pairs]
        return median(values) if values else None

    return {
        "system": system.name,
        "ms": 1e3 * median(system.times),
        **{f"/ {name}": ratio(name) for name in REFERENCES},
        "FLOPs / base": flops(system.name, *shape) / flops("base", *shape),
        "saved MB": system.saved_bytes / 1e6,
        "peak MB": system.peak_bytes / 1e6,
    }


def plot(rows: list[dict[str, Any]], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["system"] for row in rows][::-1]
    figure, (times, saved) = plt.subplots(1, 2, figsize=(10, 0.4 * len(rows) + 1.2), sharey=True)
    times.barh(names, [row["/ base"] for row in rows][::-1], color="tab:blue")
    bounds = [row["FLOPs / base"] for row in rows][::-1]
    times.plot(bounds, names, "k|", markersize=16, label="its FLOPs")
    times.set_xlabel("time of a step, of the frozen model's")
    times.legend()
    saved.barh(names, [row["saved MB"] for row in rows][::-1], color="tab:orange")
    saved.set_xlabel("kept for backward, MB")
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: float | str | None) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
        return "" if value is None else value

    lines = [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.rjust, line, widths)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
