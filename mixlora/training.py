"""An adapter's training, step by step: what `train.py` drives, alone or several at once."""

import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch

import mixlora
from mixlora import processes
from mixlora.adapter_files import read_tensors
from mixlora.adapters import freeze_but, trained_parameters
from mixlora.checkpoint import Checkpoints
from mixlora.data import Batch, Dataset, Order, collate
from mixlora.errors import InputError
from mixlora.faults import non_finite_report
from mixlora.files import write_json
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import MetricsLog, Progress, routing_metrics, tell
from mixlora.ops import Routing
from mixlora.ops.philox import draw_seed
from mixlora.optim import lr_at, make_optimizer, set_lr
from mixlora.packing import packed
from mixlora.report import code_commit
from mixlora.status import Status
from mixlora.train_config import AdapterRun, TrainConfig


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
        settings = {key: dataclasses.asdict(getattr(config, key)) for key in ("model", "run")}
        self.facts = {  # of a checkpoint, for who reads it
            "processes": processes.world_size(),
            "code_commit": code_commit(Path(__file__)),
            "config": {**dataclasses.asdict(run), **settings},
        }
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

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / (time.perf_counter() - self.began)

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
        speed = self.tokens_per_second
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
        self.tell_status(loss)
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
        self.tell_status(None)
        self.end_step()

    def tell_status(self, loss: float | None) -> None:
        counts = self.step, self.num_steps, self.log.num_skipped
        self.status.tell(self.name, *counts, loss, self.tokens_per_second)

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
            **self.facts,
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
