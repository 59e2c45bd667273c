"""`lamella bench ops`: the operations of the active placement are measured and checked."""

from __future__ import annotations

import json

import pytest

from apriel2_models import SUPERNET, checkpoint, fixed
from covering import mostly_slow
from lamella.cli.main import main


@pytest.mark.parametrize("name", mostly_slow(["gdn", "kda", "mamba", "attention"], fast=["kda", "attention"]))
def test_operations_of_active_mixers_are_timed(tmp_path, capsys, name):
    folder = checkpoint(tmp_path, fixed(SUPERNET))
    options = ["--device", "cpu", "--requests", "2", "--input-len", "8", "--output-len", "2", "--dtype", "float32"]
    assert main(["bench", "ops", str(folder), *options, "--placement", f"all-{name}"]) == 0
    ops = {each["op"]: each for each in json.loads(capsys.readouterr().out.splitlines()[-1])["ops"]}
    of_mixers = {op.split(".")[2] for op in ops if op.startswith("mixer.mixers.")}
    assert of_mixers == {name}
    central = "attention.attention" if name == "attention" else f"{name}.recurrence"
    assert ops[f"mixer.mixers.{central}"]["calls"] == 2
    assert f"mixer.mixers.{name}.norm" not in ops
    assert all(each["error"] <= 1e-4 for each in ops.values())
