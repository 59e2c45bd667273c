"""Layouts of parameters: the tensors of a file that fill them, and their initial values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamella.checkpoint.names import separate_tensors, targets
from lamella.config import MoEConfig
from lamella.layers.linear import MergedLinear
from lamella.layers.local_kit import LocalKit
from lamella.layers.moe import Experts
from lamella.layers.parameters import ParameterLayout, initialize, layout_of
from lamella.parallel.sharding import Split

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


def merged(bias=True):
    parts = {"a_proj": Split.whole(3), "b_proj": Split(8, ((2, 4),))}
    return MergedLinear(Split.whole(5), parts, bias, torch.float32, CPU)


class Module(nn.Module):
    """Module of another package, with a layout for one parameter only."""

    def __init__(self):
        super().__init__()
        self.decay, self.weight, self.bias = (nn.Parameter(torch.empty(4)) for _ in range(3))
        self.layouts = {"decay": ParameterLayout(initial=(2.0, 3.0))}


def test_tensors_of_a_merged_parameter_are_its_rows_in_order():
    found = [tuple(tensor) for tensor in merged().layouts["weight"].tensors()]
    whole = Split.whole(5)
    assert found == [("a_proj", (Split.whole(3), whole), 0, 3), ("b_proj", (Split(8, ((2, 4),)), whole), 3, 5)]


def test_rows_that_are_not_stored_do_not_shift_later_rows():
    (tensor,) = merged(("b_proj",)).layouts["bias"].tensors()
    assert (tensor.part, tensor.start, tensor.stop) == ("b_proj", 3, 5)
    assert "a_proj.bias" not in targets(nn.ModuleDict({"ab": merged(("b_proj",))}), {})


def test_a_parameter_without_a_layout_is_whole():
    assert layout_of(nn.Linear(2, 2), "weight") == ParameterLayout() == layout_of(Module(), "weight")
    assert [tuple(tensor) for tensor in ParameterLayout().tensors()] == [(None, (), None, None)]


def test_initial_bounds_hold_and_biases_start_from_zero():
    module = Module()
    initialize(module, torch.Generator().manual_seed(0))
    assert ((module.decay >= 2) & (module.decay <= 3)).all() and module.decay.unique().numel() == 4
    assert (module.bias == 0).all() and module.weight.abs().max() < 0.2 and module.weight.unique().numel() == 4


def test_constant_initial_values_use_no_random_numbers():
    """Otherwise a seed would give other values to the other parameters."""
    first, second = Module(), Module()
    second.layouts = {"decay": ParameterLayout(initial=(1.0, 1.0))}
    del first._parameters["decay"]
    for module in (first, second):
        initialize(module, torch.Generator().manual_seed(0))
    assert torch.equal(first.weight, second.weight) and (second.decay == 1).all()


def test_separate_tensors_of_a_copied_model_fill_the_copy():
    """A layout that refers to the original's memory would fill the original."""
    model = nn.ModuleDict({"experts": Experts(MoEConfig(num_experts=2, top_k=1, intermediate_size=3), LocalKit(), 4)})
    other = copy.deepcopy(model)
    for layers in (model, other):
        for parameter in layers.parameters():
            parameter.data.zero_()
    for _, path, part in separate_tensors(other):
        part.target.fill_(1.0 if path.endswith("1.up_proj.weight") else 0.0)
    assert other["experts"].gate_up_proj[1, :, 3:].eq(1).all() and other["experts"].gate_up_proj.sum() == 12
    assert all(parameter.eq(0).all() for parameter in model.parameters())
