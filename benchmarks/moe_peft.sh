#!/usr/bin/env bash
# Makes an environment in which MoE-PEFT trains, beside nothing of ours: benchmarks/moe_peft.sh DIR,
# then python -m benchmarks.bench_train_step --moe-peft DIR/bin/python
set -euo pipefail

"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install -q torch==2.13.0 transformers==4.46.3 "huggingface_hub<1" "datasets<4" \
  "evaluate<0.4.6" fire scikit-learn sentencepiece accelerate numpy
"$1/bin/pip" install -q --no-deps moe_peft==2.0.2
"$1/bin/python" -c "import moe_peft"
