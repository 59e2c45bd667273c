"""The getters of `HFConfig` have types that mypy can check in readers."""

from __future__ import annotations

import re

import pytest

CODE = """
from typing import Literal
from lamella.config.hf_config import HFConfig

config = HFConfig({})
reveal_type(config.int("key"))
reveal_type(config.int("key", 4, minimum=0))
reveal_type(config.int("key", None))
reveal_type(config.float("key"))
reveal_type(config.float("key", 1))
reveal_type(config.float("key", None))
reveal_type(config.bool("key"))
reveal_type(config.bool("key", None))
reveal_type(config.choice("key", ("a", "b")))
reveal_type(config.choice("key", ("a", "b"), "a"))
reveal_type(config.text("key", "", "a text"))
reveal_type(config.list("key"))
reveal_type(config.mapping("key"))
reveal_type(config.token_ids("key"))
reveal_type(config.get("key"))
reveal_type(config.values)
kind: Literal["a", "b"] = config.choice("key", ("a", "b"), "a")
size: int = config.int("key", None)
other: str = config.get("key")
"""
TYPES = """
int | int | int | None | float | float | float | None | bool | bool | None | str | str | str | list[object] | None
| dict[str, object] | tuple[int, ...] | object | dict[str, object]
"""


@pytest.mark.slow  # mypy without its cache reads torch's types
def test_a_getter_without_none_as_default_is_not_optional_and_none_is_any(tmp_path):
    """`Any` would hide wrong uses of values in readers; optional types would require needless checks."""
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "reader.py"
    file.write_text(CODE)
    output, _, _ = api.run([str(file), "--cache-dir", str(tmp_path), "--follow-imports=silent"])
    revealed = re.findall(r'Revealed type is "(.*)"', output)
    assert " | ".join(revealed).replace("builtins.", "") == " ".join(TYPES.split())
    assert output.count("error:") == 2, output
    assert 'variable has type "int"' in output and 'variable has type "str"' in output
