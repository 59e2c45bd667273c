"""Command line: output, exit status, and one-line errors."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import canon_checkpoint, change_config
from image_models import image, image_checkpoint, image_prompt
from lamella import LLM, SamplingParams
from lamella.bench.compile import LIMIT, CompileCost
from lamella.cli import main
from lamella.cli.main import parser
from lamella.models import LlamaCanonForCausalLM

LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"], "dtype": "float32", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return canon_checkpoint(tmp_path_factory.mktemp("canon"), torch_dtype="float32")


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_generate_prints_the_engines_tokens(folder, capsys):
    expected = LLM(folder, device="cpu").generate(
        {"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False
    )
    tokens = expected[0].outputs[0].token_ids
    assert main(["generate", str(folder), "--tokens", "1,2,3", "--max-tokens", "5", "--json"]) == 0
    outputs = last_json(capsys)["outputs"]
    assert outputs[0]["outputs"][0]["token_ids"] == tokens
    # Without a tokenizer a single prompt's tokens are shown as ids, as several prompts' are.
    assert main(["generate", str(folder), "--tokens", "1 2 3", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(token) for token in tokens]
    assert main(["generate", str(folder), "--tokens", "1,2,3", "--tokens", "4", "--max-tokens", "5"]) == 0
    assert " ".join(map(str, tokens)) in capsys.readouterr().out


def test_engine_settings_reach_the_engine(folder, capsys):
    command = ["generate", str(folder), "--tokens", "1,2,3", "--num-blocks", "1", "--block-size", "4"]
    assert main([*command, "--max-tokens", "2"]) == 0
    assert main([*command, "--max-tokens", "3"]) == 2
    assert "num_blocks=1" in capsys.readouterr().err


def test_generate_demo_checks_its_answers(capsys):
    assert main(["generate", "demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("right") == 6
    assert "wrong" not in out
    assert main(["generate", "demo", "--json"]) == 0
    answers = last_json(capsys)["answers"]
    assert len(answers) == 6
    assert all(answer["right"] and answer["said"].split() == answer["answer"].split() for answer in answers)


def test_hf_overrides_named_in_errors_work(tmp_path, capsys):
    folder = canon_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"made_up": 1}))
    commands = (
        ["inspect", str(folder)],
        ["generate", str(folder), "--tokens", "1,2", "--max-tokens", "1", "--num-blocks", "8"],
        ["convert", str(folder), str(tmp_path / "new")],
    )
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        out = line.partition("--hf-overrides ")[2].strip("'")
        assert json.loads(out) == {"made_up": None}
        assert main([*command, "--hf-overrides", out]) == 0
        with pytest.raises(SystemExit):
            main([*command, "--hf-overrides", "[1]"])


def test_generate_takes_image_files(tmp_path, capsys, monkeypatch):
    image_checkpoint(tmp_path)
    file, broken = tmp_path / "image.png", tmp_path / "broken.png"
    pixels = image("1 x 3", 4)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    broken.write_bytes(file.read_bytes()[:400])
    given, params = image_prompt(pixels, pixels), SamplingParams(temperature=0, max_tokens=4)
    (expected,) = LLM(tmp_path, device="cpu", num_blocks=50).generate(given, params, use_tqdm=False)
    tokens = ",".join(map(str, given["prompt_token_ids"]))
    command = ["generate", str(tmp_path), "--max-tokens", "4", "--num-blocks", "50", "--image", str(file)]
    two = [*command, "--image", str(file)]
    assert main([*two, "--tokens", tokens, "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert outputs[0]["outputs"][0]["token_ids"] == expected.outputs[0].token_ids
    assert main([*command, "-p", "w5 <|image|> w6"]) == 0
    for arguments, message in (
        ([*two, "-p", "<|image|>"], "2 images for 1 placeholders"),
        ([*two, "-p", "<|image|>", "--limit-mm-per-prompt", '{"image": 1}'], "2 images, and limit_mm_per_prompt"),
        ([*command, "-p", "a", "-p", "b"], "--image: needs a single prompt, not 2"),
        ([*command, "--image", "nowhere.png", "-p", "a"], "--image nowhere.png: "),
        ([*command, "--image", str(broken), "-p", "<|image|> <|image|>"], "an image cannot be read"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main([*command, "-p", "<|image|>"]) == 2
    assert "needs Pillow" in capsys.readouterr().err


def test_the_demo_tour(capsys):
    assert main(["demo", "--questions", "60"]) == 0
    out = capsys.readouterr().out
    for shown in ("canon A", "floor of a decode step", "60 held-out questions", "all checks passed"):
        assert shown in out
    assert main(["demo", "--questions", "60", "--json"]) == 0
    result = last_json(capsys)
    assert result["passed"]
    assert set(result["accuracy"]) == {"3", "16", "64", "2048"}
    assert result["plain_agrees"] == 1


def test_inspect_counts_bytes(folder, capsys):
    assert main(["inspect", str(folder), "--json", "--context", "100"]) == 0
    card = last_json(capsys)
    model = LLM(folder, device="cpu").engine.model
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["state_bytes_per_token"] == 2 * (2 * 2 * 16 * 4)  # layers x (k and v, heads, width, fp32)
    channels = 32 + (4 + 2 * 2) * 16 + 32 + 2 * 48
    assert card["state_bytes_per_request"] == 2 * 3 * channels * 4
    assert card["decode_step_weight_bytes"] == card["weight_bytes"] - model.model.embed_tokens.weight.nbytes
    assert len(card["layers"]) == 2
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for shown in ("layers 0..1", "canon D on gate,up (width 4)", "state per token", "floor of a decode step, batch 16"):
        assert shown in out


def test_convert_writes_a_checkpoint_that_generates_the_same(folder, tmp_path, capsys):
    command = ["--tokens", "1,2,3,4,5", "--max-tokens", "6", "--json"]
    assert main(["generate", str(folder), *command]) == 0
    before = last_json(capsys)["outputs"][0]["outputs"][0]["token_ids"]
    assert main(["convert", str(folder), str(tmp_path / "new"), "--rope", "lingua"]) == 0
    assert main(["generate", str(tmp_path / "new"), *command]) == 0
    assert last_json(capsys)["outputs"][0]["outputs"][0]["token_ids"] == before
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("workload", ["offline", "latency"])
def test_bench_ends_with_one_json_line(folder, workload, capsys):
    sizes = ["--requests", "2", "--input-len", "9", "--output-len", "4", "--repeats", "1"]
    assert main(["bench", workload, str(folder), "--load-format", "dummy", *sizes]) == 0
    out = capsys.readouterr().out
    assert re.match(r".*parameters.*floor", out.splitlines()[0])
    result = json.loads(out.splitlines()[-1])
    assert result["workload"] == workload
    assert result["check_logprob_gap"] <= 1e-4
    assert result["output_tok_s"] > 0


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["generate", "{folder}"], "no prompt"),
        (["generate", "{folder}", "--tokens", "a,b"], "--tokens"),
        (["generate", "{folder}", "-p", "text"], "tokenizer.json"),
        (["generate", "{folder}", "--tokens", "1", "--temperature", "-1"], "temperature"),
        (["generate", "{folder}", "--tokens", "1", "--dtype", "int3"], "dtype"),
        (["generate", "./nowhere", "--tokens", "1"], "./nowhere"),
        (["inspect", "{folder}", "--context", "0"], "--context"),
        (["inspect", "{folder}/config.json"], "config.json"),
        (["inspect", "{folder}", "--layers", "12"], "--layers"),
        (["inspect", "{folder}", "--compile", "--layers", "4", "0"], "--layers 4 0"),
        (["inspect", "{folder}", "--compile", "--placement", "all-gdn"], "placement"),
        (["convert", "{folder}", "{folder}-new", "--rope", "spiral"], "rope"),
        (["bench", "latency", "{folder}", "--output-len", "0"], "--output-len"),
        (["demo", "--questions", "0"], "--questions"),
    ],
)
def test_user_error_is_one_line_and_status_2(folder, command, named, capsys):
    assert main([part.format(folder=folder) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lamella: ")
    assert named in error


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="no prompt"):
        main(["generate", str(folder), "--debug"])


def test_help_does_not_import_torch():
    code = """if True:
        import sys
        from lamella.cli import main
        try:
            main(["--help"])
        except SystemExit:
            print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_cuda_without_a_device_raises(folder, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert main(["generate", str(folder), "--tokens", "1", "--device", "cuda"]) == 2
    assert "device='cuda'" in capsys.readouterr().err


def test_inspect_compile_shows_the_engines_form(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lamella.bench.compile.FORMS", {"lamella": None})
    monkeypatch.setattr("lamella.bench.compile._ALONE", {})
    # Both this process and the compiling process reject the key unless they get the override.
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4 | {"made_up": 1}))
    way_out = ["--hf-overrides", '{"made_up": null}']
    assert main(["inspect", str(tmp_path), "--compile", "--layers", "4", "--json", *way_out]) == 0
    (ours,) = last_json(capsys)["compile"]
    assert (ours["layers"], ours["graphs"], ours["recompiles"], ours["gave_up"]) == (4, 3, [], False)
    assert ours["difference"] <= LIMIT


