"""Where a run stands, in a file of its folder, so that it can be watched from elsewhere.

<run.dir>/status.json, replaced as a whole:

    {"state": "running", "pid": 4711, "host": "here", "began": 1767000000.0, "told": 1767000060.0,
     "adapters": {"default": {"step": 120, "of": 160, "skipped": 0, "loss": 0.81,
                              "tokens_per_second": 5321.0, "seconds_left": 20.5,
                              "last_checkpoint": "step-000100"}}}

state is running, finished, stopped (it can be resumed) or failed, then with `message`. A process
that was killed leaves `running`: mixlora/watch.py looks whether it is there. `skipped` are the
steps whose loss or gradient was not finite; after one of them, loss is null.
"""

import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mixlora import processes
from mixlora.checkpoint import checkpoints
from mixlora.files import write_json

SECONDS_BETWEEN = 2.0  # writes; the beginning and the end are always told


class Status:
    """Of a run, as a context: what leaves it tells how the run ended. Of several processes the
    first writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapters: dict[str, dict[str, Any]] = {}
        self.state: dict[str, Any] = {"state": "running"}
        self.began = time.time()
        self._first: dict[str, tuple[int, float]] = {}  # (step, time) of an adapter's first word
        self._write()

    def __enter__(self) -> "Status":
        return self

    def tell(
        self,
        name: str,
        step: int,
        of: int,
        skipped: int,
        loss: float | None,
        tokens_per_second: float,
    ) -> None:
        """So many optimizer steps of an adapter are done; of the last one, loss and speed."""
        first, since = self._first.setdefault(name, (step, time.monotonic()))
        seconds = (time.monotonic() - since) / (step - first) if step > first else None
        self.adapters[name] = {
            "step": step,
            "of": of,
            "skipped": skipped,
            "loss": loss,
            "tokens_per_second": round(tokens_per_second, 1),
            "seconds_left": None if seconds is None else round(seconds * (of - step), 1),
        }
        if time.time() - self.told >= SECONDS_BETWEEN or step == of:
            self._write()

    def finish(self) -> None:
        """All is done that was asked for. A run that ends without this was stopped."""
        self.state = {"state": "finished"}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self.state = {"state": "failed", "message": f"{kind.__name__}: {error}"}
        elif self.state["state"] == "running":
            self.state = {"state": "stopped"}
        self._write()

    def _write(self) -> None:
        for name, adapter in self.adapters.items():
            saved = checkpoints(self.folder / name / "checkpoints")
            adapter["last_checkpoint"] = saved[-1].name if saved else None
        self.told = time.time()
        if not processes.is_first():
            return
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        times = {"began": self.began, "told": self.told}
        write_json(
            self.folder / "status.json",
            {**self.state, **process, **times, "adapters": self.adapters},
        )
