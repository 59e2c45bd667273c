"""The scripts of `examples/`, run as they stand."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = {
    "offline.py": "'copy a b c ='",
    "streaming.py": "[impatient] leaves after 4 tokens",
    "placements.py": "in one batch: all-kda",
}
ELSEWHERE = {"test_parity_of_my_model.py", "vllm_offline.py"}


@pytest.mark.parametrize("name", RUN)
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    shown = capsys.readouterr().out
    assert RUN[name] in shown
    if name == "placements.py":  # requests of one batch get the tokens of their placement
        lines = shown.splitlines()
        assert [line.removeprefix("in one batch: ") for line in lines[3:]] == lines[:3]
        assert len(set(lines[:3])) == 3


def test_the_parity_test_passes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(EXAMPLES / "test_parity_of_my_model.py"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_every_example_is_listed_and_run():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*RUN, *ELSEWHERE}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in scripts)
