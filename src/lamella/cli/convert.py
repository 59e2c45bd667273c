"""`lamella convert`: LlamaCanon checkpoints as Hugging Face safetensors."""

from __future__ import annotations

import argparse

from lamella.checkpoint.convert import convert
from lamella.cli.common import console


def run(args: argparse.Namespace) -> int:
    with console.status(f"converting {args.model}"):
        destination = convert(args.model, args.destination, rope=args.rope, overrides=args.hf_overrides)
    console.print(f"wrote {destination}", markup=False)
    return 0
