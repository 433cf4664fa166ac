PYTHON ?= python3
BIN := .venv/bin

.PHONY: run demo test test-demo test-faults test-oldest clean

run: .venv/requirements.stamp ## fill a photograph and the holes of the embedded cat
	$(BIN)/python inpainting.py --image docs/photographs/rocket.jpg --mask docs/photographs/rocket_mask.png --out results/rocket.png
	$(BIN)/python inpainting.py

demo: .venv/requirements-demo.stamp ## a page to play with, at http://127.0.0.1:7860
	$(BIN)/python demo.py

test: .venv/requirements-dev.stamp ## style and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --cov --cov-report=term

test-faults: .venv/requirements-dev.stamp ## kills, floods and mutated files: some 25 minutes
	$(BIN)/python -m pytest -m faults

test-oldest: ## the tests with the oldest versions that the requirements admit (Python 3.11 or 3.12)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct --requirement requirements-dev.txt
	.venv-oldest/bin/python -m pytest

test-demo: .venv/requirements-dev.stamp ## the page in a real browser: needs Debian's chromium
	$(BIN)/python -m pytest tests/test_demo.py

.venv/requirements-dev.stamp: requirements-demo.txt

.venv/%.stamp: %.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement $<
	touch $@

clean: ## what can be made again: the environment and caches, never results/ or checkpoints/
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis .coverage
