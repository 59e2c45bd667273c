"""Two ranks, by tensor parallelism or pipeline parallelism."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_plugin.plugin_helpers import ON_CPU, assert_right_in_a_process, canon

pytest.importorskip("vllm", reason="vLLM is not installed")

pytestmark = pytest.mark.skipif(
    (os.cpu_count() or 1) < 2 if ON_CPU else torch.cuda.device_count() < 2, reason="needs two cores or two GPUs"
)


# On CPUs vLLM's stages need the pass that warms a compiled model up, which VLLM_CPU_CI_ENV leaves out.
TRACED = {"enforce_eager": False} | ({"compilation_config": {"mode": 2, "backend": "eager"}} if ON_CPU else {})


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"num_key_value_heads": 1}, {"tensor_parallel_size": 2}),
        ({"tie_word_embeddings": True}, {"pipeline_parallel_size": 2} | TRACED),
    ],
    ids=["tensor", "pipeline"],
)
def test_tokens_are_those_of_one_rank(tmp_path: Path, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """With tensor parallelism both ranks hold the only key head, and the norm spans the queries of both."""
    folder = canon(tmp_path / "model", num_hidden_layers=4, **changes)
    separate = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_CI_ENV": "0"}
    assert_right_in_a_process(folder, options | {"max_num_batched_tokens": 64}, separate)
