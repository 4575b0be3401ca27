# Works in the active environment, or that of $(PYTHON), else in .venv, created with it. Installs
# what is missing there (tools/ensure.py) and never replaces an installed torch.

PYTHON ?= python3
OWN := import sys; sys.prefix != sys.base_prefix and print(sys.prefix)
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(shell $(PYTHON) -c "$(OWN)" 2>/dev/null),.venv)
PY := "$(ENV)/bin/python"
CHECK := -c 'import sys; sys.version_info < (3, 10) and sys.exit("mixlora needs Python >= 3.10, \
  this is %d.%d (make PYTHON=... names another)" % sys.version_info[:2])'
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help env kernels kernels-check gpu-check gpu-bench demo test sanitize faults lint format \
  bench clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+: .*## / {printf "%-14s%s\n", $$1, $$2}' Makefile

env:
	@test -x $(PY) || { $(PYTHON) $(CHECK) && $(PYTHON) -m venv .venv; }
	@$(PY) $(CHECK)

kernels: env ## build mixlora._C, the C++ kernels
	@$(PY) tools/ensure.py build run
	@$(PY) -u setup.py -q build_ext --inplace

kernels-check: env ## compile the CUDA kernels for every architecture, without a GPU
	@$(PY) tools/kernels_check.py

gpu-check: env ## on a machine with a GPU: build, run its tests, and compute-sanitizer
	@$(PY) tools/ensure.py build run gpu
	@$(PY) -u tools/gpu_check.py

gpu-bench: kernels ## on a machine with a GPU: time all that runs on it, into benchmarks/results
	@$(PY) -u -m benchmarks.gpu

demo: kernels ## MixLoRA and LoRA on four small tasks, from a tiny pretrained model
	@$(PY) tools/ensure.py plot
	$(PY) train.py --config configs/quickstart.yaml

test: kernels ## run the tests; PYTEST_ADDOPTS adds options
	@$(PY) tools/ensure.py test
	@$(PY) -m tests.cuda_on_cpu
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n logical --dist loadfile

sanitize: env ## run the kernels under the sanitizers of memory, undefined behaviour and threads
	@$(PY) tools/ensure.py build run test
	$(PY) -u tools/sanitize.py

faults: env ## plant faults in the kernels, one at a time, and see that the tests notice
	@$(PY) tools/ensure.py build run test
	$(PY) -u tools/plant_faults.py

lint: env ## check style, change nothing
	@$(PY) tools/ensure.py lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	"$(ENV)/bin/clang-format" --dry-run --Werror $(SOURCES)

format: env ## rewrite the files in our style
	@$(PY) tools/ensure.py lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	"$(ENV)/bin/clang-format" -i $(SOURCES)

bench: kernels ## time every kernel against its reference
	@for file in benchmarks/bench_*.py; do \
	  $(PY) -m benchmarks.$$(basename $$file .py) || exit 1; done

clean: ## remove what was built
	rm -rf build mixlora/_C*.so
