"""Tokens/s of a MixLoRA run in 1, 2 and 4 processes, with the whole base in each and sharded.

python -m benchmarks.bench_processes [--processes 1,2,4] [--config x.yaml a.b=value ...]
By default the quickstart's model with a thread for each process: a machine of fewer cores than
processes shows what they cost, not what they bring.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.harness import print_header, table

ROOT = Path(__file__).resolve().parents[1]
MIXLORA = {"routing_strategy": "mixlora", "r": 8, "num_experts": 8, "top_k": 2}
QUICKSTART = {
    "model": {"base": str(ROOT / "data/quickstart/model")},
    "data": {"dir": str(ROOT / "data/quickstart/tasks"), "tasks": ["sum", "compare"]},
    "adapter": MIXLORA,
    "train": {"steps": 12, "batch_size": 32, "micro_batch_size": 8, "max_seq_len": 128},
}
WARMUP = 3  # steps that are not counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--config", help="YAML file; without adapters, evaluation or a picture")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args()
    print_header()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.config or Path(folder) / "config.yaml")
        if options.config is None:
            path.write_text(yaml.safe_dump({**QUICKSTART, "run": {"dir": "set below"}}))
        for count in map(int, options.processes.split(",")):
            for shard in (False, True)[: 1 + (count > 1)]:
                run = Path(folder) / f"{count}-{shard}"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += [f"--nproc-per-node={count}", str(ROOT / "train.py")]
                command += ["--config", str(path), *options.overrides, f"run.dir={run}"]
                command += [f"model.shard={shard}", "run.plot=false"]
                environment = {"OMP_NUM_THREADS": "1", **os.environ}
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                lines = (run / "default" / "metrics.jsonl").read_text().splitlines()
                speeds = [json.loads(line)["tokens_per_second"] for line in lines[WARMUP:]]
                speed = statistics.median(speeds)
                rows.append({"processes": count, "sharded": shard, "tokens/s": speed})
    for row in rows:
        row["of one process"] = row["tokens/s"] / rows[0]["tokens/s"]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
