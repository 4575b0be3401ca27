"""What an adapter's training needs to go on exactly where it stopped (docs/checkpoints.md).

    checkpoints/step-000123/adapter_config.json  adapter_model.safetensors   the adapter
                            optimizer.safetensors    AdamW's state
                            state.json               step, epoch, ..., the settings
                            MANIFEST.json            bytes and sha256 of these (whole_folder.py)

No file is a pickle. There is no random state: a step's randomness, on a GPU too, is a function of
(seed, step, place of the micro-batch in it), the data's order one of (seed, epoch).
"""

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixlora
from mixlora.adapter_files import CONFIG_FILE, TENSOR_FILE, read_tensors, save_adapter
from mixlora.adapters import adapter_parameters, trained_parameters
from mixlora.errors import InputError
from mixlora.files import (
    TensorFile,
    check_shapes,
    make_folder,
    read_json,
    write_json,
    write_tensors,
)
from mixlora.layers.adapted_model import AdaptedModel
from mixlora.metrics import tell
from mixlora.optim import fresh_tensors, state_from, state_tensors
from mixlora.train_config import RunConfig
from mixlora.whole_folder import discard, publish, sweep, verify

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
FILES = (CONFIG_FILE, TENSOR_FILE, OPTIMIZER_FILE, STATE_FILE)
BESIDE_TENSORS = 1 << 16  # bytes of a checkpoint: headers, settings, manifest, folder


