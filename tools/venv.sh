# Sourced by tools/demo and tools/test: a virtual environment of their own, made once, updated when the pins change.
#   RQC_VENV    where it lies                    (default: .venv in the checkout)
#   RQC_PYTHON  the Python that makes it, 3.11+  (default: the newest one found)

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RQC_VENV:-$root/.venv}

say() { printf '\n== %s\n' "$*" >&2; }

find_python() {
    local name
    for name in ${RQC_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    printf 'error: no Python 3.11 or later was found\nhint: set RQC_PYTHON to one\n' >&2
    return 2
}

# enter_venv EXTRAS: install rqc[EXTRAS] at the pinned versions, unless exactly that was done before, and put it first in PATH
enter_venv() {
    local extras=$1 python stamp
    stamp=$(cat "$root/pyproject.toml" "$root/tools/constraints.txt" | cksum)
    if [[ $(cat "$venv/rqc-$extras" 2>/dev/null) != "$root $stamp" ]]; then
        python=$(find_python)
        say "installing rqc[$extras] into $venv ($("$python" --version))"
        [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --constraint "$root/tools/constraints.txt" --editable "$root[$extras]"
        printf '%s\n' "$root $stamp" >"$venv/rqc-$extras"
    fi
    PATH=$venv/bin:$PATH
}
