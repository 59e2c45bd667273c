"""Default sampling parameters, read from the `generation_config.json` of a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.checkpoint.file_kinds import read_json
from lamella.checkpoint.files import find_folder
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.errors import CheckpointError, ConfigError, ParameterError

if TYPE_CHECKING:
    from lamella.engine.options import EngineOptions

logger = logging.getLogger("lamella")

NAME = "generation_config.json"
# Key of the file -> field of `SamplingParams`. vLLM reads the same keys.
_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def read_defaults(options: EngineOptions, folder: Path | None) -> dict[str, Any]:
    """Return the default values of `SamplingParams` fields.

    Args:
        options: `generation_config` names the file, `override_generation_config` replaces its keys.
        folder: of the model; None for a model without files.

    Returns:
        Values by field name, only for fields that the file or the options set.

    Raises:
        ConfigError: `SamplingParams` does not accept a value, or a key is not supported.
        CheckpointError: the named folder has no such file.
    """
    asked, values = options.generation_config, dict[str, Any]()
    if asked == "auto":
        file = None if folder is None else folder / NAME
        if file is not None and file.is_file():
            values = read_json(file)
    elif asked != "vllm":
        file = find_folder(asked, options.revision) / NAME
        if not file.is_file():
            raise CheckpointError(f"generation_config={asked!r}: {file} does not exist; give another folder, or 'vllm'")
        values = read_json(file)
    else:
        file = None
    overrides = options.override_generation_config or {}
    found = {}
    for key, field in _FIELDS.items():
        value = overrides.get(key, values.get(key))
        if value is None:
            continue
        where = f"override_generation_config: {key}" if key in overrides else f"{file}: {key}"
        try:
            SamplingParams(**{field: value})
        except ParameterError as error:
            raise ConfigError(f"{where}={value!r}: {error}; or give generation_config='vllm'") from error
        found[field] = value
    unknown = sorted(set(overrides) - set(_FIELDS))
    if unknown:
        raise ConfigError(
            f"override_generation_config: {unknown[0]!r} is not supported: it may have {', '.join(_FIELDS)}"
        )
    if found:
        listed = ", ".join(f"{name}={value!r}" for name, value in found.items())
        logger.info("default sampling parameters: %s (from %s)", listed, file or "override_generation_config")
    return found
