"""`lamella parity`: tables, report files, exit status, and errors."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from helpers import canon_checkpoint, change_config, hf_checkpoint
from lamella.cli.main import main
from lamella.ops import native

SMALL = ["--prompt-len", "24", "--decode-len", "6", "--count", "3", "--device", "cpu"]


def test_the_demo_passes(capsys, tmp_path):
    block, file = tmp_path / "report.html", tmp_path / "report.json"
    assert main(["parity", "demo", *SMALL, "--html", str(block), "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "noise floor ratio" in shown and "token by token from the first" in shown and "all in line" in shown
    report = json.loads(file.read_text())
    assert report["verdict"] == "pass" and report["noise_floor_ratio"] == report["stats"]["noise_floor_ratio"]
    assert report["oracle"] == "reference" and report["reference_dtype"] == "float64"
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["config_hash"]) == 12 and report["tolerances"]["ratio"] == 1.0
    assert report["inputs"]["source"].startswith("random tokens (no tokenizer that reads")
    assert len(report["worst_tokens"]) == 20 and report["worst_tokens"][0]["context"]
    assert block.read_text().startswith("<!doctype html>") and "chunked, cut at 3" in block.read_text()


def test_json_is_the_last_line(capsys):
    assert main(["parity", "stats", "demo", "--dtype", "bfloat16", "--random", "2", "--json", "-", *SMALL[:4]]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["paths"] is None and report["bisect"] is None and report["inputs"]["sequences"] == 2


@pytest.mark.skipif(not native.available(), reason="breaks a native kernel")
def test_broken_kernel_fails_with_status_1(capsys, monkeypatch):
    right = native.add_rms_norm
    monkeypatch.setattr(native, "add_rms_norm", lambda x, residual, weight, eps: right(x, residual, weight, eps + 0.1))
    assert main(["parity", "demo", "bisect", *SMALL]) == 1
    assert "first operation out of line: layer 0, norm (layers.0.mixer_norm)" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_the_deprecated_flag_oracle_gives_the_same_report(capsys):
    def stats(flag: str) -> dict:
        assert main(["parity", "demo", "stats", flag, "reference", "--json", "-", *SMALL]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        return {name: report[name] for name in ("oracle", "stats", "worst_tokens", "inputs")}

    assert stats("--oracle") == stats("--reference")


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
        (["stats"], "'stats': must be one model, and any of the checks stats, paths, bisect"),
        (["demo", "demo2"], "'demo demo2': must be one model"),
        (["demo", "--random", "0"], "--random 0: must be at least 1"),
        (["demo", "--random", "2", "--count", "2"], "--count: not with --random, which gives the number"),
        (["demo", "--html", "no/such/folder/block.html"], "no/such/folder/block.html: not a file that can be written"),
        (["demo", "--prompts", "no-such-file"], "prompts: no-such-file cannot be read"),
        (["demo", "--engine", "tgi"], "engine='tgi': must be one of"),
        (["demo", "--dtype", "int8"], "dtype='int8': must be auto"),
        (["demo", "paths", "--engine", "reference"], "check 'paths': the engine reference supports stats"),
        (["demo", "--oracle", "gpt"], "reference='gpt': must be auto, hf or reference"),
        (["demo", "--oracle", "hf", "--reference", "hf"], "--oracle: is the deprecated name of --reference"),
        (["no/such/model/here"], "no/such/model/here: no such folder"),
    ],
)
def test_user_errors_are_one_line(arguments, line, capsys):
    assert main(["parity", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lamella: ") and line in captured.err and captured.err.count("\n") == 1


def test_dummy_model_and_free_running(capsys, tmp_path):
    folder = canon_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--free-running"]
    assert main(["parity", str(folder), "stats", *SMALL, *options]) == 0
    assert "texts that are still equal diverge at" in " ".join(capsys.readouterr().out.split())


def test_override_named_in_config_error_works(capsys, tmp_path):
    """For keys at any depth, and for engines that read the file themselves."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    hf_checkpoint(tmp_path, LlamaConfig(vocab_size=64, num_key_value_heads=1, head_dim=16, **shape))
    rotation = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "odd": 3}
    change_config(tmp_path, made_up=1, moe_layers=[1], rope_parameters=rotation)
    capsys.readouterr()  # transformers shows how far it has written
    command, given = ["parity", str(tmp_path), "stats", *SMALL, "--json", "-"], {}
    for _ in range(3):
        options = ["--hf-overrides", json.dumps(given)] if given else []
        if main([*command, *options]) == 0:
            break
        error = capsys.readouterr().err
        assert error.startswith(f"lamella: {tmp_path / 'config.json'}: ") and error.count("\n") == 1
        option, text = shlex.split(error[error.index("--hf-overrides") :])
        assert option == "--hf-overrides"
        given |= json.loads(text)
    assert given == {"made_up": None, "moe_layers": None, "rope_parameters": {"odd": None}}
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verdict"] == "pass" and report["oracle"] == "hf"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"rms_norm_eps": "much"}, "rms_norm_eps='much'"),
        ({"intermediate_size": 40}, "has shape (48, 32), the config says (40, 32)"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1."),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight; if the head is the embedding: --hf-overrides"),
    ],
)
def test_overrides_that_contradict_tensors_raise_one_line(overrides, line, capsys, tmp_path):
    folder = canon_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if tensors.pop("lm_head.weight", None) is not None:
        save_file(tensors, folder / "model.safetensors")
        change_config(folder, tie_word_embeddings=True)
    assert main(["parity", str(folder), "stats", *SMALL, "--hf-overrides", json.dumps(overrides)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lamella: ") and line in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_overrides_that_are_not_json_objects_raise(text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["parity", "demo", "--hf-overrides", text])
    assert exit.value.code == 2 and "--hf-overrides: " in capsys.readouterr().err
