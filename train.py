"""Fine-tune adapters on tasks: `python train.py --config configs/quickstart.yaml [a.b=value ...]`

One YAML file says everything (docs/config.md). A run leaves in `run.dir`:

    config.yaml                     the settings in full
    <adapter>/metrics.jsonl         a line per step
    <adapter>/checkpoints/step-N/   what --resume goes on from
    <adapter>/adapter/              the trained adapter
    results.json, summary.png       accuracies of the base and of every adapter, and a picture
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import mixlora
import models
from mixlora import config as configs
from mixlora import mlora_config
from mixlora.adapter_files import read_tensors
from mixlora.adapters import adapter_parameters, freeze_but, trained_parameters
from mixlora.batches import alike, joined
from mixlora.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mixlora.data import Batch, Dataset, Order, collate, load_dataset
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.estimate import estimate
from mixlora.evaluation import evaluate, load_questions
from mixlora.files import write_json
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import MetricsLog, Progress, routing_metrics, tell
from mixlora.ops import Routing
from mixlora.optim import lr_at, make_optimizer, set_lr
from mixlora.report import (
    accuracy_table,
    averages,
    one_column,
    plot_run,
    provenance,
    require_matplotlib,
)
from mixlora.run_folder import open_run_folder
from mixlora.tasks import data_file
from mixlora.tokenizer import Tokenizer
from mixlora.train_config import AdapterRun, EvalConfig, ModelConfig, TrainConfig


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Fine-tune adapters on tasks.")
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that win")
    parser.add_argument("--resume", action="store_true", help="go on with the run in run.dir")
    parser.add_argument("--print-config", action="store_true", help="print all settings and stop")
    parser.add_argument(
        "--estimate", action="store_true", help="print the memory it needs and stop"
    )
    options = parser.parse_intermixed_args(argv)
    config = configs.load(TrainConfig, options.config, options.overrides, mlora_config.translate)
    if options.print_config:
        print(configs.to_yaml(config), end="")
        return 0
    if options.estimate:
        print_estimate(config)
        return 0

    # Everything that can be wrong is found before anything is written or trained.
    if config.run.plot:
        require_matplotlib()
    torch.manual_seed(config.run.seed)
    asked_of = {
        r.name: load_questions(r.eval.protocol, r.data.dir, r.eval.tasks, r.eval.max_rows)
        for r in config.runs()
    }
    device = device_of(config.model)
    dtype = getattr(torch, config.model.dtype)
    model = models.load(config.model.base, dtype, device, config.model.quantize)
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
    folder = open_run_folder(config, options.resume)

    results: dict[str, dict] = {"base": {}}
    for run in config.runs():
        asked = asked_of[run.name]
        new = {task: rows for task, rows in asked.items() if task not in results["base"]}
        results["base"] |= score(model, tokenizer, new, run.eval)
    waiting = (
        AdapterTraining(model, config, run, dataset, folder / run.name, options.resume)
        for run, dataset in zip(config.runs(), datasets, strict=True)
    )
    failed = []
    for ended in fine_tune(model, waiting, config.run.together):
        if ended.failure is None:
            model.active_adapter = ended.name
            results[ended.name] = score(model, tokenizer, asked_of[ended.name], ended.run.eval)
        else:
            failed.append(ended.name)
        mixlora.remove_adapter(model, ended.name)
    report(config, folder, results)
    if failed:
        raise InputError(f"stopped before their last step, as told above: {', '.join(failed)}")
    return 0


def score(model: AdaptedModel, tokenizer: Tokenizer, questions: dict, how: EvalConfig) -> dict:
    if not questions:
        return {}
    return evaluate(model, tokenizer, questions, how.batch_size, how.protocol)[0]


class AdapterTraining:
    """One adapter on its way: data, optimizer, schedule, log, checkpoints and random generator are
    its own, so that it learns the same whoever is trained beside it.

    The loss of a step is that of all its label tokens, whatever the cut into micro-batches.
    """

    def __init__(
        self,
        model: AdaptedModel,
        config: TrainConfig,
        run: AdapterRun,
        dataset: Dataset,
        folder: Path,
        resume: bool,
    ) -> None:
        torch.manual_seed(config.run.seed)
        begin_adapter(model, run)
        # dropout is drawn on where the initial weights end
        self.generator = model.generators[run.name] = torch.Generator()
        self.generator.set_state(torch.get_rng_state())
        mixlora.print_trainable_parameters(model, run.name)
        self.model, self.run, self.folder = model, run, folder
        self.name, self.save = run.name, config.run
        self.device = next(model.parameters()).device
        self.dataset = dataset
        self.order = Order(dataset, run.data, run.train.batch_size, config.run.seed)
        print(
            f"{run.name}: {len(dataset.samples)} samples, {self.order.samples_per_epoch} in an "
            f"epoch, {dataset.num_truncated} truncated, {dataset.num_skipped} skipped (no answer, "
            "or longer than train.max_seq_len)"
        )
        self.parameters = trained_parameters(model, run.name)
        self.optimizer = make_optimizer(self.parameters, run.optim, run.adapter.loraplus_lr_ratio)
        self.num_steps = run.train.steps or run.train.epochs * self.order.steps_per_epoch
        folder.mkdir(parents=True, exist_ok=True)
        saved = checkpoints(folder / "checkpoints") if resume else []
        of_run = model, run.name, self.optimizer, self.generator
        self.step = load_checkpoint(saved[-1], *of_run) if saved else 0  # so many are done
        if resume:
            print(f"{run.name}: goes on after step {self.step} of {self.num_steps}")
        self.log = MetricsLog(folder / "metrics.jsonl", self.step)
        self.progress = Progress(f"train {run.name}", self.num_steps, "steps", self.step)
        self.failure: str | None = None
        self.begin_step()

    @property
    def has_ended(self) -> bool:
        return self.step == self.num_steps or self.failure is not None

    def begin_step(self) -> None:
        self.began = time.perf_counter()
        self.losses: list[torch.Tensor] = []
        self.forwards: list[list[Routing]] = []
        self.batches: list[Batch] = []
        if self.has_ended:
            return
        chosen = [self.dataset.samples[i] for i in self.order.samples(self.step)]
        micro = self.run.train.micro_batch_size or self.run.train.batch_size
        parts = [chosen[i : i + micro] for i in range(0, len(chosen), micro)]
        self.batches = [collate(part, self.device, self.dataset.pad_id) for part in parts]
        self.num_labels = sum(batch.num_labels for batch in self.batches)
        self.num_tokens = sum(len(sample.tokens) for sample in chosen)

    def next_batch(self) -> Batch:
        return self.batches[len(self.losses)]

    def loss(self, loss_B: torch.Tensor) -> torch.Tensor:
        """Of the batch that was next, whose rows' losses these are: its share of the step's."""
        loss = loss_B.sum() / self.num_labels
        router_loss = self.model.router_loss(self.name) / len(self.batches)
        self.forwards.append(self.model.routing(self.name))
        self.losses.append(torch.stack([loss, router_loss]).detach())
        return loss + router_loss

    def end_micro_batch(self) -> None:
        """Gradients are there: with those of a step's last micro-batch, a step of the optimizer."""
        if len(self.losses) < len(self.batches):
            return
        optim = self.run.optim
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), optim.max_grad_norm or float("inf")
        )
        # a GPU is waited for here, once for all of the step's losses
        loss, router_loss = torch.stack(self.losses).double().sum(0).tolist()
        if not torch.isfinite(norm):
            self.failure = (
                f"{self.name}: step {self.step + 1}: the gradient is not finite (loss {loss}); no "
                "weight was changed in this step, checkpoints are in "
                f"{self.folder / 'checkpoints'}"
            )
            return
        lr = lr_at(self.step, self.num_steps, optim)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        speed = self.num_tokens / (time.perf_counter() - self.began)
        self.log.write(
            step=self.step,
            loss=loss,
            router_loss=router_loss,
            lr=lr,
            grad_norm=norm.item(),
            tokens_per_second=round(speed, 1),
            **routing_metrics(self.forwards),
        )
        self.progress.advance(loss=f"{loss:.4f}", tokens_per_s=f"{speed:.0f}")
        if self.step % self.save.save_every_steps == 0 or self.step == self.num_steps:
            save_checkpoint(
                *(self.folder / "checkpoints", self.step, self.model, self.name),
                *(self.optimizer, self.generator, self.save.keep_last),
            )
        self.begin_step()

    def end(self) -> None:
        self.progress.close()
        self.log.close()
        if self.failure is None:
            mixlora.save_adapter(self.model, self.folder / "adapter", self.name)
        else:
            tell(f"error: {self.failure}")
        del self.parameters, self.optimizer  # the next one needs their memory


