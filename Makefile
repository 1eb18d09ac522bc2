# make demo   explain real photos with the embedded network and say where the pictures are
# make test   run the whole test suite
# make build  the environment (.venv) and the compiled library, nothing else
# make lint   formatting, lint and types
# make bench  regenerate benchmarks/results and the tables made from them
# make studies  the studies of how far explanations can be trusted, at quick size; FULL=1 for the results in benchmarks/results
# make gpu    on a machine with a GPU: build, test, check and measure, within nine minutes
# make wheel  a manylinux wheel in dist/, tried in a clean environment
# make clean  remove what these made, the fetched photos in .cache excepted

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
PYTEST_FLAGS ?=
GPU_FLAGS ?=
FULL ?=
STUDIES ?=

SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.inc csrc/include/diffcam/*.h)
NATIVE := setup.py pyproject.toml $(SOURCES)
CPP := $(SOURCES) $(wildcard tests/cuda_host/*.h tests/cuda_host/*.cpp tests/cuda/*.cu)

.PHONY: build demo test sanitize lint bench studies gpu wheel clean

build: $(VENV)/.built

# Two steps: PyTorch comes with the first, so that the build in the second finds it.
$(VENV)/.installed: tests/requirements.txt tests/requirements-peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/requirements-peers.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: build
	$(BIN)/python -m diffcam_fast.models.samples $(CACHE)/samples
	$(BIN)/diffcam explain $(CACHE)/samples/chelsea.png $(CACHE)/samples/both.png --output demo

# In two processes. Threads that have nothing to do sleep: spinning they would take the other process's time.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST_FLAGS)

sanitize: build
	tests/sanitize.sh $(BIN)/python

lint: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: build
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.tables

studies: build
	$(BIN)/python -m benchmarks.studies $(STUDIES) $(if $(FULL),,--quick)

# With the Python that has PyTorch for the GPU, as it is: nothing is installed.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

wheel: build
	rm -rf build/wheel
	DIFFCAM_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl
	tests/try_wheel.sh $(BIN)/python dist

clean:
	rm -rf $(VENV) build dist demo studies *.egg-info diffcam_fast/_build.json diffcam_fast/*.so
