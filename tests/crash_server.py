"""Kill -9, COUNT times: `python -m tests.crash_server FOLDER COUNT SEED` prints a line of JSON.

Forks a trainer that saves and prunes without pause, kills it at a random moment, and goes on as the
next run would. Forked, since it takes seconds to import torch.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.trained import Trained


def trainer(trained: Trained, first: int, told: int) -> None:
    """Tells of a step when its checkpoint is said to be safe."""
    trained.checkpoints.rehearse()
    for step in range(first + 1, first + 1000):
        trained.save(step, loss=float(-step % 7))
        os.write(told, step.to_bytes(8, "little"))


def main(folder: Path, count: int, seed: int) -> dict[str, int]:
    torch.set_num_threads(1)
    rng, trained = random.Random(seed), Trained(folder, keep_last=2, keep_best=1)
    began = time.perf_counter()
    for i in range(1, 11):
        trained.save(i)
    period = (time.perf_counter() - began) / 10
    last = told = 10
    seen = {"kills": 0, "lost": 0, "unloadable": 0, "damaged": 0, "most_left": 0, "in_the_midst": 0}
    for _ in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                trainer(trained, last, write)
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(rng.uniform(0, 4 * period))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as pipe:
            steps = pipe.read()
        if steps:
            told = int.from_bytes(steps[-8:], "little")
        left = [path for path in trained.folder.iterdir() if path.name.endswith(".tmp")]
        trained.moved(folder)
        try:
            last = trained.resume()
        except (AssertionError, ValueError):
            seen["unloadable"] += 1
        seen["kills"] += 1
        seen["lost"] += last < told
        seen["damaged"] += len(trained.checkpoints.refused)
        seen["most_left"] = max(seen["most_left"], len(left))
        seen["in_the_midst"] += bool(left)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
