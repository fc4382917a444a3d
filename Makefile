PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile
# What a wheel may lack is modules and the files beside them: these import all and read those.
PACKED := namespace device_install cli report artifact runtime onnx export lint kernels quantize \
	tensorrt_builder device_examples
export PYTHONSAFEPATH := 1

.PHONY: demo test test-wheel setup clean

demo: setup  ## compile the trained network, compare pictures, write out/demo/report.html
	PYTHONSAFEPATH= $(BIN)/python examples/demo.py

test: setup  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typing_tree.py
	$(BIN)/python .ci/tensorrt_stubs.py
	$(BIN)/mypy
	$(TESTS)

test-wheel: setup  ## the tests that the built wheel could fail
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(BIN)/python -c 'import effuse; print("testing", effuse.__file__)'
	$(TESTS) $(PACKED:%=tests/test_%.py); status=$$?; \
	$(BIN)/python -m pip install --quiet --no-deps --editable .; exit $$status

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[compiler,diffusers,triton,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
