"""A second opinion: every architecture's forward in plain torch, written again from the config.

It shares the config and the checkpoint's tensors with the engine, and no layer, kernel, state or loader, so that one
mistake cannot stand in both. It computes every operation as `transformers`' modeling code does, rounding after each:
in float32 and float64 it is the truth, and in bfloat16 its error is the one that users of `transformers` live with.

A new kind of mixer or feed-forward adds its plain form to `MIXERS` or `FEED_FORWARDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.config import (
    AttentionConfig,
    CanonConfig,
    DynamicScaling,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LayerConfig,
    Llama3Scaling,
    LongRopeScaling,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    YarnScaling,
)
from lamella.errors import ConfigError
from lamella.parity.recurrences import gated_delta_net, kimi_delta, mamba
from lamella.parity.sites import Tap, untouched

ATTENTION = ("eager", "sdpa")


class ReferenceModel:
    """One full causal forward of one sequence from nothing: no cache, no batch, no chunk."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str = "eager",
    ) -> None:
        """`weights` by our parameter paths, projections apart: `model.layers.0.mixer.q_proj.weight`."""
        assert attention in ATTENTION
        self.config, self.dtype, self.device, self.attention = config, dtype, torch.device(device), attention
        self._weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], tap: Tap = untouched) -> Tensor:
        """Logits (n, vocab) in the oracle's dtype.

        `tap(site, value)` sees what every operation gives, as (n, channels), and returns what goes on.
        """
        x = self._weights["model.embed_tokens.weight"][torch.tensor(token_ids, device=self.device)]
        x = tap("embed_tokens", x)
        for index, layer in enumerate(self.config.layers):
            x = self._layer(layer, x, f"layers.{index}", tap)
        x = tap("norm", self.norm(tap("norm.residual", x), self.config.norm, "norm"))
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return tap("lm_head", F.linear(x, self._weights[head]))

    def _layer(self, layer: LayerConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
        for part, config, canon, kinds in (
            ("mixer", layer.mixer, layer.mixer_canon, MIXERS),
            ("feed_forward", layer.feed_forward, layer.feed_forward_canon, FEED_FORWARDS),
        ):
            if type(config) not in kinds:
                raise ConfigError(f"{name}.{part}: the reference has no plain form of {type(config).__name__}")
            x = tap(f"{name}.{part}_norm.residual", x)
            y = tap(f"{name}.{part}_norm", self.norm(x, layer.norm, f"{name}.{part}_norm"))
            y = tap(f"{name}.{part}_canon", self.canon(y, canon, f"{name}.{part}_canon")) if canon else y
            x = x + kinds[type(config)](self, config, y, f"{name}.{part}", tap)
        return x

    def fp32_parameter(self, name: str) -> Tensor:
        """A parameter in fp32, or fp64 for an fp64 oracle, as far as its dtype here is that exact."""
        weight = self._weights[f"model.{name}"]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def find_wide(self, name: str) -> Tensor | None:
        """The same of one that may not be there."""
        return self.fp32_parameter(name) if f"model.{name}" in self._weights else None

    def norm(self, x: Tensor, config: NormConfig, name: str | None) -> Tensor:
        """The norm whose weight has this name, or none."""
        if config.kind == "layer":
            weight, bias = (self.fp32_parameter(f"{name}.{part}") for part in ("weight", "bias"))
            return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, config.eps).to(x.dtype)
        x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + config.eps)
        return x_fp32.to(x.dtype) if name is None else self._weights[f"model.{name}.weight"] * x_fp32.to(x.dtype)

    def linear(self, x: Tensor, name: str, tap: Tap) -> Tensor:
        weight, bias = self._weights[f"model.{name}.weight"], self._weights.get(f"model.{name}.bias")
        return tap(name, F.linear(x, weight, bias))

    def experts(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """The experts' weights (E, H, 2 I), gates first, and (E, I, H), as a file has them whole or one by one."""
        prefix = f"model.{name}"
        if f"{prefix}.gate_up_proj" in self._weights:
            return self._weights[f"{prefix}.gate_up_proj"], self._weights[f"{prefix}.down_proj"]
        gate, up, down = (
            torch.stack([self._weights[f"{prefix}.{index}.{part}_proj.weight"].T for index in range(count)])
            for part in ("gate", "up", "down")
        )
        return torch.cat((gate, up), -1), down

    def canon(self, x: Tensor, config: CanonConfig, name: str) -> Tensor:
        weight, bias = self._weights[f"model.{name}.weight"], self._weights.get(f"model.{name}.bias")
        padded = F.pad(x.T, (config.kernel - 1, 0))
        if self.dtype == torch.float64:  # which torch's convolution needs 40 times longer for
            windows = padded.unfold(-1, config.kernel, 1)
            y = ((windows * weight).sum(-1) + (0 if bias is None else bias[:, None])).T
        else:
            y = F.conv1d(padded[None], weight, bias, groups=weight.shape[0])[0].T
        y = F.silu(y) if config.activation else y
        return x + y if config.residual else y


def attention(oracle: ReferenceModel, config: AttentionConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    q, k, v = (oracle.linear(x, f"{name}.{part}_proj", tap) for part in "qkv")
    if config.qk_norm and config.qk_norm_weight:
        shape = (-1, config.head_dim) if config.qk_norm_scope == "head" else (1, -1)
        q, k = (
            oracle.norm(side.unflatten(-1, shape), config.qk_norm, site)
            for side, site in ((q, f"{name}.q_norm"), (k, f"{name}.k_norm"))
        )
        q, k = tap(f"{name}.q_norm", q.flatten(1)), tap(f"{name}.k_norm", k.flatten(1))
    if config.canon:
        joined = oracle.canon(torch.cat((q, k, v), -1), config.canon, f"{name}.canon")
        q, k, v = tap(f"{name}.canon", joined).split((config.query_size, config.kv_size, config.kv_size), -1)
    q, k, v = (side.unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for side in (q, k, v))  # (heads, n, D)
    turned = torch.cat((q, k))
    if config.rope:
        turned = _rotate(turned, *_angles(config.rope, x), config.rope)
    if config.qk_norm and not config.qk_norm_weight:
        turned = oracle.norm(turned, config.qk_norm, None)
    if config.temperature:
        positions = torch.arange(x.shape[0], device=x.device).float()
        grown = torch.log1p(torch.floor((positions + 1.0) / config.temperature.floor_scale))
        grown = (grown * config.temperature.scale + 1.0)[:, None]
        q, k = turned.split((config.num_heads, config.num_kv_heads))
        turned = torch.cat(((q * grown).to(q.dtype), k))
    turned = tap_turned(tap, name, config, turned.transpose(0, 1))
    q, k = turned.transpose(0, 1).split((config.num_heads, config.num_kv_heads))
    k, v = (side.repeat_interleave(config.num_heads // config.num_kv_heads, 0) for side in (k, v))
    y = _ATTEND[oracle.attention](q, k, v, config.scale, _visible(x.shape[0], config, x.device))
    return oracle.linear(tap(f"{name}.attention", y.transpose(0, 1).flatten(1)), f"{name}.o_proj", tap)


def mlp(oracle: ReferenceModel, config: MLPConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    sides = [oracle.linear(x, f"{name}.{part}_proj", tap) for part in (("gate", "up") if config.gated else ("up",))]
    if config.canon:
        joined = tap(f"{name}.canon", oracle.canon(torch.cat(sides, -1), config.canon, f"{name}.canon"))
        sides = list(joined.chunk(len(sides), -1))
    y = _ACTIVATIONS[config.activation](sides[0])
    y = y * sides[1] if config.gated else y
    return oracle.linear(tap(f"{name}.activation", y), f"{name}.down_proj", tap)


def tap_turned(tap: Tap, name: str, config: AttentionConfig, turned: Tensor) -> Tensor:
    """The site of what attention is given: queries and keys (n, heads, D), as one.

    Where attention sees chunks, the engine turns by positions in the chunk. This is another angle for all of a chunk
    alike, which no product of a query and a key shows; but the site would show it. So there the engine's angles stand.
    """
    site, rope, chunk = f"{name}.queries_keys", config.rope, config.chunk
    if tap is untouched or rope is None or chunk is None:
        return tap(site, turned.flatten(1)).view(turned.shape)
    positions, (frequencies, _) = torch.arange(turned.shape[0]), _frequencies(rope)
    here, there = ((at.float()[:, None] * frequencies).double() for at in (positions, positions % chunk))

    def turn(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
        return _rotate(x.double().transpose(0, 1), cos, sin, rope).transpose(0, 1)

    shown = turn(turned, there - here)
    shown = tap(site, shown.flatten(1)).view(shown.shape)
    return turn(shown, here - there).to(turned.dtype)


def moe(oracle: ReferenceModel, config: MoEConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Every expert of every token, of which those not chosen are given zeros."""
    logits = oracle.linear(x, f"{name}.router", tap)
    chosen, ids = logits.topk(config.top_k, dim=1)
    weights = torch.full_like(logits, -torch.inf).scatter(1, ids, chosen)
    weights = torch.sigmoid(weights.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    gate_up, down = oracle.experts(f"{name}.experts", config.num_experts)
    gate, up = torch.bmm(x[None] * weights.T[:, :, None], gate_up).chunk(2, -1)
    routed = torch.bmm(up * F.silu(gate), down).sum(0)
    routed = tap(f"{name}.experts", routed)
    if config.shared_size is None:
        return routed
    return mlp(oracle, MLPConfig(intermediate_size=config.shared_size), x, f"{name}.shared_expert", tap) + routed


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu6": lambda x: x.clamp(0, 6),
    "sqrtsoftplus": lambda x: torch.sqrt(F.softplus(x)),
    "tanh": torch.tanh,
}

MIXERS: dict[type, Callable[..., Tensor]] = {
    AttentionConfig: attention,
    GatedDeltaNetConfig: gated_delta_net,
    KimiDeltaConfig: kimi_delta,
    MambaConfig: mamba,
}
FEED_FORWARDS: dict[type, Callable[..., Tensor]] = {MLPConfig: mlp, MoEConfig: moe}


def _visible(length: int, config: AttentionConfig, device: torch.device) -> Tensor:
    """(n, n), true where a query (row) sees a key (column)."""
    keys = torch.arange(length, device=device)
    queries = keys[:, None]
    seen = (keys <= queries) & (queries - keys < (config.window or length))
    return seen if config.chunk is None else seen & (keys // config.chunk == queries // config.chunk)


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> Tensor:
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scale)[0]


_ATTEND = {"eager": _attend_eager, "sdpa": _attend_sdpa}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: RopeConfig) -> Tensor:
    """x (heads, n, D) with its first `rope.dim` channels turned.

    Adjacent channels are turned as complex numbers of at least fp32, and rounded once, as they are in the code that
    they come from (lingua, Llama 4).
    """
    turned, rest = x[..., : rope.dim], x[..., rope.dim :]
    if rope.interleaved:
        x_fp32 = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(turned.to(x_fp32).unflatten(-1, (-1, 2)).contiguous())
        joined = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    else:
        first, second = turned.chunk(2, -1)
        joined = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((joined, rest), -1)


def _frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """The angle of each pair at position 1, (dim / 2,) fp32, and what cos and sin are multiplied by."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    theta, scaling, factor = rope.theta, rope.scaling, 1.0
    if isinstance(scaling, DynamicScaling) and scaling.length > scaling.original_length:
        grown = scaling.factor * scaling.length / scaling.original_length - (scaling.factor - 1)
        theta *= grown ** (rope.dim / (rope.dim - 2))
    frequencies = 1.0 / theta**exponents
    if isinstance(scaling, Llama3Scaling):
        frequencies = _llama3(frequencies, scaling)
    elif isinstance(scaling, YarnScaling):
        frequencies, factor = _yarn(frequencies, rope, scaling), scaling.attention_factor
    elif isinstance(scaling, LongRopeScaling):
        frequencies, factor = frequencies / torch.tensor(scaling.factors), scaling.attention_factor
    elif scaling is not None and not isinstance(scaling, DynamicScaling):
        frequencies = frequencies / scaling.factor
    return frequencies, factor


def _angles(rope: RopeConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (n, dim / 2): fp32 angles by definition, in the dtype of x, or at least fp32 where interleaved."""
    frequencies, factor = _frequencies(rope)
    angles = torch.arange(x.shape[0]).float()[:, None] * frequencies
    if rope.interleaved:
        turns, dtype = (
            torch.polar(torch.ones_like(angles), angles) * factor,
            torch.promote_types(x.dtype, torch.float32),
        )
        return turns.real.to(x.device, dtype), turns.imag.to(x.device, dtype)
    cos, sin = (angles.cos() * factor, angles.sin() * factor)
    return cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Wavelengths beyond original / low are divided, those below original / high kept, a line between."""
    wavelengths = 2 * math.pi / frequencies
    long, short = (scaling.original_length / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
    slow = frequencies / scaling.factor
    if long == short:
        return torch.where(wavelengths < short, frequencies, slow)
    blend = (scaling.original_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * slow + blend * frequencies
    return torch.where(wavelengths > long, slow, torch.where(wavelengths < short, frequencies, between))


def _yarn(frequencies: Tensor, rope: RopeConfig, scaling: YarnScaling) -> Tensor:
    """Dimensions that turn more than beta_fast times in the trained context are kept, slow ones divided."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    steps = torch.arange(rope.dim // 2, dtype=torch.float32)
    divided = ((steps - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = (1 - divided) * scaling.extrapolation_factor
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept
