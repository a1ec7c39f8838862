# Two commands: `make demo` and `make test`. Both set up .venv first, if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Two processes with one thread each: two threads of torch on two cores are slower.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Two halves that take about as long.
FIRST = $(filter-out tests/test_background_images.py tests/test_blur.py, \
        $(wildcard tests/test_[a-d]*.py)) tests/test_engine_of_evaluation.py
SECOND = $(filter-out $(FIRST), $(wildcard tests/test_*.py)) src

.PHONY: demo test test-all lint docs release-check interoperability clean

demo: $(READY)
	$(BIN)/demur demo

test: $(READY)
	@$(TEST) $(FIRST) > .first.log 2>&1 & first=$$!; \
	$(TEST) $(SECOND); second=$$?; \
	wait $$first; first=$$?; cat .first.log; exit $$((first + second))

test-all: $(READY)
	$(TEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(READY)
	$(BIN)/python results/check.py

interoperability: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[peers]'
	DEMUR_PEERS=1 $(BIN)/python -m pytest tests/test_interoperability.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "demur needs Python 3.11 or later; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
