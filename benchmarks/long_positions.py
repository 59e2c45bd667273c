"""What rotation by positions in the chunk is worth far into a context: Llama 4's logits at 1 M and 10 M positions.

    python benchmarks/long_positions.py [--tokens 256]

A random float32 Llama 4 (4 layers, the last of which neither rotates nor sees chunks; heads of 128, the released base
and chunk) reads tokens at positions from a chunk's start on, 0, 1 M and 10 M tokens into the context. Truth is the
parity kit's reference in float64 with angles in float64, of the absolute positions. `in the chunk` is the engine's
model; `absolute` the same with rotation by the whole position, fp32 as in `transformers` and vLLM. The error is that of
the log-probabilities. The model must be within 1e-4 nats wherever it reads. Temperature is off in the logits, and
compared by itself. One JSON line ends the output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from common.checkpoints import enlarge_weights, write_checkpoint
from lamella.layers.rotary import Rotary, inverse_frequencies
from lamella.models import Llama4ForCausalLM
from lamella.ops.rotary import temperature
from lamella.parity import reference_model as oracle
from lamella.parity.tested_model import ModelUnderTest

CHUNK = 8192
STARTS = (0, 1 << 20, 10 * (1 << 20) - CHUNK)
TOLERANCE = 1e-4  # nats
VALUES: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 256,
    "intermediate_size_mlp": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": CHUNK,
    "attn_temperature_tuning": False,
    "rope_theta": 500000.0,
    "max_position_embeddings": 10 * (1 << 20),
}


def make(folder: Path) -> None:
    """Write a random checkpoint, each part of which matters to the output."""
    torch.manual_seed(0)
    model = Llama4ForCausalLM.from_config(VALUES)
    enlarge_weights(model, dims=(2, 3))
    write_checkpoint(folder, model, VALUES)


def truth(subject: ModelUnderTest, ids: Tensor, start: int) -> Tensor:
    """Log-probabilities (n, vocab) in fp64, by angles of the absolute positions in fp64."""

    def angles(rope: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        turns = (start + torch.arange(x.shape[0]))[:, None].double() * inverse_frequencies(rope).double()
        return turns.cos(), turns.sin()

    plain = oracle.ReferenceModel(subject.config, subject.weights(torch.device("cpu")), torch.float64)
    with mock.patch.object(oracle, "_angles", angles):
        return plain.logits(ids.tolist()).log_softmax(-1)


def angle_error(rotary: Rotary, positions: Tensor) -> float:
    """The largest error of cos and sin that the layers are given."""
    turns = positions[:, None].double() * rotary.frequencies.double()
    if rotary.period is not None:
        turns = (positions % rotary.period)[:, None].double() * rotary.frequencies.double()
    exact = turns.cos(), turns.sin()
    return max(float((ours - right).abs().max()) for ours, right in zip(rotary.angles(positions), exact, strict=True))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        rows = measure(ModelUnderTest.open(folder), Llama4ForCausalLM.from_pretrained(folder), args.tokens)
    off = temperature_error()
    print(f"temperature off by {off:.1e}")
    print(json.dumps({"benchmark": "long_positions", "rows": rows, "temperature_error": off}))
    worst = max(row["largest"] for row in rows if row["rotation"] == "in the chunk")
    if worst > TOLERANCE:
        sys.exit(f"off by {worst:.1e} nats")


def measure(subject: ModelUnderTest, model: Llama4ForCausalLM, tokens: int) -> list[dict[str, Any]]:
    """By either rotation, from each start on."""
    rows = []
    mixers = [layer.mixer for layer in model.model.layers if layer.mixer.rotary is not None]
    ids = torch.randint(VALUES["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(1))
    print(f"{'from position':>14} {'rotation':>14} {'cos and sin off by':>20} {'rms, nats':>12} {'largest, nats':>14}")
    for start in STARTS:
        positions, right = start + torch.arange(tokens), truth(subject, ids, start)
        for kind, period in (("in the chunk", CHUNK), ("absolute", None)):
            for mixer in mixers:
                mixer.rotary = Rotary(mixer.config.rope, ids.device, period)
            with torch.inference_mode():
                found = model.compute_logits(model(ids, positions)).double().log_softmax(-1)
            error = (found - right).abs()
            row = {
                "start": start,
                "rotation": kind,
                "angle_error": angle_error(mixers[0].rotary, positions),
                "rms": float(error.pow(2).mean().sqrt()),
                "largest": float(error.max()),
            }
            rows.append(row)
            print(f"{start:14,} {kind:>14} {row['angle_error']:20.1e} {row['rms']:12.1e} {row['largest']:14.1e}")
    return rows


def temperature_error() -> float:
    """Of what queries of the other layers are multiplied by, beside float64."""
    far = torch.tensor([0, CHUNK - 2, CHUNK - 1, *STARTS[1:]])
    exact = 1 + 0.1 * (1 + ((far + 1) // CHUNK).double()).log()
    return float((temperature(far, 0.1, CHUNK) - exact).abs().max())


if __name__ == "__main__":
    main()
