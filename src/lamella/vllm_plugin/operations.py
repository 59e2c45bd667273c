"""Custom operations that torch.compile does not trace and piecewise CUDA graphs exclude.

Each operation finds its layer by name in vLLM's forward context.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from lamella.vllm_plugin.registration import OPERATIONS


def _stateful(inputs: list[Tensor], out: Tensor, layer: str, state_module: str, part: str) -> None:
    """Run the computation `part` of a state module on inputs (T, ...); write the result to out (T, ...)."""
    get_forward_context().no_compile_layers[layer].compute(state_module, part, inputs, (out,))


def _stateful_after_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor,
    layer: str,
    state_module: str,
    part: str,
) -> None:
    """Run a computation on the weighted RMS norm of x + residual; write the result to out and the sum to total."""
    get_forward_context().no_compile_layers[layer].compute(state_module, part, (x, residual), (out, total), weight, eps)


def _chosen_mixer(x: Tensor, positions: Tensor, out: Tensor, layer: str) -> None:
    """Run the active mixer of a stochastic layer on x (T, C) at positions (T,); write the result to out (T, C)."""
    out.copy_(get_forward_context().no_compile_layers[layer].choose(x, positions))


def _fake(*_: Any) -> None:
    """Fake (meta) kernel: does nothing, because the outputs are arguments."""


_library = Library("lamella", "FRAGMENT")  # keep a reference: the operations are removed with the library object
for _operation, _function, _outputs in (
    ("stateful", _stateful, ["out"]),
    ("stateful_after_norm", _stateful_after_norm, ["out", "total"]),
    ("chosen_mixer", _chosen_mixer, ["out"]),
):
    assert f"lamella::{_operation}" in OPERATIONS
    direct_register_custom_op(
        op_name=_operation, op_func=_function, mutates_args=_outputs, fake_impl=_fake, target_lib=_library
    )
