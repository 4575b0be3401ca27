"""Wrong input of every kind is one line that names what is wrong and where, and changes nothing."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
import generate
import mixlora
import models
import train
from mixlora.files import TensorFile, read_json, write_json, write_tensors
from tests.conftest import ARC_ROWS, make_checkpoint, make_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
model:
  base: {checkpoint}
data:
  dir: {tasks}
  tasks: [arc-e]
adapter:
  routing_strategy: mixlora
  r: 2
  num_experts: 2
  top_k: 1
optim:
  lr: 1e-3
train:
  steps: 1
  batch_size: 2
  max_seq_len: 128
run:
  dir: {run}
  plot: false
"""


class Place:
    """A folder with a config, a checkpoint and tasks of its own, and the commands that use them."""

    def __init__(self, folder: Path, checkpoint: Path, tasks: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.checkpoint = shutil.copytree(checkpoint, folder / "checkpoint")
        self.tasks = shutil.copytree(tasks, folder / "tasks")
        self.config = folder / "config.yaml"
        self.config.write_text(
            CONFIG.format(checkpoint=self.checkpoint, tasks=self.tasks, run=self.run)
        )

    def change_config(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new, 1))

    def train(self, *more: str) -> list[str]:
        return ["train", "--config", str(self.config), *more]

    def evaluate(self, *more: str, tasks: str = "arc-e") -> list[str]:
        outputs = ["--output", str(self.folder / "out.json"), "--rows", str(self.folder / "rows")]
        base = ["--base", str(self.checkpoint), "--data", str(self.tasks), "--tasks", tasks]
        return ["evaluate", *base, *outputs, *more]

    def generate(self, *more: str) -> list[str]:
        prompt = [] if {"--prompt", "--instruction"} & {*more} else ["--prompt", "the cat"]
        return ["generate", "--base", str(self.checkpoint), *prompt, *more]

    def everything(self) -> dict[str, bytes | None]:
        files = sorted(self.folder.rglob("*"))
        return {str(p): p.read_bytes() if p.is_file() else None for p in files}


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, task_folder: Path) -> Place:
    return Place(tmp_path, checkpoint, task_folder)


def check(
    place: Place, code: int, out: str, err: str, words: tuple[str, ...], before: dict
) -> None:
    assert code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert out == ""
    assert place.everything() == before


# What is done to a good place, the command, and what its error must say.
Case = tuple[Callable[[Place], object], Callable[[Place], list[str]], tuple[str, ...]]


def nothing(place: Place) -> None:
    pass


def config(old: str, new: str, *words: str) -> Case:
    return lambda place: place.change_config(old, new), Place.train, words


def override(text: str, *words: str) -> Case:
    return nothing, lambda place: place.train(text), words


def damaged(
    change: Callable[[Path], object],
    *words: str,
    command: Callable[..., list[str]] = Place.generate,
) -> Case:
    return lambda place: change(place.checkpoint), command, words


def row(change: Callable[[list[str]], object], *words: str) -> Case:
    """`change` works on the lines of arc-e's three files."""

    def damage(place: Place) -> None:
        for path in (place.tasks / "arc-e").iterdir():
            lines = path.read_text().splitlines()
            change(lines)
            path.write_text("".join(f"{line}\n" for line in lines))

    return damage, Place.train, words


