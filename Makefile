# make demo    set up and train a small model that tells a story     (CORPUS=my.txt: on your own text)
# make test    set up and check everything
# make lab     open the notebooks in JupyterLab
# make export  notebooks -> cs336_lm/, README.md
# make run     run all notebooks and store their outputs
# make figures redraw every figure from the recorded logs
# make writeup every answer and the errata on one page: build/write_up.html (and .pdf where Chromium is installed)
# make clean   remove what can be made again (keeps data/ and runs/)

# The first Python of these that is new enough builds the environment; say PYTHON=/path/to/python for another one.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(if $(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo yes),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip, e.g. an index that holds CPU-only builds of torch.
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

.PHONY: demo test lab export run figures writeup clean
.DEFAULT_GOAL := help
help:
	@sed -n 's/^# make /make /p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "This needs Python 3.11 or newer with venv and ensurepip; none was found. Install one, or say PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A constraint alone would let pip look at newer torch builds first, which are gigabytes: name the tested one.
$(VENV)/.package: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing cs336_lm into $(VENV) (torch is the large part) ..."
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "Installing what the notebooks and tests need ..."
	@$(PIP) --editable '.[dev,peers]'
	@touch $@

demo: $(VENV)/.package
	@$(BIN)/cs336 demo $(if $(CORPUS),--corpus "$(CORPUS)")

test: $(VENV)/.dev
	@$(BIN)/python tools/run_notebooks.py --check --workers 2
	@$(BIN)/python -m pytest

lab: $(VENV)/.dev
	@$(BIN)/jupyter lab nbs

export: $(VENV)/.dev
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/make_readme.py

run: $(VENV)/.dev
	@$(BIN)/python tools/run_notebooks.py

figures: $(VENV)/.package
	@$(BIN)/cs336 figures

writeup: $(VENV)/.dev
	@$(BIN)/python tools/make_writeup.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis _book
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
