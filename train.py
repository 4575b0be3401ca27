"""Fine-tune adapters on tasks: `python train.py --config configs/quickstart.yaml [a.b=value ...]`

One YAML file says everything (docs/config.md). A run leaves in `run.dir`:

    config.yaml                     the settings in full
    data.json, base.json            digests of the data and of the base model
    status.json                     where it stands: `python -m mixlora.watch <run.dir>`
    out-of-memory-N.json            what held memory in step N, where none was left
    <adapter>/metrics.jsonl         a line per step
    <adapter>/routing.png           how the experts fared, over the steps
    <adapter>/checkpoints/step-N/   what --resume goes on from
    <adapter>/adapter/              the trained adapter
    results.json, summary.png       accuracies of the base and of every adapter, and a picture

docs/running.md says how a run is stopped and taken up, and what a failure leaves.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

import mixlora
import models
from mixlora import config as configs
from mixlora import mlora_config, processes
from mixlora.adapters import adapter_parameters
from mixlora.batches import alike, joined
from mixlora.data import Batch, load_dataset
from mixlora.determinism import deterministic
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.estimate import Estimate, estimate, rows_of
from mixlora.evaluation import evaluate, load_questions
from mixlora.faults import memory_for_training
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import require_tensorboard, tell
from mixlora.profiling import profiled, whole_number
from mixlora.report import report_run, require_matplotlib
from mixlora.run_folder import digests, open_run_folder
from mixlora.status import Status
from mixlora.stopping import Stop
from mixlora.tokenizer import Tokenizer
from mixlora.train_config import AdapterRun, EvalConfig, ModelConfig, TrainConfig
from mixlora.training import AdapterTraining, begin_adapter


@command
@processes.together
def main(argv: list[str]) -> int:
    with contextlib.ExitStack() as during:
        return train(argv, during)


def train(argv: list[str], during: contextlib.ExitStack) -> int:
    """`during`: what is closed at the end, however that comes."""
    parser = ArgumentParser(description="Fine-tune adapters on tasks.")
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that win")
    parser.add_argument("--resume", action="store_true", help="go on with the run in run.dir")
    parser.add_argument("--allow-changes", action="store_true", help="--resume with new settings")
    parser.add_argument("--print-config", action="store_true", help="print all settings and stop")
    parser.add_argument("--profile", type=whole_number, metavar="N", help="N steps, by torch")
    parser.add_argument(
        "--estimate", action="store_true", help="print the memory it needs and stop"
    )
    options = parser.parse_intermixed_args(argv)
    if options.allow_changes and not options.resume:
        raise InputError("--allow-changes must go with --resume")
    config = configs.load(TrainConfig, options.config, options.overrides, mlora_config.translate)
    if options.print_config:
        print(configs.to_yaml(config), end="")
        return 0
    if options.estimate:
        print_estimate(config)
        return 0

    if config.run.deterministic:
        during.enter_context(deterministic())
    # Everything that can be wrong is found before anything is written or trained.
    if config.run.plot:
        require_matplotlib()
    if config.run.tensorboard:
        require_tensorboard()
    torch.manual_seed(config.run.seed)
    asked_of = {
        r.name: load_questions(r.eval.protocol, r.data.dir, r.eval.tasks, r.eval.max_rows)
        for r in config.runs()
    }
    model = load_model(config.model)
    tokenizer = Tokenizer(model.folder, model.config.vocab_size)
    datasets = [load_dataset(r.data, tokenizer, r.train.max_seq_len) for r in config.runs()]
    for run in config.runs():
        begin_adapter(model, run)
        mixlora.remove_adapter(model, run.name)
        if run.train.max_seq_len > model.config.max_position_embeddings:
            raise InputError(
                f"train.max_seq_len {run.train.max_seq_len} exceeds the model's "
                f"max_position_embeddings {model.config.max_position_embeddings}"
            )
    folder = Path(config.run.dir)
    if processes.is_first():
        data = {r.name: digests(d, r.data) for r, d in zip(config.runs(), datasets, strict=True)}
        base = models.fingerprint(model.folder)
        open_run_folder(config, data, base, options.resume, options.allow_changes)
    processes.wait()
    status = during.enter_context(Status(folder))
    if options.profile and processes.is_first():
        during.enter_context(profiled(folder, options.profile))

    results: dict[str, dict] = {"base": {}}
    for run in config.runs():
        asked = asked_of[run.name]
        new = {task: rows for task, rows in asked.items() if task not in results["base"]}
        results["base"] |= score(model, tokenizer, new, run.eval)
    waiting = (
        AdapterTraining(model, config, run, dataset, folder / run.name, options.resume, status)
        for run, dataset in zip(config.runs(), datasets, strict=True)
    )
    failed, skipped = [], {}
    stop = Stop(folder / "stop")
    with stop.listening():
        for ended in fine_tune(model, waiting, config, stop):
            skipped[ended.name] = ended.log.num_skipped
            if ended.failure is None:
                model.active_adapter = ended.name
                rest = model, tokenizer, asked_of[ended.name], ended.run.eval
                results[ended.name] = stop.unless_asked(functools.partial(score, *rest))
            else:
                failed.append(ended.name)
            mixlora.remove_adapter(model, ended.name)
    if stop.by:
        settings = folder / "config.yaml"
        tell(f"stopped by {stop.by}; python train.py --config {settings} --resume goes on")
        return stop.exit_code
    if processes.is_first():
        report_run(config, folder, results, skipped)
    if failed:
        raise InputError(f"stopped before their last step, as told above: {', '.join(failed)}")
    status.finish()
    return 0


def score(model: AdaptedModel, tokenizer: Tokenizer, questions: dict, how: EvalConfig) -> dict:
    if not questions:
        return {}
    return evaluate(model, tokenizer, questions, how.batch_size, how.protocol)[0]


def fine_tune(
    model: AdaptedModel, waiting: Iterator[AdapterTraining], config: TrainConfig, stop: Stop
) -> Iterator[AdapterTraining]:
    """Train all that wait, `run.together` at once, and give back each when it has ended.

    The next micro-batches of several adapters go through the base model as one batch. When the run
    shall stop, each ends the step that it is in and is saved.
    """
    model.train()
    training: dict[str, AdapterTraining] = {}

    def state() -> str:
        return "; ".join(adapter.state for adapter in training.values())

    def snapshot() -> Path:
        step = max((adapter.step + 1 for adapter in training.values()), default=0)
        process = f"-process-{processes.rank()}" if processes.world_size() > 1 else ""
        return Path(config.run.dir) / f"out-of-memory-{step:06d}{process}.json"

    def needed() -> dict[str, int]:
        return dataclasses.asdict(estimated(config)[1])

    def memory(state: Callable[[], str]) -> AbstractContextManager:
        return memory_for_training(model, state, needed, snapshot)

    def begin(count: int | None) -> None:
        with memory(lambda: "the beginning of an adapter's training"):
            training.update((x.name, x) for x in itertools.islice(waiting, count))

    begin(config.run.together)
    while training:
        ended = [adapter for adapter in training.values() if adapter.has_ended]
        for adapter in ended:
            adapter.end()
            yield training.pop(adapter.name)
            if not stop.asked():
                begin(1)
        if ended:
            continue
        stops = stop.asked()
        going = {name: x for name, x in training.items() if x.is_in_a_step or not stops}
        if not going:
            for adapter in training.values():
                adapter.pause()
            return
        with memory(state):
            due = {name: adapter.next_batch() for name, adapter in going.items()}
            for batches in alike({name: batch for name, batch in due.items() if batch}):
                forward_backward(model, going, batches)
            processes.follow(model, trains=True)
            for adapter in going.values():
                adapter.end_round()


def forward_backward(
    model: AdaptedModel, training: dict[str, AdapterTraining], batches: dict[str, Batch]
) -> None:
    """Of adapters' next micro-batches, as one."""
    settings = [training[name].run.train for name in batches]
    model.gradient_checkpointing = any(x.gradient_checkpointing for x in settings)
    model.recompute_ffn = any(x.activation == "recompute" for x in settings)
    batch, spans = joined(batches)
    loss_B, _ = model(
        batch.tokens_BS,
        mask_BS=batch.mask_BS,
        positions_BS=batch.positions_BS,
        segments_BS=batch.segments_BS,
        adapters=spans,
        labels_BS=batch.labels_BS,
        by_row=True,
    )
    losses = [training[span.name].loss(loss_B[span.start : span.end]) for span in spans]
    torch.stack(losses).sum().backward()


def load_model(config: ModelConfig) -> AdaptedModel:
    device = processes.device(config.device)
    shards = config.shard and processes.world_size() > 1
    dtype = getattr(torch, config.dtype)
    model = models.load(config.base, dtype, "cpu" if shards else device, config.quantize)
    if shards:
        processes.shard(model, device)
    return model


def print_estimate(config: TrainConfig) -> None:
    runs, found = estimated(config)
    dtype, quantize = config.model.dtype, config.model.quantize
    base = dtype if quantize == "none" else f"{quantize} ({dtype})"
    for run in runs:
        print(f"{run.name}: {rows_of(run)} x {run.train.max_seq_len} tokens, {base} base")
    print(found.table())


def estimated(config: TrainConfig) -> tuple[list[AdapterRun], Estimate]:
    """Of a GPU's memory, unless the settings say cpu; of so many adapters as train together those
    that are largest."""
    dtype, quantize = getattr(torch, config.model.dtype), config.model.quantize
    model = models.without_data(config.model.base, dtype, quantize)
    with torch.device("meta"):
        for run in config.runs():
            begin_adapter(model, run)

    def size(run: AdapterRun) -> int:
        return sum(p.numel() for p in adapter_parameters(model, run.name).values())

    runs = sorted(config.runs(), key=size, reverse=True)
    runs, later = runs[: config.run.together], runs[config.run.together or len(runs) :]
    for run in later:
        mixlora.remove_adapter(model, run.name)
    device = "cuda" if config.model.device == "auto" else config.model.device
    return runs, estimate(model, runs, device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
