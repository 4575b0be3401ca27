# Works in the active environment, else in .venv, created with $(PYTHON). Installs what is missing
# there (tools/ensure.py) and never replaces an installed torch.

PYTHON ?= python3
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
PY := "$(ENV)/bin/python"
CHECK := -c 'import sys; sys.version_info < (3, 10) and sys.exit("mixlora needs Python >= 3.10, \
  this is %d.%d (make PYTHON=... names another)" % sys.version_info[:2])'
SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help env kernels kernels-check demo test sanitize faults lint format bench clean

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

demo: kernels ## MixLoRA and LoRA on four small tasks, from a tiny pretrained model
	@$(PY) tools/ensure.py plot
	$(PY) train.py --config configs/quickstart.yaml

test: kernels ## run the tests; PYTEST_ADDOPTS adds options
	@$(PY) tools/ensure.py test
	$(PY) -m pytest

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
