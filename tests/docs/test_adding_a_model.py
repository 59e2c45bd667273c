"""docs/adding_a_model.md, followed word for word in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_model.md"


def test_the_page_runs_as_written(tmp_path):
    blocks = re.findall(r"```python\n# file: (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["alternating.py", "register.py", "run.py", "check.py"]
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    for name, last in (("run.py", "]"), ("check.py", "every path and every operation is right")):
        done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith(last)


def test_the_entry_point_group_is_the_one_that_is_read():
    from lamella.models.registry import ENTRY_POINT_GROUP

    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in PAGE.read_text()
