"""Cost card: bytes that a decode step must move, and their time at the measured memory bandwidth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lamella.layers.decoder import LanguageModel
from lamella.layers.moe import Experts
from lamella.layers.supernet.placing import find_active_state_modules, idle_parameters
from lamella.state.memory import StateCost

_PROBE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # much larger than any cache
_PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class CostCard:
    """Size of weights and state, which bounds the time of a decode step from below.

    Attributes:
        parameters: number of parameters; tied ones count once.
        weight_bytes: bytes of all parameters.
        step_bytes: bytes of the parameters that every decode step reads completely. Excludes an untied embedding table,
            experts, and the inactive mixers of a supernet.
        state: size of the state of the active mixers.
        bandwidth: measured memory bandwidth in bytes per second; None if not measured.
        experts: (bytes of this rank's experts, number of all experts, experts per token) of each layer with experts.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    state: StateCost
    bandwidth: float | None
    experts: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def from_model(cls, model: LanguageModel, bandwidth: float | None = None) -> CostCard:
        """Make the card of a model, which may be on the meta device.

        Args:
            model: with its active placement.
            bandwidth: measured memory bandwidth in bytes per second.
        """
        parameters = dict(model.named_parameters())
        weight_bytes = sum(p.nbytes for p in parameters.values())
        embedding = parameters["model.embed_tokens.weight"]
        looked_up = 0 if model.config.tie_word_embeddings else embedding.nbytes
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        experts = [(sum(p.nbytes for p in each.parameters()), each.own.full, each.top_k) for each in layers]
        return cls(
            parameters=sum(p.numel() for p in parameters.values()),
            weight_bytes=weight_bytes,
            step_bytes=weight_bytes
            - looked_up
            - sum(nbytes for nbytes, _, _ in experts)
            - sum(p.nbytes for p in idle_parameters(model)),
            state=StateCost.from_modules(find_active_state_modules(model)),
            bandwidth=bandwidth,
            experts=tuple(experts),
        )

    def decode_weight_bytes(self, batch: int) -> int:
        """Return the bytes of weights that a decode step of `batch` requests must read.

        For experts this is the expected value under uniform routing.
        """
        routed = sum(nbytes * (1 - (1 - top_k / count) ** batch) for nbytes, count, top_k in self.experts)
        return self.step_bytes + round(routed)

    def decode_bytes(self, batch: int, context: int) -> int:
        """Return the bytes that a decode step of `batch` requests with `context` tokens each must move.

        Slot state counts twice, since it is read and written.
        """
        state = self.state.bytes_at(context) + self.state.bytes_per_request
        return self.decode_weight_bytes(batch) + batch * state

    def floor_seconds(self, batch: int, context: int) -> float:
        """Return the shortest possible time of such a decode step, in seconds."""
        assert self.bandwidth is not None
        return self.decode_bytes(batch, context) / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "decode_step_weight_bytes": self.decode_weight_bytes(1),
            "state_bytes_per_token": self.state.bytes_per_token,
            "state_bytes_per_request": self.state.bytes_per_request,
            "bandwidth_gb_s": None if self.bandwidth is None else round(self.bandwidth / 1e9, 1),
        }


def measure_bandwidth(device: torch.device) -> float:
    """Measure the memory read bandwidth in bytes per second: the best of the repetitions within about a second."""
    nbytes = _PROBE_BYTES[device.type]
    buffer = torch.ones(nbytes // 8, dtype=torch.float64, device=device)

    def read() -> float:
        start = time.perf_counter()
        buffer.sum().item()  # waits for the device
        return time.perf_counter() - start

    read()
    best, end = read(), time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < end:
        best = min(best, read())
    return nbytes / best
