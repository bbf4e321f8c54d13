# `make serve` and `make test` do all set-up themselves; everything lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: serve test lint format clean

serve: $(VENV)/.engine
	@exec $(BIN)/motley serve $(ARGS)

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Motley needs Python 3.11 or newer; say which: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 lacks its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@touch $@

# What the installation compiles or reads.
SOURCES := pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

$(VENV)/.engine: $(VENV)/.venv $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[engine,exact]'
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	$(BIN)/python -m pip install --quiet --editable '.[engine,exact,plan,test,lint]'
	@touch $@
