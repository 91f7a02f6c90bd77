#!/usr/bin/env bash
# An environment with what whet works with beside PyTorch: Ray, DeepSpeed and Megatron-Core, and the tools of the tests.
# whet runs inside it where backend.use is megatron or deepspeed, or cluster.address is given.
#
#   scripts/integration_env.sh DIR     what `make integration` runs; about two minutes and 2 GB
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: scripts/integration_env.sh DIR}
python=${PYTHON:-python3}

[[ -x $dir/bin/pip ]] || "$python" -m venv "$dir"
pip() { "$dir/bin/pip" --disable-pip-version-check --no-input -q "$@"; }

# torch first and alone: with it in place nothing else brings another build of it. Without a GPU, the CPU build.
if ! "$dir/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null; then pip install torch==2.13.0; else pip install -r constraints-cpu.txt; fi
fi
"$dir/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$dir/torch.txt"
pip install -c "$dir/torch.txt" -e '.[megatron,ray,test]'
# DeepSpeed's package is built from source, and its build looks at the torch that is there.
pip install setuptools wheel ninja
pip install -c "$dir/torch.txt" --no-build-isolation "$(sed -n 's/^deepspeed = \["\(.*\)"\]$/\1/p' pyproject.toml)"

"$dir/bin/python" - <<'END'
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import megatron.core  # noqa: F401

print("Ready:", ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "deepspeed", "megatron-core")))
END
