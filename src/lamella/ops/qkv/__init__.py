"""Operations between the fused query/key/value projection and attention: norm, canon, rotation, cache write."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops.backend import BackendTable
from lamella.ops.operands import ConvStep, PagedCache, QKVSteps
from lamella.ops.qkv import reference

_table = BackendTable("prepare_qkv", __name__)


def prepare_qkv(
    qkv: Tensor, steps: QKVSteps, cache: PagedCache | None = None, canon: ConvStep | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Prepare the projected [q | k | v] for attention; see `reference.prepare_qkv`.

    Args:
        qkv: (T, (H + 2 * KV) * D).
        steps: sizes of the projection, norms, rotation and scaling.
        cache: is written with keys and values; None to return them.
        canon: convolution of [q | k | v] between norms and rotation, or None.

    Returns:
        q (T, H, D), k and v (T, KV, D); k and v are None if `cache` is given.
    """
    return _table.choose(qkv)(qkv, steps, cache, canon)


@_table.lazy("triton")
def _triton() -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    from lamella.ops.qkv import triton

    return triton.prepare_qkv


_table.backend("reference")(reference.prepare_qkv)
