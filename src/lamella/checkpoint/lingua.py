"""Lingua checkpoints of PhysicsLM4: `params.json` + `consolidated.pth`, as the released LlamaCanon models come.

Key and name mapping: PhysicsLM4, huggingface/modeling_llama_canon.py. These rotate adjacent channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.checkpoint.json_file import read_json
from lamella.errors import CheckpointError
from lamella.models.hf_config import HFConfig

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
# A tied head stands in the file a second time, under this name.
TIED_HEAD = "output.tied_module.weight"

# How the model was initialised and trained.
_TRAINING = ["init_base_std", "init_std_factor", "seed", "z_loss", "max_seqlen", "multiple_of", "ffn_dim_multiplier"]
_LLAMA3_VOCABULARY = 128256


def find_lingua(folder: Path) -> Path | None:
    """The folder that holds params.json and consolidated.pth: this one or its `default`, if either."""
    for candidate in (folder, folder / "default"):
        if (candidate / "params.json").is_file() and (candidate / "consolidated.pth").is_file():
            return candidate
    return None


def read_params(file: Path) -> dict[str, Any]:
    """params.json as the values of a LlamaCanon `config.json`.

    The files do not say which tokens begin and end a text. The 8B models have Llama 3's vocabulary, the others
    Llama 2's; the published converter writes Llama 2's ids for all.
    """
    params = HFConfig(read_json(file), str(file))
    model = HFConfig(params.mapping("model"), f"{file}: model")
    if not model.values:
        raise CheckpointError(f"{file}: no section 'model'")
    data = HFConfig(params.mapping("data"), f"{file}: data")
    dim = model.int("dim")
    vocab_size = model.int("vocab_size")
    llama3 = vocab_size == _LLAMA3_VOCABULARY
    model.choice("sliding_window", (None,), None)
    values = {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": model.int("hidden_dim", 256 * ((dim * 8 + 767) // 768)),
        "num_hidden_layers": model.int("n_layers"),
        "num_attention_heads": model.int("n_heads"),
        "num_key_value_heads": model.int("n_kv_heads", None),
        "head_dim": model.int("head_dim", None),
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
    }
    model.finish(harmless=_TRAINING)
    return values