CONFIGS: dict[str, Case] = {
    "typo in a key": config(
        "lr: 1e-3", "lrr: 1e-3", "config.yaml:12: unknown key 'optim.lrr' (did you mean 'lr'?)"
    ),
    "unknown section": config(
        "optim:", "optimizer:", "config.yaml:11: unknown key 'optimizer' (did you mean 'optim'?)"
    ),
    "unknown protocol": config(
        "run:",
        "eval:\n  protocol: mixlora-fix\nrun:",
        "config.yaml:18: eval.protocol must be mixlora-fixed or mixlora or llm-adapters, "
        "got 'mixlora-fix'",
    ),
    "text for a number": config(
        "lr: 1e-3", "lr: fast", "config.yaml:12: optim.lr must be a finite number, got 'fast'"
    ),
    "fraction for a count": config(
        "steps: 1", "steps: 1.5", "config.yaml:14: train.steps must be a whole number, got 1.5"
    ),
    "text for a list": config(
        "[arc-e]", "arc-e", "config.yaml:5: data.tasks must be a list of text, got 'arc-e'"
    ),
    "text for a section": config(
        "optim:\n  lr: 1e-3", "optim: 1e-3", "config.yaml:11: optim must be a mapping, got '1e-3'"
    ),
    "negative number of checkpoints": config(
        "plot:", "keep_best: -1\n  plot:", "config.yaml:19: run.keep_best must be >= 0, got -1"
    ),
    "infinite number": config("lr: 1e-3", "lr: .inf", "config.yaml:12: optim.lr", "finite", "inf"),
    "number of 80 bits": config("steps: 1", f"steps: {1 << 80}", "config.yaml:14: train.steps"),
    "wrong choice": config(
        "lr: 1e-3",
        "schedule: cosin",
        "config.yaml:12: optim.schedule must be constant or linear or cosine, got 'cosin'",
    ),
    "wrong optimizer": config(
        "lr: 1e-3", "kind: adam8", "config.yaml:12: optim.kind must be adamw or adamw8bit"
    ),
    "wrong bits": config(
        "  base:",
        "  quantize: nf8\n  base:",
        "model.quantize must be none or nf4 or int8, got 'nf8'",
    ),
    "out of range": config("lr: 1e-3", "lr: -1", "config.yaml:12: optim.lr must be > 0, got -1"),
    "out of range, adapter": config(
        "top_k: 1", "top_k: 3", "config.yaml:10: adapter.top_k", "got 3"
    ),
    "missing key": config(
        "  base:", "  dtype: float32 #", "config.yaml:1: missing key 'model.base'"
    ),
    "missing section": (
        lambda place: place.config.write_text(place.config.read_text().partition("run:")[0]),
        Place.train,
        ("config.yaml:1: missing key 'run'",),
    ),
    "duplicate key": config("  r: 2", "  r: 2\n  r: 4", "key 'adapter.r' is written twice"),
    "not YAML": config("tasks: [arc-e]", "tasks: [arc-e", "config.yaml:", "not YAML"),
    "tab": config("  r: 2", "\tr: 2", "config.yaml:8: not YAML"),
    "python object": config("lr: 1e-3", "lr: !!python/object:os.system x", "config.yaml:12", "not"),
    "impossible date": config(
        "lr: 1e-3", "lr: 2020-99-99", "config.yaml:12: optim.lr: '2020-99-99'"
    ),
    "list": config("model:", "- model:", "config.yaml"),
    "steps and epochs": config(
        "steps: 1", "steps: 1\n  epochs: 1", "config.yaml:14: train.steps or epochs", "not both"
    ),
    "neither steps nor epochs": config("  steps: 1\n", "", "config.yaml:13: train.steps or epochs"),
    "NUL in a path": config("dir: ", 'dir: "a\\0b" #', "config.yaml:4: data.dir must be text"),
    "no tasks": config("[arc-e]", "[]", "data.tasks or data.files"),
    "packing of learned padding": config(
        "[arc-e]",
        "[arc-e]\n  packing: true\n  loss_on: padded_text",
        "config.yaml:6: data.packing leaves no padding to learn: loss_on must be answer or text",
    ),
    "task twice": config("[arc-e]", "[arc-e, arc-e]", "config.yaml:5: data.tasks", "once"),
    "unknown projection": config(
        "r: 2",
        "r: 2\n  target_modules: [q_porj]",
        "target_modules",
        "'q_porj' (did you mean 'q_proj'?)",
    ),
    "sequence longer than the model's": config("128", "4096", "max_seq_len 4096", "192"),
    "two adapters of one name": config(
        "run:", "adapters: [{name: a}, {name: a}]\nrun:", "config.yaml:17: adapters", "a, a"
    ),
    "adapter name that is a path": config(
        "run:", "adapters: [{name: ../../a}]\nrun:", "name", "'../../a'"
    ),
    "seed that torch cannot take": config("plot:", f"seed: -{1 << 62}\n  plot:", "seed"),
    "unknown device": config("model:", "model:\n  device: tpu9", "device", "tpu9"),
    "task without a folder": config("[arc-e]", "[piqa]", "tasks/piqa/train.jsonl: no such file"),
    "unknown task": config("[arc-e]", "[arce]", "unknown task 'arce' (did you mean 'arc-e'?)"),
    "no data folder": config("dir: ", "dir: nowhere #", "nowhere/arc-e/train.jsonl: no such file"),
    "override without =": override("optim.lr", "command line 'optim.lr'", "key=value"),
    "override of an unknown key": override(
        "optim.lrr=1", "command line 'optim.lrr=1': unknown key 'optim.lrr' (did you mean 'lr'?)"
    ),
    "override of a wrong type": override(
        "train.steps=many", "command line 'train.steps=many': train.steps must be a whole number"
    ),
    "override that is not YAML": override(
        "data.tasks=[a", "command line 'data.tasks=[a'", "not YAML"
    ),
    "override past a list's end": override("data.tasks.1=boolq", "'1' is no index of a list of 1"),
    "override of no index": override("data.tasks.²=boolq", "'²' is no index of a list of 1"),
    "unknown option": override("--stpes", "--stpes", "--help"),
    "changes without --resume": override(
        "--allow-changes", "--allow-changes must go with --resume"
    ),
    "negative count of skips": override(
        "train.max_skips=-1", "train.max_skips must be >= 0, got -1"
    ),
    "unknown policy": override(
        "train.on_non_finite=ignore", "train.on_non_finite must be stop or skip, got 'ignore'"
    ),
    "a quantised base in parts": (
        nothing,
        lambda place: place.train("model.shard=true", "model.quantize=int8"),
        ("model", "shard must be false with quantize int8"),
    ),
    "no config file": (
        lambda place: place.config.unlink(),
        Place.train,
        ("config.yaml: cannot be read",),
    ),
    "config that is a folder": (
        nothing,
        lambda place: ["train", "--config", str(place.tasks)],
        ("tasks: cannot be read",),
    ),
    "config that is no text": (
        lambda place: place.config.write_bytes(b"\xff\xfe\x00"),
        Place.train,
        ("config.yaml",),
    ),
    "--config without a file": (nothing, lambda place: ["train", "--config"], ("--config",)),
    "no --config": (nothing, lambda place: ["train"], ("--config",)),
}


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**read_json(folder / "config.json"), **changes}
        write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})

    return change


