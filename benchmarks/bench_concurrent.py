"""A training step of several adapters: all in one batch of one base model, or one after the other.

    python -m benchmarks.bench_concurrent [--adapters 4] [--rows 1] [--tokens 32] [--seconds 20]
           [--dtype float32] [--layers 4] [--device cuda] [--model 7b]

Of D 1024, F 2816, vocabulary 4096, or another of bench_train_step's models. Both ways step the same
adapters (forward, loss, backward, clipping, AdamW) and take turns in one process; the ratio is that
of samples per second. The frozen weights, read once for all rows, are what is saved, and the calls.
LoRA has r 16, MixLoRA r 16, 8 experts, top 2; "mixed" are both in turns.
"""

import sys
from typing import Any

import torch

import mixlora
import models
from benchmarks.bench_train_step import MIXTURE, MODELS
from benchmarks.harness import compared, print_header, table
from benchmarks.train_step_worker import made_there
from benchmarks.worker import resident
from mixlora.adapters import trained_parameters
from mixlora.batches import joined
from mixlora.data import Batch, Sample, collate
from mixlora.errors import ArgumentParser, command

LORA = {"r": 16, "lora_alpha": 32}
KINDS = {"LoRA": [LORA], "MixLoRA": [MIXTURE], "mixed": [LORA, MIXTURE]}


class Trainees:
    """Adapters of one base model, each with its optimizer and a batch of its own."""

    def __init__(self, kinds: list[dict], count: int, rows: int, tokens: int, options: Any) -> None:
        torch.manual_seed(0)
        sizes = {**MODELS[options.model], "num_hidden_layers": options.layers}
        with made_there(vars(options)):
            self.model = models.new({"model_type": "llama", **sizes}).train()
        self.base_bytes = sum(p.nbytes for p in self.model.parameters())
        self.batches: dict[str, Batch] = {}
        self.parameters, self.optimizers = {}, {}
        for i in range(count):
            name = f"adapter_{i}"
            mixlora.add_adapter(self.model, mixlora.AdapterConfig(**kinds[i % len(kinds)]), name)
            parameters = list(trained_parameters(self.model, name).values())
            self.parameters[name] = parameters
            self.optimizers[name] = torch.optim.AdamW(parameters, lr=2e-4)
            texts = torch.randint(sizes["vocab_size"], (rows, tokens)).tolist()
            samples = [Sample(text, [-100, *text[1:]]) for text in texts]
            self.batches[name] = collate(samples, options.device)

    def step(self, names: list[str]) -> None:
        batch, spans = joined({name: self.batches[name] for name in names})
        loss_B, num_labels_B = self.model(
            *(batch.tokens_BS,),
            mask_BS=batch.mask_BS,
            labels_BS=batch.labels_BS,
            adapters=spans,
            by_row=True,
        )
        losses = [
            loss_B[s.start : s.end].sum() / num_labels_B[s.start : s.end].sum()
            + self.model.router_loss(s.name)
            for s in spans
        ]
        torch.stack(losses).sum().backward()
        for name in names:
            torch.nn.utils.clip_grad_norm_(self.parameters[name], 1.0)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)

    def together(self) -> None:
        self.step(list(self.batches))

    def in_turn(self) -> None:
        for name in self.batches:
            self.step([name])


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Several adapters' training steps, together and in turn.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args(argv)
    print_header()
    print(
        f"{options.dtype}, {options.layers} layers, {options.rows} x {options.tokens} tokens each"
    )
    rows = []
    for kind, configs in KINDS.items():
        trainees = Trainees(configs, options.adapters, options.rows, options.tokens, options)
        together_us, in_turn_us, ratio, num_pairs = compared(
            trainees.together, trainees.in_turn, options.seconds, options.device
        )
        samples = options.adapters * options.rows
        rows.append(
            {
                "adapters": f"{options.adapters} {kind}",
                "in turn ms": in_turn_us / 1e3,
                "together ms": together_us / 1e3,
                "samples/s": samples / together_us * 1e6,
                "samples/s, of in turn": ratio,
                "pairs": num_pairs,
                "base MB": trainees.base_bytes / 1e6,
                "held MB": resident("VmRSS") / 1e6 if options.device == "cpu" else None,
            }
        )
        del trainees
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
