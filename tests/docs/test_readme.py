"""The README's examples, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 1
    code = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, stats = done.stdout.splitlines()
    assert "f 3 f x" in first.removeprefix("copy f 3 f x =")
    assert second.split()[-2:] == ["2", "stop"]
    assert "generated_tokens" in stats


def test_every_command_that_is_shown_exists():
    from lamella.cli.main import parser

    commands = set(re.findall(r"^lamella (\w+)", README.read_text(), re.MULTILINE))
    shown = parser().format_help()
    assert commands == {"generate", "chat", "inspect", "parity", "convert", "placement", "bench", "doctor", "demo"}
    assert all(command in shown for command in commands)
