"""The reference shares no code with the engine, and is bitwise equal to `transformers` for its models."""

from __future__ import annotations

import pytest
import torch

from helpers import canon_checkpoint, hf_checkpoint, random_prompts
from lamella.config import AttentionConfig
from lamella.errors import ConfigError
from lamella.parity.reference_model import ATTENTION, MIXERS, ReferenceModel
from lamella.parity.scorers.hf import HFModel
from lamella.parity.scores import Settings
from lamella.parity.tested_model import ModelUnderTest
from models.canon_oracle import CanonReferenceModel, read_hf
from models.test_canon_parity import OPTIONS as CANON
from models.test_hf_parity import CASES
from models.test_llama4 import CONFIGS as LLAMA4

CPU = torch.device("cpu")


def tokens(length: int, seed: int = 0) -> list[int]:
    return random_prompts([length], seed)[0]["prompt_token_ids"]


def recorded(logits, ids):
    """Return (logits, value of every site) of a tapped forward."""
    values = {}

    def tap(site, value):
        values[site] = value.clone()
        return value

    return logits(ids, tap), values


CASES = CASES | {f"llama 4: {name}": config for name, config in LLAMA4.items()}


@pytest.fixture(scope="module", params=CASES)
def tested(request, tmp_path_factory) -> ModelUnderTest:
    folder = tmp_path_factory.mktemp("checkpoint")
    hf_checkpoint(folder, CASES[request.param])
    return ModelUnderTest.open(folder)


def pair(tested: ModelUnderTest, dtype: torch.dtype, attention: str = "eager") -> tuple[HFModel, ReferenceModel]:
    hf = HFModel(tested, Settings(dtype=dtype, device=CPU, attention=attention))
    return hf, ReferenceModel(tested.config, tested.weights(CPU), dtype, CPU, attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_bitwise_equal_to_transformers(tested, dtype):
    for attention in ATTENTION:
        hf, ours = pair(tested, dtype, attention)
        ids = tokens(90)
        assert torch.equal(hf.logits(ids), ours.logits(ids))


def test_float64_logits_equal_transformers_up_to_its_float32_norms(tested):
    hf, ours = pair(tested, torch.float64)
    ids = tokens(90)
    assert (hf.logits(ids) - ours.logits(ids)).abs().max() < 1e-4


def test_every_site_equals_transformers(tested):
    hf, ours = pair(tested, torch.float32)
    ids = tokens(40)
    (theirs, their_sites), (ours, our_sites) = recorded(hf.logits, ids), recorded(ours.logits, ids)
    assert their_sites.keys() == our_sites.keys() and torch.equal(theirs, ours)
    for site, value in our_sites.items():
        assert torch.equal(value, their_sites[site]), site
    assert torch.equal(hf.logits(ids), theirs)  # tapping leaves the model as it was


def test_a_tap_can_replace_values(tested):
    hf, ours = pair(tested, torch.float32)
    ids = tokens(20)
    for model in (hf, ours):
        plain, sites = recorded(model.logits, ids)
        dense = "layers.1.feed_forward.activation" in sites
        inner = ("activation",) if dense else ("router", "experts", "shared_expert.activation")
        named = ["layers.0.mixer.queries_keys", "layers.1.mixer.o_proj"]
        for site in (*named, *(f"layers.1.feed_forward.{name}" for name in inner)):
            assert site in sites
            changed = model.logits(ids, lambda at, value, site=site: value * 2 if at == site else value)
            assert not torch.allclose(plain, changed)


@pytest.mark.parametrize("name", CANON)
def test_canon_models_equal_their_formulas(name, tmp_path):
    folder = canon_checkpoint(tmp_path, **CANON[name])
    tested = ModelUnderTest.open(folder)
    expected = CanonReferenceModel(*read_hf(folder))
    ids = tokens(70)
    ours = ReferenceModel(tested.config, tested.weights(CPU), torch.float64).logits(ids)
    # The angles are float32 by definition here, and float64 there.
    assert (ours - expected(torch.tensor([ids]))[0]).abs().max() < 1e-4


def test_dummy_weights_are_those_of_the_engine(tmp_path):
    folder = canon_checkpoint(tmp_path, canon_bias=True, attention_bias=True)
    (folder / "model.safetensors").unlink()
    tested = ModelUnderTest.open(folder, load_format="dummy", seed=3)
    model = tested.load(torch.float32, CPU)
    ids = tokens(30)
    expected = model.compute_logits(model(torch.tensor(ids)))
    assert (ReferenceModel(tested.config, tested.weights(CPU), torch.float32).logits(ids) - expected).abs().max() < 1e-4


def test_a_mixer_without_a_reference_implementation_is_named(tmp_path, monkeypatch):
    tested = ModelUnderTest.open(canon_checkpoint(tmp_path))
    monkeypatch.delitem(MIXERS, AttentionConfig)
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer: .* no plain form of AttentionConfig"):
        ReferenceModel(tested.config, tested.weights(CPU), torch.float32).logits([1, 2])


def test_the_reason_why_transformers_is_not_used_is_given(tmp_path):
    tested = ModelUnderTest.open(canon_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match=r"hf: transformers does not know the model .*; `reference`"):
        HFModel(tested, Settings(dtype=torch.float32, device=CPU))
