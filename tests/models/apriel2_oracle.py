"""Apriel2 in plain fp64 torch, from the file's own keys; shares no code with the package, not even the config reader.

Recurrent mixers are computed token by token; the formulas are those of the published modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F


class Apriel2ReferenceModel:
    """Logits (1, S, V) of ids (1, S). `placement` names the mixer of each stochastic layer, else the main one."""

    def __init__(self, folder: Path, placement: list[str] | None = None) -> None:
        self.values = json.loads((folder / "config.json").read_text())
        self.tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.placement = placement
        self.head_eps = self.values["head"]["normalization"]["epsilon"]

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.tensors["model.embed_tokens.weight"][ids[0]]
        decoder = self.values["decoder"]
        for index in range(decoder["num_blocks"]):
            if decoder["type"] == "fixed":
                block = decoder["block"]
            else:
                block = decoder["blocks"][decoder["pattern"][index % len(decoder["pattern"])]]
            at = f"model.decoder.blocks.{index}."
            eps, kind = block["normalization"].get("epsilon", self.head_eps), block["normalization"]["type"]
            mixer, name = block["mixer"], f"{at}mixer."
            if mixer["type"] == "stochastic":
                active = self.placement[index] if self.placement else mixer["main_mixer_name"]
                mixer, name = mixer["mixers"][active], f"{name}mixers.{active}."
            x = x + getattr(self, mixer["type"])(self.norm(x, f"{at}input_layernorm", eps, kind), mixer, name)
            x = x + self.mlp(self.norm(x, f"{at}post_attention_layernorm", eps, kind), block["mlp"], f"{at}mlp.")
        x = self.norm(x, "model.norm", self.head_eps, "rms_norm")
        tied = self.values.get("tie_word_embeddings")
        return (x @ self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T)[None]

    def norm(self, x: Tensor, name: str, eps: float, kind: str) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        if kind == "layer_norm":
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            return scaled * weight + self.tensors[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def lin(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def mlp(self, x: Tensor, config: dict[str, Any], name: str) -> Tensor:
        act = {
            "silu": F.silu,
            "relu2": lambda y: F.relu(y) ** 2,
            "gelu_pytorch_tanh": lambda y: F.gelu(y, approximate="tanh"),
        }
        up = self.lin(x, f"{name}up_proj")
        function = act[config["activation"]]
        if f"{name}gate_proj.weight" in self.tensors:
            return self.lin(function(self.lin(x, f"{name}gate_proj")) * up, f"{name}down_proj")
        return self.lin(function(up), f"{name}down_proj")

    def attention(self, x: Tensor, config: dict[str, Any], name: str) -> Tensor:
        heads, groups, dim = config["heads"], config["head_groups"], config["head_size"]
        length = x.shape[0]
        q, k, v = (self.lin(x, f"{name}{part}_proj").view(length, -1, dim) for part in "qkv")
        frequency = config["rotary"]["theta"] ** (-torch.arange(0, dim, 2).double() / dim)
        angle = torch.arange(length).double()[:, None, None] * frequency
        q, k = (
            torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
            for a, b in (side.chunk(2, -1) for side in (q, k))
        )
        out = torch.empty(length, heads, dim, dtype=torch.float64)
        window = config.get("window_size") or length
        for h in range(heads):
            for t in range(length):
                first = max(0, t - window + 1)
                scores = k[first : t + 1, h // (heads // groups)] @ q[t, h] * dim**-0.5
                out[t, h] = scores.softmax(0) @ v[first : t + 1, h // (heads // groups)]
        return self.lin(out.flatten(1), f"{name}o_proj")

    sliding_window = attention

    def conv(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        kernel, bias = weight.shape[-1], self.tensors.get(f"{name}.bias", torch.zeros(()))
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for tap in range(kernel):
                if t - (kernel - 1) + tap >= 0:
                    out[t] += weight[:, 0, tap] * x[t - (kernel - 1) + tap]
        return F.silu(out + bias)

    @staticmethod
    def rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        """One head: q and k (S, K), v (S, V), log_decay (S,) or (S, K), beta (S,)."""
        state, out = torch.zeros(k.shape[1], v.shape[1], dtype=torch.float64), torch.empty_like(v)
        for t in range(k.shape[0]):
            query = q[t] / (q[t] @ q[t] + 1e-6).sqrt() * k.shape[1] ** -0.5
            key = k[t] / (k[t] @ k[t] + 1e-6).sqrt()
            state = state * log_decay[t].exp().reshape(-1, 1)
            state = state + torch.outer(key, beta[t] * (v[t] - key @ state))
            out[t] = query @ state
        return out

    def gate(self, o: Tensor, z: Tensor, weight: str, eps: float, activation: str) -> Tensor:
        normed = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * self.tensors[weight]
        return normed * (F.silu(z) if activation == "silu" else z.sigmoid())

    def gdn(self, x: Tensor, config: dict[str, Any], name: str) -> Tensor:
        nv, nk, dk, dv = (config[key] for key in ("value_heads", "key_heads", "key_head_dim", "value_head_dim"))
        q, k, v, z = self.lin(x, f"{name}in_proj_qkvz").split([nk * dk, nk * dk, nv * dv, nv * dv], -1)
        b, a = self.lin(x, f"{name}in_proj_ba").split([nv, nv], -1)
        q, k, v = self.conv(torch.cat((q, k, v), -1), f"{name}convolution").split([nk * dk, nk * dk, nv * dv], -1)
        rate = self.tensors[f"{name}A_log"].exp() * F.softplus(a + self.tensors[f"{name}dt_bias"])
        outs = []
        for h in range(nv):
            key = slice(h // (nv // nk) * dk, (h // (nv // nk) + 1) * dk)
            value = slice(h * dv, (h + 1) * dv)
            o = self.rule(q[:, key], k[:, key], v[:, value], -rate[:, h], b[:, h].sigmoid())
            outs.append(self.gate(o, z[:, value], f"{name}norm.weight", config.get("norm_eps", 1e-5), "silu"))
        return self.lin(torch.cat(outs, -1), f"{name}out_proj")

    def kda(self, x: Tensor, config: dict[str, Any], name: str) -> Tensor:
        heads, dim = config["heads"], config["head_dim"]
        q, k, v = (self.conv(self.lin(x, f"{name}{part}_proj"), f"{name}{part}_conv") for part in "qkv")
        f, z = (self.lin(self.lin(x, f"{name}{part}_a_proj"), f"{name}{part}_b_proj") for part in "fg")
        beta = self.lin(x, f"{name}beta_proj").sigmoid()
        norm = config.get("normalization", {})
        outs = []
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            rate = self.tensors[f"{name}A_log"][h].exp() * F.softplus(f[:, part] + self.tensors[f"{name}dt_bias"][part])
            o = self.rule(q[:, part], k[:, part], v[:, part], -rate, beta[:, h])
            eps, activation = norm.get("epsilon", 1e-5), norm.get("activation", "silu")
            outs.append(self.gate(o, z[:, part], f"{name}norm.weight", eps, activation))
        return self.lin(torch.cat(outs, -1), f"{name}o_proj")

    def mamba(self, x: Tensor, config: dict[str, Any], name: str) -> Tensor:
        size, inner, narrow = config["state_size"], config["d_inner"], config["d_xb"]
        repeats = inner // narrow
        z, u, b, c = self.lin(x, f"{name}in_proj").split([inner, narrow, narrow, inner], -1)

        def repeat(y: Tensor) -> Tensor:
            groups = y.split(size, -1)
            return torch.cat([group for group in groups for _ in range(repeats)], -1)

        if config.get("repeat_kv_before_conv", True):
            u = self.conv(repeat(u), f"{name}conv1d")
        else:
            u = repeat(self.conv(u, f"{name}conv1d"))
        b = repeat(b)
        # The projection adds the bias, and the scan adds it again.
        step = self.lin(self.lin(x, f"{name}dt_in_proj"), f"{name}dt_proj")
        step = F.softplus(step + self.tensors.get(f"{name}dt_proj.bias", torch.zeros(())))
        rates, out = -self.tensors[f"{name}A_log"].exp(), torch.zeros(x.shape[0], inner, dtype=torch.float64)
        for channel in range(inner):
            head = slice(channel // size * size, (channel // size + 1) * size)
            state = torch.zeros(size, dtype=torch.float64)
            for t in range(x.shape[0]):
                delta = step[t, channel]
                state = state * (delta * rates[channel]).exp() + delta * u[t, channel] * b[t, head]
                out[t, channel] = state @ c[t, head]
        out = (out + self.tensors[f"{name}D"] * u) * F.silu(z)
        return self.lin(out, f"{name}out_proj")
