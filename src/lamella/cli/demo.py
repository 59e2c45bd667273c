"""`lamella demo`: the tour of the bundled model."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from lamella.bench.card import measure_bandwidth
from lamella.checkpoint.files import DEMO, open_checkpoint
from lamella.cli.common import console, print_json
from lamella.cli.inspect import cost_card, show
from lamella.demo.tour import show_answers, show_result, take_tour

_SHOWN = 6
_CONTEXT = 100  # about the tokens of a question and its answer


def run(args: argparse.Namespace) -> int:
    """Run the tour; return exit status 1 if the model is less accurate than it should be."""
    # One thread: the model is so small that synchronization of threads would dominate.
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(DEMO)
    if not args.json:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        show(console, checkpoint.read_config(), cost_card(checkpoint, "auto", measure_bandwidth(device)), _CONTEXT)
    with console.status(f"asking {args.questions} held-out questions"):
        result, answers = take_tour(args.questions)
    if args.json:
        print_json({**asdict(result), "passed": result.passed})
    else:
        show_answers(console, answers[:_SHOWN])
        show_result(console, result)
    return 0 if result.passed else 1