@pytest.mark.slow
def test_inspect_compiles_in_every_form(tmp_path, capsys, monkeypatch):
    """The engine's form and each layer by itself, at twice the depth, in this process instead of a new one."""
    monkeypatch.setattr("lamella.bench.compile.FORMS", {"lamella": None, "each layer": None})
    monkeypatch.setattr("lamella.bench.compile._ALONE", {})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4))
    assert main(["inspect", str(tmp_path), "--compile", "--layers", "8", "--json"]) == 0
    ours, naive = last_json(capsys)["compile"]
    assert (ours["layers"], ours["graphs"], ours["recompiles"], ours["gave_up"]) == (8, 3, [], False)
    assert naive["graphs"] > ours["graphs"]
    assert naive["gave_up"]
    assert any("feed_forward" in reason for reason in naive["recompiles"])
    assert max(ours["difference"], naive["difference"]) <= LIMIT


def test_inspect_fails_if_compiling_changes_results(folder, capsys, monkeypatch):
    right = CompileCost("lamella", 2, 2, [], False, 1.0, LIMIT)
    wrong = CompileCost("whole model", 2, 1, ["2 <= input_ids.size()[0]"] * 3, True, 1.0, 2 * LIMIT)
    monkeypatch.setattr("lamella.cli.inspect.compile_costs", lambda *_: iter([right, wrong]))
    assert main(["inspect", str(folder), "--compile"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    for shown in ("limit hit", "WRONG", "2 layers, whole model, 3 x 2 <= input_ids.size()[0]"):
        assert shown in out


def test_inspect_shows_differences_of_layers(tmp_path, capsys):
    """Chunks, temperatures and experts; a decode step reads only the experts of its tokens."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA4))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    experts = 3 * 32 * 24 * 4  # bytes of one, in fp32
    dense = card["decode_step_weight_bytes"] - 2 * experts
    assert card["weight_bytes"] - 128 * 32 * 4 == dense + 2 * 4 * experts
    assert "interleaved, qk-norm per head, no weight, chunk 16" in card["layers"][0]
    assert "no rope, temperature from 8191 on" in card["layers"][3]
    assert "1 of 4 experts 24 + shared 24" in card["layers"][1] and "MLP 40" in card["layers"][2]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "experts" in capsys.readouterr().out


def test_commands_with_models_have_hf_overrides():
    """Errors of the config reader name `--hf-overrides`, so all commands with a model have it, except `set`."""

    def leaves(command: argparse.ArgumentParser, name: str):
        below = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
        if not below:
            yield name, {option for action in command._actions for option in (action.dest, *action.option_strings)}
        for action in below:
            for word, each in action.choices.items():
                yield from leaves(each, f"{name} {word}".strip())

    reading = {name: options for name, options in leaves(parser(), "") if options & {"model", "words"}}
    assert {"parity", "inspect", "placement sweep"} <= reading.keys()
    assert [name for name, options in reading.items() if "--hf-overrides" not in options] == ["placement set"]


def test_from_pretrained_accepts_hf_overrides(tmp_path):
    folder = canon_checkpoint(tmp_path)
    change_config(folder, made_up=1)
    model = LlamaCanonForCausalLM.from_pretrained(folder, hf_overrides={"made_up": None, "rms_norm_eps": 0.05})
    assert model.config.norm.eps == 0.05
