"""Steps of several placements by the GPU kernels in Triton's interpreter; dummy blocks and slots are NaN."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from apriel2_models import SUPERNET, checkpoint, fixed
from lamella.engine.steps import graphs
from lamella.layers.kernel_attention import use_attention_kernels
from lamella.ops import backend
from lamella.ops.attention import triton as attention
from lamella.ops.attention.paged import AttentionSpace
from mixed_steps import A, B, C, answers, fake_graphs, mixed_llm, parameters, with_graphs


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels for CPU tensors."""
    monkeypatch.setattr(backend, "platform", lambda x: "triton")


@pytest.mark.parametrize(("own", "few"), [pytest.param((A, B, C), 8, marks=pytest.mark.slow), ((B, C), 8), ((B, C), 1)])
def test_masked_batches_equal_gathered_batches(tmp_path, monkeypatch, own, few):
    """With the kernels for few requests and for many."""
    recorded = fake_graphs(monkeypatch)
    monkeypatch.setattr(graphs, "_WARM_UPS", 0)
    folder, lengths, params = checkpoint(tmp_path, fixed(SUPERNET, layers=3)), (3, 4, 1)[: len(own)], parameters(own, 3)
    expected = answers(mixed_llm(folder), lengths, params)
    monkeypatch.setattr(attention, "FEW_REQUESTS", few)
    llm = with_graphs(mixed_llm(folder))
    use_kernels(monkeypatch)
    use_attention_kernels(llm.engine.model)
    runner = llm.engine.runner
    runner.attention = runner.inputs.attention = AttentionSpace(4, 64, torch.device("cpu"))
    found = answers(llm, lengths, params)
    assert found[0] == expected[0] and (found[1] - expected[1]).abs().max() <= 2e-5
    assert sum(graph.replays for graph in recorded) == runner.num_replays > 2
