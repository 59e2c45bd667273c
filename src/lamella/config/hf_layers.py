"""Readers of `config.json` keys that many decoders share: head size, activation, biases, windows, model-level keys.

RoPE: see `hf_rope`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lamella.config.feed_forward import ACTIVATIONS
from lamella.config.hf_config import HFConfig
from lamella.config.model import LayerConfig, ModelConfig
from lamella.config.parts import NormConfig
from lamella.errors import ConfigError


def read_head_dim(config: HFConfig) -> int:
    """Return `head_dim`, by default `hidden_size` divided by the number of heads."""
    hidden_size, heads = config.int("hidden_size"), config.int("num_attention_heads")
    head_dim = config.int("head_dim", None)
    if head_dim is None and hidden_size % heads:
        raise config.error("num_attention_heads", heads, f"a divisor of hidden_size={hidden_size}, or with a head_dim")
    return head_dim or hidden_size // heads


# Names of activations in transformers (ACT2FN) -> name here. Several names denote the same function, computed in
# different ways.
_ACT2FN = {
    "swish": "silu",
    "linear": "identity",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}


def read_activation(config: HFConfig, key: str = "hidden_act") -> str:
    """Return the name of an activation here, from its name in transformers' ACT2FN.

    Raises:
        ConfigError: the name is unknown, or denotes a function with learned weights (prelu, xielu).
    """
    name = config.get(key, "silu")
    known = [other for other in (*ACTIVATIONS, *_ACT2FN) if other != "identity"]
    if not isinstance(name, str) or name not in known:
        raise config.error(key, name, f"one of {', '.join(sorted(known))}")
    return _ACT2FN.get(name, name)


def read_output_bias(config: HFConfig, stated: bool) -> bool:
    """Return True if `o_proj` has a bias.

    `attention_bias` is also true in files of models with biases only in the query, key and value projections. So the
    checkpoint's tensors decide, if their names are available.

    Args:
        config: the model's config file.
        stated: `attention_bias` of the file.
    """
    tensors = config.list_tensors() if stated else None
    if tensors is None or any(name.endswith("o_proj.bias") for name in tensors):
        return stated
    config.say("attention_bias=true, and no o_proj.bias in the files: o_proj has none")
    return False


def read_windows(config: HFConfig, num_layers: int, window: int | None, first: int) -> list[int | None]:
    """Return the attention window of each layer: by `layer_types`, or `window` for all layers from `first` on."""
    if config.get("layer_types", None) is None:
        return [window if index >= first else None for index in range(num_layers)]
    allowed = f"a list of num_hidden_layers={num_layers} names"
    types = config.list("layer_types", allowed) or []
    if len(types) != num_layers:
        raise config.error("layer_types", config.get("layer_types"), allowed)
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.error("layer_types", kind, "full_attention or sliding_attention")
    if "sliding_attention" in types and window is None:
        raise ConfigError(f"{config.source}: layer_types has sliding_attention, but no sliding_window is in force")
    return [window if kind == "sliding_attention" else None for kind in types]


def read_model(
    config: HFConfig,
    architecture: str,
    layers: Iterable[LayerConfig],
    eps: float,
    max_positions: int,
    *,
    defaults: Mapping[str, int] | None = None,
    length_is_known: bool = True,
    harmless: Iterable[str] = (),
) -> ModelConfig:
    """Read the model-level keys, and reject keys that no reader has read.

    Args:
        config: the model's config file.
        architecture: name of the architecture.
        layers: layer configs, in order.
        eps: of the norm after the last layer.
        max_positions: longest context that the file supports, in tokens.
        defaults: default values of the architecture for vocab_size, hidden_size, bos_token_id and eos_token_id. Sizes
            without a default are required.
        length_is_known: False if `max_positions` is a default, not a limit of the file.
        harmless: keys of the architecture that do not change what is computed.

    Returns:
        The model config.

    Raises:
        ConfigError: a key is missing, not supported, or unknown.
    """
    for key in ("is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        config.choice(key, (False, {}), False)  # transformers writes these keys to every file
    defaults = defaults or {}
    bos = config.token_ids("bos_token_id", defaults.get("bos_token_id", ()))

    def size(key: str) -> int:
        return config.int(key, defaults[key]) if key in defaults else config.int(key)

    model = ModelConfig(
        architecture=architecture,
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        layers=tuple(layers),
        norm=NormConfig(eps=eps),
        tie_word_embeddings=config.bool("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        length_is_known=length_is_known,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id", defaults.get("eos_token_id", ())),
    )
    config.finish(harmless)
    return model
