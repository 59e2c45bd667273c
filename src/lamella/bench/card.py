"""The cost card: bytes that a decode step must move, and the time that they take at the measured bandwidth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from lamella.layers.decoder import LanguageModel
from lamella.layers.moe import Experts
from lamella.layers.supernet.placing import find_active_state_modules, idle_parameters
from lamella.state.memory import StateCost

_PROBE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}  # well beyond any cache's share of one process
_PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class CostCard:
    """Bytes of weights and state; what a decode step reads of them decides its time.

    Attributes:
        parameters: count, tied ones once.
        weight_bytes: of all parameters.
        step_bytes: of those that every step reads whole, which leaves out an untied embedding table, experts, and the
            mixers that the placement of a supernet leaves out.
        experts: of each layer's experts, the bytes of those at hand, how many there are in all, and how many a token
            goes to.
        state: bytes per token and per request, of the layers' active mixers.
        bandwidth: bytes per second that reading takes, measured; None where it was not.
    """

    parameters: int
    weight_bytes: int
    step_bytes: int
    state: StateCost
    bandwidth: float | None
    experts: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, model: LanguageModel, bandwidth: float | None = None) -> CostCard:
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
        """Bytes of the weights that a decode step of `batch` requests must read: of experts, those that are to be
        expected where every token goes to any of them.
        """
        routed = sum(nbytes * (1 - (1 - top_k / count) ** batch) for nbytes, count, top_k in self.experts)
        return self.step_bytes + round(routed)

    def decode_bytes(self, batch: int, context: int) -> int:
        """Bytes that a decode step of `batch` requests with `context` tokens each must move: slot state twice."""
        state = self.state.bytes_at(context) + self.state.bytes_per_request
        return self.decode_weight_bytes(batch) + batch * state

    def floor_seconds(self, batch: int, context: int) -> float:
        """The shortest time of such a step at the measured bandwidth."""
        assert self.bandwidth is not None
        return self.decode_bytes(batch, context) / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "decode_step_weight_bytes": self.decode_weight_bytes(1),
            "state_bytes_per_token": self.state.bytes_per_token,
            "state_bytes_per_request": self.state.bytes_per_request,
            "bandwidth_gb_s": None if self.bandwidth is None else round(self.bandwidth / 1e9, 1),
        }


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory once, the best of some repetitions within about a second."""
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
