"""The examples of the page on supernets, executed as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from apriel2_models import SUPERNET, checkpoint, fixed

PAGE = Path(__file__).parents[2] / "docs" / "supernets.md"


def test_the_examples_run(tmp_path, monkeypatch):
    checkpoint(tmp_path / "supernet", fixed(SUPERNET, layers=4))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
