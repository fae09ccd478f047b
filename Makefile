# Everything a newcomer or a machine runs; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo
WAITING := tests/faults/test_slurm.py tests/faults/test_stores.py tests/faults/test_supervise.py tests/unit/test_sinks.py
LTX := $(BIN)/ltx-train
VOICE := data/sample/speaker03_0.mp4
PROMPTS := eval.prompts=[{prompt: a person is speaking, seed: 1, reference_audio: $(VOICE)}, {prompt: a person is speaking, seed: 2, without_references: true}]
# A higher rate and more steps than the recipe: a tiny model takes a voice over only then.
LEARNS := optim.lr=3e-3 optim.steps=2000
REFERENCE := experiment=audio_reference run.root=$(DEMO) data.root=$(DEMO)/data model.path=$(DEMO)/base.safetensors $(LEARNS)

.DEFAULT_GOAL := help
.PHONY: help setup demo study test computing waiting lint format unit golden faults docs gpu aio tools wheel sample settings site clean

help: ## list the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-24s %s\n", $$1, $$2}'

setup: $(STAMP) ## a virtual environment with pinned versions

# pip compiles with one processor what compileall does with all of them. Some packages bring files that do not compile, and
# many that are seldom imported: those are compiled when they are.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests?|testing|models|pipelines|moto|sklearn|numba|pip)/' $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true
	@touch $@

demo: setup ## clips to a measured, exported LoRA and a sample, on the tiny model
	$(LTX) prepare experiment=audio_reference data.root=$(DEMO)/data
	$(LTX) check experiment=audio_reference data.root=$(DEMO)/data check.previews=2
	$(LTX) fit experiment=tiny_base run.root=$(DEMO) data.root=$(DEMO)/data
	$(LTX) export experiment=tiny_base run.root=$(DEMO) data.root=$(DEMO)/data export.out=$(DEMO)/base.safetensors
	$(LTX) fit $(REFERENCE) '$(PROMPTS)'
	$(LTX) evaluate $(REFERENCE)
	$(LTX) evaluate swap $(REFERENCE) swap.speakers=10 swap.seeds=4 swap.strengths=[]
	$(LTX) export $(REFERENCE) export.out=$(DEMO)/voice.safetensors
	$(LTX) inspect $(REFERENCE) inspect.file=$(DEMO)/voice.safetensors inspect.run=$(DEMO)/audio_reference/main
	$(LTX) sample $(REFERENCE) sample.adapter=$(DEMO)/voice.safetensors sample.strength=1.0 \
	  sample.reference_audio=$(VOICE) sample.out=$(DEMO)/voice.mp4
	@echo "look at report.html and swap.html in $(DEMO)/audio_reference/main, and at $(DEMO)/voice.mp4"

study: setup ## tests the verdicts on seven cases whose truth is known: docs/study.md
	$(BIN)/python docs/study/study.py

test: setup ## lint, types and all tests
	@$(MAKE) --no-print-directory --jobs 2 lint tools
	@$(MAKE) --no-print-directory --jobs 2 computing waiting

computing: setup # every test that needs a processor all the time
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(addprefix --ignore ,$(WAITING))

waiting: setup # the tests that wait most of their time: for SLURM's clocks, stores and servers that stall, restarts
	$(BIN)/pytest $(WAITING)

lint: setup ## style, types and the direction of imports
	$(BIN)/ruff format --check --quiet ltx_train data docs tests
	$(BIN)/ruff check --quiet ltx_train data docs tests
	$(BIN)/lint-imports --no-logo > $(VENV)/lint-imports.log || (cat $(VENV)/lint-imports.log; exit 1)
	$(BIN)/shellcheck -x .ci/run launch/spot/start.sh launch/slurm/requeue.sh launch/slurm/venv.sbatch launch/slurm/container.sbatch docs/performance/measure.sh
	$(BIN)/pyright

format: setup ## rewrite to the house style
	$(BIN)/ruff check --fix --quiet ltx_train data docs tests
	$(BIN)/ruff format --quiet ltx_train data docs tests

unit golden faults docs: setup ## one test suite
	$(BIN)/pytest tests/$@ --numprocesses 2

tools: # a SLURM and a browser to test with, where they can be had; without them those tests are skipped
	@command -v chromium google-chrome > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  { apt-get update -qq; timeout 300 apt-get install -y -qq --no-install-recommends chromium; } > $(VENV)/browser.log 2>&1; } || \
	  echo "chromium could not be installed: the test that looks at the report is skipped"
	@test -x /usr/sbin/slurmctld || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  { apt-get update -qq; timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge; } > $(VENV)/tools.log 2>&1; } || \
	  echo "slurm-wlm and munge could not be installed: the SLURM tests will be skipped"

gpu: setup ## the tests that need a CUDA device
	$(BIN)/pytest tests/gpu

aio: setup ## the tests of DeepSpeed's state in files; needs g++ and libaio-dev, and compiles for five minutes
	LTX_TRAIN_TEST_AIO=1 $(BIN)/pytest tests/faults/test_deepspeed.py -k files

wheel: setup ## dist/*.whl with the configuration inside
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

settings: setup ## write docs/settings.md from the schema
	$(BIN)/python -c 'from ltx_train.config.help import settings_page; print(settings_page(), end="")' > docs/settings.md

site: setup ## all documents as a site with a search: build/site/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs/site -d build/doctrees . build/site

sample: setup ## generate data/sample again
	$(BIN)/python data/make_sample.py

clean: ## remove what make made, runs excepted
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
