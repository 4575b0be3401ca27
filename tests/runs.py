"""Tiny runs of train.py, and what they leave."""

import json
from pathlib import Path

import torch
import yaml

import train
from mixlora.files import TensorFile

MIXLORA = {"routing_strategy": "mixlora", "r": 4, "num_experts": 4, "lora_dropout": 0.1}
LORA = {"r": 8, "lora_dropout": 0.1}


def tiny_settings(checkpoint: Path, task_folder: Path, folder: Path) -> dict:
    """24 samples in batches of 7: every fourth step ends an epoch with a short batch."""
    return {
        "model": {"base": str(checkpoint)},
        "data": {"dir": str(task_folder), "tasks": ["arc-e", "boolq"]},
        "adapter": MIXLORA,
        "optim": {"lr": 0.01, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 7, "micro_batch_size": 3, "max_seq_len": 96},
        "run": {"dir": str(folder), "plot": False},
    }


def run(settings: dict, tmp_path: Path, *arguments: str, code: int = 0) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(path), *arguments]) == code
    return Path(settings["run"]["dir"])


def metrics(folder: Path, name: str = "default") -> list[dict]:
    """Every step's line without its speed, which no two runs share."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "tokens_per_second": None} for line in lines]


def weights(folder: Path, name: str = "default") -> dict[str, torch.Tensor]:
    file = TensorFile(folder / name / "adapter" / "adapter_model.safetensors")
    return {key: file[key] for key in file.shapes}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def strict_json(path: Path) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
