"""Adapters and configs that somebody mutated: each is read, or refused by an InputError, in less
than a second of the processor and in bounded memory, and no file outside its folder is opened.

A fixed seed and 2,000 adapters and configs by default; `-m slow` runs 100,000 of each.
"""

import json
import os
import pickle
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mixlora
import models
from mixlora import config as configs
from mixlora import mlora_config
from mixlora.adapter_files import CONFIG_FILE, PICKLED_FILE, TENSOR_FILE
from mixlora.config import build, locate
from mixlora.errors import InputError
from mixlora.files import write_json, write_tensors
from tests.test_config import PLACED, STORIES, mutate
from tests.tiny import MIXLORA, SIZES, add_filled, tiny_model
from train import TrainConfig

slow = pytest.mark.slow
MOST_MEMORY = 200 << 20  # bytes that all cases together may add at their worst
STRANGE: list = [
    *(None, True, False, 0, -1, 1, 2, 3, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 1 << 200),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800", "字", "../x", "/etc"),
    *([], {}, [[]], {"": {}}, ["q_proj", "q_proj"], [0], "F64", "F8_E4M3", "I64", "BOOL"),
    *([1 << 40, 32], [2, 1 << 62], [0], [2, -1], [0, 8], [8, 0], [1 << 62, 1 << 63], "(a+)+b", "("),
]


@pytest.fixture
def bounded() -> Iterator[Callable[[Callable], bool]]:
    """Calls a function; whether it ended without an InputError."""
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def call(function: Callable) -> bool:
        nonlocal slowest
        began = time.process_time()
        try:
            function()
            return True
        except InputError as error:
            assert len(str(error)) < 100_000
            return False
        finally:
            slowest = max(slowest, time.process_time() - began)

    yield call
    assert slowest < 1
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more << 10 < MOST_MEMORY


OPENED: list[str] | None = None


def record(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(record)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that Python opens."""
    global OPENED
    OPENED = []
    yield OPENED
    OPENED = None


def put(path: Path, content: bytes) -> None:
    """A new file: one that is written over waits for the disk, which takes most of the time."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A bit, a byte, a piece lost, doubled or put elsewhere, a length that lies."""
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(7):
        case 0:
            return content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :]
        case 1:
            return content[:i]
        case 2:
            return content[:i] + content[j:]
        case 3:
            return content[:j] + content[i:]
        case 4:
            return content[:i] + rng.randbytes(rng.randrange(9)) + content[i:]
        case 5:
            lie = rng.choice([0, 1, 7, len(content), 1 << 31, 1 << 40, (1 << 64) - 1])
            return struct.pack("<Q", lie) + content[8:]
        case _:
            return bytes(rng.randrange(20))