def edit_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = TensorFile(folder / "model.safetensors")
        tensors = {name: file[name].clone() for name in file.shapes}
        change(tensors)
        write_tensors(folder / "model.safetensors", tensors)

    return damage


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lie_about_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def lie_about_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[48,32]", b"[48,33]", 1))


def shard(folder: Path, **index: str) -> None:
    """Two shards and their index; `index` adds to it or changes it."""
    file = TensorFile(folder / "model.safetensors")
    names = sorted(file.shapes)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        write_tensors(folder / f"part-{i}.safetensors", {name: file[name] for name in part})
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    changed = {key.replace("/", "."): value for key, value in index.items()}
    write_json(folder / "model.safetensors.index.json", {"weight_map": {**weight_map, **changed}})


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "part-2.safetensors").unlink()


CHECKPOINTS: dict[str, Case] = {
    "no folder": damaged(shutil.rmtree, "model ", "checkpoint: no such folder"),
    "a file instead": damaged(
        lambda folder: (shutil.rmtree(folder), folder.write_text("")), "checkpoint: no such folder"
    ),
    "no config.json": damaged(
        lambda folder: (folder / "config.json").unlink(), "config.json: no such file"
    ),
    "broken config.json": damaged(
        lambda folder: (folder / "config.json").write_text('{\n"a": 1,\n}'),
        "config.json:3: not JSON",
    ),
    "config.json with a number of 5000 digits": damaged(
        lambda folder: (folder / "config.json").write_text('{"a": 1' + "0" * 5000 + "}"),
        "config.json: cannot be read",
    ),
    "config.json that is a list": damaged(
        lambda folder: (folder / "config.json").write_text("[]"), "config.json", "object", "list"
    ),
    "unknown model type": damaged(
        edit_config(model_type="lama"),
        "config.json: model_type 'lama' is not supported (did you mean 'llama'?)",
    ),
    "missing size": damaged(edit_config(hidden_size=None), "config.json: missing hidden_size"),
    "text for a size": damaged(edit_config(hidden_size="32"), "config.json: hidden_size", "'32'"),
    "heads that do not divide": damaged(
        edit_config(num_attention_heads=5), "config.json: hidden_size 32", "num_attention_heads 5"
    ),
    "unknown activation": damaged(edit_config(hidden_act="swish9"), "swish9"),
    "scaled rope": damaged(
        edit_config(rope_scaling={"type": "yarn", "factor": 2.0}),
        "config.json: rope_scaling",
        "yarn",
    ),
    "rope that is no mapping": damaged(
        edit_config(rope_scaling="yarn"), "config.json", "rope_scaling"
    ),
    "rope base that is no number": damaged(
        edit_config(rope_scaling={"rope_theta": "10k"}), "config.json", "rope_theta"
    ),
    "no weights": damaged(
        lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"
    ),
    "weights cut short": damaged(truncate, "model.safetensors: not a whole safetensors file"),
    "empty weights": damaged(
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors: not a whole",
    ),
    "header longer than the file": damaged(lie_about_length, "model.safetensors: not a whole"),
    "header with another shape": damaged(lie_about_shape, "model.safetensors: not a whole"),
    "transposed tensor": damaged(
        edit_weights(transpose),
        "model.safetensors: 0 missing, 0 unexpected, 1 misshaped",
        "model.layers.0.mlp.up_proj.weight must be [48, 32], got [32, 48]",
        "likely cause",
    ),
    "missing tensor": damaged(
        edit_weights(lambda tensors: tensors.pop("model.norm.weight")), "missing: model.norm.weight"
    ),
    "tied, but not said": damaged(
        edit_weights(lambda tensors: tensors.pop("lm_head.weight")), "tie_word_embeddings"
    ),
    "tensor of another model": damaged(
        edit_weights(lambda tensors: tensors.update({"visual.weight": torch.ones(1)})),
        "unexpected: visual.weight",
    ),
    "weights of another model": damaged(
        edit_config(hidden_size=64), "misshaped", "another checkpoint"
    ),
    "missing shard": damaged(lose_a_shard, "index.json", "not there: part-2.safetensors"),
    "shard without its tensor": damaged(
        lambda folder: shard(folder, **{"visual.weight": "part-1.safetensors"}),
        "part-1.safetensors",
        "visual.weight",
    ),
    "shard outside the folder": damaged(
        lambda folder: shard(folder, **{"visual.weight": "../part.safetensors"}),
        "'../part.safetensors'",
    ),
    "no tokenizer": damaged(
        lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model: no such file"
    ),
    "broken tokenizer": damaged(
        lambda folder: (folder / "tokenizer.model").write_bytes(b"spam" * 99),
        "tokenizer.model: not a sentencepiece model",
    ),
    "tokenizer without BOS": damaged(
        lambda folder: make_tokenizer(folder / "tokenizer.model", bos_id=-1, eos_id=1),
        "tokenizer.model",
        "no BOS",
    ),
    "tokenizer of another model": damaged(
        lambda folder: make_tokenizer(folder / "tokenizer.model", vocab_size=390), "390", "384"
    ),
    "train": damaged(lose_a_shard, "not there: part-2.safetensors", command=Place.train),
    "evaluate": damaged(lose_a_shard, "not there: part-2.safetensors", command=Place.evaluate),
}


