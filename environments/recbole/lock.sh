#!/usr/bin/env bash
# Resolves requirements.lock again from requirements.in.
set -euo pipefail
cd "$(dirname "$0")/../.."
. environments/uv.sh
.venv/bin/uv pip compile --quiet --python-version 3.11 --override environments/recbole/overrides.txt \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command environments/recbole/lock.sh \
    environments/recbole/requirements.in --output-file environments/recbole/requirements.lock
unpin_torch environments/recbole/requirements.lock
