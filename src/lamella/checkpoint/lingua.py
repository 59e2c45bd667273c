"""Lingua checkpoints of PhysicsLM4: `params.json` and `consolidated.pth`, the format of the released LlamaCanon models.

Key and name mapping: PhysicsLM4, huggingface/modeling_llama_canon.py. RoPE rotates pairs of adjacent channels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamella.checkpoint.file_kinds import read_json
from lamella.checkpoint.overrides import apply_overrides
from lamella.config.config_keys import IgnoredKeys
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError, ConfigError

logger = logging.getLogger("lamella")

LINGUA_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "output",
    "mixer_norm": "attention_norm",
    "mixer_canon": "canonA",
    "mixer.canon": "attention.canonB",
    "mixer": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "feed_forward_norm": "ffn_norm",
    "feed_forward_canon": "canonC",
    "feed_forward.canon": "feed_forward.canonD",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
# Name of the redundant copy of a tied head.
TIED_HEAD = "output.tied_module.weight"

# Keys of initialization and training. `attn_impl` selects a kernel; `max_seqlen` is the size of a table of angles.
_TRAINING = ("init_base_std", "init_std_factor", "seed", "z_loss", "max_seqlen", "attn_impl")
_ATTENTION_KERNELS = ("sdpa", "fmha", "flex_attention")
_LLAMA3_VOCABULARY = 128256
# Keys of lingua's other trainers, and the models that they train.
_OTHER_MODELS = {
    "mamba_ssm": "a Mamba 2 model",
    "state_dim": "a Mamba 2 model",
    "n_future_head": "a model with several prediction heads",
    "lru_dim_multiplier": "a Hawk model",
    "conv_size": "a recurrent model",
}


def find_lingua(folder: Path) -> Path | None:
    """Return the folder with params.json and consolidated.pth; None if there is none.

    Candidates are `folder` itself, its subfolders `default` (released models) and `consolidated` (a training step), and
    those of the last training step in `folder` or in `folder/checkpoints`.
    """
    steps = sorted((step for step in folder.glob("[0-9]*") if step.name.isdigit()), key=lambda step: int(step.name))
    for parent in (folder, *reversed(steps)):
        for candidate in (parent, parent / "default", parent / "consolidated"):
            if (candidate / "params.json").is_file() and (candidate / "consolidated.pth").is_file():
                return candidate
    return find_lingua(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None


def read_params(file: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Convert params.json to the values of a LlamaCanon `config.json`.

    The files do not define BOS and EOS. Models with Llama 3's vocabulary (8B) get Llama 3's ids, the others Llama 2's.
    The published converter writes Llama 2's ids for all models.

    Args:
        file: params.json.
        overrides: values of its sections, `{"model": {...}, "data": {...}}`.

    Raises:
        CheckpointError: the file is not lingua's.
        ConfigError: a key is missing, or the model is not a LlamaCanon.
    """
    params = HFConfig(apply_overrides(read_json(file), overrides or {}), str(file))
    section = params.mapping("model")
    if not section:
        raise CheckpointError(
            f"{file}: no section 'model', so it is not lingua's; if it is Meta's or Mistral's own format, take the "
            "repository with config.json and *.safetensors, or convert it with transformers' "
            "convert_llama_weights_to_hf.py"
        )
    ignored = IgnoredKeys()
    model = HFConfig(section, f"{file}: model", ignored=ignored, path=("model",))
    _reject_other_models(model)
    data = HFConfig(params.mapping("data"), f"{file}: data", path=("data",))
    dim = model.int("dim")
    head_dim, heads = model.int("head_dim", None, minimum=0) or None, model.int("n_heads", None)
    if heads is None:
        if head_dim is None:
            raise ConfigError(f"{model.source}: n_heads is missing")
        heads = dim // head_dim
    vocab_size, num_layers = model.int("vocab_size"), model.int("n_layers")
    llama3 = vocab_size == _LLAMA3_VOCABULARY
    values = {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": _hidden_dim(model, dim),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.int("n_kv_heads", None, minimum=0) or None,
        "head_dim": head_dim,
        "max_position_embeddings": data.int("seq_len", 4096),
        "rms_norm_eps": model.float("norm_eps", 1e-5),
        "rope_theta": model.float("rope_theta", 10000.0),
        "rope_version": "lingua",
        "rope_dim": model.int("rope_dim", None, minimum=0),
        "qk_norm": model.bool("qk_norm", False),
        "canon_set": model.get("canon_set", ""),
        "canon_kernel": model.int("canon_kernel", 4),
        "canon_bias": model.bool("canon_bias", False),
        "canon_activation": model.bool("canon_activation", False),
        "canon_residual": model.bool("canon_residual", True),
        "tie_word_embeddings": model.bool("weight_tying", False),
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": 128001 if llama3 else 2,
        **_window(model, num_layers),
    }
    model.finish(harmless=_TRAINING)
    ignored.log(str(file))
    return values


def _hidden_dim(model: HFConfig, dim: int) -> int:
    """Return the width of the feed-forward by the trainer's rule. The published converter ignores part of this rule."""
    stated, multiple = model.int("hidden_dim", None), model.int("multiple_of", 256)
    multiplier = model.float("ffn_dim_multiplier", None)
    if stated is not None:
        return stated
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple * -(-width // multiple)


def _window(model: HFConfig, num_layers: int) -> dict[str, Any]:
    """Return the config keys of a sliding window, which only the trainer's fmha kernel applies."""
    window = model.int("sliding_window", None)
    kernel = model.choice("attn_impl", _ATTENTION_KERNELS, "sdpa")
    if window is None:
        return {}
    if kernel != "fmha":
        logger.warning(
            "%s: sliding_window=%d: ignored, since the trainer ignores it with attn_impl=%s",
            model.source,
            window,
            kernel,
        )
        return {}
    return {"sliding_window": window, "layer_types": ["sliding_attention"] * num_layers}


def _reject_other_models(model: HFConfig) -> None:
    """Reject models of lingua's other trainers.

    Raises:
        ConfigError: a key belongs to another kind of model.
    """
    name = model.get("model_name", None)
    if name is not None and str(name).lower() not in ("llama", "llamacanon", "transformer"):
        raise ConfigError(
            f"{model.source}: model_name={name!r} is a linear model, which is not supported: only the transformers of "
            "lingua's apps/main (Llama and LlamaCanon) are"
        )
    for key, kind in _OTHER_MODELS.items():
        if model.values.get(key) is not None:
            raise ConfigError(
                f"{model.source}: {key}={model.values[key]!r} belongs to {kind}, which is not supported: only the "
                "transformers of lingua's apps/main (Llama and LlamaCanon) are"
            )
        model.get(key, None)
    model.choice("mlp_type", (None,), None)
