"""`lamella parity`: tables, files, and an exit status that can be trusted."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import canon_checkpoint
from lamella.cli.main import main
from lamella.ops import native

SMALL = ["--prompt-len", "24", "--decode-len", "6", "--count", "3", "--device", "cpu"]


def test_the_demo_passes(capsys, tmp_path):
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    assert main(["parity", "demo", *SMALL, "--html", str(page), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "noise floor ratio" in shown and "token by token from the first" in shown and "all in line" in shown
    report = json.loads(file.read_text())
    assert report["verdict"] == "pass" and report["noise_floor_ratio"] == report["stats"]["noise_floor_ratio"]
    assert report["oracle"] == "reference" and report["truth_dtype"] == "float64"
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["config_hash"]) == 12 and report["tolerances"]["ratio"] == 1.0
    assert report["inputs"]["source"].startswith("random tokens (no tokenizer that reads")
    assert len(report["worst_tokens"]) == 20 and report["worst_tokens"][0]["context"]
    assert page.read_text().startswith("<!doctype html>") and "chunked, cut at 3" in page.read_text()


def test_json_is_the_last_line(capsys):
    assert main(["parity", "stats", "demo", "--dtype", "bfloat16", "--random", "2", "--json", "-", *SMALL[:4]]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["paths"] is None and report["bisect"] is None and report["inputs"]["sequences"] == 2


@pytest.mark.skipif(not native.available(), reason="breaks a native kernel")
def test_a_broken_kernel_is_found_and_the_status_says_so(capsys, monkeypatch):
    right = native.add_rms_norm
    monkeypatch.setattr(native, "add_rms_norm", lambda x, residual, weight, eps: right(x, residual, weight, eps + 0.1))
    assert main(["parity", "demo", "bisect", *SMALL]) == 1
    assert "first operation out of line: layer 0, norm (layers.0.mixer_norm)" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_prompts_from_a_file(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(
        'copy a b c =\n\n[1, 2, 3, 4]\n{"prompt": "mod 7 start 3 plus 5 ="}\n{"prompt_token_ids": [5, 6]}\n'
    )
    assert main(["parity", "demo", "stats", "--prompts", str(file), "--json", "-"]) == 0
    inputs = json.loads(capsys.readouterr().out.splitlines()[-1])["inputs"]
    assert inputs["source"] == "prompts.txt" and inputs["sequences"] == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["stats"], "'stats': must name one model, and of stats, paths, bisect those that are wanted"),
        (["demo", "demo2"], "'demo demo2': must name one model"),
        (["demo", "--random", "0"], "--random 0: must be at least 1"),
        (["demo", "--random", "2", "--count", "2"], "--count: --random says how many already"),
        (["demo", "--html", "no/such/folder/page.html"], "no/such/folder/page.html: not a file that can be written"),
        (["demo", "--prompts", "no-such-file"], "prompts: no-such-file cannot be read"),
        (["demo", "--engine", "tgi"], "engine='tgi': must be one of"),
        (["demo", "--dtype", "int8"], "dtype='int8': must be auto"),
        (["demo", "paths", "--engine", "reference"], "check 'paths': the engine reference can be asked for stats"),
        (["no/such/model/here"], "no/such/model/here: no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments, line, capsys):
    assert main(["parity", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lamella: ") and line in captured.err and captured.err.count("\n") == 1


def test_a_dummy_model_and_the_old_number(capsys, tmp_path):
    folder = canon_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--free-running"]
    assert main(["parity", str(folder), "stats", *SMALL, *options]) == 0
    assert "texts that are still the same part at" in " ".join(capsys.readouterr().out.split())
