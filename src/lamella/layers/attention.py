"""The attention mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamella.config import AttentionConfig
from lamella.layers.block_input import BlockInput
from lamella.layers.canon import Canon
from lamella.layers.context import require_batch
from lamella.layers.holders import PagedAttention
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm
from lamella.layers.rotary import Positions, Rotary, Turn
from lamella.layers.short_conv import ConvHistory
from lamella.ops.attention.paged import is_few_decodes
from lamella.ops.backend import use_fused
from lamella.ops.operands import HeadNorms, HeadSizes, QKVSteps, Rope
from lamella.ops.qkv import prepare_qkv
from lamella.ops.rms_norm import rms_norm
from lamella.ops.rotary import rotate
from lamella.parallel.sharding import Split
from lamella.state.spec import PagedState


@dataclass(frozen=True)
class AttentionForm:
    """Which operations an attention layer runs between its projections and attention itself.

    Attributes:
        pairs: channels that are turned by their positions, in pairs; 0 for none.
        interleaved: whether a pair's channels are neighbours.
        eps: of the norm without a weight; None where there is no such norm.
        scales: whether queries are multiplied by something.
    """

    pairs: int
    interleaved: bool
    eps: float | None
    scales: bool

    @classmethod
    def of(cls, config: AttentionConfig) -> AttentionForm:
        """A layer's own."""
        return cls(
            pairs=config.rope.dim // 2 if config.rope else 0,
            interleaved=config.rope is not None and config.rope.interleaved,
            eps=config.qk_norm.eps if config.qk_norm and not config.qk_norm_weight else None,
            scales=config.temperature is not None,
        )

    def covers(self, other: AttentionForm) -> bool:
        """Whether this has what the other has, and so does it where what is more changes nothing."""
        turns = other.pairs == 0 or (other.pairs, other.interleaved) == (self.pairs, self.interleaved)
        return turns and other.eps in (None, self.eps) and other.scales <= self.scales

    def joined(self, other: AttentionForm) -> AttentionForm | None:
        """The least that covers both; None where nothing does."""
        turning = self if self.pairs else other
        eps = other.eps if self.eps is None else self.eps
        both = AttentionForm(turning.pairs, turning.interleaved, eps, self.scales or other.scales)
        return both if both.covers(self) and both.covers(other) else None


