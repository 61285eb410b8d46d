#!/usr/bin/env bash
# Resolves requirements.lock again from pyproject.toml (run by `make lock`).
set -euo pipefail
cd "$(dirname "$0")/../.."
. environments/uv.sh
.venv/bin/uv pip compile --quiet --python-version 3.11 --override environments/cpu/overrides.txt \
    --extra cpu --extra pipeline --extra offline-embeddings --extra serve --extra replicas --extra dev \
    --no-emit-package torchaudio \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
    pyproject.toml --output-file environments/cpu/requirements.lock
unpin_torch environments/cpu/requirements.lock
