"""LlamaCanon from its formulas: one sequence, no cache, fp64, no code shared with the package.

Tensors go by their Hugging Face names; `read_lingua` gives those of a lingua checkpoint the same names.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_version": "huggingface",
    "rope_dim": None,
    "canon_set": "",
    "canon_activation": False,
    "canon_residual": True,
    "qk_norm": False,
}
LINGUA = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "canonA": "canonA",
    "canonC": "canonC",
    **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"attention.{x}": f"self_attn.{x}" for x in ("q_norm", "k_norm", "canonB")},
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.canonD": "mlp.canonD",
}


def read_lingua(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of consolidated.pth; the caller interprets params.json."""
    state = torch.load(folder / "consolidated.pth", weights_only=True)["model"]
    return {from_lingua_name(name): tensor for name, tensor in state.items() if "tied_module" not in name}


def read_hf(folder: Path) -> tuple[dict[str, Tensor], dict]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors, json.loads((folder / "config.json").read_text())


def from_lingua_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    stem, leaf = name.rsplit(".", 1)
    if not stem.startswith("layers."):
        return f"{LINGUA[stem]}.{leaf}"
    _, index, part = stem.split(".", 2)
    return f"model.layers.{index}.{LINGUA[part]}.{leaf}"


class CanonReferenceModel:
    """`oracle(ids (1, S))` gives logits (1, S, V)."""

    def __init__(self, tensors: dict[str, Tensor], config: dict) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.config = DEFAULTS | {key: value for key, value in config.items() if value is not None}

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.tensors["model.embed_tokens.weight"][ids[0]]
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(x, f"model.layers.{index}")
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return (self.norm(x, "model.norm") @ head.T)[None]

    def layer(self, x: Tensor, name: str) -> Tensor:
        x = x + self.attention(self.canon(self.norm(x, f"{name}.input_layernorm"), "A", f"{name}.canonA"), name)
        u = self.canon(self.norm(x, f"{name}.post_attention_layernorm"), "C", f"{name}.canonC")
        gate_up = torch.cat([self.linear(u, f"{name}.mlp.{part}_proj") for part in ("gate", "up")], dim=-1)
        gate, up = self.canon(gate_up, "D", f"{name}.mlp.canonD").chunk(2, dim=-1)
        return x + self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj")

    def attention(self, u: Tensor, name: str) -> Tensor:
        q, k, v = (self.linear(u, f"{name}.self_attn.{part}_proj") for part in "qkv")
        if self.config["qk_norm"]:
            q, k = self.norm(q, f"{name}.self_attn.q_norm"), self.norm(k, f"{name}.self_attn.k_norm")
        widths = [part.shape[-1] for part in (q, k, v)]
        q, k, v = self.canon(torch.cat([q, k, v], -1), "B", f"{name}.self_attn.canonB").split(widths, -1)
        heads = self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads", heads)
        q, k = self.rotate(q.view(len(u), heads, -1)), self.rotate(k.view(len(u), kv_heads, -1))
        v = v.view(len(u), kv_heads, -1)
        out = []
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / q.shape[-1] ** 0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv_head])
        return self.linear(torch.cat(out, dim=-1), f"{name}.self_attn.o_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]

    def canon(self, x: Tensor, letter: str, name: str) -> Tensor:
        if letter not in self.config["canon_set"]:
            return x
        weight = self.tensors[f"{name}.weight"]
        padded = F.pad(x.T, (weight.shape[-1] - 1, 0))[None]
        y = F.conv1d(padded, weight, self.tensors.get(f"{name}.bias"), groups=len(weight))[0].T
        if self.config["canon_activation"]:
            y = F.silu(y)
        return x + y if self.config["canon_residual"] else y

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the first rope_dim channels of each head of x (S, heads, D), pair by pair."""
        rope_dim = self.config["rope_dim"]
        rope_dim = x.shape[-1] if rope_dim is None else min(rope_dim, x.shape[-1])
        y = x.clone()
        for i in range(rope_dim // 2):
            angle = torch.arange(len(x), dtype=torch.float64)[:, None] * self.config["rope_theta"] ** (
                -2 * i / rope_dim
            )
            a, b = (2 * i, 2 * i + 1) if self.config["rope_version"] == "lingua" else (i, i + rope_dim // 2)
            y[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
            y[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
        return y
