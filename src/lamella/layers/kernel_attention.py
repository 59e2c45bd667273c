"""Attention layers on a GPU: the steps before attention in one kernel, or in attention's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.layers.attention import Attention
from lamella.layers.block_input import BlockInput
from lamella.layers.context import require_batch
from lamella.layers.rotary import Positions
from lamella.layers.state_modules import PagedAttention
from lamella.ops.attention.paged import is_few_decodes
from lamella.ops.backend import use_fused
from lamella.ops.operands import HeadNorms, HeadSizes, QKVSteps
from lamella.ops.qkv import prepare_qkv


def use_attention_kernels(model: nn.Module) -> None:
    """Have the attention layers of a model compute an engine's steps as `KernelAttention`.

    The modules stay the same objects: other parts of the engine refer to them.
    """
    for module in model.modules():
        if type(module) is Attention and isinstance(module.attention, PagedAttention):
            module.__class__ = KernelAttention


class KernelAttention(Attention):
    """An attention layer that computes the same as its base class in fewer kernels.

    A plain forward, and operations that must be computed one by one, are left to the base class.
    """

    attention: PagedAttention

    def forward(self, positions: Positions, entry: BlockInput) -> Tensor:
        """(T, hidden_size) -> (T, hidden_size)."""
        if require_batch().blocks is None or not use_fused(entry.source):
            return super().forward(positions, entry)
        # Behind a query/key norm the convolution cannot be the projection's own.
        canon, norms = self.canon, self.head_norm is not None or self.q_norm is not None
        within = canon is not None and not norms and entry.fuses(self.qkv_proj, canon)
        qkv = entry.project(self.qkv_proj, canon if within else None)
        return self.o_proj(self._attend(positions, qkv, within).flatten(1))

    def _attend(self, positions: Positions, qkv: Tensor, convolved: bool) -> Tensor:
        """Return attention's output (T, H, D) of the projected [q | k | v], with keys and values in the cache.

        The steps before attention are one kernel, or a part of attention's own where few requests decode. Exceptions
        are computed separately: a norm over all heads or one that rounds twice, and a canon in a step in which requests
        have several tokens each.
        """
        rope = None if self.rotary is None else positions.rope(self.rotary)
        q_scale = None if self.temperature is None else positions.temperature(self.temperature)
        norms, step, canon = None, None, None if convolved else self.canon
        if self.head_norm is not None:
            # Before the rotation, which leaves the norm as it is.
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
