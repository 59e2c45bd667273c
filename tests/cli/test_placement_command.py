"""`lamella placement`: show, set and sweep."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from apriel2_models import MIXERS, SUPERNET, block, checkpoint, config, fixed
from helpers import canon_checkpoint, change_config
from lamella import LLM
from lamella.bench.sweep import Swept, is_pareto_optimal, usual_placements
from lamella.checkpoint import load_model, open_checkpoint
from lamella.cli import main
from lamella.parity import score

NAMES = list(MIXERS)
SIZES = ["--requests", "2", "--input-len", "9", "--output-len", "3", "--repeats", "1", "--count", "3"]
# Of a layer, in fp32: keys and values of two heads of 16; the convolution's window and the matrices.
ATTENTION_TOKEN = 2 * 2 * 16 * 4
GDN_REQUEST = 4 * (4 * 8 * 16 + 3 * (2 * 16 + 64))
MAMBA_REQUEST = 4 * (64 * 8 + 3 * 64)


@pytest.fixture(scope="module")
def supernet(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET, layers=3))


@pytest.fixture
def own(tmp_path) -> Path:
    """Return a supernet folder that a test can change, with a plain layer between two layers with a choice."""
    blocks = {"super": block(SUPERNET), "plain": block(MIXERS["mamba"])}
    decoder = {"type": "pattern", "num_blocks": 3, "pattern": ["super", "plain"], "blocks": blocks}
    return checkpoint(tmp_path / "own", config(decoder))


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["placement", *command]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def told(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    return json.loads(said(capsys, *command, "--json").splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run a command that fails, and return its one line of output."""
    assert main(["placement", *command]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lamella: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err.removeprefix("lamella: ").rstrip("\n")


class TestShow:
    def test_show_default_placement(self, supernet, capsys):
        found = told(capsys, "show", str(supernet))
        assert found["placement"] == "all-attention"
        assert found["layers"] == {str(i): {"mixers": NAMES, "active": "attention"} for i in range(3)}
        assert (found["bytes_per_token"], found["bytes_per_request"]) == (3 * ATTENTION_TOKEN, 0)

    def test_show_given_placement(self, supernet, capsys):
        found = told(capsys, "show", str(supernet), "--placement", "gdn,attn,gdn")
        assert [layer["active"] for layer in found["layers"].values()] == ["gdn", "attention", "gdn"]
        assert (found["bytes_per_token"], found["bytes_per_request"]) == (ATTENTION_TOKEN, 2 * GDN_REQUEST)
        model = load_model(open_checkpoint(supernet))
        active = sum(p.nbytes for name, p in model.named_parameters() if ".mixers." not in name and "embed" not in name)
        for layer, name in enumerate(("gdn", "attention", "gdn")):
            active += sum(p.nbytes for p in model.model.layers[layer].mixer.mixers[name].parameters())
        assert found["decode_step_weight_bytes"] == active

    def test_show_with_dtype(self, supernet, capsys):
        found = told(capsys, "show", str(supernet), "--dtype", "bfloat16")
        assert found["bytes_per_token"] == 3 * ATTENTION_TOKEN // 2

    def test_layers_without_a_choice_count_only_in_the_cost(self, own, capsys):
        found = told(capsys, "show", str(own))
        assert list(found["layers"]) == ["0", "2"]
        assert (found["bytes_per_token"], found["bytes_per_request"]) == (2 * ATTENTION_TOKEN, MAMBA_REQUEST)

    def test_text_output(self, supernet, capsys):
        out = said(capsys, "show", str(supernet), "--placement", "all-gdn")
        for words in (
            "placement all-gdn",
            "gated delta net 4 x 8 x 16",
            "others",
            "0 B per token and 9.38 KiB per request",
        ):
            assert words in out

    def test_no_weights_are_needed(self, supernet, tmp_path, capsys):
        (tmp_path / "config.json").write_text((supernet / "config.json").read_text())
        assert told(capsys, "show", str(tmp_path)) == told(capsys, "show", str(supernet))

    def test_override_named_in_config_error_works(self, supernet, tmp_path, capsys):
        """`set` accepts no overrides, so its error says to change the file."""
        folder = checkpoint(tmp_path / "refused", fixed(SUPERNET, layers=3))
        values = json.loads((folder / "config.json").read_text())
        change_config(folder, decoder=values["decoder"] | {"made_up": 1})
        before = (folder / "config.json").read_bytes()
        error = refused(capsys, "show", str(folder))
        option, text = shlex.split(error[error.index("--hf-overrides") :])
        assert json.loads(text) == {"decoder": {"made_up": None}}
        assert told(capsys, "show", str(folder), option, text) == told(capsys, "show", str(supernet))
        swept = told(capsys, "sweep", str(folder), "all-gdn", *SIZES, option, text)
        assert swept["placements"][0]["kl"] == pytest.approx(
            told(capsys, "sweep", str(supernet), "all-gdn", *SIZES)["placements"][0]["kl"], abs=1e-4
        )
        error = refused(capsys, "set", str(folder), "all-gdn")
        assert error.endswith("; placement set takes no overrides: correct the file itself first")
        assert (folder / "config.json").read_bytes() == before

    def test_overrides_change_the_costs(self, supernet, capsys):
        changes = {"main_mixer_name": "gdn", "mixers": {"gdn": {"value_heads": 2}}}
        written = json.dumps({"decoder": {"block": {"mixer": changes}}})
        found = told(capsys, "show", str(supernet), "--hf-overrides", written)
        smaller = 4 * (2 * 8 * 16 + 3 * (2 * 16 + 32))
        assert (found["placement"], found["bytes_per_request"]) == ("all-gdn", 3 * smaller)


class TestSet:
    def test_set_writes_and_prints_the_placement(self, own, capsys):
        found = told(capsys, "set", str(own), "gdn,swa")
        assert found == {"placement": "gdn,sliding_window", "file": str(own / "config.json")}
        assert told(capsys, "show", str(own))["placement"] == "gdn,sliding_window"
        assert LLM(own, device="cpu", num_blocks=8).placement == ("gdn", None, "sliding_window")
        out = said(capsys, "set", str(own), "all-kda")
        assert "".join(out.split()) == f"{own / 'config.json'}:all-kda"
        assert sorted(file.name for file in own.iterdir()) == ["config.json", "model.safetensors"]

    def test_set_with_bad_placement_changes_nothing(self, own, capsys):
        before = (own / "config.json").read_bytes()
        for written, why in (
            ("all-rwkv", f"placement: layer 0 has no mixer 'rwkv'; it has {', '.join(NAMES)}"),
            ("gdn", "placement: 1 names, for 2 stochastic layers of 3"),
            ("every0th-gdn", "placement='every0th-gdn': every 0th layer is none"),
            ("", "placement: 1 names, for 2 stochastic layers of 3"),
        ):
            assert refused(capsys, "set", str(own), written) == why
            assert (own / "config.json").read_bytes() == before

    def test_nothing_is_written_through_a_planted_link(self, own, capsys, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("precious")
        for name in ("config.json.new", ".config.json.new", "config.json.tmp"):
            (own / name).symlink_to(victim)
        assert told(capsys, "set", str(own), "all-gdn")["placement"] == "all-gdn"
        assert victim.read_text() == "precious"
        assert not (own / "config.json").is_symlink()

    def test_a_link_in_place_of_the_file_is_replaced_and_its_target_stays(self, own, capsys, tmp_path):
        other = tmp_path / "other.json"
        (own / "config.json").rename(other)
        (own / "config.json").symlink_to(other)
        before = other.read_bytes()
        told(capsys, "set", str(own), "all-gdn")
        assert other.read_bytes() == before and not (own / "config.json").is_symlink()

    def test_nothing_is_left_of_a_replacement_that_fails(self, own, capsys, monkeypatch):
        def fail(source, target):
            raise PermissionError(13, "Permission denied")

        before = (own / "config.json").read_bytes()
        monkeypatch.setattr(os, "replace", fail)
        error = refused(capsys, "set", str(own), "all-gdn")
        assert error.startswith(f"{own / 'config.json'}: cannot be written (Permission denied); make room")
        assert sorted(file.name for file in own.iterdir()) == ["config.json", "model.safetensors"]
        assert (own / "config.json").read_bytes() == before


class TestSweep:
    def test_sweep_figures(self, supernet, capsys):
        """Losses and KL equal those of the parity kit; state sizes equal those of the placement."""
        found = told(capsys, "sweep", str(supernet), "all-attention", "all-gdn", "gdn,attn,gdn", *SIZES)
        assert (found["main"], found["workload"]) == ("all-attention", {"requests": 2, "input_len": 9})
        swept = {each["placement"]: each for each in found["placements"]}
        assert list(swept) == ["all-attention", "all-gdn", "gdn,attn,gdn"]
        reference = None
        for placement, each in swept.items():
            scores = score(str(supernet), placement=placement, device="cpu", count=3, seed=0)[1]
            reference = reference or scores
            loss = -float(torch.cat([one.target for one in scores]).mean())
            assert each["loss"] == pytest.approx(loss, abs=1e-4)
            pairs = [(a.logprobs.double(), b.logprobs.double()) for a, b in zip(reference, scores, strict=True)]
            kl = float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())
            assert each["kl"] == pytest.approx(kl, abs=1e-4)
            assert each["prefill_tok_s"] > 0
        assert swept["all-attention"]["kl"] == 0 < swept["gdn,attn,gdn"]["kl"]
        assert [(e["bytes_per_token"], e["bytes_per_request"]) for e in swept.values()] == [
            (3 * ATTENTION_TOKEN, 0),
            (0, 3 * GDN_REQUEST),
            (ATTENTION_TOKEN, 2 * GDN_REQUEST),
        ]
        assert any(each["best"] for each in swept.values())

    def test_default_placements_of_a_sweep(self, own, capsys):
        found = told(capsys, "sweep", str(own), *SIZES, "--count", "1")
        placements = [each["placement"] for each in found["placements"]]
        usual = usual_placements(open_checkpoint(own).read_config())
        assert placements[0] == "all-attention" and set(placements) <= set(usual)
        assert {f"all-{name}" for name in NAMES} <= set(placements)
        # Of two layers, between attention is all attention, and so is every fourth: each is computed once.
        assert "every2nd-gdn" in placements and not any(p.startswith(("bookend", "every4th")) for p in placements)

    def test_text_output(self, supernet, capsys):
        out = said(capsys, "sweep", str(supernet), "all-kda", *SIZES)
        for words in ("2 requests of 9 tokens; KL from all-attention", "all-kda", "loss", "KL", "best"):
            assert words in out

    def test_plot_is_written(self, supernet, tmp_path, capsys):
        image = pytest.importorskip("matplotlib.image")
        file = tmp_path / "sweep.png"
        said(capsys, "sweep", str(supernet), "all-attention", "all-kda", *SIZES, "--plot", str(file))
        assert image.imread(file, format="png").std() > 0.01
        vector = tmp_path / "sweep.SVG"
        said(capsys, "sweep", str(supernet), "all-attention", *SIZES, "--plot", str(vector))
        assert "<svg" in vector.read_text()

    def test_plot_without_matplotlib_raises_first(self, supernet, capsys, monkeypatch, tmp_path):
        """The error is raised before anything is measured."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        error = refused(capsys, "sweep", str(supernet), *SIZES, "--plot", str(tmp_path / "x.png"))
        assert error == "--plot: matplotlib is not installed; pip install lamella[plot]"

    @pytest.mark.parametrize("file", ["{tmp}", "{tmp}/nowhere/x.png", "{tmp}/x", "{tmp}/x.doc", "{tmp}/folder.png"])
    def test_unwritable_plot_raises_first(self, supernet, capsys, tmp_path, file):
        pytest.importorskip("matplotlib")
        (tmp_path / "folder.png").mkdir()
        file = file.format(tmp=tmp_path)
        error = refused(capsys, "sweep", str(supernet), *SIZES, "--plot", file)
        assert error.startswith(f"--plot {file}: ")

    def test_failed_plot_keeps_the_table(self, supernet, capsys, tmp_path):
        """The measured table is printed nevertheless."""
        pytest.importorskip("matplotlib")
        (tmp_path / "x.png").symlink_to("/nowhere/x.png")
        command = ["placement", "sweep", str(supernet), "all-kda", *SIZES, "--plot", str(tmp_path / "x.png")]
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.err == f"lamella: --plot {tmp_path / 'x.png'}: cannot be written (No such file or directory)\n"
        assert "all-kda" in captured.out

    @pytest.mark.parametrize(
        "option", [("--output-len", "1"), ("--output-len", "0"), ("--requests", "0"), ("--repeats", "0")]
    )
    def test_too_short_output_raises(self, supernet, capsys, option):
        error = refused(capsys, "sweep", str(supernet), "all-kda", *SIZES, *option)
        least = 2 if option == ("--output-len", "1") else 1
        assert error == f"{' '.join(option)}: must be at least {least}"

    def test_bad_placement_in_a_sweep_raises_first(self, supernet, capsys):
        error = refused(capsys, "sweep", str(supernet), "all-gdn", "all-rwkv", *SIZES)
        assert error == f"placement: layer 0 has no mixer 'rwkv'; it has {', '.join(NAMES)}"


@pytest.mark.parametrize("command", [["show"], ["set", "all-gdn"], ["sweep"]])
class TestMistakes:
    def run(self, capsys, command: list[str], model: Path | str) -> str:
        return refused(capsys, command[0], str(model), *command[1:])

    def test_a_model_without_a_choice(self, capsys, command, tmp_path):
        for folder in (
            canon_checkpoint(tmp_path / "canon"),
            checkpoint(tmp_path / "plain", fixed(MIXERS["gdn"])),
        ):
            assert self.run(capsys, command, folder) == f"{folder}: no layer has a choice of mixers"

    def test_missing_model_raises(self, capsys, command, tmp_path):
        assert self.run(capsys, command, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"

    def test_unreadable_config_raises(self, capsys, command, tmp_path):
        values = fixed(SUPERNET | {"surprise": 1})
        (tmp_path / "config.json").write_text(json.dumps(values))
        error = self.run(capsys, command, tmp_path)
        assert error.startswith(f"{tmp_path / 'config.json'}: decoder: block: mixer: unknown keys")


def test_pareto_optimal_placements():
    def at(loss: float, time: float) -> Swept:
        return Swept("x", loss, 0.0, time, 1.0, 0, 0)

    assert is_pareto_optimal([at(1, 5), at(2, 3), at(3, 3), at(2, 4), at(4, 1), at(5, 1), at(6, 6)]) == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert is_pareto_optimal([at(1, 1), at(1, 1)]) == [True, True]
