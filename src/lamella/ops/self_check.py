"""Self-check at start-up: compare the GPU kernels with their references on tiny tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lamella.errors import KernelError
from lamella.ops.attention import reference as attention_reference
from lamella.ops.backend import use_triton
from lamella.ops.delta_rule import reference as delta_reference
from lamella.ops.gated_rms_norm import reference as gated_reference
from lamella.ops.linear import reference as linear_reference
from lamella.ops.moe import reference as moe_reference
from lamella.ops.operands import (
    ConvState,
    ConvWeights,
    HeadNorms,
    HeadSizes,
    PagedCache,
    QKVSteps,
    RecurrentState,
    ResidualNorm,
    Rope,
)
from lamella.ops.qkv import reference as qkv_reference
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import reference as norm_reference
from lamella.ops.rotary import reference as rotary_reference
from lamella.ops.selective_scan import reference as scan_reference
from lamella.ops.short_conv import reference as conv_reference
from lamella.ops.swiglu import reference as swiglu_reference

# Maximum difference from the reference, relative to the reference's root mean square.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_BLOCK = 4


@torch.inference_mode()
def self_check(dtype: torch.dtype, device: torch.device) -> None:
    """Run every Triton kernel of lamella once, if they are used on this device.

    Args:
        dtype: dtype of activations.
        device: device to check.

    Raises:
        KernelError: a kernel differs from its reference; the message names the kernel.
    """
    if not use_triton(torch.empty(0, device=device)):
        return
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for name, ours, expected in _checks(random, dtype, device):
        scale = expected.float().square().mean().sqrt()
        difference = (ours.float() - expected.float()).abs().max()
        if not bool(difference <= _TOLERANCE[dtype] * scale):
            raise KernelError(
                f"{name}: the GPU kernel differs from its reference by {float(difference / scale):.2g} of its size on "
                f"{torch.cuda.get_device_name(device)} (torch {torch.__version__}); refusing to run"
            )


def _checks(
    random: Callable[..., Tensor], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lamella.ops.linear import triton as linear
    from lamella.ops.moe import triton as moe
    from lamella.ops.rms_norm import triton as norm
    from lamella.ops.short_conv import triton as conv
    from lamella.ops.swiglu import triton as swiglu

    width, gate_up = 64, random(3, 128)
    x, residual, weight = random(3, width), random(3, width), random(width).float()
    yield "rms_norm", norm.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5)
    step = ResidualNorm(residual, weight, 1e-5)
    normed, _ = norm_reference.add_rms_norm(x, step)
    yield "add_rms_norm", norm.add_rms_norm(x, step)[0], normed
    yield "swiglu", swiglu.swiglu(gate_up), swiglu_reference.swiglu(gate_up)
    logits, gates, downs = random(3, 5).float(), random(5, 96, width) / 8, random(5, width, 48) / 8
    for top_k in (1, 2):
        mixture = x, logits, top_k, gates, downs, residual
        yield "experts", moe.experts(*mixture), moe_reference.experts(*mixture)
    matrix = random(96, width)
    if linear.serves(x[:1], matrix):
        step, product = ResidualNorm(residual[:1], weight, 1e-5), linear_reference.linear(normed[:1], matrix, None)
        yield "linear", linear.linear(normed[:1], matrix, None), product
        yield "linear behind a norm", linear.fused_linear(x[:1], matrix, None, norm=step)[0], product
        ours = linear.fused_linear(x[:1], matrix, None, gated=True, norm=step)[0]
        yield "linear before swiglu", ours, swiglu_reference.swiglu(product)

    taps = random(4, width).T
    for query, context in (((1, 1, 1), (1, 9, 3)), ((1, 2, 7), (4, 2, 9))):
        batch = RaggedBatch.from_lengths(query, context, device)
        tokens, slots = batch.num_tokens, torch.tensor([2, 1, 3], device=device)
        x, residual, history = random(tokens, width), random(tokens, width), random(4, 3, width)
        old, new = ConvState(history.clone(), slots), ConvState(history.clone(), slots)
        operands = x, ConvWeights(taps, residual=True), batch
        yield "short_conv", conv.short_conv(*operands, new), conv_reference.short_conv(*operands, old)
        yield "short_conv (its history)", new.history, old.history
        before = [ConvState(history.clone(), slots) for _ in range(4)]
        behind_norm = x, ResidualNorm(residual, weight, 1e-5), ConvWeights(taps), batch
        yield (
            "norm_short_conv",
            conv.norm_short_conv(*behind_norm, before[0])[0],
            conv_reference.norm_short_conv(*behind_norm, before[1])[0],
        )
        operands = x, ConvWeights(taps), batch
        yield (
            "short_conv_swiglu",
            conv.short_conv_swiglu(*operands, before[2]),
            conv_reference.short_conv_swiglu(*operands, before[3]),
        )
        yield from _attention_checks(random, batch, dtype, device)
        yield from _recurrence_checks(random, batch, slots)
    yield from _sampling_checks(device)


def _attention_checks(
    random: Callable[..., Tensor], batch: RaggedBatch, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lamella.ops.attention import triton_decode_few
    from lamella.ops.attention.paged import AttentionPlan, AttentionSpace, is_few_decodes, paged_attention
    from lamella.ops.qkv import triton as qkv
    from lamella.ops.rotary import triton as rotary

    heads, kv_heads, dim = 4, 2, 16
    blocks = torch.randperm(12, device=device)[:9].view(3, 3).int() + 1
    rows = blocks[batch.token_request, batch.positions // _BLOCK].long() * _BLOCK + batch.positions % _BLOCK
    caches = [random(13, _BLOCK, kv_heads, dim) for _ in range(2)]
    frequencies = random(dim // 2).float()
    radians = batch.positions.float()[:, None] * frequencies
    cos, sin = rotary.angles(batch.positions, frequencies, 1.0)
    yield "angles", torch.cat((cos, sin)), torch.cat((radians.cos(), radians.sin()))
    periodic = (function.angles(batch.positions, frequencies, 1.0, 2)[1] for function in (rotary, rotary_reference))
    yield "angles within a period", *periodic
    growth = [function.temperature(batch.positions, 0.5, 2) for function in (rotary, rotary_reference)]
    yield "temperature", *growth
    projected = random(batch.num_tokens, (heads + 2 * kv_heads) * dim)
    steps = QKVSteps(
        HeadSizes(heads, kv_heads, dim),
        HeadNorms(random(dim).float(), random(dim).float(), 1e-5),
        Rope(cos, sin, interleaved=False),
        growth[1],
    )
    written = [PagedCache(caches[0].clone(), caches[1].clone(), blocks, rows) for _ in range(2)]
    prepared = [
        function(projected, steps, some)[0]
        for function, some in zip((qkv.prepare_qkv, qkv_reference.prepare_qkv), written, strict=True)
    ]
    yield "prepare_qkv", prepared[0], prepared[1]
    yield "prepare_qkv (its cache)", torch.stack(written[0][:2]), torch.stack(written[1][:2])
    space = AttentionSpace(batch.num_requests, 3 * _BLOCK, device)
    listed = torch.cat(
        [
            row[: -(-length // _BLOCK)]
            for row, length in zip(blocks[batch.num_decodes :], batch.context_lens[batch.num_decodes :], strict=True)
        ]
        or [blocks.new_empty(0)]
    )
    for window, chunk in ((None, None), (3, None), (None, 3)):
        expected = attention_reference.paged_attention(prepared[1], written[1], batch, 0.25, window, chunk)
        plan = AttentionPlan(
            space, batch, listed, heads, kv_heads, dim, _BLOCK, dtype, 0.25, window, flashinfer=False, chunk=chunk
        )
        ours = paged_attention(prepared[1], written[1], batch, 0.25, window, chunk, plan)
        yield "paged attention", ours, expected
        if is_few_decodes(batch):
            fresh = PagedCache(caches[0].clone(), caches[1].clone(), blocks, rows)
            few = triton_decode_few.decode_prepared(projected, steps, fresh, 0.25, window, plan.decode_workspace)
            yield "attention of few", few, expected
            yield "attention of few (its cache)", torch.stack(fresh[:2]), torch.stack(written[1][:2])


def _recurrence_checks(
    random: Callable[..., Tensor], batch: RaggedBatch, slots: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lamella.ops.delta_rule import triton as delta
    from lamella.ops.gated_rms_norm import triton as gated
    from lamella.ops.selective_scan import triton as scan

    tokens, heads, dim, width = batch.num_tokens, 4, 16, 8
    x, gate, weight = random(tokens, heads, dim), random(tokens, heads, dim), random(dim).float()
    yield (
        "gated_rms_norm",
        gated.gated_rms_norm(x, gate, weight, 1e-5),
        gated_reference.gated_rms_norm(x, gate, weight, 1e-5),
    )
    for channels in ((), (dim,)):
        q, k, v = random(tokens, 2, dim), random(tokens, 2, dim), random(tokens, heads, width)
        decay, beta = random(tokens, heads, *channels), random(tokens, heads)
        operands = q, k, v, decay, beta, random(heads).float(), random(heads, *channels).float(), batch
        old = RecurrentState(random(4, heads, dim, width).float(), slots)
        new = RecurrentState(old.matrix.clone(), slots)
        yield "delta_rule", delta.delta_rule(*operands, new), delta_reference.delta_rule(*operands, old)
        yield "delta_rule (its state)", new.matrix, old.matrix
    x, b, c = random(tokens, 2, dim), random(tokens, 2, width), random(tokens, heads, width)
    rates, bias, d = random(heads, dim, width).float(), random(heads, dim).float(), random(heads, dim).float()
    steps = x, random(tokens, heads, dim), b, c, gate, rates, bias, d, batch
    before = random(4, heads, dim, width).float()
    for chunked in (False, True):
        old, new = (RecurrentState(before.clone(), slots) for _ in range(2))
        ours = scan.selective_scan(*steps, new, chunked=chunked)
        yield "selective_scan", ours, scan_reference.selective_scan(*steps, old)
        yield "selective_scan (its state)", new.matrix, old.matrix


def _sampling_checks(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    from lamella.ops.sampling import draw, placeholder_tokens

    logits = torch.randn(2, 5000, device=device)
    logits[0, 4321] = logits[1, 7] = 50.0
    sampling = {
        "temperature": torch.tensor([0.0, 1.0], device=device),
        "top_k": torch.tensor([0, 3], dtype=torch.int32, device=device),
        "top_p": torch.tensor([1.0, 0.9], device=device),
        "min_p": torch.zeros(2, device=device),
        "seed": torch.tensor([1, 2], device=device),
        "step": torch.tensor([0, 5], device=device),
    }
    tokens = draw(logits, sampling)
    yield "draw", tokens, torch.tensor([4321, 7], device=device)
    ids = torch.tensor([5, -1, 9, -2], device=device)
    yield "placeholder_tokens", placeholder_tokens(ids, tokens), torch.tensor([5, 4321, 9, 7], device=device)
