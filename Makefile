PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1

.PHONY: demo test setup lint clean

demo: setup  ## compile the trained network, compare pictures, write out/demo/report.html
	PYTHONSAFEPATH= $(BIN)/python examples/demo.py

test: setup  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typing_tree.py
	$(BIN)/mypy
	$(BIN)/pytest -q

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[compiler,diffusers,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
