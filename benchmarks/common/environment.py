"""Versions, device names, and environment variables of vLLM."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed beside this interpreter."""
    found = {}
    for name in ("torch", "triton", "fla-core", "vllm", "flashinfer-python"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: str) -> str:
    """Return the name of the GPU, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if device != "cpu" else "CPU"


def prepare_vllm() -> None:
    """Set defaults for a vLLM engine within this process. Call it before vllm is imported."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
