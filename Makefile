# `make test` and `make demo` need Python 3.11 to 3.13, git and a C++ compiler, and set up the rest
# in .venv. To use an environment that already has everything, name its interpreter:
#
#     make test-gpu PYTHON=/path/to/python

# Dozens of tests start a process: each would compile PyTorch's Python sources again.
export PYTHONDONTWRITEBYTECODE :=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# More options for pytest or the demo: make test PYTEST_ARGS="-k router", make demo DEMO_ARGS=...
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=

# Pure functions: of sizes, of expressions, of reports and options.
QUICK := tests/test_architecture.py tests/lowering/test_splitting.py tests/lowering/test_selection.py \
  tests/lowering/test_replay.py tests/lowering/test_tuning.py tests/patterns/test_axes.py \
  tests/patterns/test_meaning.py \
  tests/patterns/test_numbers.py tests/patterns/test_contractions.py tests/patterns/test_rolling.py \
  tests/patterns/test_buffers.py tests/mhf_compiler/test_options.py \
  tests/mhf_compiler/substitution/test_cost.py tests/mhf_compiler/report/test_report.py tests/test_figures.py

# Random programs: how many, and the first one's seed. FUZZ_ARGS="--write FOLDER" keeps failures.
N ?= 500
SEED ?= 0
FUZZ_ARGS ?=

$(VENV)/.ready: pyproject.toml constraints.txt
	@suits='import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	for base in $(VENV)/bin/python python3 python3.13 python3.12 python3.11 none; do \
	  if $$base -c "$$suits" 2>/dev/null; then break; fi; \
	done; \
	if [ $$base = none ]; then \
	  echo 'Python 3.11 to 3.13 with its venv module is needed, and none is on the PATH' >&2; exit 1; \
	fi; \
	if [ $$base != $(VENV)/bin/python ]; then $$base -m venv --clear $(VENV); fi
	$(VENV)/bin/python -m pip install --no-compile --constraint constraints.txt --editable '.[demo,test,docs,dev,hf]'
	@touch $@

.PHONY: setup
setup: $(READY)  ## create .venv with everything below (the other targets do so themselves)

.PHONY: install
install:  ## put the package itself into PYTHON's environment, offline and without dependencies
	$(PYTHON) -m pip install --no-deps --no-build-isolation --editable .

.PHONY: demo
demo: $(READY)  ## train the byte-level model under three backends and compare them
	$(PYTHON) examples/byte_lm.py $(DEMO_ARGS)

.PHONY: test
test: lint pytest  ## lint, types and every test that needs no GPU

# worksteal gives each worker one stretch of the tests: what the tests of a module share is made once.
# A test that hangs fails with its stack; the slowest takes some 30 s.
.PHONY: pytest
pytest: $(READY)  ## the tests alone
	$(PYTHON) -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal --timeout 300 --durations=25 \
	  $(PYTEST_ARGS)

.PHONY: quick
quick: $(READY)  ## lint, and the tests that compile nothing: under two minutes
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -m "not gpu" -n $(WORKERS) -q $(QUICK) $(PYTEST_ARGS)

# Releases to test; none: all. MATRIX_ARGS="2.11 --keep"
MATRIX_ARGS ?=
.PHONY: test-matrix
test-matrix: $(READY)  ## quick tests and compiled kernels with every supported pair of torch and Triton
	$(PYTHON) -m tests.matrix $(MATRIX_ARGS)

.PHONY: fuzz
fuzz: $(READY)  ## N random programs from SEED on, and mutants of each: none missed, none wrong
	$(PYTHON) -m tests.fuzz --number $(N) --seed $(SEED) --workers $(WORKERS) $(FUZZ_ARGS)

.PHONY: fuzz-gpu
fuzz-gpu: $(READY)  ## the same number through Inductor and our kernels, on a GPU: none wrong
	$(PYTHON) -m tests.fuzz.gpu --number $(N) --seed $(SEED) $(FUZZ_ARGS)

# Changes to the checks and the gradients, one at a time: which, and how many of them.
MUTANTS_ARGS ?=
.PHONY: mutants
mutants: build/mutants/reach.json  ## break every check and gradient in turn: a test must notice
	$(PYTHON) -m tests.mutants --jobs $(WORKERS) $(MUTANTS_ARGS)

build/mutants/reach.json:
	$(MAKE) mutants-record

.PHONY: mutants-record
mutants-record: $(READY)  ## record which tests run which statements, for `make mutants`
	$(PYTHON) -m tests.mutants --record --limit 0 --jobs $(WORKERS)
	TRITON_INTERPRET=1 $(PYTHON) -m tests.mutants --record --limit 0 --jobs $(WORKERS)

.PHONY: test-gpu
test-gpu: $(READY)  ## the tests that need a CUDA device; fails where there is none
	$(PYTHON) -m pytest -m gpu --require-gpu $(PYTEST_ARGS)

# PyTorch's pool of memory is left out, so that what lies past a tensor is nobody's.
SANITIZE := compute-sanitizer --error-exitcode 1
.PHONY: sanitize
sanitize: $(READY)  ## every kernel under compute-sanitizer: memory, races, values never written
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck $(PYTHON) tests/lowering/sanitize.py
	$(SANITIZE) --tool racecheck $(PYTHON) tests/lowering/sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool initcheck $(PYTHON) tests/lowering/sanitize.py

.PHONY: lint
lint: ruff typecheck  ## ruff and mypy

.PHONY: ruff
ruff: $(READY)  ## ruff alone: its rules, and its formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# mypy knows no package-dir mapping, so it is shown the package as an installation lays it out, made
# of links; its messages are mapped back to the files they are about.
.PHONY: typecheck
typecheck: $(READY)  ## mypy alone
	@rm -rf build/typecheck && mkdir -p build/typecheck/mhf_compiler
	@ln -s "$(CURDIR)"/mhf_compiler/* "$(CURDIR)"/{patterns,lowering} build/typecheck/mhf_compiler/
	$(PYTHON) -m mypy build/typecheck/mhf_compiler examples/{,cpp/}*.py \
	  | sed -E 's#^build/typecheck/mhf_compiler/(patterns|lowering)/#\1/#; s#^build/typecheck/##'

.PHONY: docs
docs: $(READY)  ## the documentation as a site, in site/
	$(PYTHON) -m mkdocs build --strict --site-dir site

.PHONY: clean
clean:  ## remove what the targets above made, .venv included
	rm -rf $(VENV) build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1 | \2/p' $(MAKEFILE_LIST) | column -t -s '|' \
	  || true
