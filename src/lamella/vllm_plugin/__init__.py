"""lamella's architectures inside vLLM: a plugin in the entry-point group `vllm.general_plugins`.

vLLM calls `register` in each of its processes, before it reads a model's config. No file of vLLM is touched.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.lamella")  # whose lines stand among vLLM's own

PREFIX = "Lamella"  # of the names under which architectures are served here that vLLM has a class of its own for


def register() -> None:
    """Make vLLM know every architecture that lamella knows, and the formats "lamella" of configs and weights.

    Cheap, and harmless when called again. Nothing that goes wrong here keeps vLLM from starting: it is one log line.
    """
    from lamella.vllm_plugin import compat

    try:
        compat.require_supported()
        from lamella.vllm_plugin.registration import register_all

        register_all()
    except (ImportError, AttributeError, compat.UnsupportedVersion) as error:
        logger.warning("lamella: its architectures are not registered with vLLM: %s", error)
