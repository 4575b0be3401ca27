"""Accuracy of a base model, with or without an adapter, on multiple-choice tasks.

python evaluate.py --base DIR [--adapter DIR] --tasks arc-e,boolq [--data DIR]
                   [--protocol mixlora-fixed] [--output results.json] [--rows rows.jsonl]
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

import mixlora
import models
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.evaluation import PROTOCOLS, Row, evaluate
from mixlora.files import write_bytes, write_json
from mixlora.report import accuracy_table
from mixlora.tasks import load_examples
from mixlora.tokenizer import Tokenizer


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Accuracy of a model on multiple-choice tasks.")
    parser.add_argument("--base", required=True, help="checkpoint folder of the base model")
    parser.add_argument("--adapter", help="adapter folder; without it the base model is scored")
    parser.add_argument("--tasks", required=True, help="names with commas: arc-e,boolq")
    parser.add_argument("--data", default="data", help="folder of <task>/<split>.jsonl")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-rows", type=int, help="of each task, from its beginning")
    parser.add_argument("--output", help="write the results here, as JSON")
    parser.add_argument("--rows", help="write every row's scores here, as JSON lines")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_rows"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    for path in filter(None, (options.output, options.rows)):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist")
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder")

    examples = {
        task: load_examples(options.data, task)[: options.max_rows]
        for task in options.tasks.split(",")
    }
    model = models.load(options.base, getattr(torch, options.dtype), options.device)
    tokenizer = Tokenizer(options.base, model.config.vocab_size)
    if options.adapter:
        mixlora.load_adapter(model, options.adapter)

    results, rows = evaluate(model, tokenizer, examples, options.batch_size)
    name = options.adapter or options.base
    print(accuracy_table({name: results}))
    if options.rows:
        lines = [
            json.dumps({"task": task, **describe(row)}, ensure_ascii=False)
            for task in rows
            for row in rows[task]
        ]
        write_bytes(options.rows, ("\n".join(lines) + "\n").encode())
    if options.output:
        described = {task: dataclasses.asdict(result) for task, result in results.items()}
        settings = {key: getattr(options, key) for key in ("protocol", "base", "adapter", "dtype")}
        write_json(options.output, {**settings, "tasks": described})
    return 0


def describe(row: Row) -> dict:
    labels = row.example.labels
    return {
        "prompt": row.example.prompt,
        "labels": labels,
        "log_probs": row.log_probs,
        "prediction": labels[row.prediction],
        "gold": labels[row.example.gold],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
