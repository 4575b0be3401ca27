"""Fine-tune adapters on tasks: `python train.py --config configs/quickstart.yaml [a.b=value ...]`

One YAML file says everything (docs/config.md). A run leaves in `run.dir`:

    config.yaml, data.json          the settings in full, and digests of the data
    status.json                     where it stands: `python -m mixlora.watch <run.dir>`
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
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import mixlora
import models
from mixlora import config as configs
from mixlora import mlora_config, processes
from mixlora.adapter_files import read_tensors
from mixlora.adapters import adapter_parameters, freeze_but, trained_parameters
from mixlora.batches import alike, joined
from mixlora.checkpoint import Checkpoints
from mixlora.data import Batch, Dataset, Order, collate, load_dataset
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.estimate import estimate
from mixlora.evaluation import evaluate, load_questions
from mixlora.faults import memory_for_training, non_finite_report
from mixlora.files import write_json
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import MetricsLog, Progress, require_tensorboard, routing_metrics, tell
from mixlora.ops import Routing
from mixlora.ops.philox import draw_seed
from mixlora.optim import lr_at, make_optimizer, set_lr
from mixlora.packing import packed
from mixlora.profiling import profiled, whole_number
from mixlora.report import (
    accuracy_table,
    averages,
    one_column,
    plot_routing,
    plot_run,
    provenance,
    require_matplotlib,
)
from mixlora.run_folder import digests, open_run_folder
from mixlora.status import Status
from mixlora.stopping import Stop
from mixlora.tasks import data_file
from mixlora.tokenizer import Tokenizer
from mixlora.train_config import AdapterRun, EvalConfig, ModelConfig, TrainConfig


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
        open_run_folder(config, data, options.resume, options.allow_changes)
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
    failed = []
    stop = Stop(folder / "stop")
    with stop.listening():
        for ended in fine_tune(model, waiting, config.run.together, stop):
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
        report(config, folder, results)
    if failed:
        raise InputError(f"stopped before their last step, as told above: {', '.join(failed)}")
    status.finish()
    return 0


def score(model: AdaptedModel, tokenizer: Tokenizer, questions: dict, how: EvalConfig) -> dict:
    if not questions:
        return {}
    return evaluate(model, tokenizer, questions, how.batch_size, how.protocol)[0]


class AdapterTraining:
    """One adapter on its way: data, optimizer, schedule, log, checkpoints and randomness are its
    own, so that it learns the same whoever is trained beside it.

    The loss of a step is that of all its label tokens, whatever the cut into micro-batches. These
    are shared out over the processes, in rounds.
    """

    def __init__(
        self,
        model: AdaptedModel,
        config: TrainConfig,
        run: AdapterRun,
        dataset: Dataset,
        folder: Path,
        resume: bool,
        status: Status,
    ) -> None:
        torch.manual_seed(config.run.seed)
        begin_adapter(model, run)
        self.generator = model.generators[run.name] = torch.Generator()
        mixlora.print_trainable_parameters(model, run.name)
        self.model, self.run, self.folder = model, run, folder
        self.name, self.save, self.status = run.name, config.run, status
        self.device = next(model.parameters()).device
        self.dataset = dataset
        self.order = Order(dataset, run.data, run.train.batch_size, config.run.seed)
        print(
            f"{run.name}: {len(dataset.samples)} samples, {self.order.samples_per_epoch} in an "
            f"epoch, {dataset.num_truncated} truncated, {dataset.num_skipped} skipped (no answer, "
            "or longer than train.max_seq_len)"
        )
        size = run.train.batch_size
        num_batches = -(-size // (run.train.micro_batch_size or size))
        if num_batches < processes.world_size():
            tell(
                f"{run.name}: a step's {num_batches} micro-batches leave some of "
                f"{processes.world_size()} processes idle: train.micro_batch_size can be smaller"
            )
        self.parameters = trained_parameters(model, run.name)
        processes.copy_from_first(self.parameters.values())
        self.optimizer = make_optimizer(self.parameters, run.optim, run.adapter.loraplus_lr_ratio)
        self.num_steps = run.train.steps or run.train.epochs * self.order.steps_per_epoch
        of_run = model, run.name, self.optimizer, config.run
        self.checkpoints = Checkpoints(folder / "checkpoints", *of_run)
        saved = self.checkpoints.resume() if resume else None
        self.step = self.saved_step = saved["step"] if saved else 0  # so many are done
        self.since_saved: list[float] = []  # the losses of the steps since the last checkpoint
        if processes.is_first():
            self.checkpoints.rehearse()
        processes.wait()
        if resume:
            print(f"{run.name}: goes on after step {self.step} of {self.num_steps}")
        self.log = MetricsLog(folder / "metrics.jsonl", self.step, config.run.tensorboard)
        self.progress = Progress(f"train {run.name}", self.num_steps, "steps", self.step)
        self.failure: str | None = None
        self.begin_step()

    @property
    def has_ended(self) -> bool:
        return self.step >= self.num_steps or self.failure is not None

    @property
    def is_in_a_step(self) -> bool:
        return self.num_rounds > 0

    def begin_step(self) -> None:
        self.began = time.perf_counter()
        self.losses: list[torch.Tensor] = []
        self.row_losses: list[torch.Tensor] = []
        self.forwards: list[list[Routing]] = []
        self.batches: list[Batch | None] = []  # None: in this round others have one
        self.num_rounds = 0  # that are done
        if self.has_ended:
            return
        chosen = [self.dataset.samples[i] for i in self.order.samples(self.step)]
        micro = self.run.train.micro_batch_size or self.run.train.batch_size
        if self.run.data.packing:
            chosen = packed(chosen, self.run.train.max_seq_len)
        parts = [chosen[i : i + micro] for i in range(0, len(chosen), micro)]
        self.batches = [
            part and collate(part, self.device, self.dataset.pad_id)
            for part in processes.rounds(parts)
        ]
        # a micro-batch's dropout depends on its place alone, whoever computes it, and when
        self.generator.manual_seed(self.save.seed * 1_000_003 + self.step)
        self.seeds = processes.rounds([draw_seed(self.generator) for _ in parts])
        self.num_batches = len(parts)
        self.num_labels = sum(processes.gathered([b.num_labels for b in self.batches if b]))
        self.num_tokens = sum(len(sample.tokens) for sample in chosen)

    def next_batch(self) -> Batch | None:
        if self.seeds[self.num_rounds] is not None:
            self.generator.manual_seed(self.seeds[self.num_rounds])
        return self.batches[self.num_rounds]

    def loss(self, loss_B: torch.Tensor) -> torch.Tensor:
        """Of the batch that was next, whose rows' losses these are: its share of the step's."""
        loss = loss_B.sum() / self.num_labels
        router_loss = self.model.router_loss(self.name) / self.num_batches
        self.forwards.append(self.model.routing(self.name))
        self.losses.append(torch.stack([loss, router_loss]).detach())
        self.row_losses.append(loss_B.detach())
        return loss + router_loss

    def end_round(self) -> None:
        """Gradients are there: with those of a step's last round, a step of the optimizer."""
        self.num_rounds += 1
        if self.num_rounds < len(self.batches):
            return
        optim = self.run.optim
        parameters = self.parameters.values()
        processes.sum_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # a GPU is waited for here, once for all of the step's losses
        losses = torch.stack(self.losses).tolist() if self.losses else []
        loss, router_loss = map(sum, zip(*processes.gathered(losses), strict=True))
        if not math.isfinite(loss + router_loss + norm.item()):
            self.drop_step(loss, router_loss, norm.item())
            return
        torch.nn.utils.clip_grads_with_norm_(parameters, optim.max_grad_norm or math.inf, norm)
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
        self.status.tell(self.name, self.step, self.num_steps, loss, speed)
        self.since_saved.append(loss)
        self.end_step()

    def drop_step(self, loss: float, router_loss: float, norm: float) -> None:
        """It changes no weight and no moment; what it was made of is written to a file."""
        step = self.step + 1
        path = self.folder / f"not-finite-{step:06d}.json"
        samples = [(i, self.dataset.samples[i]) for i in self.order.samples(self.step)]
        places = processes.rounds(range(self.num_batches))
        own = [[i, x.tolist()] for i, x in zip(places, self.row_losses, strict=False)]
        row_losses = [losses for _, losses in sorted(processes.gathered(own))]
        described = non_finite_report(self.parameters, samples, row_losses)
        numbers = f"loss {loss}, router loss {router_loss}, gradient norm {norm}"
        if processes.is_first():
            write_json(path, {"step": step, "found": numbers, **described})
        told = (
            f"{self.name}: step {step}: the loss or the gradient is not finite ({numbers}); no "
            f"weight was changed, samples and norms are in {path}"
        )
        self.optimizer.zero_grad(set_to_none=True)
        train = self.run.train
        if train.on_non_finite == "stop" or self.log.num_skipped == train.max_skips:
            used = f"train.max_skips {train.max_skips} are used up; "
            told = f"{told}; {used if train.on_non_finite == 'skip' else ''}"
            self.failure = f"{told}checkpoints are in {self.folder / 'checkpoints'}"
            return
        self.log.num_skipped += 1
        tell(f"{told}; the step is skipped ({self.log.num_skipped} of {train.max_skips})")
        self.step = step
        self.log.write(step=step, skipped=path.name)
        self.progress.advance()
        self.end_step()

    def end_step(self) -> None:
        if self.step % self.save.save_every_steps == 0 or self.step == self.num_steps:
            self.save_state()
        self.begin_step()

    def save_state(self) -> None:
        epoch, position = divmod(self.step, self.order.steps_per_epoch)
        state = {
            "epoch": epoch,
            "position": position,
            "lr": lr_at(self.step - 1, self.num_steps, self.run.optim),
            "loss": statistics.fmean(self.since_saved) if self.since_saved else None,
            "config": dataclasses.asdict(self.run),
        }
        if processes.is_first():
            self.checkpoints.save(self.step, state)
        self.saved_step, self.since_saved = self.step, []

    def pause(self) -> None:
        """The run stops between two steps, and may go on."""
        if self.step > self.saved_step:
            self.save_state()
        self.progress.close()
        self.log.close()
        tell(f"{self.name}: saved after step {self.step} of {self.num_steps}")

    @property
    def state(self) -> str:
        shapes = ", ".join(str(list(x.tokens_BS.shape)) for x in self.batches if x)
        saved = f"last checkpoint after step {self.saved_step}" if self.saved_step else "none saved"
        return f"{self.name}, step {self.step + 1} with batches of {shapes} tokens, {saved}"

    def end(self) -> None:
        self.progress.close()
        self.log.close()
        if self.failure is not None:
            tell(f"error: {self.failure}")
        elif processes.is_first():
            mixlora.save_adapter(self.model, self.folder / "adapter", self.name)
        del self.parameters, self.optimizer  # the next one needs their memory


def fine_tune(
    model: AdaptedModel, waiting: Iterator[AdapterTraining], together: int | None, stop: Stop
) -> Iterator[AdapterTraining]:
    """Train all that wait, so many at once (None = all), and give back each when it has ended.

    The next micro-batches of several adapters go through the base model as one batch. When the run
    shall stop, each ends the step that it is in and is saved.
    """
    model.train()
    training = {adapter.name: adapter for adapter in itertools.islice(waiting, together)}
    while training:
        ended = [adapter for adapter in training.values() if adapter.has_ended]
        for adapter in ended:
            adapter.end()
            yield training.pop(adapter.name)
            if not stop.asked():
                training |= {adapter.name: adapter for adapter in itertools.islice(waiting, 1)}
        if ended:
            continue
        stops = stop.asked()
        going = {name: x for name, x in training.items() if x.is_in_a_step or not stops}
        if not going:
            for adapter in training.values():
                adapter.pause()
            return
        with memory_for_training(lambda going=going: "; ".join(x.state for x in going.values())):
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
        for path in metrics.values():
            plot_routing(path.with_name("routing.png"), path)
    print(f"the run is in {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
