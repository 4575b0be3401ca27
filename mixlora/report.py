"""What is left of a run: a table of accuracies, the same as JSON with all that it depends on, and
one picture."""

import dataclasses
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from mixlora.errors import InputError
from mixlora.evaluation import TaskResult
from mixlora.files import write_json
from mixlora.tasks import data_file
from mixlora.train_config import TrainConfig

MAX_COLUMNS = 300  # of a picture over time; a long run's steps share them
MAX_COUNTS = 10  # answers in a line of the table; a task of numbers has hundreds


def report_run(
    config: TrainConfig, folder: Path, results: dict, skipped: Mapping[str, int]
) -> None:
    """The table on the screen, results.json, and the pictures. `results`: a model's by task; the
    base is one of them. `skipped`: an adapter's steps that were not finite."""
    runs = config.runs()
    order = ["base", *(run.name for run in runs)]
    results = {name: results[name] for name in order if results.get(name)}
    files = {task: data_file(run.data.dir, task) for run in runs for task in run.eval.tasks}
    described = {
        "protocol": runs[0].eval.protocol,
        "batch_size": runs[0].eval.batch_size,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "seed": config.run.seed,
        **provenance(files),
        "results": {
            name: {task: dataclasses.asdict(result) for task, result in by_task.items()}
            for name, by_task in results.items()
        },
        "averages": {name: averages(by_task) for name, by_task in results.items()},
        "skipped_steps": dict(skipped),
    }
    write_json(folder / "results.json", described)
    shown = one_column(results)
    if results:
        print(accuracy_table(shown))
    for name, count in skipped.items():
        if count:
            print(f"{name}: {count} steps were skipped: {folder / name}/not-finite-*.json")
    if config.run.plot:
        metrics = {run.name: folder / run.name / "metrics.jsonl" for run in runs}
        plot_run(folder / "summary.png", metrics, shown)
        for path in metrics.values():
            plot_routing(path.with_name("routing.png"), path)
    print(f"the run is in {folder}")


def accuracy_table(results: dict[str, dict[str, TaskResult]]) -> str:
    """One line per task of the first model: rows, majority rate, and each model's accuracy with
    standard error, in %. Under it, for each model, how often it gave each label.
    """
    tasks = list(next(iter(results.values())))
    columns = ["task", "rows", "majority", *results]
    lines = [columns]
    for task in tasks:
        first = next(iter(results.values()))[task]
        accuracies = [
            f"{100 * r[task].accuracy:.1f} ± {100 * r[task].stderr:.1f}" if task in r else "-"
            for r in results.values()
        ]
        lines.append([task, str(first.num_rows), f"{100 * first.majority:.1f}", *accuracies])
    if len(tasks) > 1:
        means = [
            f"{100 * averages(r)['macro']:.1f}" if len(r) == len(tasks) else "-"
            for r in results.values()
        ]
        lines.append(["average", "", "", *means])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(map(str.ljust, line, widths)) for line in lines]
    text.append("predictions:")
    for name, by_task in results.items():
        text.append(f"  {name}: {'; '.join(map(_counts, by_task.values()))}")
    for task in tasks:
        for name, by_task in results.items():
            if task in by_task and by_task[task].strict_accuracy is not None:
                strict = f"{100 * by_task[task].strict_accuracy:.1f}"
                text.append(f"  {task}, {name}: {strict} where only training's form counts")
        if cut := next(iter(results.values()))[task].num_truncated:
            text.append(f"  {task}: {cut} prompts were too long and cut")
    return "\n".join(line.rstrip() for line in text)


def one_column(results: dict[str, dict[str, TaskResult]]) -> dict[str, dict[str, TaskResult]]:
    """The base and, where no two adapters were scored on the same task, all adapters as one."""
    adapters = [by_task for name, by_task in results.items() if name != "base"]
    joined = {task: result for by_task in adapters for task, result in by_task.items()}
    if len(adapters) < 2 or len(joined) < sum(map(len, adapters)):
        return results
    return {"base": results["base"], "adapters": joined}


def _counts(result: TaskResult) -> str:
    """ "arc-e A:5 B:2", with the answers that could not be read last."""
    counts = [f"{label}:{n}" for label, n in result.predictions.items()]
    if len(counts) > MAX_COUNTS:
        commonest = sorted(result.predictions.items(), key=lambda item: -item[1])[:MAX_COUNTS]
        counts = [*(f"{x}:{n}" for x, n in commonest), f"({len(counts) - MAX_COUNTS} more)"]
    if result.num_unparsable:
        counts.append(f"unparsable:{result.num_unparsable}")
    return " ".join([result.task, *counts])


def averages(results: dict[str, TaskResult]) -> dict[str, float]:
    """Of one model's accuracies: over tasks, over all rows, and geometric over tasks."""
    accuracies = [result.accuracy for result in results.values()]
    rows = [result.num_rows for result in results.values()]
    right = sum(n * accuracy for n, accuracy in zip(rows, accuracies, strict=True))
    return {
        "macro": sum(accuracies) / len(accuracies),
        "weighted": right / sum(rows),
        "geometric": math.prod(accuracies) ** (1 / len(accuracies)),
    }


def provenance(files: Mapping[str, Path]) -> dict:
    """Of the code, and of the file that holds each task's evaluated rows."""
    packages = ("torch", "sentencepiece", "safetensors", "numpy")
    return {
        "code_commit": code_commit(Path(__file__)),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "data": {task: _revision(file) for task, file in files.items()},
    }