def put(number: int, **changes: object) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})

    return change


def replace(number: int, text: str) -> Callable[[list[str]], None]:
    return lambda lines: lines.__setitem__(number - 1, text)


CHOICES = {"text": ["red", "ten"], "label": ["A", "B"]}
ROWS: dict[str, Case] = {
    "broken JSON": row(replace(7, '{"id": "q'), "arc-e/train.jsonl:7: not JSON"),
    "number of 5000 digits": row(replace(7, "1" * 5000), "train.jsonl:7: not JSON"),
    "nested too deeply": row(replace(7, "[" * 200_000), "train.jsonl:7: not JSON"),
    "list": row(replace(3, "[1]"), "train.jsonl:3: a row must be a JSON object, got list"),
    "missing column": row(replace(5, '{"question": "x"}'), "train.jsonl:5", "no key 'choices'"),
    "gold label not among the labels": row(
        put(4, answerKey="E"), "train.jsonl:4", "answerKey must be one of A, B, C, got 'E'"
    ),
    "hidden gold label": row(put(4, answerKey=""), "train.jsonl:4", "answerKey", "got ''"),
    "null for text": row(put(2, question=None), "train.jsonl:2", "question must be text, got None"),
    "text for choices": row(put(2, choices="AB"), "train.jsonl:2", "choices", "'AB'"),
    "null for a choice": row(
        put(2, choices={**CHOICES, "text": ["red", None]}), "train.jsonl:2", "text must be a list"
    ),
    "fewer texts than labels": row(
        put(2, choices={**CHOICES, "text": ["red"]}), "train.jsonl:2", "choices must"
    ),
    "the same label twice": row(
        put(2, choices={**CHOICES, "label": ["A", "A"]}), "train.jsonl:2", "choices must"
    ),
    "half a surrogate pair": row(put(2, question="a \ud800"), "train.jsonl:2", "surrogates"),
    "empty": row(list.clear, "arc-e/train.jsonl is empty"),
    "only blank lines": row(lambda lines: lines.__setitem__(slice(None), [" "]), "is empty"),
    "not UTF-8": (
        lambda place: (place.tasks / "arc-e/train.jsonl").write_bytes(b'{"id": "\xff"}\n'),
        Place.train,
        ("arc-e/train.jsonl: not UTF-8",),
    ),
    "all answers longer than max_seq_len": (
        nothing,
        lambda place: place.train("train.max_seq_len=1"),
        ("all 12 samples", "max_seq_len 1"),
    ),
    "like nothing known": (
        lambda place: write_json(place.tasks / "mine/task.json", {"like": "arce"}),
        lambda place: place.train("data.tasks=[mine]"),
        ("mine/task.json: like = 'arce' is no known task (did you mean 'arc-e'?)",),
    ),
    "like a list": (
        lambda place: write_json(place.tasks / "mine/task.json", {"like": ["arc-e"]}),
        lambda place: place.evaluate(tasks="mine"),
        ("mine/task.json: like = ['arc-e']",),
    ),
    "like, misspelt": (
        lambda place: write_json(place.tasks / "mine/task.json", {"lik": "arc-e"}),
        lambda place: place.evaluate(tasks="mine"),
        ("mine/task.json: like = None",),
    ),
    "broken task.json": (
        lambda place: (place.tasks / "mine/task.json").write_text("{"),
        lambda place: place.evaluate(tasks="mine"),
        ("mine/task.json:1: not JSON",),
    ),
    "a task of another schema": (
        lambda place: write_rows(place.tasks / "gsm8k/test.jsonl", ARC_ROWS),
        lambda place: place.evaluate(tasks="gsm8k"),
        ("gsm8k/test.jsonl:1: the row has no key 'answer' (schema of gsm8k)",),
    ),
    "under another protocol": (
        lambda place: write_rows(place.tasks / "arc-e/test.jsonl", [*ARC_ROWS, {"id": "x"}]),
        lambda place: place.evaluate("--protocol", "llm-adapters"),
        ("arc-e/test.jsonl:13: the row has no key 'question'",),
    ),
    "in the evaluated split": (
        lambda place: write_rows(place.tasks / "arc-e/test.jsonl", [*ARC_ROWS, {"id": "x"}]),
        lambda place: place.train("eval.tasks=[arc-e]"),
        ("arc-e/test.jsonl:13", "'question'"),
    ),
}


