"""Former path of `lamella.engine.requests.outputs`, kept for importers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamella._lazy import lazy_attributes

if TYPE_CHECKING:
    from lamella.engine.requests.outputs import CompletionOutput as CompletionOutput
    from lamella.engine.requests.outputs import Logprob as Logprob
    from lamella.engine.requests.outputs import RequestOutput as RequestOutput

_MODULE = "lamella.engine.requests.outputs"
__getattr__, __all__ = lazy_attributes(
    __name__, {"CompletionOutput": _MODULE, "Logprob": _MODULE, "RequestOutput": _MODULE}
)
