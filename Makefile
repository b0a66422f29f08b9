.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test check test-all test-compiled pytest sim cancel fuzz bench lock clean

VENV ?= .venv
VERSIONS := 3.11 3.12 3.13

# A python3.X on the PATH can be a shim that does not run, so each candidate is really run. ensurepip is asked for because
# some systems ship Python without it, and then no virtual environment can be made.
PROBE := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	if "$$python" -c '$(PROBE)' >/dev/null 2>&1; then echo "$$python"; break; fi; done)

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F '|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON (the interpreter for $(VENV)), ARGS (for test, test-all, bench and lock), SEEDS, SEED (for sim), SECONDS (for fuzz)"

run: $(VENV)/.installed ## Run the main job: a replicated database, a model server, and what goes between them.
	$(VENV)/bin/python examples/main_job.py

test: check pytest ## Check everything and run all tests.

check: $(VENV)/.installed ## Check format, lint, types and tidiness (seconds).
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m pytest -q tests/test_tidy.py

pytest: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 4 $(ARGS)

# pyenv hides the versions that are not selected, so its folder is looked at as well.
test-all: ## Run the tests on each Python that this machine has, of 3.11, 3.12 and 3.13.
	@summary=; found=; status=0; \
	for version in $(VERSIONS); do \
		python=; \
		for candidate in "python$$version" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python$$version; do \
			if "$$candidate" -c '$(PROBE)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then result="not found on this machine, so not tested"; \
		elif $(MAKE) --no-print-directory VENV=.venv-$$version PYTHON="$$python" pytest; then result=passed; found=yes; \
		else result=FAILED; found=yes; status=1; fi; \
		summary="$${summary}Python $$version: $$result\n"; \
	done; \
	printf "$$summary"; \
	test -n "$$found" || { echo "error: none of Python $(VERSIONS) was found" >&2; exit 1; }; \
	exit $$status

SEEDS ?= 10000
SEED ?= 0
sim: $(VENV)/.installed ## Run SEEDS simulated networks, the first of them SEED.
	$(VENV)/bin/python -m tests.sim --seeds $(SEEDS) --seed $(SEED)

REQUESTS ?= 100000
cancel: $(VENV)/.installed ## Cancel REQUESTS asyncio requests at random, and account for each.
	$(VENV)/bin/python -X dev -m tests.asyncio_cancel --requests $(REQUESTS) --seed $(SEED)

SECONDS ?= 60
fuzz: $(VENV)/.fuzz-installed ## Fuzz the parser and the core, guided by coverage, SECONDS each.
	$(VENV)/bin/python -m tests.fuzz wire --seconds $(SECONDS)
	$(VENV)/bin/python -m tests.fuzz exchange --seconds $(SECONDS)

# The library with a compiled core, in a folder of its own. Without a compiler there is none, and PYTHONPATH leads nowhere.
COMPILED := build/compiled
bench: $(VENV)/.bench-installed $(if $(COMPILED),$(COMPILED)/.built) ## Measure beside pyzmq and other libraries; ARGS="--rounds N --only TEXT".
	PYTHONPATH=$(COMPILED) $(VENV)/bin/python -m benchmarks $(ARGS)

test-compiled: $(VENV)/.installed $(COMPILED)/.built ## Run the tests on the compiled core.
	@ls $(COMPILED)/messenger/wire.*.so
	PYTHONPATH=$(CURDIR)/$(COMPILED) $(VENV)/bin/python -m pytest -n 4 $(ARGS)

$(COMPILED)/.built: hatch_build.py pyproject.toml $(VENV)/.installed $(shell find src -name '*.py')
	rm -rf $(COMPILED)
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --target $(COMPILED) . || echo "note: the core was not compiled, so it is interpreted" >&2
	@mkdir -p $(@D) && touch $@

COMPILE = .venv-lock/bin/uv pip compile pyproject.toml --python .venv-lock/bin/python --universal --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --quiet

lock: .venv-lock/.installed ## Write the lock files anew; ARGS=--upgrade takes newer releases.
	$(COMPILE) --extra cli --extra replication --extra models --group dev --output-file requirements.lock $(ARGS)
	$(COMPILE) --extra bench --constraint requirements.lock --output-file requirements-bench.lock $(ARGS)
	$(COMPILE) --group fuzz --constraint requirements.lock --output-file requirements-fuzz.lock $(ARGS)
	@! grep -n '://' requirements.lock requirements-bench.lock requirements-fuzz.lock || { echo "error: a lock names a host" >&2; exit 1; }

clean: ## Remove the virtual environments and all caches.
	rm -rf .venv .venv-* build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that was broken off starts anew, and a complete one is not repeated.
define make_venv
	@"$(PYTHON)" -c '$(PROBE)' || { \
		echo "error: no Python 3.11 or newer with venv was found (PYTHON='$(PYTHON)'); install one or set PYTHON" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(@D)
endef

$(VENV)/.installed: requirements.lock pyproject.toml
	$(make_venv)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Without the peers the benchmarks run as well, so a machine that has no wheel for one of them is told and goes on.
$(VENV)/.bench-installed: requirements-bench.lock $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement requirements-bench.lock || echo "note: not all peers could be installed; they are left out" >&2
	@touch $@

$(VENV)/.fuzz-installed: requirements-fuzz.lock $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		--requirement requirements-fuzz.lock
	@touch $@

.venv-lock/.installed:
	$(make_venv)
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
	@touch $@