def fine_tune(
    model: AdaptedModel, waiting: Iterator[AdapterTraining], together: int | None
) -> Iterator[AdapterTraining]:
    """Train all that wait, so many at once (None = all), and give back each when it has ended.

    The next micro-batches of several adapters go through the base model as one batch.
    """
    model.train()
    training = {adapter.name: adapter for adapter in itertools.islice(waiting, together)}
    while training:
        ended = [adapter for adapter in training.values() if adapter.has_ended]
        for adapter in ended:
            adapter.end()
            yield training.pop(adapter.name)
            training |= {adapter.name: adapter for adapter in itertools.islice(waiting, 1)}
        if ended:
            continue
        for batches in alike({name: adapter.next_batch() for name, adapter in training.items()}):
            settings = [training[name].run.train for name in batches]
            model.gradient_checkpointing = any(x.gradient_checkpointing for x in settings)
            model.recompute_ffn = any(x.activation == "recompute" for x in settings)
            batch, spans = joined(batches)
            loss_B, _ = model(
                batch.tokens_BS,
                mask_BS=batch.mask_BS,
                positions_BS=batch.positions_BS,
                adapters=spans,
                labels_BS=batch.labels_BS,
                by_row=True,
            )
            losses = [training[span.name].loss(loss_B[span.start : span.end]) for span in spans]
            torch.stack(losses).sum().backward()
        for adapter in training.values():
            adapter.end_micro_batch()


