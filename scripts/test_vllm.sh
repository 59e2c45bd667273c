#!/usr/bin/env bash
# The vLLM plugin's tests, with the vLLM of PYTHON: 0.26 or later, for CUDA or for CPUs. What a version or device cannot
# do is skipped, and said. lamella must be installed there. Usage: test_vllm.sh PYTHON [PYTEST_ARGS...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: test_vllm.sh PYTHON [PYTEST_ARGS...]}
shift
exec "$python" -m pytest tests/parity/test_vllm_scorer.py tests/vllm_plugin "$@"
