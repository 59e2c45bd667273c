"""vLLM's config format and load format "lamella": all checkpoints that lamella's engine reads, including lingua's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from lamella.checkpoint.files import open_checkpoint
from lamella.checkpoint.loader import log_dequantization
from lamella.errors import ConfigError
from lamella.models.registry import model_types
from lamella.vllm_plugin.hf_config import config_class
from lamella.vllm_plugin.loading.weights import WeightFiller

FORMAT = "lamella"


class Parser(ConfigParserBase):
    """Config parser of `--config-format lamella`."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **_: Any,
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        """Return the config's values and a config object; called by vLLM.

        Raises:
            ConfigError: a revision is given.
        """
        if revision is not None or code_revision is not None:
            raise ConfigError(
                f"revision={revision or code_revision!r}: format 'lamella' reads the newest files; leave it out"
            )
        values = dict(open_checkpoint(model).values)
        architecture, model_type = values["architectures"][0], values.get("model_type")
        if model_type not in model_types():
            model_type = next(name for name, target in model_types().items() if target == architecture)
        return values, config_class(model_type)(**values)


class Loader(BaseModelLoader):
    """Weight loader of `--load-format lamella`."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the checkpoint; called by vLLM."""
        open_checkpoint(model_config.model)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill the model from the checkpoint; called by vLLM."""
        checkpoint = open_checkpoint(model_config.model)
        with checkpoint.tensors.opened() as tensors:
            log_dequantization(checkpoint, tensors)
            leftovers = checkpoint.architecture.leftovers
            filler = WeightFiller(model, checkpoint.names, tied_head=checkpoint.tied_head, leftovers=leftovers)
            filler.fill((name, torch.as_tensor(tensors.load(name))) for name in tensors.names())


def register_formats() -> None:
    """Register parser and loader with vLLM; repeated calls have no effect."""
    global _registered
    if not _registered:
        register_config_parser(FORMAT)(Parser)
        register_model_loader(FORMAT)(Loader)
        _registered = True


_registered = False
