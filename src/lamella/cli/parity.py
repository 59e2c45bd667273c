"""`lamella parity`: compare an engine with the reference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from lamella.cli.common import console, print_json
from lamella.errors import ParameterError
from lamella.files import write_text
from lamella.parity.api import CHECKS, check
from lamella.parity.report import html, terminal


def run(args: argparse.Namespace) -> int:
    """Run the checks, and write the reports; return exit status 1 if a check fails."""
    model, checks = _model_and_checks(args.words)
    if args.random is not None and args.count is not None:
        raise ParameterError("--count: not with --random, which gives the number of sequences")
    files = [Path(name) for name in (args.json, args.html) if name not in (None, "-")]
    for file in files:
        # Checked before the long work, not after it.
        if not file.parent.is_dir() or file.is_dir():
            raise ParameterError(f"{file}: not a file that can be written")
    with Console(stderr=True).status(f"opening {model}") as status:
        report = check(
            model,
            checks,
            progress=status.update,
            engine=args.engine,
            reference=_reference(args),
            dtype=args.dtype,
            device=args.device,
            prompts="random" if args.random is not None else args.prompts,
            count=args.random if args.random is not None else args.count,
            prompt_len=args.prompt_len,
            decode_len=args.decode_len,
            batch_size=args.batch_size,
            seed=args.seed,
            top=args.top,
            free_running=args.free_running,
            load_format=args.load_format,
            max_model_len=args.max_model_len,
            placement=args.placement,
            hf_overrides=args.hf_overrides,
        )
    result = report.as_dict()
    terminal.show(console, result)
    if args.html:
        write_text(Path(args.html), html.render(result), ParameterError)
    if args.json == "-":
        print_json(result)
    elif args.json:
        write_text(Path(args.json), json.dumps(result, ensure_ascii=False) + "\n", ParameterError)
    return 0 if report.passed else 1


def _reference(args: argparse.Namespace) -> str:
    """Return the value of `--reference`, or of its deprecated alias `--oracle`."""
    if args.oracle is not None and args.reference is not None:
        raise ParameterError("--oracle: is the deprecated name of --reference, and both are given; remove --oracle")
    return args.reference or args.oracle or "auto"


def _model_and_checks(words: list[str]) -> tuple[str, list[str]]:
    """Return the model and the named checks, given in any order. A folder named like a check is written as ./stats."""
    models = [word for word in words if word not in CHECKS]
    if len(models) != 1:
        raise ParameterError(f"{' '.join(words)!r}: must be one model, and any of the checks {', '.join(CHECKS)}")
    return models[0], [name for name in CHECKS if name in words]
