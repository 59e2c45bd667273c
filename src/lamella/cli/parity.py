"""`lamella parity`: compare an engine with the reference; the exit status says whether it is as exact as it can be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from lamella.cli.common import console, print_json
from lamella.errors import ParameterError
from lamella.parity.api import CHECKS, check
from lamella.parity.report import html, terminal


def run(args: argparse.Namespace) -> int:
    model, checks = _words(args.words)
    if args.random is not None and args.count is not None:
        raise ParameterError("--count: --random says how many already")
    files = [Path(name) for name in (args.json, args.html) if name not in (None, "-")]
    for file in files:
        # Before the work rather than after it.
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
        Path(args.html).write_text(html.render(result), encoding="utf-8")
    if args.json == "-":
        print_json(result)
    elif args.json:
        Path(args.json).write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if report.passed else 1


def _reference(args: argparse.Namespace) -> str:
    """Return the value of `--reference`, or of its deprecated alias `--oracle`."""
    if args.oracle is not None and args.reference is not None:
        raise ParameterError("--oracle: is the deprecated name of --reference, and both are given; remove --oracle")
    return args.reference or args.oracle or "auto"


def _words(words: list[str]) -> tuple[str, list[str]]:
    """The model and the named checks, in any order; a folder that is called like a check can be given as ./stats."""
    models = [word for word in words if word not in CHECKS]
    if len(models) != 1:
        raise ParameterError(
            f"{' '.join(words)!r}: must name one model, and of {', '.join(CHECKS)} those that are wanted"
        )
    return models[0], [name for name in CHECKS if name in words]
