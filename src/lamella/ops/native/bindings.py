"""ctypes bindings of the C++ kernels.

`SIGNATURES` lists the argument types of every kernel; a test compares it with the C++ templates.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from lamella.ops.native.build import build

logger = logging.getLogger("lamella")

_P, _I, _F, _B, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool, ctypes.c_int

SIGNATURES: dict[str, list[type]] = {
    "decode_attention": [_P, _I, _P, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _F, _I, _I, _N],
    "short_conv": [_P, _I, _P, _I, _I, _P, _P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _B, _B, _N],
    "add_rms_norm": [_P, _I, _I, _P, _I, _P, _F, _P, _P, _I, _I, _I, _N],
    "silu_mul": [_P, _I, _P, _I, _I, _N],
    "linear": [_P, _I, _P, _P, _P, _I, _I, _I, _N],
    "fp32_linear": [_P, _I, _P, _P, _P, _I, _I, _I, _N],
    "rotary": [_P, _I, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _B, _N],
    "write_kv": [_P, _I, _P, _I, _P, _P, _P, _I, _I, _N],
    "delta_rule": [*[_P, _I] * 5, _P, _P, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _B, _N],
    "selective_scan": [*[_P, _I] * 5, _P, _P, _P, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _N],
}
"""Argument types of each kernel, by its name in C++."""

_DTYPES = (torch.float32, torch.bfloat16)  # in the order in which the library exports a kernel

kernels: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
"""Kernels by name and dtype; filled when `available` returns True."""

_has_tiles = False


@functools.cache
def available() -> bool:
    """Return True if the kernels can be called. The first call builds and loads the library."""
    return why_unavailable() is None


@functools.cache
def why_unavailable() -> str | None:
    """Return the reason why the kernels cannot be called, and log it once; None if they can.

    `LAMELLA_NATIVE=0` turns the kernels off; see also `build`.
    """
    if os.environ.get("LAMELLA_NATIVE") == "0":
        logger.info("native CPU kernels are off (LAMELLA_NATIVE=0): using the portable torch path")
        return "LAMELLA_NATIVE=0"
    try:
        _look_up(load(build()))
    except Exception as error:  # whatever is wrong with the compiler or the cache, the portable path is there
        reason = _reason(error)
        logger.warning("native CPU kernels are off (%s): using the portable torch path", reason)
        return reason
    return None


def _look_up(library: ctypes.CDLL) -> None:
    """Fill `kernels` with the functions of a library."""
    found: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
    for name, types in SIGNATURES.items():
        prototype = ctypes.CFUNCTYPE(None, *types)
        exported = (ctypes.c_void_p * len(_DTYPES)).in_dll(library, f"lamella_{name}")
        for dtype, address in zip(_DTYPES, exported, strict=True):
            assert address is not None
            found[name, dtype] = prototype(address)
    global _has_tiles
    _has_tiles = bool(library.lamella_has_tiles())
    kernels.update(found)


def _reason(error: Exception) -> str:
    """Return an error of the build in one line."""
    output = getattr(error, "stderr", None) or ""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    line = next((line for line in text.splitlines() if "error" in line), str(error).partition("\n")[0])
    return line or type(error).__name__


def has_tiles() -> bool:
    """Return True if bf16 products run on AMX."""
    return _has_tiles


def load(library: Path) -> ctypes.CDLL:
    """Load the library with torch's own OpenMP runtime.

    torch's wheel contains a private copy of the runtime under its own name. A second runtime would create a second pool
    of spinning threads. The library is therefore linked without one, and finds the symbols in the copy that is already
    mapped.
    """
    mapped = re.findall(r"\s(/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*)$", _maps(), re.MULTILINE)
    ctypes.CDLL(mapped[0] if mapped else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def _maps() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""