class Attention(nn.Module):
    """Projections, query/key norm, canon over [q|k|v], rotation, temperature, attention, output projection.

    What it does by positions is in its `form` and in the `Turn` of a step, so that layers that differ in nothing else
    can be one program.
    """

    unit_norm: Tensor

    def __init__(
        self, config: AttentionConfig, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None
    ) -> None:
        super().__init__()
        self.config, self.device = config, kit.device
        heads, kv_heads = kit.share.heads(config.num_heads), kit.share.kv_heads(config.num_kv_heads)
        dim = config.head_dim
        queries, keys = heads.times(dim), kv_heads.times(dim)
        self.heads, self.kv_heads = heads.size, kv_heads.size
        self.sizes = (queries.size, keys.size, keys.size)
        self.qkv_proj = kit.qkv_linear(
            hidden_size, config.num_heads, config.num_kv_heads, dim, config.qkv_bias, f"{prefix}.qkv_proj"
        )
        self.o_proj = kit.row_linear(config.query_size, hidden_size, config.output_bias, f"{prefix}.o_proj")
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm and not config.qk_norm_weight:
            self._make_unit_norm()
        elif config.qk_norm and config.qk_norm_scope == "full":
            self.q_norm, self.k_norm = (kit.column_norm(split, config.qk_norm.eps) for split in (queries, keys))
        elif config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(dim, config.qk_norm.eps, kit.device) for _ in "qk")
        self.canon: Canon | None = None
        if config.canon:
            assert history is not None
            self.canon = Canon(config.canon, Split.join((queries, keys, keys)), kit, history, "mixer")
        self.rotary = Rotary(config.rope, kit.device, config.chunk) if config.rope else None
        self.form = AttentionForm.of(config)
        self.normed: Tensor | None = None
        spec = PagedState(kv_heads.size, dim, kit.dtype, config.window, config.chunk)
        self.attention = kit.attention(heads.size, config.scale, spec, f"{prefix}.attention")

    def take(self, form: AttentionForm) -> None:
        """Run the operations of a form that covers the layer's own, from now on; the result is the same."""
        own = AttentionForm.of(self.config)
        assert form.covers(own)
        self.form = form
        if form.eps is not None:
            self._make_unit_norm()
            # Also where it counts: layers of one form have the same parts.
            self.normed = torch.tensor(own.eps is not None, device=self.device)

    def _make_unit_norm(self) -> None:
        ones = torch.ones(self.config.head_dim, dtype=torch.float32, device=self.device)
        self.register_buffer("unit_norm", ones, persistent=False)

    def turn(self, positions: Positions) -> Turn:
        """What the step does by positions."""
        rope, scale = None, None
        if self.rotary is not None:
            rope = Rope(*positions.angles(self.rotary), self.form.interleaved)
        elif self.form.pairs:
            rope = Rope(*positions.identity(self.form.pairs), self.form.interleaved)
        if self.config.temperature is not None:
            scale = positions.temperature(self.config.temperature)
        elif self.form.scales:
            scale = positions.identity(1)[0].squeeze(1)
        return Turn(rope, scale, self.normed)

    def forward(self, positions: Positions, entry: BlockInput) -> Tensor:
        """(T, hidden_size) -> (T, hidden_size)."""
        # Behind a query/key norm the convolution cannot be the projection's own.
        norms = self.form.eps is not None or self.q_norm is not None
        canon = None if norms or not entry.fuses(self.qkv_proj, self.canon) else self.canon
        qkv = entry.project(self.qkv_proj, canon)
        turn = self.turn(positions) if positions.turn is None else positions.turn
        if isinstance(self.attention, PagedAttention) and use_fused(qkv) and require_batch().pages is not None:
            return self.o_proj(self._attend(turn, qkv, canon is not None).flatten(1))
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        if self.canon is not None:
            q, k, v = self.canon(torch.cat((q, k, v), dim=-1)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in (q, k, v))
        if turn.rope is not None:
            q, k = rotate(q, k, turn.rope)
        if self.form.eps is not None:
            normed = [rms_norm(part, self.unit_norm, self.form.eps) for part in (q, k)]
            if turn.normed is not None:
                normed = [torch.where(turn.normed, new, old) for new, old in zip(normed, (q, k), strict=True)]
            q, k = normed
        if turn.scale is not None:
            q = (q.float() * turn.scale[:, None, None]).to(q.dtype)
        return self.o_proj(self.attention(q, k, v).flatten(1))

    def _attend(self, turn: Turn, qkv: Tensor, convolved: bool) -> Tensor:
        """From the projected [q | k | v] to attention's output (T, H, D), with keys and values in their pages.

        What comes before attention is one kernel, or a part of attention's own where few requests decode, with
        exceptions that are computed apart: a norm over all heads or one that rounds twice, and a canon in a step in
        which requests have several tokens each.
        """
        config, batch = self.config, require_batch()
        assert isinstance(self.attention, PagedAttention)
        norms, step = None, None
        canon = None if convolved else self.canon
        if config.qk_norm and not config.qk_norm_weight:
            # Before the rotation, which leaves it as it is.
            norms = HeadNorms(self.unit_norm, self.unit_norm, config.qk_norm.eps)
        elif self.q_norm is not None and self.k_norm is not None:
            apart = config.qk_norm_scope == "full" or self.q_norm.round_twice
            if apart or (canon is not None and not canon.is_step):
                q, k, v = qkv.split(self.sizes, dim=-1)
                qkv = torch.cat((self._norm(q, self.q_norm), self._norm(k, self.k_norm), v), dim=-1)
            else:
                norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        if canon is not None and canon.is_step:
            step = canon.step()
        elif canon is not None:
            qkv = canon(qkv)
        steps = QKVSteps(HeadSizes(self.heads, self.kv_heads, config.head_dim), norms, turn.rope, turn.scale)
        if step is None and is_few_decodes(batch.ragged):
            return self.attention.decode(qkv, steps)
        return self.attention.read(prepare_qkv(qkv, steps, self.attention.cache(), step)[0])

    def _norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x (T, heads * D) normalised as a whole or head by head."""
        if self.config.qk_norm_scope == "full":
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.config.head_dim))).flatten(-2)
