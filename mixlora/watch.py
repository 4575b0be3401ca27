"""Look at a training run from its folder alone: `python -m mixlora.watch <run.dir> [--every 5]`

--plot draws the pictures that a run draws at its end, of the steps that there are.
"""

import os
import socket
import sys
import time
from pathlib import Path

from mixlora.errors import ArgumentParser, InputError, command
from mixlora.files import read_json
from mixlora.report import plot_routing, plot_run


@command
def main(argv: list[str]) -> int:
    parser = ArgumentParser(description="Where a training run stands.")
    parser.add_argument("folder", type=Path, help="its run.dir")
    parser.add_argument("--every", type=float, help="look again after so many seconds, to its end")
    parser.add_argument("--plot", action="store_true", help="draw summary.png and routing.png")
    options = parser.parse_args(argv)
    if options.every is not None and not options.every > 0:
        raise InputError(f"--every must be > 0, got {options.every}")
    while True:
        status = read_status(options.folder)
        print(described(options.folder, status), flush=True)
        if options.every is None or status["state"] != "running":
            break
        time.sleep(options.every)
    if options.plot:
        logs = {
            name: path
            for name in status["adapters"]
            if (path := options.folder / name / "metrics.jsonl").is_file()
        }
        plot_run(options.folder / "summary.png", logs, {})
        for path in logs.values():
            plot_routing(path.with_name("routing.png"), path)
    return 0


def read_status(folder: Path) -> dict:
    """The run's own word, with the state `dead` where its process is gone without a last one."""
    status = read_json(folder / "status.json")
    here = status.get("host") == socket.gethostname()
    if status.get("state") == "running" and here and not is_alive(status["pid"]):
        status["state"] = "dead"
    return status


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def described(folder: Path, status: dict) -> str:
    seconds = max(0.0, time.time() - status["told"])
    words = {"dead": "its process is gone, --resume goes on", "stopped": "--resume goes on"}
    note = status.get("message") or words.get(status["state"])
    lines = [
        f"{folder}: {status['state']}{f' ({note})' if note else ''}, process {status['pid']} on "
        f"{status['host']}, last word {duration(seconds)} ago"
    ]
    for name, adapter in status["adapters"].items():
        left, loss = adapter["seconds_left"], adapter["loss"]
        running = status["state"] == "running" and left is not None
        lines.append(
            f"  {name}  step {adapter['step']} of {adapter['of']}"
            + (f" ({adapter['skipped']} skipped)" if adapter.get("skipped") else "")
            + f"  loss {'not finite' if loss is None else f'{loss:.4f}'}  "
            f"{adapter['tokens_per_second']:.0f} tokens/s  "
            f"last checkpoint {adapter['last_checkpoint'] or 'none'}"
            + (f"  {duration(left)} left" if running else "")
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """90.0 -> "1 min 30 s" """
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
