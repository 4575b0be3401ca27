"""Task folders <out>/<task>/{train,validation,test}.jsonl from the datasets' own files.

python data/prepare.py --task arc-e --split train --input file.parquet [...] [--out data]
python data/prepare.py --task arc-e [--out data]        every split, from the Hugging Face hub

A file is parquet, a JSON array or JSON lines. Each row is checked to be one that training and
evaluation can read; columns that are not of the task's schema (data/README.md) are dropped.
Nothing is written unless all rows are right.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root

from mixlora.errors import ArgumentParser, InputError, command, did_you_mean  # noqa: E402
from mixlora.files import write_bytes  # noqa: E402
from mixlora.tasks import TASKS, example_of, parse_row  # noqa: E402

SPLITS = ("train", "validation", "test")
PUBLIC = ("train", "validation")  # where the answers of the test split are hidden
PARQUET_BRANCH = "refs/convert/parquet"  # the hub's own conversion: <config>/<split>/0000.parquet


class Source(NamedTuple):
    hub: str  # a dataset that needs no loading script
    config: str | dict[str, str] | None  # None: it has but one; a dict: of splits, their folders
    splits: tuple[str, ...]
    columns: str  # what is kept of a row, where it is there, in this order


SOURCES = {
    "arc-e": Source("allenai/ai2_arc", "ARC-Easy", SPLITS, "id question choices answerKey"),
    "arc-c": Source("allenai/ai2_arc", "ARC-Challenge", SPLITS, "id question choices answerKey"),
    "boolq": Source("google/boolq", None, PUBLIC, "question answer passage"),
    "obqa": Source("allenai/openbookqa", "main", SPLITS, "id question_stem choices answerKey"),
    "piqa": Source("baber/piqa", None, PUBLIC, "goal sol1 sol2 label"),
    "siqa": Source(
        "lighteval/siqa", None, PUBLIC, "context question answerA answerB answerC label"
    ),
    "hellaswag": Source(
        "Rowan/hellaswag",
        None,
        PUBLIC,
        "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label",
    ),
    "winogrande": Source(
        "allenai/winogrande",
        "winogrande_debiased",  # MixLoRA's training set
        PUBLIC,
        "qID sentence option1 option2 answer",
    ),
    "csqa": Source("tau/commonsense_qa", None, PUBLIC, "id question choices answerKey"),
    "pubmedqa": Source(
        "qiaojin/PubMedQA",
        {"train": "pqa_artificial/train", "test": "pqa_labeled/train"},
        ("train", "test"),
        "pubid question context long_answer final_decision",
    ),
    "gsm8k": Source("openai/gsm8k", "main", ("train", "test"), "question answer"),
    "aqua": Source("deepmind/aqua_rat", "raw", SPLITS, "question options rationale correct"),
}


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Write a task's folder of JSON lines.")
    parser.add_argument("--task", required=True, help=", ".join(SOURCES))
    parser.add_argument("--split", choices=SPLITS, help="needed with --input")
    parser.add_argument("--input", nargs="+", action="extend", default=[], help="files, in order")
    parser.add_argument("--out", default="data", help="the folder of task folders")
    options = parser.parse_args(argv)
    if options.task not in SOURCES:
        raise InputError(f"unknown task {options.task!r}{did_you_mean(options.task, SOURCES)}")
    if options.input and not options.split:
        raise InputError("--input needs --split: train, validation or test")

    splits = [options.split] if options.split else SOURCES[options.task].splits
    contents = {}
    for split in splits:
        paths = map(Path, options.input) if options.input else download(options.task, split)
        contents[split] = [line for path in paths for line in convert(options.task, path)]
        if not contents[split]:
            raise InputError(f"{', '.join(options.input) or options.task}: no rows for {split}")
    folder = Path(options.out) / options.task
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in contents.items():
        write_bytes(folder / f"{split}.jsonl", "".join(lines).encode())
        print(f"{folder / f'{split}.jsonl'}: {len(lines)} rows")
    return 0


def convert(task: str, path: Path) -> Iterator[str]:
    """The rows of a file as lines of the task's file."""
    for row, where in read_rows(path):
        if isinstance(row, dict):
            row = {key: row[key] for key in SOURCES[task].columns.split() if key in row}
        example_of(TASKS[task], row, where, TASKS[task].train_example)
        yield json.dumps(row) + "\n"


def read_rows(path: Path) -> Iterator[tuple[object, str]]:
    """Each row of a parquet, JSON or JSON lines file, and where it stands."""
    if path.suffix == ".parquet":
        for number, row in enumerate(read_parquet(path), 1):
            yield row, f"{path}: row {number}"
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if content.lstrip().startswith("["):
        for number, row in enumerate(parse_row(content, str(path)), 1):
            yield row, f"{path}: row {number}"
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield parse_row(line, where), where


def read_parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: a parquet file needs pyarrow: pip install pyarrow") from None
    try:
        return ParquetFile(path).read().to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file: {error}") from None


def download(task: str, split: str) -> list[Path]:
    """The split's parquet files, from the hub."""
    source = SOURCES[task]
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            "without --input the rows come from the hub: pip install huggingface_hub pyarrow"
        ) from None
    place = {"repo_type": "dataset", "revision": PARQUET_BRANCH}
    config = source.config
    folder = config[split] if isinstance(config, dict) else f"{config or '[^/]+'}/{split}"
    pattern = rf"{folder}/\d+\.parquet"
    try:
        files = huggingface_hub.list_repo_files(source.hub, **place)
        names = sorted(name for name in files if re.fullmatch(pattern, name))
        paths = [huggingface_hub.hf_hub_download(source.hub, name, **place) for name in names]
    except Exception as error:  # the hub's own errors are many; each ends here, with its text
        raise InputError(f"{source.hub}: cannot be fetched from the hub: {error}") from None
    if len({Path(name).parent for name in names}) != 1:
        found = ", ".join(names) or "none"
        raise InputError(f"{source.hub}: one folder must hold the split {split}, found {found}")
    return [Path(path) for path in paths]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
