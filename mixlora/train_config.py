"""The settings of train.py: one YAML, strict (docs/config.md)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mixlora.adapter_config import AdapterConfig
from mixlora.adapters import PARTS
from mixlora.data import DataConfig
from mixlora.errors import InputError
from mixlora.evaluation import PROTOCOLS
from mixlora.optim import OptimConfig


@dataclass
class ModelConfig:
    base: str  # checkpoint folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; adapters are float32
    quantize: Literal["none", "nf4", "int8"] = "none"  # the frozen projections, by bitsandbytes
    device: str = "auto"  # auto: cuda where there is one, else cpu
    shard: bool = False  # of several processes each keeps a part of the base

    def __post_init__(self) -> None:
        if self.shard and self.quantize != "none":
            raise InputError(f"shard must be false with quantize {self.quantize}")


@dataclass
class LoopConfig:
    steps: int | None = None  # optimizer steps; either this or epochs
    epochs: int | None = None
    batch_size: int = 16  # samples per optimizer step
    micro_batch_size: int | None = None  # samples per forward; None = batch_size
    max_seq_len: int = 512  # what longer samples lose is data.truncate
    gradient_checkpointing: bool = False  # per block: less memory, one more forward
    activation: Literal["save", "recompute"] = "save"  # gate and up of the feed-forwards
    start_from: str | None = None  # an adapter's folder; None = fresh
    parts: list[Literal[PARTS]] = field(default_factory=lambda: list(PARTS))  # the rest is frozen
    on_non_finite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is
    max_skips: int = 10  # such steps of a run

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise InputError("steps or epochs must be given, and not both")
        for key in ("steps", "epochs", "batch_size", "micro_batch_size", "max_seq_len"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"{key} must be >= 1, got {getattr(self, key)}")
        if self.max_skips < 0:
            raise InputError(f"max_skips must be >= 0, got {self.max_skips}")
        if not self.parts:
            raise InputError(f"parts must name at least one of {', '.join(PARTS)}")


@dataclass
class EvalConfig:
    tasks: list[str] = field(default_factory=list)  # before and after training; [] = none
    protocol: Literal[tuple(PROTOCOLS)] = "mixlora-fixed"
    batch_size: int = 32
    max_rows: int | None = None  # of each task, from its beginning; None = all

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_rows"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"{key} must be >= 1, got {getattr(self, key)}")


@dataclass
class RunConfig:
    dir: str
    together: int | None = None  # adapters that train at once; None = all of them
    seed: int = 0
    deterministic: bool = False  # on a GPU the same bits every time, with slower kernels
    overwrite: bool = False  # delete an earlier run in dir
    save_every_steps: int = 500  # the last step is always saved
    keep_last: int = 2  # checkpoints
    keep_best: int = 0  # besides, those of the lowest training loss since the one before
    plot: bool = True  # summary.png and routing.png, by matplotlib
    tensorboard: bool = False  # <adapter>/tensorboard: the numbers of metrics.jsonl

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must be in [0, 2^32), got {self.seed}")
        for key in ("together", "save_every_steps", "keep_last"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"{key} must be >= 1, got {getattr(self, key)}")
        if self.keep_best < 0:
            raise InputError(f"keep_best must be >= 0, got {self.keep_best}")


@dataclass
class AdapterRun:
    """One of several adapters; what it leaves out it takes from the top level."""

    name: str
    train: LoopConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


INHERITED = ("adapter", "data", "optim", "train", "eval")


@dataclass
class TrainConfig:
    model: ModelConfig
    run: RunConfig
    train: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    # several adapters; [] = one, named "default"
    adapters: list[AdapterRun] = field(default_factory=list, metadata={"inherits": INHERITED})

    def __post_init__(self) -> None:
        names = [run.name for run in self.adapters]
        if len(set(names)) < len(names):
            raise InputError(f"adapters must have names of their own, got {', '.join(names)}")
        protocols = sorted({run.eval.protocol for run in self.adapters})
        if len(protocols) > 1:
            raise InputError(f"adapters must share eval.protocol, got {', '.join(protocols)}")

    def runs(self) -> list[AdapterRun]:
        own = {key: getattr(self, key) for key in INHERITED}
        runs = self.adapters or [AdapterRun("default", **own)]
        for run in runs:
            if run.adapter.capacity_factor and not run.adapter.capacity_seq_len:
                length = run.train.max_seq_len
                run.adapter = dataclasses.replace(run.adapter, capacity_seq_len=length)
        return runs
