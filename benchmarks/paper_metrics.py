"""The efficiency measurement of the MixLoRA paper (arXiv 2404.15159, tables 6, 7), for any config.

    python -m benchmarks.paper_metrics configs/paper/lora.yaml configs/paper/mixlora.yaml
           [--tokens 512] [--rows 8] [--runs 10] [a.b=value ...]

Per token, as the paper: the time of a forward and of a backward pass in training, of a forward in
inference, and the peak memory of each; mean and standard deviation over the runs. Then two adapters
of the kind on one base, each with half of the rows, memory per adapter. All configs share a base
and take turns run by run, so that a machine that slows down slows all; percentages are of the
first. Time is that of CUDA events on a GPU and of the wall clock on a CPU; memory is what torch
allocated at most on a GPU, and the resident memory of the process at its highest (VmHWM) on a CPU,
base included in both. Attention, loss and logits are part of the step; the optimizer is not.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

import mixlora
import train
from benchmarks.harness import print_header
from mixlora import config as configs
from mixlora.adapters import adapter_parameters
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import Progress
from mixlora.train_config import AdapterRun, TrainConfig

PHASES = ("forward", "backward", "inference")


@dataclass
class Side:
    """One config with one adapter, or with two on the same base."""

    label: str
    adapters: list[str]
    run: AdapterRun
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    peak: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))  # bytes


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="The efficiency measurement of the MixLoRA paper.")
    parser.add_argument("configs", nargs="+", help="training configs; a.b=value overrides in all")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args(argv)
    paths = [x for x in options.configs if "=" not in x]
    overrides = [x for x in options.configs if "=" in x]
    if not paths:
        raise InputError("give at least one config")
    if options.rows % 2 or min(options.rows, options.tokens, options.runs - 1) < 1:
        raise InputError("--rows must be even, --tokens >= 1, --runs >= 2")
    loaded = [configs.load(TrainConfig, path, overrides) for path in paths]
    shared = loaded[0].model
    for path, config in zip(paths, loaded, strict=True):
        if config.model != shared:
            raise InputError(f"{path}: model differs from that of {paths[0]}: {config.model}")
    model = train.load_model(shared)
    device = next(model.parameters()).device

    sides = []
    for path, config in zip(paths, loaded, strict=True):
        for run in config.runs():
            label = Path(path).stem + (f" {run.name}" if len(config.adapters) > 1 else "")
            names = [f"side{len(sides)}_{i}" for i in range(2)]
            for name in names:
                mixlora.add_adapter(model, run.adapter, name)
                warm(model, name)
            sides += [Side(label, names[:1], run), Side(f"{label} x2", names, run)]

    generator = torch.Generator().manual_seed(0)
    shape = options.rows, options.tokens
    tokens_BS = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    progress = Progress("measure", (options.runs + 1) * len(sides), "runs")
    for run in range(options.runs + 1):
        for side in sides:
            measure(model, side, tokens_BS, keep=run > 0)  # the first warms up
            progress.advance()
    progress.close()
    print_header()
    print(
        f"model {shared.base} in {shared.dtype}, {options.rows} rows of {options.tokens} tokens, "
        f"{options.runs} runs: mean +- standard deviation"
    )
    print(table(sides, tokens_BS.numel()))
    return 0


def warm(model: AdaptedModel, name: str) -> None:
    """Fill B, or a fresh adapter's zeros might be what is fast."""
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            if key.endswith("lora_B"):
                parameter.normal_(std=0.02)


def measure(model: AdaptedModel, side: Side, tokens_BS: Tensor, keep: bool) -> None:
    """One run: a training step's two passes, and an inference forward."""
    rows = len(tokens_BS) // len(side.adapters)
    names = [name for name in side.adapters for _ in range(rows)]
    model.train()
    model.gradient_checkpointing = side.run.train.gradient_checkpointing
    model.recompute_ffn = side.run.train.activation == "recompute"
    result: dict[str, Tensor] = {}

    def forward() -> None:
        loss, num_labels = model(tokens_BS, labels_BS=tokens_BS, adapters=names)
        result["loss"] = loss / num_labels + model.router_loss()

    def backward() -> None:
        result.pop("loss").backward()

    def inference() -> None:
        with model.evaluating():
            last_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
            last_BS[:, -1] = True
            model(tokens_BS, adapters=names, select_BS=last_BS)

    for phase, function in zip(PHASES, (forward, backward, inference), strict=True):
        seconds, peak = timed(function, tokens_BS.device)
        if keep:
            side.seconds[phase].append(seconds)
            side.peak[phase] = max(side.peak[phase], peak)
    model.zero_grad(set_to_none=True)


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds, highest memory in bytes) of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # VmHWM begins anew at what is resident
    began = time.perf_counter()
    function()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((line for line in lines if line.startswith("VmHWM")), "VmHWM: nan kB")
    return seconds, float(peak.split()[1]) * 1024


def table(sides: list[Side], num_tokens: int) -> str:
    """us per token of each phase (share of the first side's), and GB per adapter."""
    lines = [["", "forward us", "backward us", "train GB", "inference us", "inference GB"]]
    for side in sides:
        cells = {}
        for phase in PHASES:
            times = [1e6 * x / num_tokens for x in side.seconds[phase]]
            share = mean(side.seconds[phase]) / mean(sides[0].seconds[phase])
            cells[phase] = f"{mean(times):.1f} +- {stdev(times):.1f} {share:.0%}"
        train_peak = max(side.peak["forward"], side.peak["backward"])
        gb = [f"{x / len(side.adapters) / 1e9:.2f}" for x in (train_peak, side.peak["inference"])]
        forward, backward, inference = cells.values()
        lines.append([side.label, forward, backward, gb[0], inference, gb[1]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
