# Every target sets up the virtual environment it needs. Another Python or folder: make test PYTHON=python3.12 VENV=../venv

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A stamp is written when an installation is whole, and is out of date when what it was made from has changed.
CREATED := $(VENV)/.stamp-created
TRAIN := $(VENV)/.stamp-train
DEV := $(VENV)/.stamp-dev

.PHONY: help quickstart quickstart-image test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart        fine-tune a real language model with DoRA and LoRA, and compare them (options: ARGS='...')"
	@echo "make quickstart-image  teach a vision transformer to read digits with DoRA, LoRA and a linear probe (ARGS='...')"
	@echo "make test              all tests, in $(WORKERS) processes (options: ARGS='-k norm')"
	@echo "make lint              ruff, ruff format and mypy"
	@echo "make clean             remove environment, builds and caches of this folder; downloads and runs stay"

quickstart: $(TRAIN)
	$(BIN)/python examples/quickstart.py $(ARGS)

quickstart-image: $(TRAIN)
	$(BIN)/python examples/quickstart_image.py $(ARGS)

# One thread for each process: two processes that both use every core are slower than one.
test: $(DEV)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests examples bench studies -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(CREATED):
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit("doratune needs Python 3.10 or newer, $(PYTHON) is " + v + ": make PYTHON=python3.12" \
		if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# gguf and onnx read the models that the quickstarts fetch.
$(TRAIN): $(CREATED) pyproject.toml constraints.txt
	@echo "Installing torch, transformers and what else training needs into $(VENV) ..."
	$(INSTALL) -e '.[train]' gguf onnx psutil
	touch $@

$(DEV): $(CREATED) pyproject.toml constraints.txt
	@echo "Installing doratune with all extras into $(VENV) ..."
	$(INSTALL) -e '.[dev]'
	touch $(TRAIN) $@
