"""`lamella generate`: generate completions of prompts; a single one is streamed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lamella.checkpoint.files import DEMO
from lamella.cli.common import console, load_llm, print_json, terminal_text
from lamella.engine.requests.outputs import RequestOutput
from lamella.engine.requests.prompt import Prompt
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.errors import ParameterError
from lamella.serve.llm import LLM

_DEMO_QUESTIONS = 6


def run(args: argparse.Namespace) -> int:
    """Generate and print completions; return exit status 1 if one of them ended with an error."""
    prompts: list[Prompt] = [*(args.prompt or ()), *map(_token_prompt, args.tokens or ())]
    if not prompts and args.model != DEMO:
        raise ParameterError("no prompt: give -p TEXT or --tokens 1,2,3")
    if args.image:
        prompts = [_with_images(prompts, args.image)]
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=args.max_tokens, stop=args.stop
    )
    llm = load_llm(args)
    if not prompts:
        return _ask_demo(llm, args.json)
    if len(prompts) == 1 and not args.json:
        return _exit_status([_stream(llm, prompts[0], params)])
    outputs = llm.generate(prompts, params)
    if args.json:
        print_json({"outputs": [asdict(output) for output in outputs]})
    else:
        for output in outputs:
            console.print(f"[bold]{_prompt_text(output)}[/bold]", markup=True)
            console.print(_completion_text(output), markup=False)
    return _exit_status(outputs)


def _exit_status(outputs: Sequence[RequestOutput]) -> int:
    """Print the errors of completions; return exit status 1 if there are any."""
    errors = [(index, each.error) for index, output in enumerate(outputs) for each in output.outputs if each.error]
    for index, error in errors:
        print(f"lamella: prompts[{index}]: {error}", file=sys.stderr)
    return 1 if errors else 0


def _token_prompt(text: str) -> Prompt:
    try:
        return {"prompt_token_ids": [int(part) for part in text.replace(",", " ").split()]}
    except ValueError as error:
        raise ParameterError(f"--tokens {text!r}: must be token ids separated by commas") from error


def _with_images(prompts: Sequence[Prompt], files: Sequence[str]) -> Prompt:
    """Return the single prompt with the images of these files."""
    if len(prompts) != 1:
        raise ParameterError(f"--image: needs a single prompt, not {len(prompts)}")
    try:
        from PIL import Image
    except ImportError as error:
        raise ParameterError("--image: reading image files needs Pillow: pip install 'lamella[images]'") from error
    images = []
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise ParameterError(f"--image {file}: not a file; give an image file")  # a pipe would be waited for
        try:
            images.append(Image.open(file))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ParameterError(f"--image {file}: {error}") from error
    (prompt,) = prompts
    fields: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    return {**fields, "multi_modal_data": {"image": images}}


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    """Print the text while it is generated, and return the output. Without a tokenizer, print token ids at the end."""
    shown = ""
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        print(_for_output(text[len(shown) :]), end="", flush=True)
        shown = text
    print("" if llm.engine.tokenizer else _completion_text(output))
    return output


def _for_output(text: str) -> str:
    """Return a text as it is, or on a terminal without control characters, which a tokenizer's file may hold."""
    return terminal_text(text) if sys.stdout.isatty() else text


def _prompt_text(output: RequestOutput) -> str:
    return _for_output(output.prompt) if output.prompt is not None else " ".join(map(str, output.prompt_token_ids))


def _completion_text(output: RequestOutput) -> str:
    first = output.outputs[0]
    return _for_output(first.text) or " ".join(map(str, first.token_ids))


def _ask_demo(llm: LLM, as_json: bool) -> int:
    """Let the demo answer some held-out questions; return exit status 1 if an answer is wrong."""
    from lamella.demo.questions import held_out
    from lamella.demo.tour import answer_questions, show_answers

    answers = answer_questions(llm, held_out(_DEMO_QUESTIONS))
    if as_json:
        print_json({"answers": [answer.as_dict() for answer in answers]})
    else:
        show_answers(console, answers)
    return 0 if all(answer.right for answer in answers) else 1
