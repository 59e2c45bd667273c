"""Reference implementation: the forward of every architecture in plain torch, written independently from the config.

It shares the config and the checkpoint's tensors with the engine, but no layer, kernel, state or loader, so that a
mistake in one is not repeated in the other. It computes and rounds every operation like `transformers`' modeling code.
In float32 and float64 it is the reference for correctness; in bfloat16 its error is the error that users of
`transformers` have.

A new kind of mixer or feed-forward adds its function to `MIXERS` or `FEED_FORWARDS`.
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
    """Full causal forward of one sequence, without cache, batch or chunks."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attention: str = "eager",
    ) -> None:
        """Convert the weights.

        Args:
            config: config of the model.
            weights: tensors by lamella's parameter paths, with separate projections:
                `model.layers.0.mixer.q_proj.weight`.
            dtype: dtype of weights and activations.
            device: device of weights and activations.
            attention: "eager" or "sdpa".
        """
        assert attention in ATTENTION
        self.config, self.dtype, self.device, self.attention = config, dtype, torch.device(device), attention
        self._weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], tap: Tap = untouched) -> Tensor:
        """Compute the logits of every token.

        Args:
            token_ids: n token ids.
            tap: called with the site and the value (n, channels) of every operation; returns the value to continue
                with.

        Returns:
            (n, vocab_size) in the model's dtype.
        """
        x = self._weights["model.embed_tokens.weight"][torch.tensor(token_ids, device=self.device)]
        x = tap("embed_tokens", x)
        for index, layer in enumerate(self.config.layers):
            x = self._layer(layer, x, f"layers.{index}", tap)
        x = tap("norm", self.norm(tap("norm.residual", x), self.config.norm, "norm"))
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return tap("lm_head", F.linear(x, self._weights[head]))

    def _layer(self, layer: LayerConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
        for part, config, canon, forms in (
            ("mixer", layer.mixer, layer.mixer_canon, MIXERS),
            ("feed_forward", layer.feed_forward, layer.feed_forward_canon, FEED_FORWARDS),
        ):
            if type(config) not in forms:
                raise ConfigError(f"{name}.{part}: the reference has no plain form of {type(config).__name__}")
            x = tap(f"{name}.{part}_norm.residual", x)
            y = tap(f"{name}.{part}_norm", self.norm(x, layer.norm, f"{name}.{part}_norm"))
            y = tap(f"{name}.{part}_canon", self.canon(y, canon, f"{name}.{part}_canon")) if canon else y
            x = x + forms[type(config)](self, config, y, f"{name}.{part}", tap)
        return x

    def fp32_parameter(self, name: str) -> Tensor:
        """Return a parameter in fp32, or in fp64 for an fp64 model; its precision is that of the model's dtype."""
        weight = self._weights[f"model.{name}"]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def find_fp32_parameter(self, name: str) -> Tensor | None:
        """Return `fp32_parameter(name)`, or None if there is no such parameter."""
        return self.fp32_parameter(name) if f"model.{name}" in self._weights else None

    def norm(self, x: Tensor, config: NormConfig, name: str | None) -> Tensor:
        """Return the norm of x; `name` is the path of its weights, None for a norm without weights."""
        if config.kind == "layer":
            weight, bias = (self.fp32_parameter(f"{name}.{part}") for part in ("weight", "bias"))
            return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, config.eps).to(x.dtype)
        x_fp32 = x.to(torch.promote_types(x.dtype, torch.float32))
        x_fp32 = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + config.eps)
        return x_fp32.to(x.dtype) if name is None else self._weights[f"model.{name}.weight"] * x_fp32.to(x.dtype)

    def linear(self, x: Tensor, name: str, tap: Tap) -> Tensor:
        """Return the tapped projection of x with the weight and bias called `name`."""
        weight, bias = self._weights[f"model.{name}.weight"], self._weights.get(f"model.{name}.bias")
        return tap(name, F.linear(x, weight, bias))

    def experts(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """Return the experts' weights (E, H, 2 * I), gates first, and (E, I, H), from joint or per-expert tensors."""
        prefix = f"model.{name}"
        if f"{prefix}.gate_up_proj" in self._weights:
            return self._weights[f"{prefix}.gate_up_proj"], self._weights[f"{prefix}.down_proj"]
        gate, up, down = (
            torch.stack([self._weights[f"{prefix}.{index}.{part}_proj.weight"].T for index in range(count)])
            for part in ("gate", "up", "down")
        )
        return torch.cat((gate, up), -1), down

    def canon(self, x: Tensor, config: CanonConfig, name: str) -> Tensor:
        """Return the canon convolution of x (n, channels)."""
        weight, bias = self._weights[f"model.{name}.weight"], self._weights.get(f"model.{name}.bias")
        padded = F.pad(x.T, (config.kernel - 1, 0))
        if self.dtype == torch.float64:  # torch's float64 convolution is 40 times slower
            windows = padded.unfold(-1, config.kernel, 1)
            y = ((windows * weight).sum(-1) + (0 if bias is None else bias[:, None])).T
        else:
            y = F.conv1d(padded[None], weight, bias, groups=weight.shape[0])[0].T
        y = F.silu(y) if config.activation else y
        return x + y if config.residual else y


def attention(model: ReferenceModel, config: AttentionConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute an attention mixer of x (n, hidden_size)."""
    q, k, v = (model.linear(x, f"{name}.{part}_proj", tap) for part in "qkv")
    if config.qk_norm and config.qk_norm_weight:
        shape = (-1, config.head_dim) if config.qk_norm_scope == "head" else (1, -1)
        q, k = (
            model.norm(side.unflatten(-1, shape), config.qk_norm, site)
            for side, site in ((q, f"{name}.q_norm"), (k, f"{name}.k_norm"))
        )
        q, k = tap(f"{name}.q_norm", q.flatten(1)), tap(f"{name}.k_norm", k.flatten(1))
    if config.canon:
        joined = model.canon(torch.cat((q, k, v), -1), config.canon, f"{name}.canon")
        q, k, v = tap(f"{name}.canon", joined).split((config.query_size, config.kv_size, config.kv_size), -1)
    q, k, v = (side.unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for side in (q, k, v))  # (heads, n, D)
    rotated = torch.cat((q, k))
    if config.rope:
        rotated = _rotate(rotated, *_angles(config.rope, x), config.rope)
    if config.qk_norm and not config.qk_norm_weight:
        rotated = model.norm(rotated, config.qk_norm, None)
    if config.temperature:
        positions = torch.arange(x.shape[0], device=x.device).float()
        factors = torch.log1p(torch.floor((positions + 1.0) / config.temperature.floor_scale))
        factors = (factors * config.temperature.scale + 1.0)[:, None]
        q, k = rotated.split((config.num_heads, config.num_kv_heads))
        rotated = torch.cat(((q * factors).to(q.dtype), k))
    rotated = tap_queries_keys(tap, name, config, rotated.transpose(0, 1))
    q, k = rotated.transpose(0, 1).split((config.num_heads, config.num_kv_heads))
    k, v = (side.repeat_interleave(config.num_heads // config.num_kv_heads, 0) for side in (k, v))
    y = _ATTEND[model.attention](q, k, v, config.scale, _visible(x.shape[0], config, x.device))
    return model.linear(tap(f"{name}.attention", y.transpose(0, 1).flatten(1)), f"{name}.o_proj", tap)


def mlp(model: ReferenceModel, config: MLPConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute a dense feed-forward of x (n, hidden_size)."""
    sides = [model.linear(x, f"{name}.{part}_proj", tap) for part in (("gate", "up") if config.gated else ("up",))]
    if config.canon:
        joined = tap(f"{name}.canon", model.canon(torch.cat(sides, -1), config.canon, f"{name}.canon"))
        sides = list(joined.chunk(len(sides), -1))
    y = _ACTIVATIONS[config.activation](sides[0])
    y = y * sides[1] if config.gated else y
    return model.linear(tap(f"{name}.activation", y), f"{name}.down_proj", tap)


def tap_queries_keys(tap: Tap, name: str, config: AttentionConfig, rotated: Tensor) -> Tensor:
    """Tap the inputs of attention, rotated queries and keys (n, heads, D), as one site.

    For chunked attention the engine rotates by positions within the chunk. All queries and keys of a chunk then differ
    by one common angle, which changes no dot product but would show at this site. The tap therefore gets values rotated
    by the engine's angles.
    """
    site, rope, chunk = f"{name}.queries_keys", config.rope, config.chunk
    if tap is untouched or rope is None or chunk is None:
        return tap(site, rotated.flatten(1)).view(rotated.shape)
    positions, (frequencies, _) = torch.arange(rotated.shape[0]), _frequencies(rope)
    own_angles, engine_angles = ((at.float()[:, None] * frequencies).double() for at in (positions, positions % chunk))

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos().to(x.device), angles.sin().to(x.device)
        return _rotate(x.double().transpose(0, 1), cos, sin, rope).transpose(0, 1)

    tapped = rotate(rotated, engine_angles - own_angles)
    tapped = tap(site, tapped.flatten(1)).view(tapped.shape)
    return rotate(tapped, own_angles - engine_angles).to(rotated.dtype)


def moe(model: ReferenceModel, config: MoEConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute a mixture of experts of x (n, hidden_size): all experts for all tokens, with weight 0 if not chosen."""
    logits = model.linear(x, f"{name}.router", tap)
    chosen, ids = logits.topk(config.top_k, dim=1)
    weights = torch.full_like(logits, -torch.inf).scatter(1, ids, chosen)
    weights = torch.sigmoid(weights.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    gate_up, down = model.experts(f"{name}.experts", config.num_experts)
    gate, up = torch.bmm(x[None] * weights.T[:, :, None], gate_up).chunk(2, -1)
    routed = torch.bmm(up * F.silu(gate), down).sum(0)
    routed = tap(f"{name}.experts", routed)
    if config.shared_size is None:
        return routed
    return mlp(model, MLPConfig(intermediate_size=config.shared_size), x, f"{name}.shared_expert", tap) + routed


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
    """Return (n, n) bool: whether a query (row) sees a key (column)."""
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
    """Rotate the first `rope.dim` channels of x (heads, n, D).

    Interleaved pairs are rotated as complex numbers of at least fp32 and rounded once, as in lingua and Llama 4.
    """
    rotated, rest = x[..., : rope.dim], x[..., rope.dim :]
    if rope.interleaved:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = torch.view_as_complex(rotated.to(compute_dtype).unflatten(-1, (-1, 2)).contiguous())
        joined = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    else:
        first, second = rotated.chunk(2, -1)
        joined = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((joined, rest), -1)


def _frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Return the angle of each pair at position 1, (dim / 2,) fp32, and the factor of cos and sin."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    theta, scaling, factor = rope.theta, rope.scaling, 1.0
    if isinstance(scaling, DynamicScaling) and scaling.length > scaling.original_length:
        growth = scaling.factor * scaling.length / scaling.original_length - (scaling.factor - 1)
        theta *= growth ** (rope.dim / (rope.dim - 2))
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
    """Return cos and sin (n, dim / 2) of fp32 angles, in the dtype of x, or at least fp32 for interleaved pairs."""
    frequencies, factor = _frequencies(rope)
    angles = torch.arange(x.shape[0]).float()[:, None] * frequencies
    if rope.interleaved:
        rotations, dtype = (
            torch.polar(torch.ones_like(angles), angles) * factor,
            torch.promote_types(x.dtype, torch.float32),
        )
        return rotations.real.to(x.device, dtype), rotations.imag.to(x.device, dtype)
    cos, sin = (angles.cos() * factor, angles.sin() * factor)
    return cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide the frequencies of wavelengths above original / low, keep those below original / high, and interpolate."""
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
    """Keep frequencies with more than beta_fast rotations in the trained context, and divide slow ones."""

    def dimension(rotations: float) -> float:
        return rope.dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    steps = torch.arange(rope.dim // 2, dtype=torch.float32)
    divided = ((steps - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept = (1 - divided) * scaling.extrapolation_factor
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept
