"""Processes of their own do not import what lies in the current folder."""

from __future__ import annotations

import subprocess
import sys

from helpers import canon_checkpoint
from lamella import LLM, SamplingParams
from lamella.processes import module_command

NAMES = ("json", "msgspec", "runpy", "socket", "torch")


def plant(folder):
    """Write modules that leave a file `imported` behind."""
    for name in NAMES:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'imported')!r}, 'a').write({name!r})\nraise SystemExit(3)\n"
        )
    return folder


def test_a_module_runs_with_its_arguments(tmp_path):
    command = module_command("json.tool", "--compact")
    done = subprocess.run(command, input='{"a": 1}', cwd=plant(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"a":1}\n', "")
    assert not (tmp_path / "imported").exists()


def test_what_is_planted_would_be_imported_otherwise(tmp_path):
    command = [sys.executable, "-c", "import json"]
    assert subprocess.run(command, cwd=plant(tmp_path), check=False).returncode == 3
    assert (tmp_path / "imported").read_text() == "json"


def test_ranks_do_not_import_from_the_current_folder(tmp_path, monkeypatch):
    folder = canon_checkpoint(tmp_path / "model")
    (tmp_path / "planted").mkdir()
    monkeypatch.chdir(plant(tmp_path / "planted"))
    llm = LLM(folder, device="cpu", num_blocks=8, tensor_parallel_size=2)
    (output,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    assert not (tmp_path / "planted" / "imported").exists()


def test_measuring_what_compiling_costs_does_not_either(tmp_path):
    command = module_command("lamella.bench.compile", "{}")
    done = subprocess.run(command, cwd=plant(tmp_path), capture_output=True, text=True, check=False)
    assert "TypeError" in done.stderr  # of the task without a model: the module itself has run
    assert not (tmp_path / "imported").exists()
