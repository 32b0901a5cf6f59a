# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
SOURCES := src tests docs benchmarks examples
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: demo install test test-slow test-all test-gpu test-lowest bench bench-gpu quality style docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,export,openvino,detect,segment,cluster,optuna,dev]"
	touch $@

demo: install
	$(BIN)/sparsevit run --config configs/digits.yaml

test: install
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: install
	$(BIN)/python -m pytest -m slow

test-all: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

# All tests, or TESTS, at the lowest versions that pyproject.toml allows; PYTHON=python3.11 takes the lowest Python too.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(PARALLEL) $(TESTS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[demo,export,openvino,detect,segment,cluster,optuna,dev]"
	touch $@

test-gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/test_triton.py tests/test_kernels.py

# Ours against the best dense model, on this machine; the tables of README and docs/benchmarks.md are made of what is kept.
BENCH_MODEL ?= swin_tiny_patch4_window7_224
BENCH_CELLS ?= 672:1 672:4 256x704:6
BENCH_PRECISIONS ?= fp32 bf16 int8
BENCH_GPU_PRECISIONS ?= fp32 bf16
BENCH_RUNTIMES ?= torch,onnxruntime,openvino
BENCH_CONTESTANTS ?= B0,B1,B2,B2f,B3,ours,O
BENCH_ROUNDS ?= 15
BENCH_RUNS ?= 3
BENCH_KERNELS ?= auto
BENCH_AUTOTUNE ?= false
bench: install
	for run in $$(seq $(BENCH_RUNS)); do for precision in $(BENCH_PRECISIONS); do for cell in $(BENCH_CELLS); do \
	  { $(BIN)/sparsevit profile --rivals --model $(BENCH_MODEL) --img-size $${cell%%:*} --output benchmarks/runs --fresh \
	    --set "profile.batch_sizes=[$${cell##*:}]" --set profile.precision=$$precision --set profile.rounds=$(BENCH_ROUNDS) \
	    --set profile.seconds=1 --set kernels=$(BENCH_KERNELS) --set profile.max_autotune=$(BENCH_AUTOTUNE) \
	    --runtime $(BENCH_RUNTIMES) --set "profile.contestants=[$(BENCH_CONTESTANTS)]" \
	    --set clock.wait=600 --set clock.retries=0 \
	    || test $$? = 8; } && $(BIN)/python benchmarks/collect.py benchmarks/runs/$(BENCH_MODEL)/rivals || exit; \
	done; done; done

# On a machine with a GPU: every kernel is tested there, then both engines are measured, Triton's with tuned launches;
# measured too where a test fails, which is told.
bench-gpu:
	-$(MAKE) test-gpu
	$(MAKE) bench BENCH_RUNTIMES=torch "BENCH_PRECISIONS=$(BENCH_GPU_PRECISIONS)" BENCH_KERNELS=portable BENCH_AUTOTUNE=true
	SPARSEVIT_TUNE=1 $(MAKE) bench BENCH_RUNTIMES=torch "BENCH_PRECISIONS=$(BENCH_GPU_PRECISIONS)" BENCH_KERNELS=triton BENCH_AUTOTUNE=true

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m sparsevit_cli.config.reference --check

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: install
	$(BIN)/python -m sparsevit_cli.config.reference
	$(BIN)/python docs/make_results.py
	$(BIN)/python benchmarks/collect.py
	$(BIN)/python benchmarks/search.py --table
	$(BIN)/python docs/make_pictures.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
