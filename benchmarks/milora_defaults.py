"""Which of MiLoRA's open options are its defaults: an experiment on the quickstart's tasks.

    python -m benchmarks.milora_defaults [--seeds 0 1 2] [--steps 160] [--batch-size 16] [--arms 12]
           [--output benchmarks/results/milora_defaults.json]

Every arm of ARMS is trained on the four tasks together, as configs/quickstart.yaml says but for
steps and batch, and scored on their validation rows, by which defaults are chosen, and on their
test rows. The parameters of all arms are within 2 % of each other. A run whose result stands in the
output file is not run again.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import yaml

import mixlora
import models
import train
from benchmarks.harness import machine
from mixlora.adapters import adapter_parameters
from mixlora.errors import ArgumentParser, command
from mixlora.evaluation import score_labels, summarize
from mixlora.tasks import load_examples
from mixlora.tokenizer import Tokenizer

CONFIG = "configs/quickstart.yaml"
R = 42  # with the routers as many parameters as the LoRA


def milora(router_weight: str, top_k: int, scale: int, **options) -> dict:
    options = {"router_weight": router_weight, "top_k": top_k, "lora_alpha": scale * R, **options}
    return {"routing_strategy": "milora", "r": R, **options}


ARMS = {
    "LoRA": {"r": 43, "lora_alpha": 86},
    "MixLoRA": {
        "routing_strategy": "mixlora",
        "r": 8,
        "lora_alpha": 16,
        "num_experts": 8,
        "top_k": 2,
    },
    "probability, top 3, alpha 8 r": milora("probability", 3, 8),
    "straight_through, top 3, alpha 2 r": milora("straight_through", 3, 2),
    "probability, top 1, alpha 8 r": milora("probability", 1, 8),
    "probability, top 7, alpha 8 r": milora("probability", 7, 8),
    "probability, top 3, alpha 2 r": milora("probability", 3, 2),
    "probability, top 5, alpha 2 r": milora("probability", 5, 2),
    "probability, top 3, alpha 8 r, prompt by the base": milora(
        "probability", 3, 8, route_prompt=False
    ),
    "probability, top 5, alpha 8 r": milora("probability", 5, 8),
    "probability, top 3, alpha 16 r": milora("probability", 3, 16),
    "straight_through, top 3, alpha 1 r": milora("straight_through", 3, 1),
}


def one_run(adapter: dict, seed: int, steps: int, batch_size: int, folder: Path) -> dict:
    settings = yaml.safe_load(Path(CONFIG).read_text())
    settings["adapters"] = [{"name": "arm", "adapter": adapter}]
    settings["eval"]["tasks"] = []
    settings["train"] |= {"steps": steps, "batch_size": batch_size}
    settings["run"] = {"dir": str(folder / "run"), "seed": seed, "plot": False, "overwrite": True}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    began = time.monotonic()
    if train.main(["--config", str(path)]) != 0:
        raise SystemExit("training failed")
    seconds = time.monotonic() - began
    model = models.load(settings["model"]["base"])
    mixlora.load_adapter(model, folder / "run/arm/adapter")
    tokenizer = Tokenizer(model.folder, model.config.vocab_size)
    steps_done = [json.loads(x) for x in (folder / "run/arm/metrics.jsonl").open()]
    result = {
        "parameters": sum(p.numel() for p in adapter_parameters(model).values()),
        "seconds": round(seconds, 1),
        "loss": round(mean(step["loss"] for step in steps_done[-10:]), 4),
        "load": steps_done[-1]["expert_load"],
    }
    for split in ("validation", "test"):
        result[split] = {}
        for task in settings["data"]["tasks"]:
            examples = load_examples(settings["data"]["dir"], task, split)
            rows = score_labels(model, tokenizer, examples, settings["eval"]["batch_size"])
            result[split][task] = round(100 * summarize(task, rows).accuracy, 2)
    return result


def shown(results: list[dict]) -> str:
    """Means over seeds; ± is the standard error of the mean, from their spread."""
    tasks = list(results[0]["test"])
    lines = ["| | parameters | validation | test | " + " | ".join(tasks) + " | loss |"]
    lines.append("|---|" + "---|" * (len(tasks) + 4))
    for arm in dict.fromkeys(result["arm"] for result in results):
        of_arm = [result for result in results if result["arm"] == arm]
        columns = [[mean(r[split].values()) for r in of_arm] for split in ("validation", "test")]
        columns += [[r["test"][task] for r in of_arm] for task in tasks]
        cells = [f"{mean(x):.1f}" + spread(x) for x in columns]
        loss = f"{mean(r['loss'] for r in of_arm):.3f}"
        lines.append(f"| {arm} | {of_arm[0]['parameters']:,} | {' | '.join(cells)} | {loss} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="MiLoRA's options, MixLoRA and LoRA on four small tasks.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--arms", type=int, default=len(ARMS), help="only the first so many")
    parser.add_argument("--output", default="benchmarks/results/milora_defaults.json")
    options = parser.parse_args(argv)
    output = Path(options.output)
    settings = {"steps": options.steps, "batch_size": options.batch_size, "config": CONFIG}
    results = json.loads(output.read_text())["results"] if output.exists() else []
    for seed in options.seeds:
        for arm, adapter in list(ARMS.items())[: options.arms]:
            if any(result["arm"] == arm and result["seed"] == seed for result in results):
                continue
            with tempfile.TemporaryDirectory() as folder:
                sizes = options.steps, options.batch_size, Path(folder)
                results.append({"arm": arm, "seed": seed, **one_run(adapter, seed, *sizes)})
            written = {**settings, "machine": machine(), "results": results}
            output.write_text(json.dumps(written, indent=1) + "\n")
            print(json.dumps(results[-1]), flush=True)
    print(shown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
