"""Selection of a stochastic layer's mixer inside vLLM."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config

from lamella.layers.rotary import Positions
from lamella.layers.sublayer_input import SublayerInput
from lamella.layers.supernet.stochastic import Stochastic
from lamella.vllm_plugin import operations  # noqa: F401 - registers torch.ops.lamella


class Chooser:
    """Call the active mixer of a stochastic layer inside a custom operation.

    The active mixer can change after compilation and graph capture. The custom operation hides the choice from both.
    """

    def __init__(self, stochastic: Stochastic, prefix: str) -> None:
        """Register the layer with vLLM under the name `prefix`."""
        self._stochastic, self._prefix = stochastic, prefix
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers
        layers[prefix] = self

    def __call__(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Compute the stochastic layer; see `Stochastic.forward`."""
        x = entry.tensor()
        out = torch.empty_like(x)
        torch.ops.lamella.chosen_mixer(x, positions.index, out, self._prefix)
        return out

    def choose(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the output of the active mixer for x (T, C) at positions (T,); called by the custom operation."""
        return self._stochastic.mixers[self._stochastic.active](Positions(positions), SublayerInput.from_tensor(x))
