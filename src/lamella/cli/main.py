"""Arguments of every subcommand, and what happens to errors."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import lamella
from lamella.cli.limits import check_numbers
from lamella.engine.options import declared_options
from lamella.errors import LamellaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. A user's mistake is one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format="%(name)s: %(message)s")
    try:
        check_numbers(args)
        # Each subcommand's module is imported when it runs, so that `--help` does not wait for torch.
        return import_module(f"lamella.cli.{args.module}").run(args)
    except LamellaError as error:
        if args.debug:
            raise
        print(f"lamella: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="lamella", description=lamella.__doc__)
    top.add_argument("--version", action="version", version=f"lamella {lamella.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", "complete prompts")
    _model(generate)
    generate.add_argument("-p", "--prompt", action="append", help="a prompt; may be given several times")
    generate.add_argument("--tokens", action="append", metavar="1,2,3", help="a prompt as token ids; likewise")
    generate.add_argument(
        "--image", action="append", metavar="FILE", help="for an <|image|> of the one prompt, in their order"
    )
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--stop", action="append", help="a string that ends the text; may be given several times")
    _engine(generate)
    _json(generate)

    chat = _command(
        commands,
        "chat",
        "talk to a model in the terminal",
        "Talk to a model in the terminal, by its chat template and its default sampling parameters. Messages come from "
        "the terminal, or one a line from standard input. In the chat, /help lists the commands.",
    )
    _model(chat)
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-tokens", type=int, help="most tokens of an answer; default: as many as fit")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        chat.add_argument(f"--{name}", type=kind, help="default: the model's")
    chat.add_argument("--sampling-seed", dest="sampling_seed", type=int, help="seed of the answers' draws")
    chat.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help='more names for the template, such as {"enable_thinking": false}',
    )
    _engine(chat)
    _json(chat)

    inspect = _command(
        commands,
        "inspect",
        "show a model's layers and what it costs",
        "The layers as a picture and a table, and what the model costs, from its config alone. With --compile, what it "
        "costs to compile in three ways: as the engine does with enable_compile, as a whole, and each layer by itself; "
        "with random weights, each in a process of its own. The exit status is 1 where one computes something else.",
    )
    _model(inspect)
    _overrides(inspect)
    inspect.add_argument("--dtype", default="auto")
    inspect.add_argument("--context", type=int, default=2048, help="tokens of context that the costs are shown for")
    inspect.add_argument("--placement", help="of a supernet: the mixers whose costs are shown")
    inspect.add_argument(
        "--compile", action="store_true", help="graphs, recompiles with their reasons, and CPU seconds of torch.compile"
    )
    inspect.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="with --compile: stacks of so many of its layers"
    )
    _json(inspect)

    parity = _command(
        commands,
        "parity",
        "prove that an engine computes what the reference does, and name the first operation that does not",
        "Checks: stats (teacher-forced log-probabilities against the reference and its noise floor), paths (every way "
        "to compute the same tokens, states included), bisect (every operation fed the reference's input). Without a "
        "name, all that the engine can be asked for. The exit status is 1 where one fails. docs/parity.md explains the "
        "figures.",
    )
    parity.add_argument("words", nargs="+", metavar="MODEL [stats] [paths] [bisect]", help="the model, then checks")
    _overrides(parity)
    parity.add_argument("--engine", default="lamella", help="lamella, vllm, hf or reference")
    parity.add_argument("--reference", help="reference implementation: hf, reference, or auto (the default)")
    parity.add_argument("--oracle", help="deprecated name of --reference")
    parity.add_argument("--dtype", default="auto", help="of the engine; bisect takes float32 unless this is given")
    parity.add_argument("--device", default="auto")
    source = parity.add_mutually_exclusive_group()
    source.add_argument("--prompts", metavar="FILE", help="a prompt a line: text, or a JSON list of token ids")
    source.add_argument("--random", type=int, metavar="N", help="N sequences of random tokens")
    parity.add_argument("--count", type=int, help="take only so many sequences")
    parity.add_argument("--prompt-len", type=int, default=64, help="tokens that are prefilled")
    parity.add_argument("--decode-len", type=int, default=16, help="tokens that follow one by one")
    parity.add_argument("--batch-size", type=int, default=8, help="sequences that the engine runs at a time")
    parity.add_argument("--top", type=int, help="compare the K likeliest tokens of each position only")
    parity.add_argument("--seed", type=int, default=0, help="of random tokens and dummy weights")
    parity.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    parity.add_argument("--max-model-len", type=int)
    parity.add_argument("--placement", help="of a supernet: all-X, every3rd-X, bookend-attn-X, or a name a layer")
    parity.add_argument("--free-running", action="store_true", help="also the old number: both generate freely")
    parity.add_argument("--json", metavar="FILE", help="the report as one JSON object; - prints it, last on stdout")
    parity.add_argument("--html", metavar="FILE", help="the report as one page")

    convert = _command(commands, "convert", "write a GGUF file or a LlamaCanon checkpoint as a Hugging Face folder")
    _model(convert)
    _overrides(convert)
    convert.add_argument("destination", help="a folder that does not exist yet")
    convert.add_argument("--dtype", default="auto", help="of the tensors; auto: the file's, bfloat16 if quantized")
    convert.add_argument(
        "--rope", default="keep", help="keep, huggingface or lingua: which channels of a head the file pairs"
    )

    placement = _command(commands, "placement", "of a supernet: its mixers, those it uses, and what others would cost")
    actions = placement.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    show = actions.add_parser("show", help="the layers' mixers, and what a placement keeps")
    _model(show)
    _overrides(show)
    show.add_argument("--placement", help="all-X, every3rd-X, bookend-attn-X, or a name a layer; default: the file's")
    show.add_argument("--dtype", default="auto")
    _json(show)
    change = actions.add_parser("set", help="write another main placement into the checkpoint's config.json")
    _model(change)
    change.add_argument("placement", help="all-X, every3rd-X, bookend-attn-X, or a name a layer")
    _json(change)
    sweep = actions.add_parser("sweep", help="loss, distance from the main placement, speed and state of several")
    _model(sweep)
    sweep.add_argument("placements", nargs="*", help="default: each mixer alone, every 2nd and 4th, between attention")
    sweep.add_argument("--prompts", metavar="FILE", help="text that is scored: a prompt a line; default: bundled")
    sweep.add_argument("--count", type=int, help="score only so many sequences")
    sweep.add_argument("--requests", type=int, default=8, help="decoded at a time, for the times")
    sweep.add_argument("--input-len", type=int, default=128)
    sweep.add_argument("--output-len", type=int, default=32)
    sweep.add_argument("--repeats", type=int, default=3)
    sweep.add_argument("--plot", metavar="FILE", help="loss over time as a picture (.png, .svg, .pdf)")
    _engine(sweep)
    _json(sweep)

    demo = _command(commands, "demo", "the tour: the bundled model, its answers, and how right it is on every path")
    demo.add_argument("--questions", type=int, default=300, help="how many held-out questions to ask")
    _json(demo)

    doctor = _command(commands, "doctor", "say what is installed, which kernels serve, and what vLLM was told")
    _json(doctor)

    bench = _command(commands, "bench", "time a model on this machine")
    bench.add_argument(
        "workload", choices=("offline", "latency", "ops"), help="many requests at a time, one, or each operation"
    )
    _model(bench)
    bench.add_argument("--requests", type=int, default=None, help="default: 16 offline, 1 otherwise")
    bench.add_argument("--input-len", type=int, default=128)
    bench.add_argument("--output-len", type=int, default=64)
    bench.add_argument("--repeats", type=int, default=3)
    _engine(bench)
    return top


def _command(
    commands: argparse._SubParsersAction, name: str, help: str, description: str | None = None
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=description or help)
    command.set_defaults(module=name)
    command.add_argument("--debug", action="store_true", help="show log lines, and tracebacks of errors")
    return command


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a folder, a GGUF file, `demo`, or a Hub id")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object, last")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"key": null}}: {text}')
    return value


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hf-overrides",
        type=_json_object,
        metavar="JSON",
        help="values in the place of the config file's; null removes",
    )


_KINDS: dict[str | None, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "json": _json_object}


def _engine(command: argparse.ArgumentParser) -> None:
    """Add the options of the engine; only those that are given are passed on."""
    names = []
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in declared_options().items():
        if not option.is_argument:
            continue
        group = groups.setdefault(option.group, command.add_argument_group(f"engine: {option.group.lower()}"))
        settings: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": option.help.replace("`", "").replace("%", "%%"),
        }
        if option.kind == "flag":
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = _KINDS[option.kind]
            settings["metavar"] = "JSON" if option.kind == "json" else None
        group.add_argument(f"--{name.replace('_', '-')}", **settings)
        names.append(name)
    command.set_defaults(engine_options=names)
