"""Sizes of the models and workloads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and workloads; lengths in tokens."""

    layers: int = 24
    hidden: int = 2048
    intermediate: int = 5632
    vocab: int = 32768
    heads: tuple[int, int, int] = (16, 2, 256)  # query heads, key heads, head size of attention
    plain_heads: tuple[int, int, int] = (32, 16, 128)  # the same, in the model with kda
    window: int = 512
    gdn: tuple[int, int, int] = (16, 32, 128)  # key heads, value heads, head size
    kda: tuple[int, int] = (32, 128)  # heads, head size
    latent: tuple[int, int, int, int] = (512, 128, 64, 128)  # rank, head sizes: without RoPE, with RoPE, of values
    mamba: tuple[int, int, int, int] = (
        16,
        4096,
        1024,
        128,
    )  # state size, inner size, key and value size, rank of the time steps
    batches: tuple[int, ...] = (1, 64)
    prompt: int = 128
    decode: int = 128
    prefill: tuple[int, int] = (16, 2048)
    batched: int = 16384
    length: int = 2304
    rounds: int = 3
    op_batches: tuple[int, ...] = (1, 64, 256)
    op_bytes: int = 1 << 29  # of the states of all layers

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Sizes:
        """Return the sizes that the command line asks for."""
        if args.tiny:
            return cls(
                layers=4, hidden=64, intermediate=96, vocab=512, heads=(4, 2, 32), plain_heads=(4, 2, 32), window=8,
                gdn=(2, 4, 64), kda=(4, 16), latent=(32, 16, 8, 16), mamba=(8, 64, 32, 4), batches=(1, 4), prompt=16,
                decode=8, prefill=(2, 64), batched=128, length=256, rounds=2, op_batches=(1, 4), op_bytes=1 << 16,
            )  # fmt: skip
        return cls(layers=12, decode=64, rounds=2) if args.quick else cls()

    def scout(self) -> Sizes:
        """Return these workloads for a Llama 4. Its chunk is `window`, and contexts may be longer than a chunk."""
        if self.hidden < 2048:
            return replace(self, window=128)
        shape = {"hidden": 5120, "intermediate": 8192, "vocab": 202048, "heads": (40, 8, 128), "window": 8192}
        return replace(self, layers=4, length=12288, **shape)

    @property
    def most(self) -> int:
        """Largest number of requests in a batch."""
        return max(self.batches)
