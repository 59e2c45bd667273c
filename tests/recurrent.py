"""A mixer with a recurrent matrix for each request, as a model author would add one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers import randomize, save_lamella
from lamella import register_architecture
from lamella.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from lamella.config.hf_config import HFConfig
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ConvHistory
from lamella.layers.sublayer_input import SublayerInput
from lamella.models.base import CausalLM
from lamella.parity.reference_model import MIXERS, ReferenceModel
from lamella.parity.sites import Tap
from lamella.state.spec import SlotState


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """`S_t = decay * S_{t-1} + k_t v_t^T`, `y_t = q_t S_t` for each head."""

    num_heads: int
    head_dim: int
    decay: float = 0.9

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None) -> Recurrent:
        return Recurrent(self, kit, hidden_size, prefix)


def step(config: RecurrentConfig, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v (n, heads * D) of one request; the outputs of its n tokens, and the state after them."""
    q, k, v = (x.unflatten(-1, (config.num_heads, config.head_dim)).to(state.dtype) for x in (q, k, v))
    outputs = []
    for t in range(q.shape[0]):
        state = config.decay * state + k[t, :, :, None] * v[t, :, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(outputs).flatten(1), state


class Recurrent(nn.Module):
    def __init__(self, config: RecurrentConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.num_heads, config.head_dim
        self.qkv_proj = kit.qkv_linear(hidden_size, heads, heads, dim, False, f"{prefix}.qkv_proj")
        self.o_proj = kit.row_linear(heads * dim, hidden_size, False, f"{prefix}.o_proj")
        self.state = kit.slot_state((SlotState((heads, dim, dim), torch.float32),), f"{prefix}.state")
        self.state.parts = {"mix": self.mix}

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        qkv = entry.project(self.qkv_proj)
        return self.o_proj(self.state.run("mix", (qkv,), qkv.shape[1] // 3))

    def mix(self, qkv: Tensor, out: Tensor | None) -> Tensor:
        batch = require_batch().ragged
        (rows,), slots = self.state.current() or ((None,), None)
        parts = [part.split(batch.query_lens) for part in qkv.chunk(3, -1)]
        outputs = []
        for index, (new, total) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            state = torch.zeros(self.state.specs[0].shape, device=qkv.device)
            if rows is not None and new < total:
                state = rows[slots[index]]
            output, state = step(self.config, *(part[index] for part in parts), state)
            if rows is not None:
                rows[slots[index]] = state
            outputs.append(output.to(qkv.dtype))
        y = torch.cat(outputs)
        return y if out is None else out.copy_(y)


def plain(oracle: ReferenceModel, config: RecurrentConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    q, k, v = (oracle.linear(x, f"{name}.{part}_proj", tap) for part in "qkv")
    state = torch.zeros(
        config.num_heads, config.head_dim, config.head_dim, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return oracle.linear(step(config, q, k, v, state)[0].to(x.dtype), f"{name}.o_proj", tap)


MIXERS[RecurrentConfig] = plain


class HybridForCausalLM(CausalLM):
    """A recurrent layer, a windowed one, a full one."""

    @classmethod
    def read_config(cls, config: HFConfig) -> ModelConfig:
        norm = NormConfig(eps=1e-5)

        def attention(window: int | None) -> AttentionConfig:
            rope = RopeConfig(dim=16)
            return AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=rope, window=window)

        mixers = (RecurrentConfig(num_heads=2, head_dim=16), attention(6), attention(None))
        feed_forward = MLPConfig(intermediate_size=48)
        return ModelConfig(
            architecture="HybridForCausalLM",
            vocab_size=config.int("vocab_size"),
            hidden_size=config.int("hidden_size"),
            layers=tuple(LayerConfig(mixer=mixer, feed_forward=feed_forward, norm=norm) for mixer in mixers),
            norm=norm,
            max_position_embeddings=512,
        )


def hybrid_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A random tiny hybrid on disk."""
    config = {"architectures": ["HybridForCausalLM"], "vocab_size": 128, "hidden_size": 32}
    register_architecture("HybridForCausalLM", HybridForCausalLM)
    model = HybridForCausalLM.from_config(config)
    randomize(model, seed)
    return save_lamella(model, config, folder)
