"""Accuracy of a base model, with or without an adapter, on tasks (docs/evaluation.md).

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
from mixlora import processes
from mixlora.errors import ArgumentParser, InputError, command
from mixlora.evaluation import PROTOCOLS, Row, evaluate, load_questions
from mixlora.files import write_bytes, write_json
from mixlora.layers.quantized import KINDS
from mixlora.report import accuracy_table, averages, provenance
from mixlora.tasks import data_file
from mixlora.tokenizer import Tokenizer


@command
@processes.together
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Accuracy of a model on tasks.")
    parser.add_argument("--base", required=True, help="checkpoint folder of the base model")
    parser.add_argument("--adapter", help="adapter folder; without it the base model is scored")
    parser.add_argument("--tasks", required=True, help="names with commas: arc-e,boolq")
    parser.add_argument("--data", default="data", help="folder of <task>/<split>.jsonl")
    parser.add_argument("--protocol", default="mixlora-fixed", help=", ".join(PROTOCOLS))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-rows", type=int, help="of each task, from its beginning")
    parser.add_argument("--output", help="write the results here, as JSON")
    parser.add_argument("--rows", help="write every row's scores here, as JSON lines")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=("none", *KINDS), default="none")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_rows"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    for path in filter(None, (options.output, options.rows)):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"{path}: its folder does not exist")
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder")

    tasks = options.tasks.split(",")
    questions = load_questions(options.protocol, options.data, tasks, options.max_rows)
    dtype = getattr(torch, options.dtype)
    device = processes.device(options.device)
    model = models.load(options.base, dtype, device, options.quantize)
    tokenizer = Tokenizer(model.folder, model.config.vocab_size)
    if options.adapter:
        mixlora.load_adapter(model, options.adapter)

    results, rows = evaluate(model, tokenizer, questions, options.batch_size, options.protocol)
    print(accuracy_table({options.adapter or options.base: results}))
    if options.rows and processes.is_first():
        lines = [line(task, row) for task in rows for row in rows[task]]
        write_bytes(options.rows, ("\n".join(lines) + "\n").encode())
    if options.output and processes.is_first():
        keys = ("protocol", "base", "adapter", "dtype", "quantize", "batch_size")
        settings = {key: getattr(options, key) for key in keys}
        files = {task: data_file(options.data, task) for task in tasks}
        settings |= {"seed": None, **provenance(files)}  # nothing is drawn at random
        described = {task: dataclasses.asdict(result) for task, result in results.items()}
        average = averages(results)
        write_json(options.output, {**settings, "tasks": described, "average": average})
    return 0


def line(task: str, row: Row) -> str:
    """A row as JSON: of log_probs, generation and strictly_right what the protocol has."""
    values = {k: v for k, v in vars(row).items() if v is not None or k == "prediction"}
    return json.dumps({"task": task, **values}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
