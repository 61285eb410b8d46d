# The two commands of the README are `make quickstart` and `make test`; both build .venv when it is missing or stale.
.DEFAULT_GOAL := help
.PHONY: help env quickstart pretrained demo test test-unit test-next check learning recbole bench lock

export PATH := $(CURDIR)/.venv/bin:$(PATH)
NEXT := --numprocesses 0 -p no:cacheprovider tests/integration/test_constrained_vllm.py
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

demo: env ## serve what `make quickstart` made, with its reasoning, as a page at http://127.0.0.1:8080
	@test -d runs/quickstart/srpo || { echo "runs/quickstart is not there: run \`make quickstart\` first"; exit 1; }
	@gream serve runs/quickstart runs/quickstart/srpo runs/quickstart/sft --reasoning

test: env ## all tests, the real verl, vLLM and LLaMA-Factory included
	$(PYTEST)

test-unit: env ## the tests that start no framework
	$(PYTEST) tests/unit

test-next: env ## the logits processors in a newer vLLM, under each of its model runners
	@environments/next/install.sh
	.venv-next/bin/python -m pytest $(NEXT) tests/unit/gream_verl/decoding/test_vllm_processor.py
	PYTHONPATH=environments/next .venv-next/bin/python -m pytest -p second_runner $(NEXT)

check: env ## ruff, mypy, lines per room, imports that climb
	ruff check .
	ruff format --check .
	mypy
	python tests/house.py

learning: env ## does SRPO improve on SFT? three seeds, three times the steps (an hour and a half)
	@python benchmarks/learning.py

recbole: env ## the environment of the SASRec baseline (RecBole), from its own lock
	@environments/recbole/install.sh

bench: env ## the short benchmarks, one after the other
	@for script in $(filter-out %/smollm2.py %/learning.py %/rewards.py %/serving.py %/expected_reward.py %/gpu_check.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; python $$script || exit 1; done

lock: env ## resolve environments/cpu/requirements.lock again from pyproject.toml
	environments/cpu/lock.sh
