"""Command line: arguments of all subcommands, and error handling."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import lamella
from lamella.cli.limits import check_numbers
from lamella.engine.options import declared_options
from lamella.errors import LamellaError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status.

    A user's mistake, and an error of the operating system, are one line on stderr and status 2. If the reader of
    standard output has gone (`lamella inspect MODEL | head`), the command ends with status 141, like other programs.
    """
    args = parser().parse_args(argv)
    _set_up_logging(args.debug)
    try:
        check_numbers(args)
        # Each subcommand's module is imported when it runs, so that `--help` does not wait for torch.
        with _terminable():
            status: int = import_module(f"lamella.cli.{args.module}").run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _close_output()
        return 141
    except (LamellaError, OSError, MemoryError, RecursionError) as error:
        if args.debug:
            raise
        print(f"lamella: {_one_line(error)}", file=sys.stderr)
        if isinstance(error, OSError):
            _close_output()
        return 2
    except KeyboardInterrupt:
        return 130


def _one_line(error: BaseException) -> str:
    """Return an error as one line; those of lamella are one already."""
    match error:
        case LamellaError():
            return str(error)
        case OSError():
            place = error.filename if error.filename is not None else "standard output, or a file"
            return printable(f"{place}: {error.strerror or error}; see it all with --debug")
        case MemoryError():
            return "out of memory: give a smaller model, fewer blocks or fewer requests"
        case _:
            return "an input is nested too deeply; see it all with --debug"


