# make demo: from a fresh clone to a controlled picture.   make test: every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME_VENV := build/runtime-venv
RUNTIME_BIN := $(RUNTIME_VENV)/bin
LOWEST_VENV := build/lowest-venv
LOWEST_BIN := $(LOWEST_VENV)/bin
# a worker for each core, of up to four: each holds models and takes up to 3 GiB; files in the order of tests/conftest.py
WORKERS := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt
export CONTROLRT_CACHE ?= $(CURDIR)/.cache

.PHONY: demo test check parity ray lowest train evaluate clean
.DELETE_ON_ERROR:

# torch first and by itself, so that TORCH_INDEX can name where its CPU build lies
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "controlrt needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	touch $@

# what a serving machine has: the package without extras
$(RUNTIME_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUNTIME_BIN)/python || $(PYTHON) -m venv $(RUNTIME_VENV)
	$(RUNTIME_BIN)/python -m pip install $(PIP_FLAGS) .
	touch $@

$(RUNTIME_VENV)/.installed-tests: $(RUNTIME_VENV)/.installed
	du -sk $(RUNTIME_VENV)/lib | cut -f1 > $(RUNTIME_VENV)/installed-kib
	$(RUNTIME_BIN)/python -m pip uninstall --quiet --yes controlrt
	$(RUNTIME_BIN)/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	$(RUNTIME_BIN)/python -m pip install $(PIP_FLAGS) pytest pytest-timeout pytest-xdist hypothesis
	touch $@

demo: $(VENV)/.installed
	$(BIN)/build-engines --profile 512x512 --output bundles/demo-512x512
	$(BIN)/python demo/run.py --bundle bundles/demo-512x512 --output out/demo

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the first run builds the bundles; the runtime's tests run without extras, and with them what needs them
test: check $(RUNTIME_VENV)/.installed-tests
	$(BIN)/python -m pytest $(WORKERS) --ignore tests/runtime
	$(RUNTIME_BIN)/python -m pytest $(WORKERS) tests/runtime --passed-to $(RUNTIME_VENV)/passed
	$(BIN)/python -m pytest $(WORKERS) tests/runtime --not-again $(RUNTIME_VENV)/passed

# the comparisons with eager diffusers that take too long for every run
parity: $(VENV)/.installed
	$(BIN)/python -m pytest tests/parity -m slow

# replicas on a Ray of this machine; Ray is too large for every run
ray: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[ray]'
	$(BIN)/python -m pytest tests/runtime/server/test_ray.py tests/runtime/server/test_ray_options.py

# the oldest versions that pyproject.toml allows of what the runtime, the export and OpenVINO need, with today's PyTorch
lowest:
	rm -rf $(LOWEST_VENV)
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_BIN)/python -m pip install $(PIP_FLAGS) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(LOWEST_BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST_BIN)/uv pip install --quiet --python $(LOWEST_BIN)/python --resolution lowest-direct --editable '.[annotate,export,openvino,serve]'
	$(LOWEST_BIN)/uv pip install --quiet --python $(LOWEST_BIN)/python pytest pytest-timeout pytest-xdist hypothesis httpx peft scipy torchsde
	CONTROLRT_CACHE=$(CURDIR)/build/lowest-cache $(LOWEST_BIN)/python -m pytest $(WORKERS) tests/compiler tests/engines tests/export tests/parity tests/runtime

train: $(VENV)/.installed
	$(BIN)/python demo/train.py

evaluate: $(VENV)/.installed
	$(BIN)/build-engines --profile 512x512 --output bundles/demo-512x512
	$(BIN)/python demo/evaluate.py bundles/demo-512x512

clean:
	rm -rf build out bundles .cache
