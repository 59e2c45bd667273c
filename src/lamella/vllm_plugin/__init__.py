"""vLLM plugin: lamella's architectures inside vLLM, through the entry-point group `vllm.general_plugins`.

vLLM calls `register` in each of its processes before it reads a model's config. vLLM's files are not modified.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.lamella")  # a child of vLLM's logger, so that vLLM formats the lines

PREFIX = "Lamella"  # for the names of architectures that vLLM already implements


def register() -> None:
    """Register lamella's architectures, and the config and load format "lamella", with vLLM.

    Repeated calls have no effect. A failure does not stop vLLM from starting; it is logged as one warning.
    """
    from lamella.vllm_plugin import compat

    try:
        compat.require_supported()
        from lamella.vllm_plugin.registration import register_all

        register_all()
    except (ImportError, AttributeError, compat.UnsupportedVersion) as error:
        logger.warning("lamella: its architectures are not registered with vLLM: %s", error)
