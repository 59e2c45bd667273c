"""Attention layers unified for torch.compile, and fused attention kernels, equal the plain layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import randomize
from lamella.config import AttentionConfig, NormConfig, RopeConfig, TemperatureConfig
from lamella.layers.attention import Attention
from lamella.layers.compiled.attention import AttentionForm, GivenPositions, PositionInputs, apply_form
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.kernel_attention import KernelAttention, use_attention_kernels
from lamella.layers.local_kit import LocalKit
from lamella.layers.rotary import Positions
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.ragged import RaggedBatch

PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
ROPE, TEMPERATURE = RopeConfig(dim=8, interleaved=True), TemperatureConfig(scale=0.5, floor_scale=2)
HEAD_NORM = {"qk_norm": NormConfig(eps=1e-5), "qk_norm_weight": False}
CONFIGS = {
    "nothing": PLAIN,
    "rotation": replace(PLAIN, rope=ROPE),
    "norm": replace(PLAIN, **HEAD_NORM),
    "temperature": replace(PLAIN, temperature=TEMPERATURE),
    "everything": replace(PLAIN, rope=ROPE, temperature=TEMPERATURE, **HEAD_NORM),
}


def built(config: AttentionConfig) -> Attention:
    layer = Attention(config, LocalKit(), 32, "layer", None)
    randomize(layer, 0)
    return layer


def compute(layer: nn.Module, positions: Positions, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), forward_batch(ForwardBatch(RaggedBatch.from_lengths([7], [7]))):
        return layer(positions, SublayerInput.from_tensor(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_running_as_a_larger_form_is_bitwise_equal(name):
    form = AttentionForm.from_config(CONFIGS["everything"])
    layer, x, index = built(CONFIGS[name]), torch.randn(7, 32), torch.arange(7)
    expected = compute(layer, Positions(index), x)
    apply_form(layer, form)
    assert layer.rotary is not None and layer.head_norm is not None and layer.temperature is not None
    assert torch.equal(compute(layer, Positions(index), x), expected)
    given = GivenPositions(index, PositionInputs.from_layer(layer, Positions(index)))
    assert torch.equal(compute(layer, given, x), expected)


def test_forms_with_different_rotations_cannot_be_joined():
    form = AttentionForm.from_config(CONFIGS["rotation"])
    other = AttentionForm.from_config(replace(PLAIN, rope=replace(ROPE, interleaved=False)))
    assert form.join(other) is None and not form.covers(other)
    both = form.join(AttentionForm.from_config(CONFIGS["temperature"]))
    assert both is not None and both.covers(form) and both.scales and both.pairs == 4


def test_layers_with_and_without_a_rotation_do_not_share_angles():
    """The identity rotation that a form adds has its own key among the angles of a step."""
    layer, rotating = built(PLAIN), built(CONFIGS["rotation"])
    apply_form(layer, AttentionForm.from_config(CONFIGS["rotation"]))
    positions = Positions(torch.arange(7))
    assert layer.rotary is not None and rotating.rotary is not None
    assert not torch.equal(positions.rope(layer.rotary).cos, positions.rope(rotating.rotary).cos)
    assert torch.equal(positions.rope(layer.rotary).cos, torch.ones(7, 4))
    assert torch.equal(positions.rope(layer.rotary).sin, torch.zeros(7, 4))


@pytest.mark.parametrize("name", CONFIGS)
def test_kernel_attention_does_not_change_a_plain_forward(name):
    layer, x, positions = built(CONFIGS[name]), torch.randn(7, 32), Positions(torch.arange(7))
    expected, parameters = compute(layer, positions, x), list(layer.state_dict())
    use_attention_kernels(nn.ModuleList([layer]))
    assert isinstance(layer, KernelAttention) and list(layer.state_dict()) == parameters
    assert torch.equal(compute(layer, positions, x), expected)


def test_only_layers_with_paged_attention_become_kernel_attention():
    layer = built(PLAIN)
    layer.attention = nn.Identity()
    use_attention_kernels(layer)
    assert type(layer) is Attention
