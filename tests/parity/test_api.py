"""Functions of the parity kit on whole models: they measure what the engines really compute."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from checkpoint.test_lingua import lingua_checkpoint
from helpers import canon_checkpoint, hf_checkpoint
from lamella.checkpoint.convert import convert
from lamella.errors import CheckpointError, ConfigError, ParameterError
from lamella.parity import ParityOptions, assert_parity, check, compare, score
from lamella.parity.forcing import ForcedEngine
from lamella.parity.sequences import split
from lamella.parity.tested_model import ModelUnderTest
from models.test_llama4 import CONFIGS as LLAMA4
from parity.test_bisection import SHAPE, layer, load

MODELS = {
    "llama": lambda folder, seed: hf_checkpoint(folder, LlamaConfig(**SHAPE), seed),
    "qwen3": lambda folder, seed: hf_checkpoint(folder, Qwen3Config(**SHAPE), seed),
    "llama 4": lambda folder, seed: hf_checkpoint(folder, LLAMA4["scout"], seed),
    "canon": lambda folder, seed: canon_checkpoint(folder, seed, num_hidden_layers=3, qk_norm=True),
}
INPUTS = {"prompts": "random", "count": 6, "prompt_len": 24, "decode_len": 8}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    MODELS[request.param](made, 0)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    MODELS["llama"](made, 0)
    return made


def test_everything_passes_in_both_dtypes(folder):
    for dtype in ("float32", "bfloat16"):
        report = assert_parity(folder, dtype=dtype, **INPUTS)
        assert report.stats and report.paths and report.bisection and report.passed
        assert report.stats.outliers["count"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_error_is_at_most_that_of_the_reference(name, tmp_path):
    """Mean over seeds of the headline, with its 99.9th percentile's."""
    results = []
    for seed in range(4):
        MODELS[name](tmp_path / str(seed), seed)
        results.append(compare(tmp_path / str(seed), dtype="bfloat16", seed=seed, **INPUTS))
    assert sum(result.noise_floor_ratio for result in results) / len(results) <= 1.0
    assert all(0.3 < result.noise_floor_ratio < 1.3 for result in results)


@pytest.mark.parametrize("engine", ["lamella", "hf", "reference"])
def test_engines_agree(engine, llama):
    sequences, ours = score(llama, engine=engine, dtype="float32", **INPUTS)
    _, reference = score(llama, engine="reference", dtype="float32", **INPUTS)
    assert [len(scores.target) for scores in ours] == [sequence.num_predictions for sequence in sequences]
    for scores, expected in zip(ours, reference, strict=True):
        assert (scores.logprobs - expected.logprobs).abs().max() < 1e-4
        assert (scores.target - expected.target).abs().max() < 1e-4


def test_top_keeps_the_likeliest(llama):
    (_, whole), (_, some) = (score(llama, top=top, **INPUTS) for top in (None, 5))
    for full, part in zip(whole, some, strict=True):
        assert torch.equal(full.target, part.target)
        assert torch.equal(full.logprobs.topk(5).values, part.logprobs)
        assert torch.equal(full.logprobs.gather(1, part.ids), part.logprobs)
    assert compare(llama, top=5, **INPUTS).engine.kl_max < 1e-6


def test_continuations_are_decoded_token_by_token(llama):
    engine = ForcedEngine(load(llama), {"max_num_seqs": 2, "max_num_batched_tokens": 64}, torch.device("cpu"))
    records = engine.score([split(range(20), 5), split(range(7), 3), split(range(2), 1)])
    assert [record.steps for record in records] == [[15, 1, 1, 1, 1], [4, 1, 1], [1]]
    assert [record.token_ids for record in records] == [tuple(range(15, 20)), (4, 5, 6), (1,)]
    assert all(record.state.keys() == records[0].state.keys() for record in records)
    assert records[1].state["model.layers.0.mixer.attention.keys"].shape == (6, 2, 16)


def test_a_fault_fails_and_says_why(llama):
    candidate = load(llama)
    layer(candidate).mixer_norm.eps = 1e-2
    report = check(llama, candidate=candidate, **INPUTS)
    assert not report.passed and report.as_dict()["verdict"] == "fail"
    assert any(reason.startswith("first operation out of line: layer 1, norm") for reason in report.reasons)
    assert any("times the noise floor's" in reason for reason in report.reasons)
    with pytest.raises(AssertionError, match="first operation out of line: layer 1, norm"):
        assert_parity(llama, candidate=candidate, **INPUTS)


def test_a_candidate_brings_its_dtype(llama):
    candidate = load(llama, torch.bfloat16)
    report = check(llama, ["stats", "bisect"], candidate=candidate, **INPUTS)
    assert report.passed and report.dtype == "bfloat16" and report.device == "cpu"
    with pytest.raises(ConfigError, match=r"dtype='float32': the candidate's is torch\.bfloat16"):
        check(llama, candidate=candidate, dtype="float32", **INPUTS)