def mutated(value: object, rng: random.Random) -> object:
    """One value somewhere in it is another, or goes, or its key is another."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        value, key = dict(value), rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(["", "r", "__metadata__", "x" * 999, "../../x"])] = value[key]
            case 2:
                value[rng.choice(list(value))] = value[key]
            case _:
                value[key] = mutated(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(value[i], rng), *value[i + 1 :]]
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 4, 1000])
    return rng.choice(STRANGE)


def with_header(content: bytes, change: Callable[[dict], dict | bytes]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = change(json.loads(content[8 : 8 + length]))
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def small_model() -> nn.Module:
    return tiny_model(num_hidden_layers=1)


KINDS = [
    {"r": 2, "target_modules": ["q_proj"]},
    {**MIXLORA, "r": 2, "num_experts": 2, "target_modules": ["up_proj", "k_proj"]},
    {"routing_strategy": "milora", "r": 2, "top_k": 1, "target_modules": ["q_proj", "v_proj"]},
]


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=slow)])
def test_fuzzed_adapters(count: int, tmp_path: Path, bounded, opened) -> None:
    rng, model, pairs = random.Random(0), small_model(), []
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for i, kind in enumerate(KINDS):
        other = small_model()
        add_filled(other, **kind)
        mixlora.save_adapter(other, tmp_path / f"{i}", pickled=False)
        config = json.loads((tmp_path / f"{i}" / CONFIG_FILE).read_text())
        pairs.append((config, (tmp_path / f"{i}" / TENSOR_FILE).read_bytes()))
    folder, loaded = tmp_path / "fuzzed", 0
    folder.mkdir()
    mixlora.load_adapter(small_model(), tmp_path / "0")  # imports what it needs
    for _ in range(count):
        (config, content), way = rng.choice(pairs), rng.randrange(4)
        text = json.dumps(mutated(config, rng) if way in (0, 1) else config).encode()
        if way == 1:
            text = damaged(text, rng)
        if way == 2:
            content = damaged(content, rng)
        if way == 3:
            content = with_header(content, lambda header: mutated(header, rng))
        put(folder / CONFIG_FILE, text)
        put(folder / TENSOR_FILE, content)
        opened.clear()
        if bounded(lambda: mixlora.load_adapter(model, folder, "new")):
            loaded += 1
            mixlora.remove_adapter(model, "new")
        assert [path for path in opened if not path.startswith(str(folder))] == []
        assert model.adapter_configs == {}
    assert 0 < loaded < 0.6 * count
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[x], state[x]) for x in state)


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=slow)])
def test_fuzzed_configs(count: int, bounded) -> None:
    rng, read = random.Random(1), 0

    def parse(text: str) -> None:
        try:
            tree = configs._parse(text, "c.yaml") or locate({}, "c.yaml")
            build(TrainConfig, mlora_config.translate(tree))
        except InputError as error:
            assert PLACED.match(str(error)), error
            raise

    for _ in range(count):
        text = mutate(STORIES, rng)
        read += bounded(lambda text=text: parse(text))
    assert 0 < read < count


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=slow)])
def test_fuzzed_configs_of_checkpoints(count: int, tmp_path: Path, bounded, opened) -> None:
    """config.json, the index and a shard's header."""
    rng = random.Random(2)
    model, shards = small_model(), ("a.safetensors", "b.safetensors")
    names = sorted(model.state_dict())
    config = {"model_type": "llama", **SIZES, "num_hidden_layers": 1}
    index = {"weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    for i, shard in enumerate(shards):
        write_tensors(tmp_path / shard, {name: model.state_dict()[name] for name in names[i::2]})
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "model.safetensors.index.json", index)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert bounded(lambda: models.load(tmp_path))
    for _ in range(count):
        path = rng.choice(sorted(files))
        if rng.random() < 0.3:
            put(path, damaged(files[path], rng))
        elif path.suffix == ".json":
            put(path, json.dumps(mutated(json.loads(files[path]), rng)).encode())
        else:
            put(path, with_header(files[path], lambda header: mutated(header, rng)))
        opened.clear()
        bounded(lambda: models.load(tmp_path))
        assert [x for x in opened if not x.startswith(str(tmp_path))] == []
        put(path, files[path])


# -- attacks that chance does not find -------------------------------------------------------------


class Command:
    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


class Module:
    def __reduce__(self) -> tuple:
        return getattr, (nn.Linear(1, 1), "forward")


