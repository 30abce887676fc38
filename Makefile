# Every target makes its own environment: `make demo` and `make test` are all the set-up there is.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := outputs/demo

.PHONY: demo test check fmt

demo: $(STAMP)  ## both recipes on scikit-learn's digits, with one and the same dense baseline
	rm -rf $(DEMO)
	$(BIN)/lightning-edge recipe=deep_compression hydra.run.dir=$(DEMO)/deep_compression
	$(BIN)/lightning-edge recipe=qat_int8 baseline=$(DEMO)/deep_compression/baseline.ckpt hydra.run.dir=$(DEMO)/int8

test: $(STAMP)  ## every test, with branch coverage
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term

check: $(STAMP)  ## what must hold before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(STAMP)  ## lay the code out, mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,executorch]"
	touch $@