def test_free_running_is_reported_in_addition(llama):
    report = check(llama, ["stats"], dtype="bfloat16", free_running=True, **INPUTS)
    free = report.free_running
    assert [row["step"] for row in free.positions] == list(range(8)) and free.positions[0]["n"] == 6
    assert free.overall["outliers_same_text"] == 0 and 0 <= free.hazard < 0.5
    assert report.paths is report.bisection is None


def test_dummy_weights_need_no_file(tmp_path):
    folder = canon_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    assert_parity(folder, load_format="dummy", dtype="bfloat16", **INPUTS)
    with pytest.raises(ConfigError, match="hf: dummy weights are in no file"):
        compare(folder, load_format="dummy", reference="hf", **INPUTS)


def test_nothing_on_disk_changes(llama):
    def state():
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in llama.iterdir()}

    before = state()
    check(llama, dtype="bfloat16", free_running=True, **INPUTS)
    assert state() == before


def test_bad_options_are_one_line(llama):
    for options, line in (
        ({"engine": "tgi"}, "engine='tgi': must be one of lamella, hf, reference, vllm"),
        ({"top": 1}, "top=1: must be a whole number of at least 2"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"engine": "hf", "engine_options": {"block_size": 4}}, "engine_options: hf has none"),
        ({"reference": "gpt"}, "reference='gpt': must be auto, hf or reference"),
        ({"oracle": "gpt"}, "oracle='gpt': must be auto, hf or reference"),
        ({"reference": "hf", "oracle": "hf"}, "oracle='hf': is the deprecated name of reference"),
        ({"reference": "hf", "oracle": "reference"}, "oracle='reference': is the deprecated name of reference"),
        ({"engine_options": {"deterministic": True}}, "deterministic=True: must be False"),
        ({"checks": ["speed"]}, "check 'speed': the engine lamella supports stats, paths, bisect"),
        ({"checks": ["paths"], "engine": "hf"}, "check 'paths': the engine hf supports stats"),
    ):
        with pytest.raises(ConfigError, match=line):
            check(llama, **INPUTS | options)
    with pytest.raises(ParameterError, match="decode_len=0"):
        check(llama, decode_len=0)
    with pytest.raises(TypeError, match="prompt_length"):
        check(llama, prompt_length=3)


@pytest.mark.parametrize("name", ["hf", "reference"])
def test_the_deprecated_option_oracle_gives_the_same_result(llama, name):
    options = INPUTS | {"dtype": "float32", "count": 2}
    old, new = check(llama, ["stats"], oracle=name, **options), check(llama, ["stats"], reference=name, **options)
    assert old.reference == new.reference == name
    assert old.as_dict()["stats"] == new.as_dict()["stats"]
    assert ParityOptions(oracle=name).reference == name and ParityOptions().reference == "auto"


def test_reports_keep_the_older_names_of_their_keys(llama):
    report = check(llama, ["stats"], reference="reference", **INPUTS | {"count": 1}).as_dict()
    assert report["oracle"] == "reference" and report["truth_dtype"] == report["reference_dtype"]
    for token in report["worst_tokens"]:
        assert token["truth_logprob"] == token["reference_logprob"] and token["truth_top"] == token["reference_top"]