GOOD_ROW = json.dumps({"instruction": "sing", "input": "", "output": "la"})
TALK = json.dumps({"messages": [{"role": "user", "content": "a"}]})


def files(content: str | bytes, *words: str, **source: object) -> Case:
    """A config whose data.files is one file of that content."""

    def damage(place: Place) -> None:
        content_bytes = content if isinstance(content, bytes) else content.encode()
        (place.folder / "rows.jsonl").write_bytes(content_bytes)
        (place.folder / "chat.jinja").write_text("{{ messages[0].content }}")
        (place.folder / "no.jinja").write_text("{{ raise_exception('never') }}")
        entry = json.dumps([{"path": "rows.jsonl", **source}])
        place.change_config("  tasks: [arc-e]", f"  files: {entry}")

    return damage, Place.train, words


FILES: dict[str, Case] = {
    "bad JSON": files(f"{GOOD_ROW}\n" * 6 + '{"instr', "error: rows.jsonl:7: not JSON"),
    "missing column": files(
        GOOD_ROW.replace("output", "outputs"),
        "rows.jsonl:1: the row has no key 'output' (did you mean 'outputs'?)",
    ),
    "empty": files("", "rows.jsonl is empty"),
    "not UTF-8": files(b'{"a": "\xff"}', "rows.jsonl: not UTF-8"),
    "surrogate": files(GOOD_ROW.replace("la", "\\udc00"), "rows.jsonl:1: half a surrogate pair"),
    "no chat template": files(TALK, "tokenizer_config.json: no chat_template"),
    "no answer": files(TALK, "all 1 samples are without an answer", template="chat.jinja"),
    "template that refuses": files(TALK, "rows.jsonl:1: no.jinja: never", template="no.jinja"),
    "no such file": files(GOOD_ROW, "nowhere.jsonl: no such file", path="nowhere.jsonl"),
    "folder": files(GOOD_ROW, "tasks: cannot be read", path="tasks"),
    "unknown key": files(
        GOOD_ROW,
        "config.yaml:5: unknown key 'data.files.0.wieght' (did you mean 'weight'?)",
        wieght=1,
    ),
    "unknown format": files(
        GOOD_ROW, "config.yaml:5: data.files.0.format must be auto or alpaca or", format="alpacca"
    ),
    "weight": files(GOOD_ROW, "config.yaml:5: data.files.0.weight must be > 0, got 0", weight=0),
    "tiny weight": files(GOOD_ROW, "rows.jsonl: weight 0.1 draws none of its 1", weight=0.1),
    "max_samples": files(GOOD_ROW, "config.yaml:5: data.files.0.max_samples", max_samples=0),
    "columns": files(GOOD_ROW, "data.files.0.columns must be a mapping", columns="instruction"),
    "unknown template": files(GOOD_ROW, "unknown template 'plian'", "'plain'", template="plian"),
    "answer longer than max_seq_len": files(
        json.dumps({"instruction": "a", "output": "x" * 500}), "all 1 samples", "max_seq_len 128"
    ),
}