@pytest.mark.parametrize("payload", [Command(), {"a": Command()}, [Command()], Module()])
@pytest.mark.parametrize("form", ["pickle 0", "pickle 2", "pickle 5", "torch", "torch, old"])
@pytest.mark.parametrize("name", [PICKLED_FILE, TENSOR_FILE])
def test_pickles_are_never_executed(
    payload: object, form: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_model()
    add_filled(model, **KINDS[0])
    mixlora.save_adapter(model, tmp_path / "adapter", pickled=False)
    (tmp_path / "adapter" / TENSOR_FILE).unlink()
    if form.startswith("pickle"):
        (tmp_path / "adapter" / name).write_bytes(pickle.dumps(payload, int(form[-1])))
    else:
        options = {"_use_new_zipfile_serialization": form == "torch"}
        torch.save(payload, tmp_path / "adapter" / name, **options)
    with pytest.raises(InputError, match=name):
        mixlora.load_adapter(small_model(), tmp_path / "adapter")
    assert not (tmp_path / "pwned").exists()


def first(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


def changed(**values) -> Callable[[dict], dict]:
    def change(header: dict) -> dict:
        first(header).update(values)
        return header

    return change


def twice(header: dict) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + ", " + text[1:]).encode()


def overlapping(header: dict) -> dict:
    for described in (x for name, x in header.items() if name != "__metadata__"):
        described["data_offsets"] = first(header)["data_offsets"]
    return header


HEADERS = {
    "keys twice": twice,
    "overlap": overlapping,
    "a product that overflows": changed(shape=[1 << 62, 1 << 62, 0]),
    "a shape that overflows": changed(shape=[1 << 63, 2]),
    "a negative shape": changed(shape=[-2, 32]),
    "a shape of fractions": changed(shape=[2.5, 32]),
    "offsets beyond the end": changed(data_offsets=[0, 1 << 40]),
    "offsets backwards": changed(data_offsets=[256, 0]),
    "negative offsets": changed(data_offsets=[-256, 0]),
    "another dtype": changed(dtype="I32"),
    "an unknown dtype": changed(dtype="object"),
    "deep": lambda header: b'{"a":' * 50_000,
    "no text": lambda header: b"\xff" * 99,
    "an object more": lambda header: json.dumps(header).encode() + b"{}",
    "a tensor that is nothing": lambda header: {**header, "x\0\n": {**first(header)}},
    "metadata that is no text": lambda header: {**header, "__metadata__": {"a": {"b": 1}}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_attacks_by_the_header(name: str, tmp_path: Path, bounded) -> None:
    model = small_model()
    add_filled(model, **KINDS[0])
    mixlora.save_adapter(model, tmp_path, pickled=False)
    path = tmp_path / TENSOR_FILE
    path.write_bytes(with_header(path.read_bytes(), HEADERS[name]))
    assert not bounded(lambda: mixlora.load_adapter(small_model(), tmp_path))


@pytest.mark.parametrize("length, said", [(100_000_001, "too large"), (100_000_000, "invalid")])
def test_a_header_of_more_than_100_MB_is_not_read(
    length: int, said: str, tmp_path: Path, bounded
) -> None:
    """T19. The file, of zeros, takes no place on the disk."""
    model = small_model()
    add_filled(model, **KINDS[0])
    mixlora.save_adapter(model, tmp_path, pickled=False)
    path = tmp_path / TENSOR_FILE
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + length)
    with pytest.raises(InputError, match=rf"not a whole safetensors file: .*{said}"):
        mixlora.load_adapter(small_model(), tmp_path)
    assert not bounded(lambda: mixlora.load_adapter(small_model(), tmp_path))


@pytest.mark.parametrize(
    "values",
    [
        *({"r": 1 << n} for n in (20, 40, 62)),
        *({"num_experts": 1 << n, "top_k": 1} for n in (14, 40, 62)),
        {"expert_lora": {"r": 1 << 40}},
        {"target_modules": "((.+)+)+#"},
        {"target_modules": "(.*.*)*.*.*.*.*.*.*.*.*.*.*#"},
    ],
    ids=str,
)
def test_settings_that_ask_for_more_than_the_file_holds(
    values: dict, tmp_path: Path, bounded
) -> None:
    model = small_model()
    add_filled(model, **KINDS[1])
    mixlora.save_adapter(model, tmp_path, pickled=False)
    path = tmp_path / CONFIG_FILE
    write_json(path, {**json.loads(path.read_text()), **values})
    assert not bounded(lambda: mixlora.load_adapter(small_model(), tmp_path))


def test_quantised_weights_are_not_cast(tmp_path: Path) -> None:
    model = small_model()
    state = {name: x.to(torch.int8) for name, x in model.state_dict().items()}
    write_tensors(tmp_path / "model.safetensors", state)
    write_json(tmp_path / "config.json", {"model_type": "llama", **SIZES, "num_hidden_layers": 1})
    with pytest.raises(InputError, match="must be float16, 32, 64 or bfloat16, got I8"):
        models.load(tmp_path)
