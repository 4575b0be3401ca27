"""Trains the quickstart's tokenizer and a small LLaMA from scratch.

python data/quickstart/pretrain.py        writes data/quickstart/model/, a Hugging Face folder
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository's root

import corpus  # noqa: E402

import models  # noqa: E402
from mixlora.layers.adapted_model import AdaptedModel  # noqa: E402

BOS, EOS = 1, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def train_tokenizer(path: Path) -> None:
    """LLaMA's kind of sentencepiece: BPE, byte fallback, single digits, a space before the text."""
    texts = itertools.islice(corpus.lessons(seed=0), 20000)
    # As in LLaMA, a line break is a byte token.
    texts = (text.replace("*", "").replace("\n", " ") for text in texts)
    # The phrases again and again: the words of the real prompts are to be single tokens.
    texts = itertools.chain(texts, corpus.PHRASES * 300)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=file,
            model_type="bpe",
            vocab_size=CONFIG["vocab_size"],
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )


def batches(tokenizer: Path, rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless tokens_BS, labels_BS, segments_BS: lessons packed into rows; none sees another.

    One lesson in thirty is learnt whole, of the others only the answers and the end: most of a
    lesson is random, and what cannot be predicted would drown what can.
    """
    encode = functools.cache(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode)

    def tokenize(text: str, whole: bool) -> list[tuple[int, int]]:
        """(token, label) pairs; word by word is exact, as no token spans a space."""
        pairs = [(BOS, -100)]
        for word in text.split(" "):
            learnt = whole or word.startswith("*")
            pairs += [(x, x if learnt else -100) for x in encode(word.removeprefix("*"))]
        return [*pairs, (EOS, EOS)]

    lessons = (tokenize(text, i % 30 == 0) for i, text in enumerate(corpus.lessons(seed)))
    lesson = next(lessons)
    while True:
        batch = torch.tensor([EOS, -100, -1]).repeat(
            rows, length, 1
        )  # padding: a segment of its own
        for row_S3 in batch:
            filled, segment = 0, 0
            while filled + len(lesson) <= length:
                end = filled + len(lesson)
                row_S3[filled:end, :2] = torch.tensor(lesson)
                row_S3[filled:end, 2] = segment
                filled, segment, lesson = end, segment + 1, next(lessons)
        yield tuple(batch.unbind(-1))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up over the first twentieth, down to zero over the last quarter, constant in between:
    skills appear one after another, and the late ones need a full step too."""
    done = (step + 1) / (steps + 1)
    return peak * min(1.0, 20 * done, 4 * (1 - done))


def new_model() -> AdaptedModel:
    """All weights trainable. Matrices start at half of 1 / sqrt(inputs): with the usual 0.02 a
    model this narrow takes several times as long to find out what attention is for."""
    model = models.new(CONFIG).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.1 if "embed_tokens" in name else 0.5 * parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def save(model: AdaptedModel, folder: Path) -> None:
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args(argv)

    torch.set_num_threads(2)  # another number sums in another order
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = args.output / "tokenizer.model"
    train_tokenizer(tokenizer)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    start, total, count = time.time(), 0.0, 0
    data = batches(tokenizer, args.rows, args.length, seed=1)
    for step, (tokens_BS, labels_BS, segments_BS) in enumerate(itertools.islice(data, args.steps)):
        loss, labels = model(tokens_BS, labels_BS=labels_BS, segments_BS=segments_BS)
        (loss / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        total, count = total + loss.item(), count + labels.item()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            seconds = time.time() - start
            print(f"step {step + 1}: loss {total / count:.4f}, {seconds:.0f} s", flush=True)
            total, count = 0.0, 0
            save(model, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
