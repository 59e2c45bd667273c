"""Placements of supernets in vLLM: methods for `collective_rpc`, and a safe way to switch the placement."""

from __future__ import annotations

from typing import Any

from lamella.config import Placement, PlacementLike, mixer_names, read_placement
from lamella.config.placement import chosen_mixer
from lamella.errors import ConfigError


class PlacementWorker:
    """Extension of vLLM's workers for supernets (`worker_extension_cls`).

    Names and results are those of the published plugin for Apriel2, except that a wrong placement changes nothing.
    """

    model_runner: Any
    vllm_config: Any

    def get_layer_placements(self) -> dict[int, str]:
        """Return the active mixer of each stochastic layer of this worker, by layer index."""
        return {index: mixer.active for index, mixer in self._model().stochastic.items()}

    def set_layer_placements(self, placement: PlacementLike) -> dict[int, str]:
        """Activate a placement without handling running requests; use `set_placement` if there are any.

        Args:
            placement: a mixer name for each layer, or any other form that `lamella.config.read_placement` accepts.

        Returns:
            The result of `get_layer_placements`.

        Raises:
            ConfigError: the placement is wrong, or prefix caching is on. All workers raise it before any change.
        """
        if self.vllm_config.cache_config.enable_prefix_caching:
            raise ConfigError(
                "set_layer_placements: with prefix caching on, the state of the old placement would be found; use "
                "lamella.vllm_plugin.placement.set_placement(llm, ...), or start with enable_prefix_caching=False"
            )
        self._activate(read_placement(placement, self._model().config))
        return self.get_layer_placements()

    def get_mixer_names(self) -> tuple[str, ...]:
        """Return the names of all mixers; an empty tuple if no layer has several."""
        return mixer_names(self._model().config)

    def clear_kv_cache(self) -> None:
        """Fill every cache with zeros. A switch does not need it: new requests never read old cache contents."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            caches = getattr(layer, "kv_cache", ())
            for cache in caches if isinstance(caches, list | tuple) else (caches,):
                cache.zero_()

    def lamella_check_placement(self, placement: PlacementLike) -> None:
        """Check a placement.

        Raises:
            ConfigError: the placement is wrong.
        """
        read_placement(placement, self._model().config)

    def lamella_activate(self, placement: PlacementLike) -> None:
        """Activate a placement that `set_placement` has checked."""
        self._activate(read_placement(placement, self._model().config))

    def _activate(self, placement: Placement) -> None:
        for index, mixer in self._model().stochastic.items():
            mixer.active = chosen_mixer(placement, index)

    def _model(self) -> Any:
        model = self.model_runner.get_model()
        return getattr(model, "unwrap", lambda: model)()


def set_placement(llm: Any, placement: PlacementLike) -> None:
    """Switch the placement of a supernet, also with running requests and with prefix caching.

    Tokens before the switch come from the old placement. For later tokens the new placement recomputes the whole
    prefix.

    Args:
        llm: vLLM's `LLM`.
        placement: any form that `lamella.config.read_placement` accepts.

    Raises:
        ConfigError: the placement is wrong; vLLM may wrap the error. The active placement does not change.
    """
    llm.collective_rpc("lamella_check_placement", args=(placement,))
    # Pause the engine, which would otherwise run steps between the two calls.
    llm.sleep(level=0, mode="keep")
    try:
        llm.collective_rpc("lamella_activate", args=(placement,))
        llm.reset_prefix_cache(reset_running_requests=True)
    finally:
        llm.wake_up(tags=["scheduling"])
