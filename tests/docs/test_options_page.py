"""docs/options.md and the command line say what the options' declarations say."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from lamella import LLM, AsyncLLM
from lamella.cli.main import parser
from lamella.engine.options import declared_options

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_declarations_give(tmp_path):
    script = "import runpy; print(runpy.run_path('scripts/options_page.py')['page'](), end='')"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "options.md").read_text() == found, "run python scripts/options_page.py"


def test_both_front_doors_have_every_option():
    assert list(signature(LLM).parameters) == list(signature(AsyncLLM).parameters)
    assert list(signature(LLM).parameters) == [*declared_options(), "vllm_arguments"]


@pytest.mark.parametrize("command", [["generate", "m"], ["bench", "offline", "m"], ["placement", "sweep", "m"]])
def test_the_command_line_has_the_declared_options(command):
    expected = {name for name, option in declared_options().items() if option.is_argument}
    arguments = parser().parse_args(command)
    assert set(arguments.engine_options) == expected
    assert not any(hasattr(arguments, name) for name in expected), "options that are not given are not passed on"


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--max-num-seqs", "3"], "max_num_seqs", 3),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--hf-overrides", '{"a": null}'], "hf_overrides", {"a": None}),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--snapshot-prompts", "busy"], "snapshot_prompts", "busy"),
    ],
)
def test_values_arrive_with_their_types(given, name, value):
    assert vars(parser().parse_args(["generate", "m", *given]))[name] == value


def test_help_needs_no_torch():
    code = "import sys\nfrom lamella.cli.main import parser\nparser()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_percent_sign_in_help_is_shown(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["generate", "--help"])
    assert "85 %" in capsys.readouterr().out
