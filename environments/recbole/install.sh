#!/usr/bin/env bash
# Builds .venv-recbole in the repository root from the committed lock; does nothing when it is there and up to date.
# Run by `make recbole`, after `make env`: uv and Python are those of .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."

lock=environments/recbole/requirements.lock
stamp=.venv-recbole/.built-from
fingerprint=$(cat "$lock" environments/recbole/install.sh environments/uv.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && [ -x .venv-recbole/bin/python ]; then
    exit 0
fi
if [ ! -x .venv/bin/uv ]; then
    echo "make recbole: .venv is missing; build it with: make env" >&2
    exit 1
fi

start=$SECONDS
echo "make recbole: building .venv-recbole from $lock"
. environments/uv.sh
.venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv-recbole
sync_with_lock "$lock" .venv-recbole/bin/python
.venv-recbole/bin/python -W ignore -c 'import recbole.config, recbole.data, recbole.trainer' || {
    echo "make recbole: RecBole cannot be imported (see above); make the lock again with: environments/recbole/lock.sh" >&2
    exit 1
}
echo "$fingerprint" > "$stamp"
echo "make recbole: .venv-recbole ready after $((SECONDS - start)) s, $(du -sh .venv-recbole | cut -f1)"
