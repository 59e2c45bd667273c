"""Parity kit: compare an engine with a reference, teacher-forced, on every path, and operation by operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.parity.api import ParityOptions as ParityOptions
    from lamella.parity.api import assert_parity as assert_parity
    from lamella.parity.api import bisect as bisect
    from lamella.parity.api import check as check
    from lamella.parity.api import compare as compare
    from lamella.parity.api import paths as paths
    from lamella.parity.api import score as score

_NAMES = ("ParityOptions", "assert_parity", "bisect", "check", "compare", "paths", "score")

__getattr__, __all__ = lazy_attributes(__name__, dict.fromkeys(_NAMES, "lamella.parity.api"))
