"""`lamella convert`: convert GGUF files and LlamaCanon checkpoints to Hugging Face folders."""

from __future__ import annotations

import argparse

from lamella.checkpoint.convert import convert
from lamella.cli.common import console


def run(args: argparse.Namespace) -> int:
    """Write the folder; return the exit status."""
    with console.status(f"converting {args.model}"):
        destination = convert(
            args.model, args.destination, rope=args.rope, overrides=args.hf_overrides, dtype=args.dtype
        )
    console.print(f"wrote {destination}", markup=False)
    return 0
