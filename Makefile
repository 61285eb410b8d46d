# The two commands of the README are `make quickstart` and `make test`; both build .venv when it is missing or stale.
.DEFAULT_GOAL := help
.PHONY: help env quickstart pretrained test test-unit check learning recbole bench lock

export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTEST := python -m pytest --numprocesses 2 --dist loadgroup

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## build .venv from the committed lock (nothing to do when it is up to date)
	@environments/cpu/install.sh

quickstart: env ## the whole pipeline on this machine, to a trained and evaluated recommender
	@gream quickstart

pretrained: env ## the same with a real pretrained model, SmolLM2-135M-Instruct (about an hour)
	@python benchmarks/smollm2.py runs/pretrained/base
	@gream quickstart runs/pretrained --base runs/pretrained/base

test: env ## all tests, the real verl, vLLM and LLaMA-Factory included
	$(PYTEST)

test-unit: env ## the tests that start no framework
	$(PYTEST) tests/unit

check: env ## ruff, mypy, lines per room, imports that climb
	ruff check .
	ruff format --check .
	mypy
	python tests/house.py

learning: env ## does SRPO improve on SFT? three seeds, with intervals (about an hour)
	@python benchmarks/learning.py

recbole: env ## the environment of the SASRec baseline (RecBole), from its own lock
	@environments/recbole/install.sh

bench: env ## every benchmark, one after the other
	@for script in $(filter-out %/smollm2.py %/learning.py %/expected_reward.py %/gpu_check.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; python $$script || exit 1; done

lock: env ## resolve environments/cpu/requirements.lock again from pyproject.toml
	environments/cpu/lock.sh