def add_adapter(place: Place, base: Path | None = None, **changes: object) -> None:
    model = models.load(base or place.checkpoint)
    mixlora.add_adapter(model, mixlora.AdapterConfig(r=2, target_modules=["q_proj", "v_proj"]))
    mixlora.save_adapter(model, place.folder / "adapter")
    path = place.folder / "adapter/adapter_config.json"
    write_json(path, {**read_json(path), **changes})


def with_adapter(command: Callable[..., list[str]]) -> Callable[[Place], list[str]]:
    return lambda place: command(place, "--adapter", str(place.folder / "adapter"))


def adapter(*words: str, **changes: object) -> Case:
    return lambda place: add_adapter(place, **changes), with_adapter(Place.generate), words


def add_adapter_of_another_base(place: Place) -> None:
    other = make_checkpoint(place.folder / "other", hidden_size=16, intermediate_size=24)
    add_adapter(place, other)


def generate_case(*options: str, words: tuple[str, ...]) -> Case:
    return nothing, lambda place: place.generate(*options), words


def evaluate_case(*options: str, words: tuple[str, ...], tasks: str = "arc-e") -> Case:
    return nothing, lambda place: place.evaluate(*options, tasks=tasks), words


COMMANDS: dict[str, Case] = {
    "no adapter": (nothing, with_adapter(Place.evaluate), ("adapter: no such folder",)),
    "adapter without weights": (
        lambda place: (
            add_adapter(place),
            (place.folder / "adapter/adapter_model.safetensors").unlink(),
        ),
        with_adapter(Place.generate),
        ("adapter/adapter_model.safetensors: no such file",),
    ),
    "adapter without config": (
        lambda place: (add_adapter(place), (place.folder / "adapter/adapter_config.json").unlink()),
        with_adapter(Place.evaluate),
        ("adapter/adapter_config.json: no such file",),
    ),
    "adapter of another base": (
        add_adapter_of_another_base,
        with_adapter(Place.evaluate),
        ("adapter_model.safetensors: 0 missing", "misshaped", "[2, 32]", "[2, 16]", "another base"),
    ),
    "adapter of another rank": adapter("misshaped", "must be [4, 32], got [2, 32]", "r of", r=4),
    "adapter for other projections": adapter(
        "missing", "target_modules", target_modules=["o_proj"]
    ),
    "adapter with an unknown key": adapter(
        "adapter_config.json: unknown key 'lora_alhpa' (did you mean 'lora_alpha'?)", lora_alhpa=1
    ),
    "adapter with what is not supported": adapter(
        "adapter_config.json: use_qalora", use_qalora=True
    ),
    "adapter with a wrong type": adapter("adapter_config.json: r must be a whole number", r="2"),
    "adapter out of range": adapter(
        "adapter_config.json: lora_dropout must be in [0, 1)", lora_dropout=1
    ),
    "prompt too long": generate_case(
        "--prompt", "a cat " * 200, words=("prompt of", "max_position_embeddings 192")
    ),
    "no new tokens": generate_case("--max-new-tokens", "0", words=("max_new_tokens must be >= 1",)),
    "too many new tokens": generate_case("--max-new-tokens", "9999", words=("9999", "192")),
    "prompt that is not UTF-8": generate_case("--prompt", "a \udcff", words=("not Unicode",)),
    "no prompt": (
        nothing,
        lambda place: ["generate", "--base", str(place.checkpoint)],
        ("--prompt",),
    ),
    "prompt and instruction": generate_case(
        "--prompt", "a", "--instruction", "b", words=("either --prompt or --instruction",)
    ),
    "unknown template": generate_case(
        "--instruction",
        "a",
        "--template",
        "alpacca",
        words=("unknown template 'alpacca' (did you mean 'alpaca'?)",),
    ),
    "chat without a chat template": generate_case(
        "--instruction", "a", "--template", "chat", words=("tokenizer_config.json: no chat_templ",)
    ),
    "no template file": generate_case(
        "--instruction", "a", "--template", "no/x.json", words=("no/x.json: no such file",)
    ),
    "negative temperature": generate_case("--temperature", "-1", words=("temperature", "-1")),
    "temperature nan": generate_case("--temperature", "nan", words=("temperature", "nan")),
    "top-p of 0": generate_case("--top-p", "0", words=("top_p", "(0, 1]")),
    "text for a number": generate_case("--seed", "x", words=("--seed", "'x'")),
    "seed too large": generate_case("--temperature", "1", "--seed", str(1 << 63), words=("seed",)),
    "unknown device": generate_case("--device", "tpu9", words=("tpu9",)),
    "unknown dtype": generate_case("--dtype", "float8", words=("--dtype", "'float8'")),
    "unknown task": evaluate_case(
        tasks="arc-e,bool",
        words=("unknown task 'bool' (did you mean 'boolq'?)", "task.json"),
    ),
    "no task": evaluate_case(tasks="", words=("unknown task ''",)),
    "unknown protocol": evaluate_case(
        "--protocol",
        "mixlora-fix",
        words=("unknown protocol 'mixlora-fix' (did you mean 'mixlora-fixed'?)",),
    ),
    "a protocol that compares labels, a task without": evaluate_case(
        "--protocol",
        "mixlora",
        tasks="gsm8k",
        words=("protocol mixlora", "gsm8k", "arc-e", "pubmedqa"),
    ),
    "a protocol without a prompt for the task": evaluate_case(
        "--protocol", "llm-adapters", tasks="csqa", words=("protocol llm-adapters", "csqa", "piqa")
    ),
    "batch size 0": evaluate_case("--batch-size", "0", words=("--batch-size must be >= 1",)),
    "no folder for the output": evaluate_case(
        "--output", "no/x.json", words=("no/x.json", "folder")
    ),
    "output that is a folder": (
        nothing,
        lambda place: place.evaluate("--output", str(place.tasks)),
        ("/tasks", "folder"),
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("config", CONFIGS),
        ("checkpoint", CHECKPOINTS),
        ("rows", ROWS),
        ("command", COMMANDS),
        ("files", FILES),
    )
    for name, case in cases.items()
}
MAINS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(
    name: str, place: Place, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, argv, words = CASES[name]
    monkeypatch.chdir(place.folder)
    damage(place)
    command, *options = argv(place)
    before = place.everything()
    code = MAINS[command](options)
    check(place, code, *capsys.readouterr(), words, before)


def test_the_undamaged_place_is_right(place: Place, capsys: pytest.CaptureFixture) -> None:
    """Else the cases above could fail for another reason than their own."""
    assert train.main(place.train()[1:]) == 0
    adapter = str(place.run / "default/adapter")
    assert evaluate.main(place.evaluate("--adapter", adapter)[1:]) == 0
    assert generate.main(place.generate("--adapter", adapter, "--max-new-tokens", "2")[1:]) == 0


RUNS = {
    "another run": ((), ("holds a run", "--resume", "run.overwrite=true")),
    "resumed under another rate": (
        ("--resume", "optim.lr=0.5"),
        ("--resume", "optim.lr was 0.001, is 0.5"),
    ),
    "resumed under another adapter": (
        ("--resume", "adapter.r=4"),
        ("--resume", "adapter.r was 2, is 4"),
    ),
    "resumed elsewhere": (
        ("--resume", "run.dir=elsewhere"),
        ("--resume: there is no run in run.dir elsewhere",),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_earlier_run_is_not_touched(
    name: str, place: Place, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, words = RUNS[name]
    monkeypatch.chdir(place.folder)
    assert train.main(place.train()[1:]) == 0
    capsys.readouterr()
    before = place.everything()
    code = train.main(place.train(*overrides)[1:])
    out, err = capsys.readouterr()
    check(place, code, "", err, words, before)


def test_a_folder_that_is_no_run_is_not_touched(
    place: Place, capsys: pytest.CaptureFixture
) -> None:
    place.run.mkdir()
    (place.run / "thesis.tex").write_text("years of work")
    before = place.everything()
    code = train.main(place.train("run.overwrite=true")[1:])
    check(place, code, *capsys.readouterr(), ("not empty", "no run"), before)


@pytest.mark.parametrize("path", ["run", "run/below"])
def test_a_file_at_run_dir_is_not_touched(
    path: str, place: Place, capsys: pytest.CaptureFixture
) -> None:
    place.run.write_text("a file")
    before = place.everything()
    code = train.main(place.train(f"run.dir={place.folder / path}")[1:])
    check(place, code, *capsys.readouterr(), (str(place.folder / path),), before)


@pytest.mark.parametrize(
    "name",
    [
        "config: typo in a key",
        "command: unknown task",
        "command: unknown template",
    ],
)
def test_as_a_program(name: str, place: Place) -> None:
    damage, argv, words = CASES[name]
    damage(place)
    command, *options = argv(place)
    before = place.everything()
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{command}.py"), *options],
        cwd=place.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    check(place, done.returncode, done.stdout, done.stderr, words, before)


def test_the_printed_config_is_the_config(place: Place, capsys: pytest.CaptureFixture) -> None:
    assert train.main(place.train("--print-config", "optim.lr=0.25")[1:]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.25 and printed["adapter"]["num_experts"] == 2
    assert not place.run.exists()