def code_commit(file: Path) -> str:
    """The git commit that `file` is of, "-dirty" where files differ from it, or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # else it lies in a repository not its own
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _revision(path: Path) -> dict:
    digest, num_rows = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            num_rows += bool(line.strip())
    return {"file": str(path), "sha256": digest.hexdigest(), "num_rows": num_rows}


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "run.plot needs matplotlib: pip install matplotlib, or set run.plot=false"
        ) from None


def plot_run(
    path: Path, metrics: dict[str, Path], results: dict[str, dict[str, TaskResult]]
) -> None:
    """Loss curves, accuracy per task, and expert load per layer of each mixture, as one PNG."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logs = {name: map(json.loads, open(file)) for name, file in metrics.items()}
    curves = {name: [step for step in log if "loss" in step] for name, log in logs.items()}
    routed = {name: steps for name, steps in curves.items() if steps and steps[-1]["expert_load"]}
    loads = {name: _mean_load(steps) for name, steps in routed.items()}
    panels = 1 + bool(results) + len(loads)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    axes = iter([axes] if panels == 1 else axes)

    axis = next(axes)
    for name, steps in curves.items():
        axis.plot([s["step"] for s in steps], _smooth([s["loss"] for s in steps]), label=name)
    axis.set_yscale("log")
    axis.set(
        title="training loss (running mean of 10)", xlabel="step", ylabel="nats per label token"
    )
    axis.legend()

    if results:
        axis = next(axes)
        width = 0.8 / len(results)
        tasks = list(next(iter(results.values())))
        for i, (name, by_task) in enumerate(results.items()):
            scored = [task for task in tasks if task in by_task]
            places = [tasks.index(task) + i * width for task in scored]
            heights = [100 * by_task[task].accuracy for task in scored]
            errors = [100 * by_task[task].stderr for task in scored]
            axis.bar(places, heights, width, yerr=errors, label=name, align="edge", capsize=2)
        for x, task in enumerate(tasks):
            majority = 100 * next(iter(results.values()))[task].majority
            label = "majority rate" if x == 0 else None
            axis.hlines(majority, x, x + 0.8, colors="black", linestyles="dotted", label=label)
        axis.set_xticks([x + 0.4 for x in range(len(tasks))], tasks, rotation=30, ha="right")
        axis.set(title="accuracy ± standard error", ylabel="%", ylim=(0, 130))
        axis.legend(fontsize="small", loc="upper center", ncols=2)

    for name, load in loads.items():
        axis = next(axes)
        image = axis.imshow(load, aspect="auto", vmin=0, vmax=max(map(max, load)))
        axis.set(title=f"expert load, {name} (even: {1 / len(load[0]):.3f})")
        axis.set(xlabel="expert", ylabel="layer", yticks=range(len(load)))
        figure.colorbar(image, ax=axis, label="share of selections")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_routing(path: Path, metrics: Path) -> None:
    """How the routers of a run fared, layer by layer and step by step, as one PNG: each expert's
    load, and of each layer entropy, dropped tokens and dead experts. No router, no picture."""
    steps = [json.loads(line) for line in open(metrics)]
    steps = [step for step in steps if step.get("expert_load")]
    if not steps:
        return
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = -(-len(steps) // MAX_COLUMNS)
    columns = [steps[i : i + width] for i in range(0, len(steps), width)]
    num_layers, num_experts = len(steps[0]["expert_load"]), max(map(len, steps[0]["expert_load"]))
    panels = {  # key of the log: title, highest value of the scale, None = the highest found
        "expert_load": (f"expert load (even: {1 / num_experts:.3f})", None),
        "router_entropy": ("the router's entropy, nats", math.log(num_experts)),
        "dropped_tokens": ("share of the tokens dropped", None),
        "dead_experts": ("experts that none selected of late", num_experts),
    }
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axis, (key, (title, highest)) in zip(axes.flat, panels.items(), strict=True):
        image = [_mean([_column(step[key], num_experts) for step in part]) for part in columns]
        shown = axis.imshow(
            list(zip(*image, strict=True)),
            aspect="auto",
            interpolation="nearest",
            extent=(steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, num_layers - 0.5, -0.5),
            vmin=0,
            vmax=highest or max(1e-9, max(map(max, image))),
        )
        axis.set(title=title, xlabel="step", ylabel="layer")
        axis.locator_params(integer=True)
        for layer in range(1, num_layers):
            axis.axhline(layer - 0.5, color="white", linewidth=0.8)
        figure.colorbar(shown, ax=axis)
    axes[0, 0].set_ylabel(f"layer, and in it its {num_experts} experts")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _column(layers: list, num_experts: int) -> list[float]:
    """A value for every layer, or for every expert of it; 0 for those that a layer lacks."""
    if not isinstance(layers[0], list):
        return layers
    return [value for x in layers for value in (*x, *[0] * (num_experts - len(x)))]


def _mean(columns: list[list[float]]) -> list[float]:
    return [sum(row) / len(columns) for row in zip(*columns, strict=True)]


def _smooth(values: list[float], window: int = 10) -> list[float]:
    windows = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _mean_load(steps: list[dict]) -> list[list[float]]:
    """[layer][expert], over the last fifth of the steps."""
    last = [step["expert_load"] for step in steps[-max(1, len(steps) // 5) :]]
    return [
        [sum(column) / len(last) for column in zip(*(step[layer] for step in last), strict=True)]
        for layer in range(len(last[0]))
    ]