def test_without_transformers_the_reference_still_serves():
    code = """
import sys
sys.modules["transformers"] = None
from lamella.cli.main import main
assert main(["parity", "demo", "stats", "--engine", "reference", "--count", "2", "--prompt-len", "8"]) == 0
assert main(["parity", "demo", "bisect", "--prompt-len", "8"]) == 0
assert main(["parity", "demo", "stats", "--reference", "hf"]) == 2
assert main(["parity", "demo", "stats", "--engine", "hf"]) == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("transformers is not installed (pip install 'lamella[hf]'); `reference` needs") == 2


OVERRIDES = {
    "a norm": {"rms_norm_eps": 0.05},
    "a base": {"rope_theta": 30.0},
    "a scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "both, in the newer form": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 30.0}},
    "a window": {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3, "sliding_window": 3},
}


class TestOverrides:
    """Every engine uses the overrides like values of the file."""

    @pytest.mark.parametrize("name", OVERRIDES)
    def test_every_engine_computes_with_them(self, name, llama, tmp_path):
        overrides = OVERRIDES[name]
        if name == "a window":
            llama = tmp_path
            hf_checkpoint(llama, Qwen3Config(**SHAPE))
        options = INPUTS | {"dtype": "float32", "count": 2}
        _, plain = score(llama, engine="reference", **options)
        _, expected = score(llama, engine="reference", hf_overrides=overrides, **options)
        assert (plain[0].logprobs - expected[0].logprobs).abs().max() > 1e-2
        for engine in ("lamella", "hf"):
            _, found = score(llama, engine=engine, hf_overrides=overrides, **options)
            for scores, other in zip(found, expected, strict=True):
                assert (scores.logprobs - other.logprobs).abs().max() < 1e-4

    def test_all_checks_pass_against_transformers_with_overrides(self, llama):
        before = (llama / "config.json").read_bytes()
        report = assert_parity(llama, hf_overrides=OVERRIDES["a norm"], reference="hf", **INPUTS)
        (ranks,) = [cell for cell in report.paths.cells if cell.path == "two tensor-parallel ranks"]
        assert ranks.status == "pass"  # other processes, which open the checkpoint themselves
        plain, same = check(llama, ["stats"], **INPUTS), check(llama, ["stats"], hf_overrides={}, **INPUTS)
        assert plain.as_dict()["config_hash"] == same.as_dict()["config_hash"] != report.as_dict()["config_hash"]
        assert (llama / "config.json").read_bytes() == before

    def test_a_candidate_without_the_overrides_fails(self, llama):
        candidate = load(llama)
        report = check(llama, ["stats"], candidate=candidate, hf_overrides=OVERRIDES["a norm"], **INPUTS)
        assert not report.passed

    def test_sections_are_merged_and_null_removes(self, tmp_path):
        config = LLAMA4["scout"]
        hf_checkpoint(tmp_path, config)
        values = json.loads((tmp_path / "config.json").read_text())
        inner = {key: values.pop(key) for key in list(values) if key not in ("architectures", "model_type")}
        text = {**inner, "model_type": "llama4_text", "made_up": 1, "attn_temperature_tuning": True}
        (tmp_path / "config.json").write_text(
            json.dumps(
                {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text}
            )
        )
        overrides = {"text_config": {"made_up": None, "rms_norm_eps": 0.05}}
        plain = {"text_config": {"made_up": None}}
        ours, theirs, without = (
            score(tmp_path, engine=engine, hf_overrides=changes, dtype="float32", **INPUTS)[1]
            for engine, changes in (("reference", overrides), ("hf", overrides), ("hf", plain))
        )
        for scores, other in zip(ours, theirs, strict=True):
            assert (scores.logprobs - other.logprobs).abs().max() < 1e-4
        assert (without[0].logprobs - theirs[0].logprobs).abs().max() > 1e-2

    def test_the_temporary_folder_is_deleted_with_the_model_under_test(self, llama):
        tested = ModelUnderTest.open(llama, overrides={"rms_norm_eps": 0.05, "made_up": None})
        folder = tested.folder
        assert folder == tested.folder != llama
        assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 0.05
        assert {file.name for file in folder.iterdir()} == {file.name for file in llama.iterdir()}
        del tested
        assert not folder.exists() and (llama / "model.safetensors").is_file()
        assert ModelUnderTest.open(llama).folder == llama

    def test_a_missing_head_is_an_error(self, tmp_path):
        hf_checkpoint(tmp_path, LlamaConfig(**SHAPE, tie_word_embeddings=True))
        for engine in ("hf", "reference", "lamella"):
            with pytest.raises(CheckpointError, match=r"lm_head\.weight") as caught:
                score(tmp_path, engine=engine, hf_overrides={"tie_word_embeddings": False}, **INPUTS)
            assert "\n" not in str(caught.value)

    def test_bad_overrides_are_one_line_errors(self, llama):
        for options, line in (
            ({"hf_overrides": "off"}, "hf_overrides='off': must be a mapping"),
            ({"hf_overrides": {1: 2}}, "hf_overrides={1: 2}: must be a mapping"),
            (
                {"hf_overrides": {"rms_norm_eps": torch.tensor(1)}},
                "hf_overrides: must be a dict of values that JSON has",
            ),
            ({"hf_overrides": {"rms_norm_eps": "small"}}, "rms_norm_eps='small'"),
            ({"engine_options": {"hf_overrides": {}}}, "engine_options: hf_overrides must be given as an option of"),
            ({"engine_options": {"dtype": "float16", "device": "cpu"}}, "engine_options: device, dtype must be given"),
        ):
            with pytest.raises(ConfigError) as caught:
                check(llama, **INPUTS | options)
            assert line in str(caught.value) and "\n" not in str(caught.value)

    def test_a_size_that_no_tensor_has_is_a_one_line_error_with_every_reference(self, llama):
        for reference in ("hf", "reference"):
            with pytest.raises(CheckpointError) as caught:
                check(llama, ["stats"], reference=reference, hf_overrides={"intermediate_size": 40}, **INPUTS)
            assert "\n" not in str(caught.value)

    def test_a_lingua_file_names_the_way_out(self, tmp_path):
        folder = lingua_checkpoint(tmp_path)
        options = {"hf_overrides": {"model": {"rope_theta": 30.0}}, "dtype": "float32", **INPUTS}
        assert check(folder, ["stats"], **options).passed  # by the reference, which reads it as lamella does
        with pytest.raises(ConfigError, match=r"lamella convert .* NEW_FOLDER --hf-overrides") as caught:
            check(folder, ["stats"], reference="hf", **options)
        option, text = shlex.split(str(caught.value).partition("NEW_FOLDER ")[2].partition(";")[0])
        assert option == "--hf-overrides"
        convert(folder, tmp_path / "new", overrides=json.loads(text))
        _, expected = score(tmp_path / "new", **INPUTS, dtype="float32")
        _, found = score(folder, **options)
        assert torch.equal(found[0].logprobs, expected[0].logprobs)
