"""Stochastic layer of a supernet: several mixers, one of which is selected by the placement."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lamella.config import SingleMixerConfig, StochasticConfig
from lamella.errors import ConfigError
from lamella.layers.context import current_batch, forward_batch
from lamella.layers.kit import Kit
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ConvHistory
from lamella.layers.sublayer_input import SublayerInput


class Stochastic(nn.Module):
    """All mixers of a layer. The `active` mixer computes the batch, unless the batch has its own `placements`.

    Attributes:
        mixers: mixers by name.
        active: name of the active mixer.
        index: index of the layer; -1 outside a decoder.
    """

    def __init__(
        self,
        config: StochasticConfig,
        kit: Kit,
        hidden_size: int,
        prefix: str,
        history: ConvHistory | None,
        build: Callable[[SingleMixerConfig, Kit, int, str, ConvHistory | None], nn.Module],
    ) -> None:
        """Build every mixer with the function `build`, see `lamella.layers.build`.

        Raises:
            ConfigError: a mixer has the name of an attribute of `torch.nn.ModuleDict`.
        """
        super().__init__()
        for name in config.names:
            if hasattr(nn.ModuleDict, name):
                raise ConfigError(
                    f"{prefix}: a mixer cannot be called {name!r}, which is torch's own name for something"
                )
        self.mixers = nn.ModuleDict(
            {name: build(mixer, kit, hidden_size, f"{prefix}.mixers.{name}", history) for name, mixer in config.mixers}
        )
        self.active = config.main
        self._caller = kit.caller(self, prefix)
        self.index = layer_index(prefix)

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        if self._caller is not None:
            return self._caller(positions, entry)
        # With one mixer, skip the batch: torch.compile could not trace the lookup.
        batch = current_batch() if len(self.mixers) > 1 else None
        if batch is None or batch.placements is None:
            return self.mixers[self.active](positions, entry)
        placements = batch.placements
        names = placements.names(self.index)
        if len(names) == 1:
            return self.mixers[names[0]](positions, entry)
        # Build the batches before reading the input: kernels launched early may read a mixer's slots while earlier
        # kernels are still running.
        mixer_batches = {name: placements.mixer_batch(batch, self.index, name) for name in names}
        x, out = entry.tensor(), None
        for name, own in mixer_batches.items():
            with forward_batch(own.batch):
                out = own.scatter(
                    self.mixers[name](own.positions(positions), SublayerInput.from_tensor(own.gather(x))), out
                )
        assert out is not None
        return out


def layer_index(prefix: str) -> int:
    """Return the layer index in a mixer's dotted path, `model.layers.INDEX.mixer`; -1 for other paths."""
    index = prefix.rpartition(".")[0].rpartition(".")[2]
    return int(index) if index.isdecimal() else -1
