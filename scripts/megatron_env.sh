#!/usr/bin/env bash
# An environment with Megatron-Core: whet runs inside it where backend.use is megatron. usage: scripts/megatron_env.sh [DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-.venv-megatron}
python=${PYTHON:-python3}

[[ -x $dir/bin/pip ]] || "$python" -m venv "$dir"
pip() { "$dir/bin/pip" --disable-pip-version-check -q "$@"; }

# torch first and alone: with it in place nothing else brings another build of it. Without a GPU, the CPU build.
limit=()
if ! command -v nvidia-smi >/dev/null; then limit=(-c constraints-cpu.txt); fi
"$dir/bin/python" -c 'import torch' 2>/dev/null || pip install torch==2.13.0
pip install "${limit[@]}" -e '.[megatron]' 'pytest>=9,<10'

"$dir/bin/python" - <<'EOF'
import warnings

warnings.simplefilter("ignore")
import megatron.core
import torch

print(f"Megatron-Core {megatron.core.__version__}, torch {torch.__version__}, whet in place")
EOF
