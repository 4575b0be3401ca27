"""A training without its data: a tiny model's adapter and AdamW, whose every number tells the step
that they are of, and their checkpoints."""

from pathlib import Path

import torch

from mixlora.adapters import adapter_parameters
from mixlora.checkpoint import Checkpoints
from mixlora.train_config import RunConfig
from tests.tiny import add_filled, tiny_model

MOMENTS = {"step": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}


class Trained:
    def __init__(self, folder: Path, *, name: str = "default", r: int = 2, **run) -> None:
        self.model = tiny_model(num_hidden_layers=1)
        add_filled(self.model, name, r=r, target_modules=["q_proj"])
        self.parameters = adapter_parameters(self.model, name)
        self.optimizer = torch.optim.AdamW(self.parameters.values())
        config = RunConfig(**{"dir": str(folder), **run})
        of_run = self.model, name, self.optimizer, config
        self.checkpoints = Checkpoints(folder / "checkpoints", *of_run)

    @property
    def folder(self) -> Path:
        return self.checkpoints.folder

    def moved(self, folder: Path) -> "Trained":
        """As a new process in that folder, but sooner."""
        self.checkpoints.folder = folder / "checkpoints"
        self.checkpoints.refused.clear()
        return self

    @torch.no_grad()
    def at(self, step: int) -> "Trained":
        for x in self.parameters.values():
            x.fill_(step)
            self.optimizer.state[x] = {
                key: torch.full_like(x if key != "step" else torch.zeros(()), step + more)
                for key, more in MOMENTS.items()
            }
        return self

    def save(self, step: int, loss: float = 1.0) -> None:
        self.at(step).checkpoints.save(step, {"loss": loss})

    def resume(self) -> int:
        """The step gone on from, with all that belongs to it; 0 if there is none."""
        state = self.at(0).checkpoints.resume()
        step = state["step"] if state else 0
        for x in self.parameters.values():
            assert (x == step).all()
            for key, more in MOMENTS.items():
                assert (self.optimizer.state[x][key] == step + more).all()
        return step

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ 1 << bit % 8
        file.seek(bit // 8)
        file.write(bytes([byte]))
