#!/usr/bin/env bash
# Resolves requirements.lock anew from pyproject.toml (run by `make lock`).
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/uv pip compile --quiet --python-version 3.11 --override environments/cpu/overrides.txt \
    --extra cpu --extra pipeline --extra offline-embeddings --extra dev --no-emit-package torchaudio \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
    pyproject.toml --output-file environments/cpu/requirements.lock
# Which CPU build of torch it is depends on the machine (see install.sh): no local version, no hash.
.venv/bin/python - <<'PYTHON'
import re
from pathlib import Path

lock = Path("environments/cpu/requirements.lock")
lock.write_text(re.sub(r"(torch==[\d.]+)(\+cpu)?(?: \\\n    --hash=\S+)+", r"\1", lock.read_text()))
PYTHON
