# Sourced by the scripts of the environments: lets .venv/bin/uv install what pip itself would install here.

# uv does not read pip's configuration: pass on what pip itself would use.
pip_setting() {
    .venv/bin/python -m pip config get "global.$1" 2>/dev/null || .venv/bin/python -m pip config get ":env:.$1" 2>/dev/null || true
}
pass_on() { # variable of uv, setting of pip
    local value
    value=$(pip_setting "$2")
    if [ -z "${!1:-}" ] && [ -n "$value" ]; then export "$1=$value"; fi
}
pass_on UV_DEFAULT_INDEX index-url
pass_on UV_INDEX extra-index-url
pass_on UV_FIND_LINKS find-links
pass_on SSL_CERT_FILE cert
UV_FIND_LINKS=$(echo "${UV_FIND_LINKS:-}" | tr -s ' \n' ',') && export UV_FIND_LINKS
# All indexes count alike, as they do for pip; the hashes in the lock say which files are meant.
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
export UV_LINK_MODE=${UV_LINK_MODE:-copy} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}

sync_with_lock() { # lock, python of the environment, further options
    local lock=$1 python=$2 torch
    shift 2
    # The CPU build of torch comes from the configured find-links when they hold it, else from PyTorch's own CPU index.
    torch=$(grep '^torch==' "$lock" | tr -d ' \\')
    if ! .venv/bin/uv pip install --python "$python" --quiet --dry-run --no-deps "$torch+cpu" 2>/dev/null; then
        set -- "$@" --torch-backend cpu
    fi
    .venv/bin/uv pip sync --python "$python" "$@" "$lock"
}

unpin_torch() { # lock
    # Which CPU build of torch it is depends on the machine: no local version, no hash.
    .venv/bin/python - "$1" <<'PYTHON'
import re
import sys
from pathlib import Path

lock = Path(sys.argv[1])
lock.write_text(re.sub(r"(torch==[\d.]+)(\+cpu)?(?: \\\n    --hash=\S+)+", r"\1", lock.read_text()))
PYTHON
}
