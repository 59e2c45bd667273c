"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamella.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`."""
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return values
