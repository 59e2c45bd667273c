"""A layer of a supernet: several mixers, of which the placement of a request selects one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lamella.config import SingleMixerConfig, StochasticConfig
from lamella.errors import ConfigError
from lamella.layers.block_input import BlockInput
from lamella.layers.context import current_batch, forward_batch
from lamella.layers.kit import Kit
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ConvHistory


class Stochastic(nn.Module):
    """All mixers of a layer. The `active` one computes, unless the batch has `placements`."""

    def __init__(
        self,
        config: StochasticConfig,
        kit: Kit,
        hidden_size: int,
        prefix: str,
        history: ConvHistory | None,
        build: Callable[[SingleMixerConfig, Kit, int, str, ConvHistory | None], nn.Module],
    ) -> None:
        """Build every mixer by `build`, see `lamella.layers.build`."""
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

    def forward(self, positions: Positions, entry: BlockInput) -> Tensor:
        """(T, hidden_size) -> (T, hidden_size)."""
        if self._caller is not None:
            return self._caller(positions, entry)
        # With one mixer nothing is chosen, and torch.compile has nothing to ask the batch for.
        batch = current_batch() if len(self.mixers) > 1 else None
        if batch is None or batch.placements is None:
            return self.mixers[self.active](positions, entry)
        placements = batch.placements
        names = placements.names(self.index)
        if len(names) == 1:
            return self.mixers[names[0]](positions, entry)
        # Before the input is there: behind a kernel that waits for it, a projection may ask for a part's slots early.
        parts = {name: placements.part(batch, self.index, name) for name in names}
        x, out = entry.tensor(), None
        for name, part in parts.items():
            with forward_batch(part.batch):
                out = part.put(self.mixers[name](part.positions(positions), BlockInput.ready(part.take(x))), out)
        assert out is not None
        return out


def layer_index(prefix: str) -> int:
    """Return the layer index in a mixer's dotted path, `model.layers.INDEX.mixer`; -1 for other paths."""
    index = prefix.rpartition(".")[0].rpartition(".")[2]
    return int(index) if index.isdecimal() else -1
