"""docs/parity.md, its examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.fixture
def text(tmp_path):
    """The page, whose files are in `tmp_path`."""
    text = PAGE.read_text()
    blocks = dict(re.findall(r"```python\n# file: (\S+)\n(.*?)```", text, re.DOTALL))
    assert list(blocks) == ["fault.py", "find.py", "test_parity.py"]
    for name, code in blocks.items():
        (tmp_path / name).write_text(code)
    return text


def test_the_worked_case_finds_what_the_page_says(text, tmp_path):
    runner = "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, '.'); import find"
    done = subprocess.run([sys.executable, "-c", runner], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, paths, first = done.stdout.splitlines()
    (shown,) = re.findall(r"```\n(\S+)\n(\[.*\])\n(layer .*)\n```", text)
    assert float(error) < 1e-3 and paths == shown[1]
    # The figures are rounding's own to the last digit; the place is not.
    assert first.split(": ")[0] == shown[2].split(": ")[0]


def test_the_blocks_own_test_passes(text, tmp_path):
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_parity.py"], cwd=tmp_path, capture_output=True)
    assert tested.returncode == 0, tested.stdout
