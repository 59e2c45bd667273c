"""docs/adding_a_mixer.md, followed word for word in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"


def blocks():
    return re.findall(r"```python\n# file: (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs_as_written(tmp_path):
    assert [name for name, _ in blocks()] == ["averaging.py", "register.py", "check.py"]
    for name, code in blocks():
        (tmp_path / name).write_text(code)
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "every path and every operation is right"


def test_the_mixer_is_short():
    assert len(dict(blocks())["averaging.py"].splitlines()) <= 120


def test_a_mistake_in_its_state_is_found(tmp_path):
    """The page's check would notice a mixer that starts from what another request left in its slot."""
    for name, code in blocks():
        changed = code.replace("(batch.positions[starts] > 0)", "(batch.positions[starts] > -1)")
        (tmp_path / name).write_text(changed)
        assert name != "averaging.py" or changed != code
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
