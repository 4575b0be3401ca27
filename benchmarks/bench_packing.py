"""Training steps on rows of instructions: padded, grouped by length, and packed.

    python -m benchmarks.bench_packing --data alpaca.json --tokenizer FOLDER
           [--base FOLDER | --hidden 256 --layers 4] [--batch 16] [--max-seq-len 512] [--steps 12]
           [--adapter MixLoRA] [--dtype float32] [--device cuda]

Without --base the model is random, with F = 2.75 D, heads of 64 and a vocabulary of 4096, small
beside the layers as in a large model: the tokenizer's ids are taken modulo it. The steps (forward,
loss, backward, clipping, AdamW) of the three ways take turns in one process. Padded and packed
steps have the same samples, so their times compare pair by pair; those of grouped ones are others.
Tokens are real ones, without padding; "area" is their share of the batch. On a loaded machine the
processor's time strays less.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import mixlora
import models
from benchmarks.bench_train_step import SYSTEMS
from benchmarks.harness import print_header, step_time, table
from benchmarks.train_step_worker import made_there
from mixlora.adapters import trained_parameters
from mixlora.data import Batch, DataConfig, Order, Sample, collate, load_dataset
from mixlora.errors import ArgumentParser, command
from mixlora.packing import packed
from mixlora.sources import Source
from mixlora.tokenizer import Tokenizer

VOCABULARY, MANY = 4096, 1 << 20


def folded(sample: Sample, V: int) -> Sample:
    return Sample(
        [token % V for token in sample.tokens],
        [label if label < 0 else label % V for label in sample.labels],
    )


class Trainee:
    """A model with an adapter and its optimizer."""

    def __init__(self, model: torch.nn.Module, adapter: dict) -> None:
        self.model = model.train()
        mixlora.add_adapter(model, mixlora.AdapterConfig(**adapter))
        self.parameters = list(trained_parameters(model, "default").values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4)

    def step(self, batch: Batch) -> None:
        loss, num_labels = self.model(
            batch.tokens_BS,
            mask_BS=batch.mask_BS,
            segments_BS=batch.segments_BS,
            labels_BS=batch.labels_BS,
        )
        (loss / num_labels + self.model.router_loss("default")).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def losses(self, samples: list[Sample], batch: Batch) -> dict[tuple, Tensor]:
        """Of every token but the first, by sample."""
        logits = self.model(
            batch.tokens_BS, mask_BS=batch.mask_BS, segments_BS=batch.segments_BS
        ).float()
        loss_BS = torch.nn.functional.cross_entropy(
            logits[:, :-1].mT, batch.tokens_BS[:, 1:], reduction="none"
        )
        found = {}
        for row, loss_S in zip(samples, loss_BS, strict=True):
            start = 0
            for length in getattr(row, "lengths", [len(row.tokens)]):
                end = start + length
                found[tuple(row.tokens[start:end])] = loss_S[start : end - 1]
                start = end
        return found


def ratio(steps: list[dict], others: list[dict], key: str) -> float:
    return median(a[key] / b[key] for a, b in zip(steps, others, strict=True))


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Training steps: padded, grouped by length, packed.")
    parser.add_argument("--data", required=True, help="rows in alpaca's form")
    parser.add_argument("--tokenizer", required=True, help="folder of a checkpoint")
    parser.add_argument("--base", help="checkpoint folder; else a random model")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapter", choices=SYSTEMS, default="MixLoRA")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    print_header()

    torch.manual_seed(0)
    if options.base:
        model = models.load(options.base, getattr(torch, options.dtype), options.device)
    else:
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": options.hidden,
            "intermediate_size": options.hidden * 11 // 4,
            "num_attention_heads": options.hidden // 64,
            "num_hidden_layers": options.layers,
        }
        with made_there(vars(options)):
            model = models.new({"model_type": "llama", **sizes})
    trainee = Trainee(model, SYSTEMS[options.adapter][1])
    config = DataConfig(files=[Source(path=options.data)])
    tokenizer = Tokenizer(Path(options.tokenizer), MANY)
    dataset = load_dataset(config, tokenizer, options.max_seq_len)
    V = model.config.vocab_size
    dataset = dataset._replace(samples=[folded(sample, V) for sample in dataset.samples])
    lengths = sorted(len(sample.tokens) for sample in dataset.samples)
    print(
        f"{options.adapter}, {options.dtype}, {len(lengths)} samples, tokens: mean "
        f"{sum(lengths) / len(lengths):.0f}, median {lengths[len(lengths) // 2]}, "
        f"longest {lengths[-1]}; {options.batch} samples a step, rows of {options.max_seq_len}"
    )

    orders = {
        by_length: Order(dataset, DataConfig(group_by_length=by_length), options.batch, seed=0)
        for by_length in (False, True)
    }

    def samples(step: int, by_length: bool = False) -> list[Sample]:
        return [dataset.samples[i] for i in orders[by_length].samples(step)]

    def batches(step: int) -> dict[str, Batch]:
        rows = {
            "padded": samples(step),
            "grouped": samples(step, True),
            "packed": packed(samples(step), options.max_seq_len),
        }
        return {way: collate(of_way, options.device) for way, of_way in rows.items()}

    first = samples(0)
    rows = packed(first, options.max_seq_len)
    alone: dict[tuple, Tensor] = {}
    for sample in first:
        alone |= trainee.losses([sample], collate([sample], options.device))
    for way, x in (("padded", first), ("packed", rows)):
        losses = trainee.losses(x, collate(x, options.device))
        worst = max(float((losses[key] - alone[key]).abs().max()) for key in alone)
        print(f"largest difference of a token's loss, {way} and alone: {worst:.1e}")

    for batch in batches(0).values():
        trainee.step(batch)  # warm-up
    found: dict[str, list[dict]] = {way: [] for way in batches(0)}
    for step in range(options.steps):
        for way, batch in batches(step).items():
            began = time.process_time()
            seconds = step_time(lambda batch=batch: trainee.step(batch), device=options.device)
            busy = time.process_time() - began
            real = int(batch.mask_BS.sum())
            found[way].append(
                {
                    "ms": 1e3 * seconds,
                    "speed": real / seconds,
                    "speed of cpu": real / busy,
                    "area": real / batch.mask_BS.numel(),
                }
            )
    padded = found["padded"]
    print(
        table(
            [
                {
                    "rows": way,
                    "real tokens/s": median(s["speed"] for s in steps),
                    "of padded": ratio(steps, padded, "speed"),
                    "by processor time": ratio(steps, padded, "speed of cpu"),
                    "ms a step": median(s["ms"] for s in steps),
                    "area": sum(s["area"] for s in steps) / len(steps),
                }
                for way, steps in found.items()
            ]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
