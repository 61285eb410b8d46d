#!/usr/bin/env bash
# Builds .venv-next in the repository root: a newer vLLM, without verl; does nothing when it is there and up to date.
# Run by `make test-next`, after `make env`: uv and Python are those of .venv. No lock: it is about what comes next.
set -euo pipefail
cd "$(dirname "$0")/../.."

stamp=.venv-next/.built-from
fingerprint=$(cat environments/next/*.{in,sh} environments/cpu/overrides.txt environments/uv.sh pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && [ -x .venv-next/bin/python ]; then
    exit 0
fi
if [ ! -x .venv/bin/uv ]; then
    echo "make test-next: .venv is missing; build it with: make env" >&2
    exit 1
fi

start=$SECONDS
. environments/uv.sh
.venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv-next
.venv/bin/uv pip install --quiet --python .venv-next/bin/python --override <(grep -v ^triton environments/cpu/overrides.txt) \
    -r environments/next/requirements.in
echo "$fingerprint" > "$stamp"
echo "make test-next: .venv-next ready after $((SECONDS - start)) s, $(du -sh .venv-next | cut -f1)"
