"""Reference implementations of the recurrent mixers: one token after another, rounded like the published modules.

The operations inside one published kernel (convolution with SiLU, recurrence, gated norm) are computed in fp32, or in
fp64 for an fp64 reference, and rounded at the end of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lamella.config import GatedDeltaNetConfig, KimiDeltaConfig, MambaConfig
from lamella.parity.sites import Tap

if TYPE_CHECKING:
    from lamella.parity.reference_model import ReferenceModel


def gated_delta_net(model: ReferenceModel, config: GatedDeltaNetConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute a gated delta net of x (n, hidden_size)."""
    key_size, value_size = config.key_size, config.value_size
    qkvz, ba = (model.linear(x, f"{name}.in_proj_{part}", tap) for part in ("qkvz", "ba"))
    qkv, z = qkvz.split((2 * key_size + value_size, value_size), -1)
    b, a = ba.chunk(2, -1)
    qkv = _convolve(model, qkv, f"{name}.convolution", config.kernel)
    q, k, v = qkv.split((key_size, key_size, value_size), -1)
    q, k = (_heads(side, config.key_head_dim) for side in (q, k))
    q, k = (side.repeat_interleave(config.value_heads // config.key_heads, 1) for side in (q, k))
    decay = -model.fp32_parameter(f"{name}.A_log").exp() * F.softplus(
        _fp32(a) + model.fp32_parameter(f"{name}.dt_bias")
    )
    mixed = _delta_rule(q, k, _heads(v, config.value_head_dim), decay[..., None], b.sigmoid()).to(x.dtype)
    gate = _heads(z, config.value_head_dim)
    y = _gated_norm(mixed, gate, model.fp32_parameter(f"{name}.norm.weight"), config.norm.eps, F.silu)
    return model.linear(tap(f"{name}.recurrence", y.to(x.dtype).flatten(1)), f"{name}.out_proj", tap)


def kimi_delta(model: ReferenceModel, config: KimiDeltaConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute Kimi delta attention of x (n, hidden_size)."""
    sides = [model.linear(x, f"{name}.{part}_proj", tap) for part in "qkv"]
    q, k, v = (
        _heads(_convolve(model, side, f"{name}.{part}_conv", config.kernel), config.head_dim)
        for part, side in zip("qkv", sides, strict=True)
    )
    narrow = [model.linear(x, f"{name}.{part}_a_proj", tap) for part in "fg"]
    f, z = (
        _heads(model.linear(low, f"{name}.{part}_b_proj", tap), config.head_dim)
        for part, low in zip("fg", narrow, strict=True)
    )
    beta = _fp32(model.linear(x, f"{name}.beta_proj", tap)).sigmoid()
    steps = F.softplus(_fp32(f) + _heads(model.fp32_parameter(f"{name}.dt_bias")[None], config.head_dim))
    mixed = _delta_rule(q, k, v, -model.fp32_parameter(f"{name}.A_log").exp()[:, None] * steps, beta).to(x.dtype)
    act = F.silu if config.gate == "silu" else torch.sigmoid
    y = _gated_norm(mixed, z, model.fp32_parameter(f"{name}.norm.weight"), config.norm.eps, act)
    return model.linear(tap(f"{name}.recurrence", y.to(x.dtype).flatten(1)), f"{name}.o_proj", tap)


def mamba(model: ReferenceModel, config: MambaConfig, x: Tensor, name: str, tap: Tap) -> Tensor:
    """Compute a Mamba mixer of x (n, hidden_size)."""
    size, inner, narrow = config.state_size, config.inner_size, config.kv_size
    z, u, b, c = model.linear(x, f"{name}.in_proj", tap).split((inner, narrow, narrow, inner), -1)
    step = model.linear(model.linear(x, f"{name}.dt_in_proj", tap), f"{name}.dt_proj", tap)
    bias = model.fp32_parameter(f"{name}.step_bias") if config.dt_bias else torch.zeros(inner, device=x.device)
    # The bias counts twice: in the projection, where it is rounded, and in the scan, where it is not.
    step = F.softplus(_fp32((_fp32(step) + bias).to(x.dtype)) + bias)

    def repeated(side: Tensor) -> Tensor:
        return _heads(side, size).repeat_interleave(config.heads // config.kv_heads, 1)

    if config.repeat_before_conv:
        u = _heads(_convolve(model, repeated(u).flatten(1), f"{name}.conv1d", config.kernel), size)
    else:
        u = repeated(_convolve(model, u, f"{name}.conv1d", config.kernel))
    b, c, step, u = (_fp32(side) for side in (repeated(b), _heads(c, size), _heads(step, size), u))
    rates = -model.fp32_parameter(f"{name}.A_log").exp().unflatten(0, (-1, size))  # (heads, channels, state)
    state, outputs = torch.zeros_like(rates), []
    for t in range(x.shape[0]):
        state = (step[t, :, :, None] * rates).exp() * state
        state = state + (step[t] * u[t])[:, :, None] * b[t, :, None, :]
        outputs.append((state * c[t, :, None, :]).sum(-1))
    y = torch.stack(outputs) + _heads(model.fp32_parameter(f"{name}.D")[None], size) * u
    y = (y.flatten(1) * F.silu(_fp32(z))).to(x.dtype)
    return model.linear(tap(f"{name}.recurrence", y), f"{name}.out_proj", tap)


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, dim: int) -> Tensor:
    """Reshape (n, heads * dim) to (n, heads, dim)."""
    return x.unflatten(-1, (-1, dim))


def _convolve(model: ReferenceModel, x: Tensor, name: str, kernel: int) -> Tensor:
    """Return SiLU of the causal convolution of x (n, channels), rounded once."""
    weight, bias = model.fp32_parameter(f"{name}.weight"), model.find_fp32_parameter(f"{name}.bias")
    windows = F.pad(_fp32(x).T, (kernel - 1, 0)).unfold(-1, kernel, 1)  # (channels, n, kernel)
    y = (windows * weight).sum(-1)
    return F.silu(y if bias is None else y + bias[:, None]).T.to(x.dtype)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """Run the delta rule over n tokens.

    Args:
        q: (n, heads, K).
        k: (n, heads, K).
        v: (n, heads, V).
        decay: (n, heads, 1) or (n, heads, K), logarithms.
        beta: (n, heads).

    Returns:
        (n, heads, V), fp32 or fp64.
    """
    q, k, v, beta = (_fp32(x) for x in (q, k, v, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    state = torch.zeros(*k.shape[1:], v.shape[-1], dtype=v.dtype, device=v.device)
    outputs = []
    for t in range(q.shape[0]):
        state = decay[t].exp()[..., None] * state
        update = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * update[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs)


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the RMS norm of each head of x times the activated gate, in fp32 or fp64."""
    x_fp32 = _fp32(x)
    x_fp32 = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps) * weight
    return x_fp32 * activation(_fp32(gate))
