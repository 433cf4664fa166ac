PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test clean

run: .venv/requirements.stamp ## fill the holes of the embedded example
	$(BIN)/python inpainting.py

test: .venv/requirements-dev.stamp ## style and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --cov --cov-report=term

.venv/%.stamp: %.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement $<
	touch $@

clean: ## everything that `make` made
	rm -rf .venv results
