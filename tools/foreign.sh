#!/usr/bin/env bash
# tools/foreign.sh DIR makes an environment for the programs that ours is compared with: MoE-PEFT,
# which needs an older transformers, and pip's mixlora, which has our import name.
#   python -m benchmarks.bench_train_step --moe-peft DIR/bin/python
#   FOREIGN_PYTHON=DIR/bin/python pytest -m slow tests/test_foreign.py
set -euo pipefail

"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install -q torch==2.13.0 transformers==4.46.3 "huggingface_hub<1" "datasets<4" \
  "evaluate<0.4.6" fire scikit-learn sentencepiece accelerate numpy
"$1/bin/pip" install -q --no-deps moe_peft==2.0.2 mixlora==0.2.3
"$1/bin/python" -c "import mixlora, moe_peft"