class Checkpoints:
    """Those of one adapter's training, in a folder of their own.

    Of another adapter, another seed, or damaged: such a checkpoint is told about, passed over and
    never deleted.
    """

    def __init__(
        self,
        folder: Path,
        model: AdaptedModel,
        name: str,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
    ) -> None:
        self.folder, self.config = folder, config
        self.model, self.name = model, name
        self.optimizer = optimizer
        self.refused: set[Path] = set()

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """`step` optimizer steps are done; `state` is kept with it. Then all are deleted but the
        `keep_last` newest and the `keep_best` of the lowest `state["loss"]`."""
        path = self.folder / f"step-{step:06d}"
        try:
            sweep(self.folder)
            if path.exists():
                if self._is_ours(path):
                    return
                self._set_aside(path)
            state = {
                "version": mixlora.__version__,
                "adapter": self.name,
                "seed": self.config.seed,
                "step": step,
                **state,
            }
            publish(path, lambda folder: self._write(folder, self._tensors(), state))
            for name in (TENSOR_FILE, OPTIMIZER_FILE):
                TensorFile(path / name)
        except OSError as error:
            raise InputError(self._cannot(path, error)) from None
        try:
            self._prune()
        except OSError as error:
            tell(f"warning: {self.folder}: an old checkpoint cannot be deleted: {error}")

    def resume(self) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint; gives back its `state`, or None if there is none.

        All are verified, so that damage is told of before the last intact one is gone.
        """
        found, state = checkpoints(self.folder), None
        reasons: list[str] = []
        for path in reversed(found):
            try:
                of_path = self._verified(path)
                if state is None:
                    self._restore(path)
                    state = of_path
            except (InputError, OSError) as error:
                self.refused.add(path)
                reasons.append(str(error))
                tell(f"warning: a checkpoint is passed over: {error}")
        if found and state is None:
            raise InputError(
                f"{self.folder}: none of its {len(found)} checkpoints is intact and of this "
                f"training; of the newest: {reasons[0]}"
            )
        return state

    def rehearse(self) -> None:
        """Before the first step: an error unless there is room for all checkpoints that are to
        come, and one can be written and read back. Nothing is left."""
        tensors = self._later_tensors()
        path = self.folder / ".rehearsal.0.tmp"  # a name that is swept
        try:
            make_folder(self.folder)
            sweep(self.folder)
            self._require_room()
            publish(path, lambda folder: self._write(folder, tensors, {}))
            try:
                verify(path, FILES)
                self._compare(path, tensors)
            finally:
                discard(path)
        except OSError as error:
            raise InputError(self._cannot(path, error)) from None

    def _tensors(self) -> dict[str, Tensor]:
        """Of the optimizer's file. A parameter that never had a gradient has no moments yet."""
        return {
            f"{key}.{moment}": x
            for key, parameter in trained_parameters(self.model, self.name).items()
            for moment, x in state_tensors(self.optimizer, parameter).items()
        }

    def _later_tensors(self) -> dict[str, Tensor]:
        """The optimizer's once all parameters have had a gradient."""
        return {
            f"{key}.{moment}": x
            for key, parameter in trained_parameters(self.model, self.name).items()
            for moment, x in fresh_tensors(self.optimizer, parameter).items()
        }

    def _write(self, folder: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        save_adapter(self.model, folder, self.name, pickled=False)
        write_tensors(folder / OPTIMIZER_FILE, tensors)
        write_json(folder / STATE_FILE, state)

    def _verified(self, path: Path, contents: bool = True) -> dict[str, Any]:
        """The state of an intact checkpoint of this training; anything else is an error."""
        verify(path, FILES, contents)
        state = read_json(path / STATE_FILE)
        wanted = {"adapter": self.name, "seed": self.config.seed, "step": _step(path)}
        for key, value in wanted.items():
            if type(state.get(key)) is not type(value) or state[key] != value:
                raise InputError(
                    f"{path / STATE_FILE}: of another training: {key} must be {value!r}, got "
                    f"{state.get(key)!r}"
                )
        return state

    def _is_ours(self, path: Path, contents: bool = True) -> bool:
        try:
            self._verified(path, contents)
        except InputError:
            return False
        return path not in self.refused

    def _restore(self, path: Path) -> None:
        """All that can be wrong is found before anything is changed."""
        file = TensorFile(path / OPTIMIZER_FILE)
        parameters = {
            key: parameter
            for key, parameter in trained_parameters(self.model, self.name).items()
            if f"{key}.step" in file.shapes
        }
        fresh = {key: fresh_tensors(self.optimizer, x) for key, x in parameters.items()}
        wanted = {
            f"{key}.{moment}": tuple(x.shape)
            for key, tensors in fresh.items()
            for moment, x in tensors.items()
        }
        check_shapes(file.shapes, wanted, file.path)
        states = {}
        for key, parameter in parameters.items():
            tensors = {moment: file[f"{key}.{moment}"] for moment in fresh[key]}
            states[parameter] = state_from(tensors, self.optimizer, parameter)
        read_tensors(self.model, path, self.name)
        self.optimizer.state.update(states)

    def _compare(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        file = TensorFile(path / OPTIMIZER_FILE)
        for key, tensor in tensors.items():
            if not torch.equal(file[key], tensor.cpu()):
                raise InputError(f"{path}: {key} is read back otherwise than it was written")

    def _prune(self) -> None:
        ours = [path for path in checkpoints(self.folder) if self._is_ours(path, contents=False)]
        kept = set(ours[-self.config.keep_last :])
        if self.config.keep_best:
            losses = {path: read_json(path / STATE_FILE).get("loss") for path in ours}
            scored = [path for path in ours if _is_finite(losses[path])]
            kept |= set(sorted(scored, key=losses.__getitem__)[: self.config.keep_best])
        for path in ours:
            if path not in kept:
                discard(path)

    def _set_aside(self, path: Path) -> None:
        """The name is needed; what had it is damaged or of another training."""
        others = (path.with_name(f"{path.name}.aside-{i}") for i in range(1, 1 << 20))
        path.rename(aside := next(other for other in others if not other.exists()))
        self.refused.discard(path)
        tell(f"warning: {path} is not intact or of another training, and is now {aside.name}")

    def _size(self) -> int:
        """Bytes of a checkpoint: the adapter, and what the optimizer will know of it."""
        adapter = adapter_parameters(self.model, self.name).values()
        return BESIDE_TENSORS + sum(x.nbytes for x in (*adapter, *self._later_tensors().values()))

    def _require_room(self) -> None:
        there = [path for path in checkpoints(self.folder) if path not in self.refused]
        count = max(1, self.config.keep_last + self.config.keep_best + 1 - len(there))
        needed, free = count * self._size(), shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.folder}: {count} checkpoints (run.keep_last and run.keep_best and one in "
                f"the making) need {needed} bytes, {free} are free"
            )

    def _cannot(self, path: Path, error: OSError) -> str:
        try:
            free = f"{shutil.disk_usage(self.folder).free}"
        except OSError:
            free = "an unknown number"
        return (
            f"checkpoint {path} cannot be written: {error.strerror or error}; it needs about "
            f"{self._size()} bytes, {free} are free; earlier checkpoints are as they were"
        )


def checkpoints(folder: Path) -> list[Path]:
    """What bears the name of a checkpoint, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted((path for path in found if re.fullmatch(r"step-\d{6,18}", path.name)), key=_step)


def _is_finite(loss: object) -> bool:
    return isinstance(loss, float) and math.isfinite(loss)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
