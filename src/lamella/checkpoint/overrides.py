"""Application of `hf_overrides` to the values of a config file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.config.config_keys import KeyRules

# RoPE parameters: sections, and keys that may be at the top level instead of inside a section.
_SECTIONS = ("rope_scaling", "rope_parameters")
_TOP = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Keys that are kept if an override changes the type of scaling.
_OF_EVERY_KIND = ("rope_theta", "partial_rotary_factor")


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `overrides` applied. Nested mappings are merged; null removes a key.

    The two notations of RoPE, `rope_parameters` and `rope_scaling` with `rope_theta`, are treated as one: an override
    in either notation replaces the file's value in either notation. An override with another `rope_type` replaces the
    whole scaling; otherwise it changes only the given keys.
    """
    values, overrides = _override_rotation(dict(values), dict(overrides))
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            values[key] = apply_overrides(values[key], value)
        elif value is None and key not in KeyRules.read().null_is_a_value:
            values.pop(key, None)
        elif isinstance(value, Mapping):
            values[key] = apply_overrides({}, value)
        else:
            values[key] = value
    return values


def _override_rotation(values: dict[str, Any], overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge overrides of RoPE keys into `rope_parameters` of the values, and remove them from the overrides."""
    stated_keys = [key for key in (*_SECTIONS, *_TOP) if key in overrides]
    sections = [source.get(key) or {} for source in (values, overrides) for key in _SECTIONS]
    if not stated_keys or not all(isinstance(section, Mapping) for section in sections):
        return values, overrides  # the reader reports what is wrong with a section
    if any(isinstance(value, Mapping) for section in sections for value in section.values()):
        return values, overrides  # one RoPE per kind of layer
    if not any(key in values for key in _SECTIONS) and not any(key in overrides for key in _SECTIONS):
        return values, overrides  # top-level keys in both
    scaling, parameters, new_scaling, new_parameters = (_with_rope_type(section) for section in sections)
    current = {**{key: values[key] for key in _TOP if values.get(key) is not None}, **scaling, **parameters}
    new = {**new_scaling, **new_parameters, **{key: overrides[key] for key in _TOP if key in overrides}}
    cleared = any(key in overrides and overrides[key] is None for key in _SECTIONS)
    kind = new.get("rope_type")
    if cleared or (kind is not None and kind != current.get("rope_type", "default")):
        current = {key: current[key] for key in _OF_EVERY_KIND if key in current}
    merged = {key: value for key, value in {**current, **new}.items() if value is not None}
    values = {key: value for key, value in values.items() if key not in (*_SECTIONS, *_TOP)}
    return {**values, "rope_parameters": merged}, {
        key: value for key, value in overrides.items() if key not in stated_keys
    }


def _with_rope_type(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with the older key `type` renamed to `rope_type`."""
    return {("rope_type" if key == "type" else key): value for key, value in section.items()}
