# Everything sets itself up: `make demo`, `make test` and `make check` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format builtin peers throughput algorithms clean

demo: $(INSTALLED)  ## train PPO on the built-in model, print texts before and after
	$(BIN)/textrlhf demo --run-dir runs/demo

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## apply the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

builtin: $(INSTALLED)  ## rebuild the built-in models from the corpus
	$(BIN)/python data/build_builtin.py build

peers:  ## the environment of the benchmarks' peers
	benchmarks/peers/install.sh $(PYTHON)

throughput: $(INSTALLED)  ## how fast this is, beside its peers (keep the machine idle)
	$(BIN)/python -m benchmarks.throughput --quick --json benchmarks/results/throughput.json

algorithms: $(INSTALLED)  ## PPO beside everybody else, 85 runs (over an hour; needs `make peers`)
	$(BIN)/python -m benchmarks.algorithms --seeds 10 --total-timesteps 40000 --out benchmarks/results/algorithms

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-peers build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
