# The two commands of the README are `make quickstart` and `make test`; both build .venv when it is missing or stale.
.DEFAULT_GOAL := help
.PHONY: help env quickstart pretrained test lint learning lock bench recbole

export PATH := $(CURDIR)/.venv/bin:$(PATH)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## build .venv from the committed lock (nothing to do when it is up to date)
	@environments/cpu/install.sh

quickstart: env ## the whole pipeline on this machine, to a trained and evaluated recommender
	@gream quickstart

pretrained: env ## the same with a real pretrained model, SmolLM2-135M-Instruct (about an hour)
	@gream quickstart --model smollm2

test: env ## all tests
	python -m pytest --numprocesses 2 --dist loadgroup

lint: env ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

learning: env ## does SRPO improve on SFT? three seeds, with intervals (about an hour)
	@gream learning

recbole: env ## the environment of `gream baseline` (SASRec by RecBole), from its own lock
	@environments/recbole/install.sh

bench: env ## every benchmark, one after the other
	@for script in $(filter-out %/data_tasks.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; python $$script || exit 1; done

lock: env ## resolve environments/cpu/requirements.lock anew from pyproject.toml
	environments/cpu/lock.sh
