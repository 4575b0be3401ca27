"""A whole training step (forward, loss, backward, clipping, AdamW), several systems in one run.

    python -m benchmarks.bench_train_step [--dtype float32] [--layers 4] [--rows 4] [--tokens 256]
           [--systems base,LoRA,...] [--moe-peft PYTHON] [--rounds 15] [--output FILE.json]
           [--device cuda] [--model 7b]
    python -m benchmarks.bench_train_step --systems LoRA,DoRA,MixDoRA,"peft DoRA"
    python -m benchmarks.bench_train_step --systems MixLoRA,"MixLoRA paper","MixLoRA vanilla"

D 1024, F 2816, 16 heads, vocabulary 4096, or another of MODELS. Every system is a process; they
take turns step by step, so that a machine that slows down slows all, and a ratio is the median of
the ratios of steps of the same round. On a GPU, which would not hold them all, they come one after
the other, in this process. The floor, base, is the frozen model with gradients of its embeddings.
"Saved" are the bytes that autograd keeps for backward, each storage once, without parameters;
"peak" is the most memory of the first step beyond what is "held": on a GPU the model, else what the
process has. A system takes 1 to 4 GB all the while.
"""

import gc
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import train_step_worker
from benchmarks.harness import Rows, machine, print_header, table
from benchmarks.modes import MODES
from benchmarks.worker import Trainer
from mixlora.errors import ArgumentParser, InputError, command, did_you_mean

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "max_position_embeddings"),
)
MODELS = {
    name: dict(zip(SIZES, sizes, strict=True))
    for name, sizes in {
        "small": (4096, 1024, 2816, 16, 2048),
        "7b": (32000, 4096, 11008, 32, 4096),
        "tiny": (96, 32, 48, 4, 64),
    }.items()
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
    """In a process of its own, or, without a `python` for that, in this one."""

    def __init__(self, name: str, python: str | None, settings: dict[str, Any]) -> None:
        self.name = name
        made_with, adapter = SYSTEMS[name]
        self.settings = {**settings, "with": made_with, "adapter": adapter}
        self.process = self.trainer = None
        if python:
            self._start(python, made_with)
        self.peak_bytes = self.held_bytes = self.saved_bytes = None
        self.times: list[float] = []
        self.is_too_large = False

    def _start(self, python: str, made_with: str) -> None:
        worker = "moe_peft_worker" if made_with == "moe_peft" else "train_step_worker"
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        if self.name == "MoE-PEFT whole":
            environment["MOE_PEFT_EVALUATE_MODE"] = "1"
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.{worker}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._send(json.dumps(self.settings))

    def warm_up(self) -> None:
        self.ask("step")
        peak = self.ask("peak")
        self.peak_bytes, self.held_bytes = peak["peak_bytes"], peak["held_bytes"]
        self.saved_bytes = self.ask("saved")["saved_bytes"]

    def ask(self, what: str) -> dict[str, Any]:
        if self.process is None:
            self.trainer = self.trainer or Trainer(train_step_worker.make, self.settings)
            return self.trainer.answer(what)
        self._send(what)
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"{self.name}: its process has ended, its message is above")
        return json.loads(line)

    def step(self) -> None:
        self.times.append(self.ask("step")["seconds"])

    def measure_alone(self, rounds: int) -> None:
        """And give back what it held."""
        try:
            self.warm_up()
            for _ in range(rounds):
                self.step()
        except torch.OutOfMemoryError:
            self.is_too_large = True
        self.trainer = None
        gc.collect()
        torch.cuda.empty_cache()

    def _send(self, line: str) -> None:
        print(line, file=self.process.stdin, flush=True)


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Training steps of several systems, side by side.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
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
    print_header()
    print(f"{options.dtype}, {options.layers} layers, {options.rows} x {options.tokens} tokens")
    rows = run(
        chosen(options.systems),
        *(options.device, options.model, options.dtype),
        *(options.layers, options.rows, options.tokens, options.rounds),
        options.moe_peft,
    )
    print(table(rows))
    if options.plot:
        plot(rows, f"{options.dtype}, {machine()}", options.plot)
    if options.output:
        settings = {**vars(options), "machine": machine()}
        Path(options.output).write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
    return 0


def run(
    names: list[str],
    device: str,
    model: str,
    dtype: str,
    num_layers: int,
    num_rows: int,
    S: int,
    rounds: int,
    moe_peft: str | None = None,
    in_turns: bool | None = None,  # None: not on a GPU
) -> Rows:
    sizes = {**MODELS[model], "num_hidden_layers": num_layers}
    tokens_BS = torch.randint(sizes["vocab_size"], (num_rows, S)).tolist()
    settings = {"sizes": sizes, "dtype": dtype, "tokens_BS": tokens_BS, "device": device}
    in_turns = device == "cpu" if in_turns is None else in_turns
    pythons = {"moe_peft": moe_peft, "peft": sys.executable if find_spec("peft") else None}
    systems = []
    for name in names:
        python = pythons.get(SYSTEMS[name][0], sys.executable)
        if python is None:
            print(f"{name}: left out, it is not installed")
        else:
            systems.append(System(name, python if in_turns else None, settings))
    if in_turns:
        for system in systems:
            system.warm_up()
        for _ in range(rounds):
            for system in systems:
                system.step()
    else:
        for system in systems:
            system.measure_alone(rounds)
    return [row_of(system, systems, sizes, num_rows, S) for system in systems]


def chosen(names: str | None) -> list[str]:
    names = USUAL if names is None else names.split(",")
    for name in names:
        if name not in SYSTEMS:
            raise InputError(f"there is no system {name!r}{did_you_mean(name, SYSTEMS)}")
    return names


def flops(name: str, sizes: dict[str, int], num_rows: int, S: int) -> float:
    """What a step must at least compute: of frozen weights the forward and the gradient of the
    input, of low ranks the weights' gradients too. A token's K experts alone, in gate and up once
    more in backward; in a DoRA also W A^T, whatever the number of tokens."""
    V, D, F = (sizes[key] for key in SIZES[:3])
    num_layers = sizes["num_hidden_layers"]
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


def row_of(
    system: System, systems: list[System], sizes: dict[str, int], num_rows: int, S: int
) -> dict[str, Any]:
    def ratio(name: str) -> float | None:
        other = next((s for s in systems if s.name == name), None)
        pairs = zip(system.times, other.times, strict=False) if other else []
        values = [a / b for a, b in pairs]
        return median(values) if values else None

    def megabytes(size: int | None) -> float | None:
        return None if size is None else size / 1e6

    shape = sizes, num_rows, S
    time = None if system.is_too_large else median(system.times)
    return {
        "system": f"{system.name}: out of memory" if system.is_too_large else system.name,
        "ms": time and 1e3 * time,
        "tokens/s": time and num_rows * S / time,
        **{f"/ {name}": ratio(name) for name in REFERENCES},
        "FLOPs / base": flops(system.name, *shape) / flops("base", *shape),
        "saved MB": megabytes(system.saved_bytes),
        "peak MB": megabytes(system.peak_bytes),
        "held MB": megabytes(system.held_bytes),
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
