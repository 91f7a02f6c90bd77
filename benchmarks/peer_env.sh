#!/usr/bin/env bash
# Makes the environment of the peers: TRL 1.16 beside the same PyTorch and transformers as ours.
#
#   benchmarks/peer_env.sh FOLDER        then FOLDER/bin/python -m benchmarks.peers.trl_sft …
set -euo pipefail
folder=$(realpath -m "${1:?usage: benchmarks/peer_env.sh FOLDER}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --no-input -q "$@"; }

# Torch comes first and alone, so that pip takes the CPU build; it must not be replaced afterwards.
pip install -c constraints-cpu.txt torch || pip install torch==2.13.0
"$folder/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$folder/torch.txt"
pip install -c "$folder/torch.txt" transformers==5.23.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
"$folder/bin/python" -c "import torch, trl; print('peers ready: trl', trl.__version__, 'torch', torch.__version__)"
