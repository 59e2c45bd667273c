"""Choice of the `LinearMethod` of each projection of a quantized checkpoint.

Methods that compute in a file's format are registered with `register_linear_method`. Without such a method, weights are
dequantized on loading and used as dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from lamella.checkpoint.names import targets
from lamella.checkpoint.quantization import DequantizedView, DequantizingMethod, Quantization
from lamella.checkpoint.tensors import OpenTensors
from lamella.layers.linear import DENSE, LinearMethod
from lamella.models.names import rename

# (quantization, stored tensors of the file, names of the weights of one module) -> method that computes with these
# weights in their format, or None. A factory should read only the tensors that it needs to decide.
MethodFactory: TypeAlias = Callable[[Quantization, OpenTensors, Sequence[str]], LinearMethod | None]

_factories: list[MethodFactory] = []


def register_linear_method(factory: MethodFactory) -> None:
    """Register a method for projections of quantized checkpoints. Later registrations have precedence."""
    _factories.insert(0, factory)


class MethodChooser:
    """Chooses the methods of a model's projections while the model is built."""

    def __init__(self, tensors: OpenTensors, names: Mapping[str, str]) -> None:
        """Make a chooser for opened files.

        Args:
            tensors: of the checkpoint; a `DequantizedView` if it is quantized.
            names: see `Architecture.checkpoint_names`.
        """
        self._tensors, self._names = tensors, names
        self._dequantizing = DequantizingMethod(tensors.scales) if isinstance(tensors, DequantizedView) else DENSE
        self._by_methods: set[str] = set()
        self._as_is: set[str] = set()

    def choose(self, projections: Sequence[str]) -> LinearMethod:
        """Return the method of a module's projections, given by their dotted paths."""
        tensors = self._tensors
        if not isinstance(tensors, DequantizedView):
            return DENSE
        names = [rename(f"{projection}.weight", self._names) for projection in projections]
        if any(name not in tensors.scales.scales for name in names):
            return DENSE  # the view dequantizes those that have scales
        self._by_methods.update(names)
        for factory in _factories:
            method = factory(tensors.scales.quantization, tensors.stored, names)
            if method is not None:
                self._as_is.update(names)
                return method
        return self._dequantizing

    def view(self, model: nn.Module) -> OpenTensors:
        """Return the tensors for a loader of `model`, which was built with the chosen methods."""
        tensors = self._tensors
        if not isinstance(tensors, DequantizedView):
            return tensors
        claimed = targets(model, self._names)
        return DequantizedView(tensors.stored, tensors.scales, self._by_methods, claimed, self._as_is)
