"""Attention layers on a GPU: norm, rotation, scaling and cache write fused into one kernel or into attention itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.layers.attention import Attention
from lamella.layers.context import require_batch
from lamella.layers.rotary import Positions
from lamella.layers.state_modules import PagedAttention
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.attention.paged import is_few_decodes
from lamella.ops.backend import use_fused
from lamella.ops.operands import HeadNorms, HeadSizes, QKVSteps
from lamella.ops.qkv import prepare_qkv


def use_attention_kernels(model: nn.Module) -> None:
    """Convert the attention layers of a model to `KernelAttention` in place.

    The modules stay the same objects, because other parts of the engine refer to them.
    """
    for module in model.modules():
        if type(module) is Attention and isinstance(module.attention, PagedAttention):
            module.__class__ = KernelAttention


class KernelAttention(Attention):
    """Attention layer that computes the result of its base class with fewer kernels.

    Plain forwards use the base class, and so do devices on which fused kernels are off.
    """

    attention: PagedAttention

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        if require_batch().blocks is None or not use_fused(entry.source):
            return super().forward(positions, entry)
        # A query/key norm comes before the convolution, which then cannot be fused into the projection.
        canon, norms = self.canon, self.head_norm is not None or self.q_norm is not None
        is_fused = canon is not None and not norms and entry.fuses(self.qkv_proj, canon)
        qkv = entry.project(self.qkv_proj, canon if is_fused else None)
        return self.o_proj(self._attend(positions, qkv, is_fused).flatten(1))

    def _attend(self, positions: Positions, qkv: Tensor, convolved: bool) -> Tensor:
        """Write keys and values to the cache and return the attention output.

        The operations before attention run as one kernel, or inside the attention kernel if few requests decode. These
        run separately: a norm over all heads, a norm that rounds twice, and a canon when requests have several new
        tokens.

        Args:
            positions: positions of the tokens.
            qkv: projected [q | k | v], (T, (H + 2 * KV) * D).
            convolved: whether the canon has been applied already.

        Returns:
            (T, H, D).
        """
        rope = None if self.rotary is None else positions.rope(self.rotary)
        q_scale = None if self.temperature is None else positions.temperature(self.temperature)
        norms, step, canon = None, None, None if convolved else self.canon
        if self.head_norm is not None:
            # The kernel norms before it rotates. A rotation does not change the RMS of a head.
            norms = HeadNorms(self.head_norm.weight, self.head_norm.weight, self.head_norm.eps)
        elif self.q_norm is not None and self.k_norm is not None:
            separate = self.config.qk_norm_scope == "full" or self.q_norm.round_twice
            if separate or (canon is not None and not canon.is_step):
                q, k, v = qkv.split(self.sizes, dim=-1)
                qkv = torch.cat((*self.normalize(q, k), v), dim=-1)
            else:
                norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        if canon is not None and canon.is_step:
            step = canon.step()
        elif canon is not None:
            qkv = canon(qkv)
        steps = QKVSteps(HeadSizes(self.heads, self.kv_heads, self.config.head_dim), norms, rope, q_scale)
        if step is None and is_few_decodes(require_batch().ragged):
            return self.attention.decode(qkv, steps)
        return self.attention.read(prepare_qkv(qkv, steps, self.attention.cache(), step)[0])
