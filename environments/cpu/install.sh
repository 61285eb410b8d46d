#!/usr/bin/env bash
# Builds .venv in the repository root from the committed lock; does nothing when it is there and up to date.
set -euo pipefail
cd "$(dirname "$0")/../.."

lock=environments/cpu/requirements.lock
stamp=.venv/.built-from
fingerprint=$(cat "$lock" pyproject.toml environments/uv.sh environments/cpu/install.sh environments/cpu/torchaudio_stub/pyproject.toml \
    environments/cpu/torchaudio_stub/torchaudio/__init__.py | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && [ -x .venv/bin/python ]; then
    exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "make env: Python 3.11 not found; install it (the lock is made for 3.11) or name it: make env PYTHON=/path/to/python3.11" >&2
    exit 1
fi

start=$SECONDS
echo "make env: building .venv from $lock with $("$python" --version)"
rm -f "$stamp"
# A .venv of another Python, or one that was moved here, is built again.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || ! .venv/bin/python -c \
    'import os, sys; sys.exit(sys.version_info[:2] != (3, 11) or os.path.realpath(sys.prefix) != os.path.realpath(".venv"))'; then
    "$python" -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep -o '^uv==[^ ]*' "$lock")"

. environments/uv.sh
# Bytecode at install: a training run starts a dozen processes, and each would compile torch and verl for itself.
sync_with_lock "$lock" .venv/bin/python --compile-bytecode
.venv/bin/uv pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation ./environments/cpu/torchaudio_stub
.venv/bin/uv pip install --python .venv/bin/python --quiet --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' || {
    echo "make env: a CUDA build of torch was installed; make the CPU wheel visible to pip (find-links) and run it again" >&2
    exit 1
}
echo "$fingerprint" > "$stamp"
echo "make env: .venv ready after $((SECONDS - start)) s, $(du -sh .venv | cut -f1)"
