"""Speed limits of a device, and what a model needs of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamella.bench.card import CostCard


def read_cost_card(path: str, bandwidth: float) -> CostCard:
    """Return the cost card of a checkpoint in bf16, without reading its weights.

    Args:
        path: the checkpoint.
        bandwidth: of the device's memory, bytes per second.
    """
    import torch

    from lamella.bench.card import CostCard
    from lamella.checkpoint import open_checkpoint
    from lamella.layers.local_kit import LocalKit

    checkpoint = open_checkpoint(path)
    model = checkpoint.allocate(checkpoint.read_config(), LocalKit(torch.bfloat16, "meta"))
    return CostCard.from_model(model, bandwidth)


def measure_product_flops(rows: int, in_size: int, out_size: int, device: str) -> float:
    """Return operations per second of a bf16 matrix product (rows, in_size) x (in_size, out_size), best of 50."""
    import torch

    x = torch.ones(rows, in_size, dtype=torch.bfloat16, device=device)
    weight = torch.ones(out_size, in_size, dtype=torch.bfloat16, device=device)

    def product_seconds() -> float:
        start = time.perf_counter()
        (x @ weight.T)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    product_seconds()
    return 2 * x.numel() * out_size / min(product_seconds() for _ in range(50))