def _close_output() -> None:
    """Drop what is left of the output, which Python would try to write again at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside the block SIGTERM raises `SystemExit`, so that temporary files and processes are removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Printable(logging.Formatter):
    """Log lines quote files; nothing in them may control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def _set_up_logging(debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="lamella", description=lamella.__doc__)
    top.add_argument("--version", action="version", version=f"lamella {lamella.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", "generate completions of prompts")
    _model(generate)
    generate.add_argument("-p", "--prompt", action="append", help="a prompt; can be given several times")
    generate.add_argument(
        "--tokens", action="append", metavar="1,2,3", help="a prompt as token ids; can be given several times"
    )
    generate.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="image for the next <|image|> placeholder; only with a single prompt; can be given several times",
    )
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--stop", action="append", help="a string that ends the text; can be given several times")
    _engine(generate)
    _json(generate)

    chat = _command(
        commands,
        "chat",
        "chat with a model in the terminal",
        "Chat with a model in the terminal, with its chat template and its default sampling parameters. Messages are "
        "read from the terminal, or line by line from standard input. In the chat, /help lists the commands.",
    )
    _model(chat)
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument("--max-tokens", type=int, help="most tokens of an answer; default: as many as fit")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        chat.add_argument(f"--{name}", type=kind, help="default: the model's")
    chat.add_argument("--sampling-seed", dest="sampling_seed", type=int, help="seed of the random draws")
    chat.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help='additional template variables, such as {"enable_thinking": false}',
    )
    _engine(chat)
    _json(chat)

    inspect = _command(
        commands,
        "inspect",
        "show the layers and the cost of a model",
        "Show the layers as a tree and a table, and the cost of the model, from its config alone. With --compile: "
        "measure torch.compile on random weights in three forms, each in its own process: as with enable_compile, the "
        "whole model at once, and each layer by itself. The exit status is 1 if a compiled form computes wrong values.",
    )
    _model(inspect)
    _overrides(inspect)
    inspect.add_argument("--dtype", default="auto")
    inspect.add_argument("--context", type=int, default=2048, help="context length, in tokens, for the costs")
    inspect.add_argument("--placement", help="for a supernet: active mixers for the costs")
    inspect.add_argument(
        "--compile", action="store_true", help="show graphs, recompiles with reasons, and CPU seconds of torch.compile"
    )
    inspect.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="with --compile: depths to measure"
    )
    _json(inspect)

    parity = _command(
        commands,
        "parity",
        "compare an engine with the reference, and find the first operation that differs",
        "Checks: stats (teacher-forced log-probabilities against the reference and its noise floor), paths (every path "
        "that computes the same tokens, states included), bisect (every operation on the reference's input). Default: "
        "all checks that the engine supports. The exit status is 1 if a check fails. docs/parity.md explains the "
        "figures.",
    )
    parity.add_argument("words", nargs="+", metavar="MODEL [stats] [paths] [bisect]", help="the model, and checks")
    _overrides(parity)
    parity.add_argument("--engine", default="lamella", help="lamella, vllm, hf or reference")
    parity.add_argument("--reference", help="reference implementation: hf, reference, or auto (the default)")
    parity.add_argument("--oracle", help="deprecated name of --reference")
    parity.add_argument("--dtype", default="auto", help="of the engine; default for bisect: float32")
    parity.add_argument("--device", default="auto")
    source = parity.add_mutually_exclusive_group()
    source.add_argument("--prompts", metavar="FILE", help="one prompt per line: text, or a JSON list of token ids")
    source.add_argument("--random", type=int, metavar="N", help="N sequences of random tokens")
    parity.add_argument("--count", type=int, help="use only the first COUNT sequences")
    parity.add_argument("--prompt-len", type=int, default=64, help="tokens of the prefill")
    parity.add_argument("--decode-len", type=int, default=16, help="tokens that are decoded one by one")
    parity.add_argument("--batch-size", type=int, default=8, help="sequences that the engine runs at the same time")
    parity.add_argument("--top", type=int, help="compare only the TOP likeliest tokens of each position")
    parity.add_argument("--seed", type=int, default=0, help="of random tokens and dummy weights")
    parity.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    parity.add_argument("--max-model-len", type=int)
    parity.add_argument("--placement", help="for a supernet: all-X, every3rd-X, bookend-attn-X, or one name per layer")
    parity.add_argument("--free-running", action="store_true", help="also compare freely generated tokens")
    parity.add_argument(
        "--json", metavar="FILE", help="write the report as one JSON object; - prints it last on stdout"
    )
    parity.add_argument("--html", metavar="FILE", help="write the report as one HTML page")

    convert = _command(commands, "convert", "convert a GGUF file or a LlamaCanon checkpoint to a Hugging Face folder")
    _model(convert)
    _overrides(convert)
    convert.add_argument("destination", help="a folder that does not exist yet")
    convert.add_argument("--dtype", default="auto", help="of the tensors; auto: the file's, bfloat16 if quantized")
    convert.add_argument("--rope", default="keep", help="RoPE channel order in the file: keep, huggingface or lingua")

    placement = _command(commands, "placement", "show, set and compare the placements of a supernet")
    actions = placement.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    show = actions.add_parser("show", help="show the mixers of each layer, and the state size of a placement")
    _model(show)
    _overrides(show)
    show.add_argument(
        "--placement", help="all-X, every3rd-X, bookend-attn-X, or one name per layer; default: the file's"
    )
    show.add_argument("--dtype", default="auto")
    _json(show)
    change = actions.add_parser("set", help="write another main placement into the checkpoint's config.json")
    _model(change)
    change.add_argument("placement", help="all-X, every3rd-X, bookend-attn-X, or one name per layer")
    _json(change)
    sweep = actions.add_parser("sweep", help="measure loss, KL from the main placement, speed and state of placements")
    _model(sweep)
    sweep.add_argument("placements", nargs="*", help="default: each mixer alone, every 2nd and 4th, between attention")
    sweep.add_argument("--prompts", metavar="FILE", help="text to score, one prompt per line; default: bundled text")
    sweep.add_argument("--count", type=int, help="score only the first COUNT sequences")
    sweep.add_argument("--requests", type=int, default=8, help="batch size of the time measurement")
    sweep.add_argument("--input-len", type=int, default=128)
    sweep.add_argument("--output-len", type=int, default=32)
    sweep.add_argument("--repeats", type=int, default=3)
    sweep.add_argument("--plot", metavar="FILE", help="write a plot of loss over decode time (.png, .svg, .pdf)")
    _engine(sweep)
    _json(sweep)

    demo = _command(commands, "demo", "run the bundled model: its layers, its answers, and its accuracy on every path")
    demo.add_argument("--questions", type=int, default=300, help="number of held-out questions")
    _json(demo)

    doctor = _command(
        commands, "doctor", "show installed packages, available kernels, and the state of the vLLM plugin"
    )
    _json(doctor)

    bench = _command(commands, "bench", "measure the speed of a model on this machine")
    bench.add_argument(
        "workload",
        choices=("offline", "latency", "ops"),
        help="offline: many requests at the same time; latency: one request; ops: each operation by itself",
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
    command.add_argument("--debug", action="store_true", help="show log messages, and tracebacks of errors")
    return command


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a folder, a GGUF file, `demo`, or a Hub id")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object last on stdout")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"key": null}}: {text}')
    return value


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hf-overrides",
        type=_json_object,
        metavar="JSON",
        help="values that replace those of the config file; null removes a key",
    )


_KINDS: dict[str | None, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "json": _json_object}


def _engine(command: argparse.ArgumentParser) -> None:
    """Add the options of the engine. Options that are not given do not appear in the parsed arguments."""
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
