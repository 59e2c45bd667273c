"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lamella.checkpoint.file_kinds import what_it_is
from lamella.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        what = what_it_is(file) or f"not JSON ({error}): correct it, or download it again"
        raise CheckpointError(f"{file}: {what}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a JSON object: correct it, or download it again")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Replace `file`, whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    try:
        new.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise CheckpointError(f"{file}: cannot be written ({error.strerror})") from error
