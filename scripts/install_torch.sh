#!/usr/bin/env bash
# Installs torch for PYTHON, unless a fitting one is there: the pinned release, and its CPU build on a machine without
# an NVIDIA GPU (the default build brings gigabytes of CUDA libraries). Triton, a part of the CUDA build only, comes with
# it: in its interpreter the tests run the GPU's kernels on a CPU.
# Usage: install_torch.sh PYTHON
set -euo pipefail
python=${1:?usage: install_torch.sh PYTHON}
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints-dev.txt")
triton=3.6.0

if "$python" -c 'import torch, triton' 2>/dev/null; then exit 0; fi
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    exec "$python" -m pip install -q "torch==$version"
fi
# A registry of one's own may serve the CPU build under the plain name; the project's index serves it to all others.
plan=$("$python" -m pip install -q --dry-run --report - "torch==$version" 2>/dev/null || true)
if [[ -n $plan ]] && ! grep -q '"name": "nvidia-' <<<"$plan" && ! grep -q '"name": "cuda-' <<<"$plan"; then
    "$python" -m pip install -q "torch==$version"
else
    "$python" -m pip install -q "torch==$version" --index-url https://download.pytorch.org/whl/cpu
fi
if [[ $(uname -s) == Linux ]]; then exec "$python" -m pip install -q "triton==$triton"; fi
