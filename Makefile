# Everything a fresh machine needs: `make demo` and `make test` build .venv first when it is missing.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo quick test soak lint proof proof-quick gpu

venv: $(STAMP)

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"nanoMolmo2 needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m train.demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The unit tests that neither wait nor compute for long.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --ignore tests/integration

# Processes of one thread each, one more than the least that we support has cores: many tests wait. A process
# that crashes or hangs prints its stacks to standard error, which is shown last if a test has failed.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder 2> .venv/.stderr \
	    || { tail -n 300 .venv/.stderr >&2; exit 1; }

# Counted proofs at full count, and new random examples of every property.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "soak_counted or hypothesis" --soak -s \
	    -o faulthandler_timeout=3600

# The whole with real models: docs/BENCHMARKS.md. Downloads 260 MB once; 1.5 to 2.5 hours, and 16 to 22 minutes.
proof: .venv/.proof
	$(BIN)/python -m tests.proof

proof-quick: .venv/.proof
	$(BIN)/python -m tests.proof --quick

.venv/.proof: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[proof]'
	touch $@

# Every CUDA path against the CPU, then its speed: docs/BENCHMARKS.md. In the environment that has torch for
# the GPU, which is rarely .venv: make gpu PYTHON=/path/to/python3.
gpu:
	$(PYTHON) -m tests.gpu
