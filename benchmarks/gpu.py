"""All that is measured on a GPU, in one run; the tables are printed and written to
benchmarks/results/<gpu>-<date>.{json,md}.

    python -m benchmarks.gpu [--minutes 8]        `make gpu-bench`
    python -m benchmarks.gpu --device cpu --tiny --output FOLDER      sizes that prove nothing

LLaMA-2-7B's sizes, bf16, random weights. A part that would begin after so many minutes is left out,
and says so.
"""

import datetime
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import bench_decode, bench_ffn, bench_ops, bench_train_step
from benchmarks.harness import Rows, machine, print_header, table
from mixlora.errors import ArgumentParser, InputError, command

RESULTS = Path(__file__).parent / "results"
STEPS = ["base", "LoRA", "MixLoRA", "MixLoRA paper", "MixLoRA vanilla", "peft LoRA"]
Parts = dict[str, Callable[[], Rows]]


def parts_for(device: str) -> Parts:
    """The most telling first."""
    bf16, ffn, step, decode = torch.bfloat16, bench_ffn.run, bench_train_step.run, bench_decode.run
    of_step = partial(step, STEPS, device, "7b", "bfloat16")
    return {
        "The operators": partial(bench_ops.run, device, [bf16, torch.float32], False),
        "The feed-forward, 4096 tokens": partial(ffn, device, bf16, 4096, 4096, 11008, 2.0),
        "A training step, 2 layers, 2 x 2048 tokens": partial(of_step, 2, 2, 2048, 7),
        "A training step, 32 layers, 2 x 2048 tokens": partial(of_step, 32, 2, 2048, 5),
        "Decoding, 32 layers": partial(
            decode, bench_decode.USUAL, device, "7b", "bfloat16", 32, [1, 8, 64], 32
        ),
        "A training step, 32 layers, 8 x 2048 tokens": partial(of_step, 32, 8, 2048, 3),
        "A training step, 2 layers, 8 x 2048 tokens": partial(of_step, 2, 8, 2048, 5),
    }


def tiny_parts(device: str) -> Parts:
    """The same parts."""
    fp32, ffn, step, decode = torch.float32, bench_ffn.run, bench_train_step.run, bench_decode.run
    return {
        "The operators": partial(bench_ops.run, device, [fp32], True),
        "The feed-forward, 8 tokens": partial(ffn, device, fp32, 8, 32, 48, 0.0),
        "A training step, 2 layers, 2 x 16 tokens": partial(
            step, STEPS, device, "tiny", "float32", 2, 2, 16, 1, in_turns=False
        ),
        "Decoding, 2 layers": partial(
            decode, bench_decode.USUAL, device, "tiny", "float32", 2, [1, 3], 2, prompt=4
        ),
    }


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="All that is measured on a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove nothing")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results' folder")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("gpu-bench: torch sees no GPU (--device cpu --tiny runs every part)")
    begun = time.perf_counter()
    date = datetime.date.today().isoformat()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    name = re.sub(r"\W+", "-", name.removeprefix("NVIDIA ")).lower() + f"-{date}"
    print_header()
    found: dict[str, Rows] = {}
    texts = [f"# {machine()}, {date}\n"]
    last = 60 * (options.minutes - 1)  # when the last part may begin; it takes about a minute
    for title, part in (tiny_parts if options.tiny else parts_for)(options.device).items():
        elapsed = time.perf_counter() - begun
        if elapsed > last:
            text = f"left out: {elapsed:.0f} s had passed"
        else:
            try:
                found[title] = part()
                text = f"{table(found[title])}\n\n({time.perf_counter() - begun - elapsed:.0f} s)"
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                text = f"FAILED: {type(error).__name__}: {error}"
        print(f"\n{title}\n\n{text}", flush=True)
        texts.append(f"## {title}\n\n{text}\n")
        write(options.output / name, {"machine": machine(), "date": date, **found}, texts)
    print(f"\nwritten: {options.output / name}.json and .md")
    return 1 if any("FAILED: " in text for text in texts) else 0


def write(path: Path, found: dict, texts: list[str]) -> None:
    """After every part, so that what was measured stays whatever becomes of the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(found, indent=2) + "\n")
    Path(f"{path}.md").write_text("\n".join(texts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
