# One command from the clone to a result: `make sweep`. Everything lives in .venv; nothing else has to be installed.

PYTHON ?= python3
EXPERIMENT ?= experiments/movie-sentiment.yaml
ARGS ?=
# Processes that run the tests, which wait for servers and clocks much of the time.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); [ $$cores -lt 4 ] && expr $$cores + 1 || echo 4)

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

# Bytecode is what makes the second start fast, so a machine-wide "do not write it" ends here.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv sweep ui test test-real test-faults test-gpu bench bench-lanes bench-records check format-check lint types directions format lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

.venv: $(READY)

sweep: $(READY) ## Search, train, evaluate and register (EXPERIMENT=file.yaml, ARGS="--set seed=1")
	@$(BIN)/softprompt sweep $(EXPERIMENT) $(ARGS)

ui: $(READY) ## Serve MLflow, Prefect and the Optuna dashboard over the local state
	@$(BIN)/softprompt ui $(ARGS)

test: $(READY) ## Run the tests, on all cores (ARGS="-k name")
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

test-real: $(READY) ## Run the default flow on the real model, with a tiny budget
	@$(BIN)/python -m pytest -m real --timeout 900 $(ARGS)

test-faults: $(READY) ## Kill, cut off and starve sweeps 200 times, and compare with undisturbed ones (FAULTS_SEED=1)
	@$(BIN)/python -m tests.faults

test-gpu: $(READY) ## Run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu --timeout 900 $(ARGS)

bench: $(READY) ## Measure the engine beside PEFT with the Trainer (QUICK=1 for a short pass)
	@$(BIN)/python -m benchmarks.engine $(if $(QUICK),--quick)

bench-records: $(READY) ## Measure the study and the runs of long searches beside Optuna and MLflow alone
	@$(BIN)/python -m benchmarks.records $(ARGS)

bench-lanes: $(READY) ## Measure a sweep with 1, 2 and 4 lanes on PostgreSQL
	@$(BIN)/python -m benchmarks.lanes

check: format-check lint types directions ## Check format, lint, types and import directions

format-check: $(READY)
	@$(BIN)/ruff format --check .

lint: $(READY)
	@$(BIN)/ruff check .

types: $(READY)
	@$(BIN)/mypy

directions: $(READY)
	@$(BIN)/lint-imports --no-logo

format: $(READY) ## Format the code and mend what lint can mend
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

# A finished .venv is brought up to date; an unfinished one (no stamp) is built anew, because pip may have
# been stopped in the middle of a package. pip compiles with one process and old ones resolve slowly: hence
# the newer pip, and the compilation afterwards on all cores of what is imported soon.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "softprompt needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing); name another one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned dependencies into .venv (about a minute, once)"
	@test -f $@ || rm -rf .venv
	@rm -f $@
	@$(PYTHON) -m venv .venv
	@$(PIP) install 'pip>=25'
	@$(PIP) install --no-compile -r requirements.lock
	@$(PIP) install --no-compile --no-deps -e .
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' .venv/lib || true
	@touch $@

# Exact versions of everything, from the ranges of pyproject.toml. Local versions (+cpu) and CUDA packages are
# left out, so that pip takes the build of torch that the machine offers, with the CUDA packages that build names.
TORCH := 2.13.0
lock: ## Resolve the ranges of pyproject.toml anew into requirements.lock
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install -qq 'pip>=25'
	@.venv-lock/bin/python -m pip install -qq --dry-run --ignore-installed --report .venv-lock/report.json '.[dev,postgres,auth]' torch==$(TORCH)
	@.venv-lock/bin/python -c "$$WRITE_LOCK" < .venv-lock/report.json > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@rm -rf .venv-lock

define WRITE_LOCK
import json, re, sys
print("# Exact versions of everything softprompt and its tests run on (extras dev, postgres and auth included).")
print("# Written by `make lock` from the ranges in pyproject.toml; do not edit by hand.")
print("# For Python 3.11 and newer on Linux. No CUDA packages: torch names its own where its build needs them.")
found = {p["metadata"]["name"].lower(): p["metadata"]["version"] for p in json.load(sys.stdin)["install"]}
for name, version in sorted(found.items()):
    if not re.match(r"(softprompt|triton)$$|nvidia-|cuda-", name):
        print(name + "==" + version.split("+")[0])
endef
export WRITE_LOCK

clean: ## Remove .venv and caches (not .softprompt, which holds your results)
	rm -rf .venv .venv-lock .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
