"""Steps of recurrent mixers over their state, without the projections."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.timing import seconds
from hybrid_parts.engines import Measure
from hybrid_parts.models import Values, apriel2, mixers
from hybrid_parts.sizes import Sizes


def ops(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Check the steps of gdn and kda, and return the function that times them."""
    import torch

    with torch.inference_mode():
        for name in ("gdn", "kda"):
            check_core(Core(name, sizes, 2, 4, args.device))

    def measure() -> Values:
        from lamella.bench.card import measure_bandwidth

        bandwidth = measure_bandwidth(torch.device(args.device))
        with torch.inference_mode():
            rows = [time_core(name, batch, sizes, args.device, bandwidth) for name in ("gdn", "kda")
                    for batch in sizes.op_batches]  # fmt: skip
        return {"bandwidth_gb_s": round(bandwidth / 1e9), "rows": rows}

    return measure


class Core:
    """Mixers of several layers in a step of `batch` decodes, without their projections."""

    def __init__(self, name: str, sizes: Sizes, layers: int, batch: int, device: str) -> None:
        import torch

        from lamella.config.hf_config import HFConfig
        from lamella.layers.build import build
        from lamella.layers.context import ForwardBatch
        from lamella.layers.local_kit import LocalKit
        from lamella.models import Apriel2ForCausalLM
        from lamella.models.base import initialize
        from lamella.ops.ragged import RaggedBatch

        # The projections are not timed, so they are narrow.
        values = apriel2(sizes, mixers(sizes), [name]) | {"hidden_size": 16}
        config = Apriel2ForCausalLM.read_config(HFConfig(values)).layers[0].mixer
        kit = LocalKit(torch.bfloat16, device)
        self.mixers: list[Any] = [build(config, kit, 16, f"{index}", None) for index in range(layers)]
        for mixer in self.mixers:
            initialize(mixer)
            specs = mixer.history.state_module.specs
            mixer.history.state_module.bind(
                *(torch.randn(batch, *spec.shape, device=device).to(spec.dtype) for spec in specs)
            )
        first = self.mixers[0]
        widths = [sum(first.sizes)] + ([first.config.size] * 2 if name == "kda" else [])  # decay and gate
        self.name, self.batch = name, batch
        self.inputs = [torch.randn(batch, width, device=device).to(torch.bfloat16) for width in widths]
        slots = torch.randperm(batch, device=device)
        self.step = ForwardBatch(RaggedBatch.from_lengths([1] * batch, [9] * batch, device), {}, slots)

    def __call__(self) -> list[Any]:
        """Run the step and return the output of each layer."""
        from lamella.layers.context import forward_batch

        with forward_batch(self.step):
            return [mixer.core(*self.inputs, None) for mixer in self.mixers]

    @property
    def nbytes(self) -> int:
        """Bytes that one layer must move: inputs, state in and out, weights, the output."""
        mixer = self.mixers[0]
        state = sum(spec.bytes_per_request for spec in mixer.history.state_module.specs)
        weights = (mixer.convolution.weight, mixer.A_log, mixer.dt_bias, mixer.norm.weight)
        out = 2 * self.batch * (mixer.config.value_size if self.name == "gdn" else mixer.config.size)
        return sum(t.nbytes for t in (*self.inputs, *weights)) + 2 * self.batch * state + out


def check_core(core: Core) -> None:
    """Compare output and state with plain torch."""
    from lamella.ops.backend import portable_only

    state_module = core.mixers[0].history.state_module
    before = [rows.clone() for rows in state_module.rows]
    found = [core()[0], *(rows.clone() for rows in state_module.rows)]
    state_module.bind(*before)
    with portable_only():
        expected = [core()[0], *state_module.rows]
    for ours, right in zip(found, expected, strict=True):
        error = float((ours.float() - right.float()).abs().max() / right.float().abs().max())
        assert error < 5e-2, f"{core.name}: off by {error:.1e}"


def time_core(name: str, batch: int, sizes: Sizes, device: str, bandwidth: float) -> Values:
    """Return the time of one layer's step beside its floor, in us."""
    each = Core(name, sizes, 1, batch, device).nbytes
    core = Core(name, sizes, max(2, min(64, -(-sizes.op_bytes // each))), batch, device)
    us = seconds(core, graph=True) / len(core.mixers) * 1e6
    floor = core.nbytes / bandwidth * 1e6
    return {
        "op": name, "batch": batch, "layers": len(core.mixers), "us": round(us, 2), "floor_us": round(floor, 2),
        "mbytes": round(core.nbytes / 1e6, 3), "of_floor": round(floor / us, 3),
    }  # fmt: skip