def print_estimate(config: TrainConfig) -> None:
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
    base = config.model.dtype if quantize == "none" else f"{quantize} ({config.model.dtype})"
    for run in runs:
        train = run.train
        rows = train.micro_batch_size or train.batch_size
        print(f"{run.name}: {rows} x {train.max_seq_len} tokens, {base} base")
    device = "cuda" if config.model.device == "auto" else config.model.device
    print(estimate(model, runs, device).table())


def device_of(config: ModelConfig) -> str:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return auto if config.device == "auto" else config.device


def begin_adapter(model: AdaptedModel, run: AdapterRun) -> None:
    """The adapter as its training begins: fresh or from a folder, in part frozen."""
    if run.adapter.routes_prompts and run.data.loss_on != "answer":
        raise InputError(
            "data.loss_on must be answer with routing_strategy milora, which takes the tokens "
            f"before the first label for the prompt, got {run.data.loss_on!r}"
        )
    mixlora.add_adapter(model, run.adapter, run.name)
    if run.train.start_from is not None:
        read_tensors(model, run.train.start_from, run.name)
    freeze_but(model, run.name, run.train.parts)


def report(config: TrainConfig, folder: Path, results: dict) -> None:
    """The table on the screen, results.json, and the picture."""
    runs = config.runs()
    order = ["base", *(run.name for run in runs)]
    results = {name: results[name] for name in order if results.get(name)}
    files = {task: data_file(run.data.dir, task) for run in runs for task in run.eval.tasks}
    described = {
        "protocol": runs[0].eval.protocol,
        "batch_size": runs[0].eval.batch_size,
        "dtype": config.model.dtype,
        "seed": config.run.seed,
        **provenance(files),
        "results": {
            name: {task: dataclasses.asdict(result) for task, result in by_task.items()}
            for name, by_task in results.items()
        },
        "averages": {name: averages(by_task) for name, by_task in results.items()},
    }
    write_json(folder / "results.json", described)
    shown = one_column(results)
    if results:
        print(accuracy_table(shown))
    if config.run.plot:
        metrics = {run.name: folder / run.name / "metrics.jsonl" for run in runs}
        plot_run(folder / "summary.png", metrics, shown)
    print(f"the run is in {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
