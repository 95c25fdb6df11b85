# Each target sets up what it needs. PYTHON: 3.11 or newer. PIP: more arguments for pip, for example
#   make train PIP="--extra-index-url https://download.pytorch.org/whl/cpu"     (no CUDA packages)
PYTHON ?= python3
PIP ?=
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell test $$(id -u) = 0 || echo sudo)

.PHONY: rehearsal train test faults check setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import ensurepip' 2> /dev/null || $(SUDO) apt-get install --yes python3-venv   # Debian splits it off
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

# A machine in software goes the whole way: blank disk, Arch, training, checkpoint at home.
rehearsal: setup
	$(BIN)/python -m provision.rehearsal run

# GPT-2 on Shakespeare, on this computer, in minutes.
train: setup
	$(BIN)/python -m workload train

# Values, real parts (sshd, rsync), then the rehearsal.
test: setup
	$(BIN)/python -m provision.rehearsal setup
	$(BIN)/pytest

# The power, the connection and fab cut in every Step: hours. A part: make faults FAULTS="--kinds process --sample 10"
FAULTS ?= --out tests/faults/RESULTS.md
faults: setup
	$(BIN)/python -m provision.rehearsal setup
	$(BIN)/python -m tests.faults $(FAULTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache
