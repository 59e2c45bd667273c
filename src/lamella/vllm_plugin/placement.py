"""Placements of supernets in vLLM: what each worker can be told by `collective_rpc`, and the order that is safe."""

from __future__ import annotations

from typing import Any

from lamella.config import Placement, PlacementLike, mixer_names, read_placement
from lamella.config.placement import chosen_mixer
from lamella.errors import ConfigError


class PlacementWorker:
    """What vLLM's workers of a supernet can do besides (`worker_extension_cls`); names and results as published for
    Apriel2, except that a bad placement changes nothing.
    """

    model_runner: Any
    vllm_config: Any

    def get_layer_placements(self) -> dict[int, str]:
        """The active mixer of each stochastic layer that this worker has."""
        return {index: mixer.active for index, mixer in self._model().stochastic.items()}

    def set_layer_placements(self, placement: PlacementLike) -> dict[int, str]:
        """Activate a placement, a name for each layer of the model or any form of `lamella.config.read_placement`, and
        tell what `get_layer_placements` tells. All workers refuse a bad one alike, before anything changes.

        What is running goes on with state of the old placement, and cached prefixes stay findable: see `set_placement`.
        """
        if self.vllm_config.cache_config.enable_prefix_caching:
            raise ConfigError(
                "set_layer_placements: with prefix caching on, the state of the old placement would be found; use "
                "lamella.vllm_plugin.placement.set_placement(llm, ...), or start with enable_prefix_caching=False"
            )
        self._activate(read_placement(placement, self._model().config))
        return self.get_layer_placements()

    def get_mixer_names(self) -> tuple[str, ...]:
        """The mixers that a layer can have; empty where none has a choice."""
        return mixer_names(self._model().config)

    def clear_kv_cache(self) -> None:
        """Fill every cache with zeros. Not needed for a switch: what a request starts from never depends on it."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            caches = getattr(layer, "kv_cache", ())
            for cache in caches if isinstance(caches, list | tuple) else (caches,):
                cache.zero_()

    def lamella_check_placement(self, placement: PlacementLike) -> None:
        """Raises `ConfigError` where a placement is bad."""
        read_placement(placement, self._model().config)

    def lamella_activate(self, placement: PlacementLike) -> None:
        """The middle step of `set_placement`, which has checked it."""
        self._activate(read_placement(placement, self._model().config))

    def _activate(self, placement: Placement) -> None:
        for index, mixer in self._model().stochastic.items():
            mixer.active = chosen_mixer(placement, index)

    def _model(self) -> Any:
        model = self.model_runner.get_model()
        return getattr(model, "unwrap", lambda: model)()


def set_placement(llm: Any, placement: PlacementLike) -> None:
    """Switch a supernet that a vLLM `LLM` serves, with requests in flight and prefix caching or without: every token
    before is the old placement's, every token after the new one's over its whole prefix, which is computed again.

    Raises what a worker raises for a bad placement (a `ConfigError`, maybe in vLLM's wrapping); nothing has changed
    then.
    """
    llm.collective_rpc("lamella_check_placement", args=(placement,))
    # Between two calls the engine would go on stepping.
    llm.sleep(level=0, mode="keep")
    try:
        llm.collective_rpc("lamella_activate", args=(placement,))
        llm.reset_prefix_cache(reset_running_requests=True)
    finally:
        llm.wake_up(tags=["scheduling"])
