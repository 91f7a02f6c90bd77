#!/usr/bin/env bash
# Makes .venv: Python 3.11 or newer, PyTorch for this machine, then whet with its developer tools.
#
#   scripts/setup.sh                 what every make target runs when something it reads has changed
#   PYTHON=python3.12 make setup     with this interpreter
#   TORCH=cpu make setup             the CPU build although there is a GPU (TORCH=default: the other way round)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/setup.log
torch=2.13.0

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# Runs a command quietly; shows all that it said when it fails.
quietly() {
    "$@" >"$log" 2>&1 || { cat "$log" >&2; return 1; }
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate found=""
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
        command -v "$candidate" >/dev/null && found+=" $("$candidate" --version 2>&1 | head -1)"
    done
    die "whet needs Python 3.11 or newer; found:${found:- none}." \
        "Install one, or name it: PYTHON=/path/to/python3.11 make setup"
}

make_venv() {
    if [ -x "$venv/bin/python" ] && is_recent "$venv/bin/python"; then
        return
    fi
    local python
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    rm -rf "$venv"
    mkdir "$venv"
    quietly "$python" -m venv "$venv" || {
        rm -rf "$venv"
        die "The virtual environment cannot be made (see above); on Debian or Ubuntu: apt install python3-venv"
    }
}

# Torch comes first and alone: asked for together with the rest, pip may pick another build.
install_torch() {
    local build=${TORCH:-}
    if [ -z "$build" ]; then
        build=cpu
        if [ "$(uname)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then build=default; fi
    fi
    echo "Installing PyTorch $torch ($build build)"
    if [ "$build" = cpu ]; then
        if pip install -r constraints-cpu.txt >"$log" 2>&1; then return; fi
        grep -q "No matching distribution found for torch" "$log" || { cat "$log" >&2; exit 1; }
        echo "pip's package index has no CPU build of PyTorch: taking the default one, several gigabytes."
        echo "(To avoid that, set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds.)"
    fi
    quietly pip install "torch==$torch"
}

install_whet() {
    echo "Installing whet and its developer tools"
    # Whatever build stands there now must not be replaced by another.
    "$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$venv/torch.txt"
    quietly pip install -c "$venv/torch.txt" -e ".[dev]"
}

make_venv
install_torch
install_whet
echo "Ready: $("$venv/bin/python" --version), $(cat "$venv/torch.txt")"
