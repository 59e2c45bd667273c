"""Apriel2's config files, as three programs write them: what they leave out, where they contradict each other."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection
from copy import deepcopy
from typing import Any

import pytest
import torch

from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, config, fixed, pattern
from helpers import VOCAB, plain_logits, random_prompts
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.names import targets
from lamella.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LayerConfig,
    Llama3Scaling,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    StochasticConfig,
    YarnScaling,
)
from lamella.config.hf_config import HFConfig
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.layers.rotary import inverse_frequencies
from lamella.models import Apriel2ForCausalLM, resolve_architecture
from lamella.models.apriel2 import _ACTIVATIONS

pytestmark = pytest.mark.unit

FILE = "folder/config.json"
BLOCKS = "model.decoder.blocks"
BIAS = {"bias": {"enabled": True}}
NO_BIAS = {"bias": {"enabled": False}}
LAYERS = {"q": "query_layer", "k": "key_layer", "v": "value_layer", "o": "dense_layer"}
DROP = object()


def read(values: dict[str, Any], tensors: Collection[str] | None = None) -> ModelConfig:
    """The model of a config file, beside a checkpoint with these tensors or beside none."""
    return Apriel2ForCausalLM.read_config(HFConfig(values, FILE, list_tensors=lambda: tensors))


def tensors_of(values: dict[str, Any]) -> set[str]:
    """What a checkpoint holds that has what the config says."""
    model = Apriel2ForCausalLM.allocate(read(values), LocalKit(device="meta"))
    return set(targets(model, Apriel2ForCausalLM.checkpoint_names))


def first(values: dict[str, Any], tensors: Collection[str] | None = None) -> LayerConfig:
    return read(values, tensors).layers[0]


def mixer(values: dict[str, Any], tensors: Collection[str] | None = None) -> Any:
    """The first layer's mixer in a model of such layers."""
    return first(fixed(values), tensors).mixer


def mlp(tensors: Collection[str] | None = None, **changes: Any) -> MLPConfig:
    return first(with_mlp(**changes), tensors).feed_forward


def with_mlp(**changes: Any) -> dict[str, Any]:
    return fixed(ATTENTION, mlp={"type": "mlp", "intermediate_size": 48} | changes)


def changed(values: dict[str, Any], path: Collection[str], **changes: Any) -> dict[str, Any]:
    """A copy with some keys of a nested mapping, which is made where there is none, set or (DROP) removed."""
    new = deepcopy(values)
    inner = new
    for key in path:
        inner = inner.setdefault(key, {})
    inner |= changes
    for key in [key for key, value in inner.items() if value is DROP]:
        del inner[key]
    return new


def refused(values: dict[str, Any], *said: str, tensors: Collection[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(values, tensors)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    return message


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING and record.name == "lamella" for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


class TestDefaults:
    """What the published config class takes where the file says nothing, or something empty."""

    def test_an_empty_file_is_the_default_decoder(self):
        model = read({})
        assert (model.hidden_size, model.vocab_size, len(model.layers)) == (4096, 32000, 32)
        assert (model.bos_token_id, model.eos_token_ids, model.tie_word_embeddings) == (1, (2,), False)
        assert (model.norm, model.max_position_embeddings) == (NormConfig(eps=1e-5), 2048)
        assert model.layers[0] == LayerConfig(
            mixer=AttentionConfig(
                num_heads=32, num_kv_heads=32, head_dim=128, scale=128**-0.5, rope=RopeConfig(dim=128, theta=10000.0)
            ),
            feed_forward=MLPConfig(intermediate_size=4 * 4096),
            norm=NormConfig(eps=1e-5),
        )
        assert set(model.layers) == {model.layers[0]}

    @pytest.mark.parametrize("key", ["decoder", "embeddings", "head"])
    @pytest.mark.parametrize("value", [None, {}])
    def test_empty_is_missing(self, key, value):
        assert read({key: value}) == read({})

    def test_the_default_decoder_computes(self, tmp_path):
        """The published class cannot build what it writes there."""
        values = {"architectures": ["Apriel2ForCausalLM"], "hidden_size": 64, "vocab_size": VOCAB}
        model = load_model(open_checkpoint(checkpoint(tmp_path, values)))
        assert len(model.model.layers) == 32
        assert plain_logits(model, torch.arange(5)[None]).isfinite().all()

    def test_token_ids_are_the_classes_or_the_files(self):
        values = fixed(ATTENTION)
        assert (read(values).bos_token_id, read(values).eos_token_ids) == (1, (2,))
        other = read(values | {"bos_token_id": 0, "eos_token_id": [7, 9], "pad_token_id": 3})
        assert (other.bos_token_id, other.eos_token_ids) == (0, (7, 9))

    def test_a_head_without_words_norms_with_1e_5(self):
        values = fixed(ATTENTION)
        for head in ({"normalization": {}}, {"normalization": None}, {"normalization": {"type": "rms_norm"}}):
            assert read(values | {"head": head}).norm == NormConfig(eps=1e-5)
        assert read(values | {"head": {"normalization": {"epsilon": 1e-3}}}).norm == NormConfig(eps=1e-3)

    def test_parts_of_a_block_that_are_missing_have_their_kinds(self):
        explicit = fixed(ATTENTION)
        for path in (("mixer",), ("mlp",), ("normalization",)):
            assert read(changed(explicit, ("decoder", "block", *path), type=DROP)) == read(explicit)
        without = changed(explicit, ("decoder", "block"), normalization=DROP)
        assert read(without) == read(explicit)
        refused(changed(explicit, ("decoder", "block"), mixer=DROP), f"{FILE}: decoder: block: mixer: heads is missing")
        refused(
            changed(explicit, ("decoder", "block"), mlp=DROP),
            f"{FILE}: decoder: block: mlp: intermediate_size is missing",
        )

    def test_attention(self):
        plain = {key: ATTENTION[key] for key in ("type", "heads", "head_size", "rotary")}
        assert mixer(plain) == AttentionConfig(
            num_heads=4, num_kv_heads=4, head_dim=16, scale=0.25, rope=RopeConfig(dim=16, theta=10000.0)
        )
        assert mixer(plain | {"window_size": 7}).window == 7

    def test_gdn(self):
        assert mixer({"type": "gdn", "convolution_layer": {"kernel_size": 4}}) == GatedDeltaNetConfig(
            value_heads=32, key_heads=8, key_head_dim=64, value_head_dim=64, kernel=4, norm=NormConfig(eps=1e-5)
        )
        assert mixer(MIXERS["gdn"] | {"norm_eps": 1e-3}).norm == NormConfig(eps=1e-3)

    def test_kda(self):
        """Its epsilon is 1e-5, as where it was trained; the published vLLM code takes 1e-6."""
        assert mixer({"type": "kda"}) == KimiDeltaConfig(
            num_heads=32, head_dim=64, kernel=4, norm=NormConfig(eps=1e-5), gate="silu"
        )
        stated = mixer({"type": "kda", "normalization": {"epsilon": 1e-6, "activation": "sigmoid"}})
        assert (stated.norm, stated.gate) == (NormConfig(eps=1e-6), "sigmoid")

    def test_mamba(self):
        """Sizes from hidden_size = 32."""
        plain = {"type": "mamba", "conv_bias": True, "dt_proj_bias": False}
        assert mixer(plain) == MambaConfig(
            state_size=16,
            inner_size=64,
            kv_size=32,
            dt_rank=2,
            kernel=4,
            repeat_before_conv=True,
            conv_bias=True,
            dt_bias=False,
            linear_bias=False,
        )
        assert mixer(plain | {"expand": 3, "d_xb": 96}).inner_size == 96
        assert mixer(plain | {"expand": 3, "d_inner": 32}).inner_size == 32
        assert mixer(plain | {"dt_rank": "auto"}).dt_rank == 2
        assert mixer(plain | {"dt_rank": 5}).dt_rank == 5
        assert mixer(plain | {"repeat_kv_before_conv": False}).repeat_before_conv is False
        values = fixed(plain | {"d_xb": 48, "d_inner": 96})
        assert first(values | {"hidden_size": 40}).mixer.dt_rank == 3  # 40 / 16, rounded up

    def test_mlp(self):
        assert mlp() == MLPConfig(intermediate_size=48, gated=False)
        assert mlp(gated=True) == MLPConfig(intermediate_size=48, gated=True)
        assert [mlp(activation=name).activation for name in _ACTIVATIONS] == list(_ACTIVATIONS)


class TestKeys:
    @pytest.mark.parametrize(
        "values",
        [
            {"type": "mamba", "conv_bias": True, "dt_proj_bias": True, "state_size": 8, "d_xb": 32},
            {"type": "mamba", "conv_bias": True, "dt_proj_bias": True, "d_state": 8, "d_xb": 32},
            {"type": "mamba", "conv_bias": True, "dt_proj_bias": True, "d_state": 8, "state_size": 8, "d_xb": 32},
        ],
    )
    def test_state_size_has_two_names(self, values):
        assert mixer(values).state_size == 8

    def test_which_must_not_contradict_each_other(self):
        values = fixed(MIXERS["mamba"] | {"d_state": 16})
        at = f"{FILE}: decoder: block: mixer: "
        refused(values, f"{at}state_size and d_state contradict each other: [8, 16]")

    @pytest.mark.parametrize(
        ("values", "path", "key"),
        [
            (ATTENTION, (), "heads"),
            (ATTENTION, (), "head_size"),
            (ATTENTION, ("rotary",), "theta"),
            (MIXERS["gdn"], ("convolution_layer",), "kernel_size"),
            (MIXERS["mamba"], (), "conv_bias"),
            (MIXERS["mamba"], (), "dt_proj_bias"),
        ],
    )
    def test_what_has_no_default_is_named(self, values, path, key):
        at = ": ".join((FILE, "decoder", "block", "mixer", *path))
        wanted = changed(fixed(values), ("decoder", "block", "mixer", *path), **{key: DROP})
        assert refused(wanted) == f"{at}: {key} is missing"
        inner = changed(fixed(SUPERNET), ("decoder", "block", "mixer", "mixers", "one", *path), **{key: DROP})
        inner["decoder"]["block"]["mixer"]["mixers"]["one"] = wanted["decoder"]["block"]["mixer"]
        at = ": ".join((FILE, "decoder", "block", "mixer", "mixers", "one", *path))
        assert refused(inner) == f"{at}: {key} is missing"

    @pytest.mark.parametrize("values", [{}, None])
    def test_gdn_without_a_convolution(self, values):
        at = f"{FILE}: decoder: block: mixer: convolution_layer"
        assert refused(fixed(MIXERS["gdn"] | {"convolution_layer": values})) == f"{at}: kernel_size is missing"

    @pytest.mark.parametrize(
        ("values", "path"),
        [
            (fixed(ATTENTION), ()),
            (fixed(ATTENTION), ("embeddings",)),
            (fixed(ATTENTION), ("head",)),
            (fixed(ATTENTION), ("head", "normalization")),
            (fixed(ATTENTION), ("decoder",)),
            (fixed(ATTENTION), ("decoder", "block")),
            (fixed(ATTENTION), ("decoder", "block", "normalization")),
            (fixed(ATTENTION), ("decoder", "block", "mlp")),
            (fixed(ATTENTION), ("decoder", "block", "mlp", "layer_1")),
            (fixed(ATTENTION), ("decoder", "block", "mlp", "layer_2", "bias")),
            (fixed(ATTENTION), ("decoder", "block", "mixer", "rotary")),
            *(
                (fixed(ATTENTION), ("decoder", "block", "mixer", layer, *inner))
                for layer in LAYERS.values()
                for inner in ((), ("bias",))
            ),
            *((fixed(values), ("decoder", "block", "mixer")) for values in MIXERS.values()),
            (fixed(MIXERS["gdn"]), ("decoder", "block", "mixer", "convolution_layer")),
            (fixed(MIXERS["kda"]), ("decoder", "block", "mixer", "convolution_layer")),
            (fixed(MIXERS["kda"]), ("decoder", "block", "mixer", "normalization")),
            (fixed(SUPERNET), ("decoder", "block", "mixer")),
            *((fixed(SUPERNET), ("decoder", "block", "mixer", "mixers", name)) for name in MIXERS),
            (fixed(SUPERNET), ("decoder", "block", "mixer", "mixers", "attention", "rotary")),
            (fixed(SUPERNET), ("decoder", "block", "mixer", "mixers", "gdn", "convolution_layer")),
            (pattern(["gdn", "kda"]), ("decoder",)),
            (pattern(["gdn", "kda"]), ("decoder", "blocks", "kda")),
            (pattern(["gdn", "kda"]), ("decoder", "blocks", "kda", "mixer")),
        ],
    )
    def test_unknown_ones_are_named_with_where_they_stand(self, values, path):
        values = changed(values, path)
        read(values)
        message = refused(changed(values, path, surprise=3, logit_cap=30.0))
        at = ": ".join((FILE, *path))
        start, _, out = message.partition("; to compute without: --hf-overrides ")
        assert start == f"{at}: unknown keys may change what the model computes: logit_cap=30.0, surprise=3"
        removed = json.loads(out.strip("'"))
        for key in path:
            assert list(removed) == [key]
            removed = removed[key]
        assert removed == {"logit_cap": None, "surprise": None}
        assert read(changed(values, path, surprise=None, _note="x")) == read(values)

    def test_what_training_left_there_is_no_news(self):
        extra = {"init": "transfer", "lr_scale": 0.5}
        values = fixed(SUPERNET | extra)
        inner = values["decoder"]["block"]
        inner["mlp"] |= extra
        inner["mixer"]["mixers"] = {name: each | extra for name, each in MIXERS.items()}
        inner["mixer"]["mixers"]["mamba"] |= {"dt_min": 1e-3, "dt_max": 0.1, "dt_init": "random", "dt_scale": 1.0}
        inner["mixer"]["mixers"]["mamba"] |= {"dt_init_floor": 1e-4}
        inner["mixer"]["mixers"]["attention"] |= {"causal": True, "cross_document_attention": False}
        extra_top = {"use_cache": True, "initializer_range": 0.02, "pad_token_id": None, "auto_map": {"AutoModel": "x"}}
        assert read(values | extra_top) == read(fixed(SUPERNET))

    @pytest.mark.parametrize(
        ("path", "changes", "said"),
        [
            (("decoder",), {"type": "random"}, "decoder: type='random'"),
            (("decoder",), {"num_blocks": 0}, "decoder: num_blocks=0"),
            (("decoder",), {"num_blocks": 2.5}, "decoder: num_blocks=2.5"),
            ((), {"decoder": "fixed"}, "decoder='fixed' is not supported: must be a mapping"),
            ((), {"head": [1]}, "head=[1]"),
            ((), {"hidden_size": "32"}, "hidden_size='32'"),
            (("decoder", "block"), {"mixer": "gdn"}, "decoder: block: mixer='gdn'"),
            (("decoder", "block", "mixer"), {"type": "rwkv"}, "decoder: block: mixer: type='rwkv'"),
            (("decoder", "block", "mixer"), {"causal": False}, "mixer: causal=False"),
            (("decoder", "block", "mixer"), {"window_size": -1}, "mixer: window_size=-1"),
            (("decoder", "block", "mixer"), {"heads": True}, "mixer: heads=True"),
            (("decoder", "block", "mixer"), {"head_groups": 3}, "num_kv_heads=3"),
            (("decoder", "block", "mixer"), {"add_linear_biases": "no"}, "mixer: add_linear_biases='no'"),
            (("decoder", "block", "mixer", "query_layer"), {"bias": True}, "mixer: query_layer: bias=True"),
            (("decoder", "block", "mixer", "rotary"), {"type": "pixtral_2d"}, "mixer: rotary: type='pixtral_2d'"),
            (("decoder", "block", "mixer", "rotary"), {"theta": 0}, "rope.theta"),
            (("decoder", "block", "mlp"), {"type": "moe"}, "decoder: block: mlp: type='moe'"),
            (("decoder", "block", "mlp"), {"activation": "tanh"}, "mlp: activation='tanh'"),
            (("decoder", "block", "mlp"), {"gated": "yes"}, "mlp: gated='yes'"),
            (("decoder", "block", "normalization"), {"type": "none"}, "normalization: type='none'"),
            (("decoder", "block", "normalization"), {"epsilon": math.inf}, "normalization: epsilon=inf"),
            (("head", "normalization"), {"type": "layer_norm"}, "head: normalization='layer_norm'"),
            (("embeddings",), {"max_position_embeddings": 0}, "embeddings: max_position_embeddings=0"),
        ],
    )
    def test_unusable_values(self, path, changes, said):
        message = refused(changed(fixed(ATTENTION), path, **changes), said)
        assert message.startswith(FILE) or said.startswith(("num_kv_heads", "rope"))

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (MIXERS["gdn"] | {"key_heads": 3}, "gdn.key_heads=3"),
            (MIXERS["gdn"] | {"convolution_layer": {"kernel_size": 1}}, "kernel_size=1"),
            (MIXERS["gdn"] | {"convolution_layer": {"kernel_size": 4, "activation": "relu"}}, "activation='relu'"),
            (MIXERS["kda"] | {"normalization": {"activation": "relu"}}, "normalization: activation='relu'"),
            (MIXERS["kda"] | {"normalization": {"type": "layer_norm"}}, "normalization: type='layer_norm'"),
            (MIXERS["mamba"] | {"d_inner": 60}, "mamba.inner_size=60"),
            (MIXERS["mamba"] | {"d_xb": 48}, "mamba.kv_size=48"),
            (MIXERS["mamba"] | {"dt_rank": "most"}, "dt_rank='most'"),
            (MIXERS["mamba"] | {"d_conv": 1}, "d_conv=1"),
            (ATTENTION | {"type": "sliding_window"}, "decoder: block: mixer: window_size is missing"),
        ],
    )
    def test_unusable_values_of_mixers(self, values, said):
        refused(fixed(values), said)

    def test_a_sliding_window_by_either_name(self):
        window = ATTENTION | {"window_size": 6}
        assert mixer(window | {"type": "sliding_window"}) == mixer(window)


class TestRotary:
    @staticmethod
    def rope(**rotary: Any) -> RopeConfig | None:
        return mixer(ATTENTION | {"rotary": rotary}).rope

    @pytest.mark.parametrize("kind", ["mistral_1d", "default", None])
    def test_the_plain_one(self, kind):
        rope = self.rope(type=kind, theta=1e6)
        assert rope == RopeConfig(dim=16, theta=1e6)
        torch.testing.assert_close(inverse_frequencies(rope), 1e6 ** (-torch.arange(0, 16, 2) / 16))

    def test_none(self):
        assert self.rope(type="none") is None and self.rope(type="none", theta=1e4) is None

    def test_llama3(self):
        rope = self.rope(
            type="llama3",
            theta=1e4,
            scale_factor=4.0,
            low_frequency_factor=2.0,
            high_frequency_factor=8.0,
            original_context_length=1024,
        )
        assert rope.scaling == Llama3Scaling(
            factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0, original_length=1024
        )
        expected = []
        for index in range(8):
            frequency = 1e4 ** (-index / 8)
            length = 2 * math.pi / frequency
            share = (1024 / length - 2.0) / (8.0 - 2.0)
            if length < 1024 / 8.0:
                expected.append(frequency)
            elif length > 1024 / 2.0:
                expected.append(frequency / 4.0)
            else:
                expected.append((1 - share) * frequency / 4.0 + share * frequency)
        assert expected[2] == 1e4 ** (-2 / 8) and 4 * expected[7] == 1e4 ** (-7 / 8)
        torch.testing.assert_close(inverse_frequencies(rope), torch.tensor(expected))
        assert self.rope(type="llama3", theta=1e4).scaling == Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
        )

    def test_yarn(self):
        rope = self.rope(
            type="yarn",
            theta=1e4,
            scale_factor=4.0,
            attention_factor=1.5,
            beta_fast=16.0,
            beta_slow=2.0,
            original_context_length=512,
        )
        assert rope.scaling == YarnScaling(
            factor=4.0, original_length=512, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0
        )

        def pair(turns: float) -> float:
            return 16 * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

        low, high = max(math.floor(pair(16.0)), 0), min(math.ceil(pair(2.0)), 15)
        assert low < high < 8
        expected = []
        for index in range(8):
            frequency, ramp = 1e4 ** (-index / 8), min(max((index - low) / (high - low), 0.0), 1.0)
            expected.append(frequency / 4.0 * ramp + frequency * (1 - ramp))
        torch.testing.assert_close(inverse_frequencies(rope), torch.tensor(expected))
        default = self.rope(type="yarn", theta=1e4).scaling
        assert default == YarnScaling(
            factor=8.0, original_length=8192, attention_factor=0.1 * math.log(8.0) + 1.0, beta_fast=32.0, beta_slow=1.0
        )

    def test_keys_of_another_kind_are_refused(self):
        refused(
            fixed(ATTENTION | {"rotary": {"type": "mistral_1d", "theta": 1e4, "scale_factor": 4.0}}),
            "mixer: rotary: unknown keys may change what the model computes: scale_factor=4.0",
        )


class TestPattern:
    def test_it_is_tiled(self):
        names = ["kda", "attention", "gdn"]
        kinds = {"kda": KimiDeltaConfig, "attention": AttentionConfig, "gdn": GatedDeltaNetConfig}
        layers = read(pattern(names, layers=8)).layers
        assert [type(layer.mixer) for layer in layers] == [kinds[names[index % 3]] for index in range(8)]
        cut = read(pattern(names) | {"decoder": pattern(names)["decoder"] | {"num_blocks": 2}}).layers
        assert cut == layers[:2]

    def test_one_block_is_a_fixed_decoder(self):
        assert read(pattern(["gdn"], layers=3)) == read(fixed(MIXERS["gdn"], layers=3))

    def test_a_fixed_decoder_need_not_say_so(self):
        for kind in (DROP, None):
            assert read(changed(fixed(ATTENTION), ("decoder",), type=kind)) == read(fixed(ATTENTION))

    def test_a_block_that_no_layer_has_is_not_read(self):
        spare = changed(pattern(["gdn"]), ("decoder", "blocks"), spare={"mixer": {"type": "rwkv"}})
        assert read(spare) == read(pattern(["gdn"]))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"pattern": []}, "decoder: pattern=[] is not supported: must be a list of names of blocks"),
            ({"pattern": DROP}, "decoder: pattern is missing"),
            ({"pattern": "gdn"}, "decoder: pattern='gdn'"),
            ({"pattern": ["gdn", 3]}, "decoder: pattern=['gdn', 3]"),
            ({"pattern": ["gdn", "rwkv"]}, "decoder: pattern='rwkv' is not supported: must be one of blocks: gdn, kda"),
            ({"blocks": {}}, "decoder: pattern='gdn'"),
            ({"blocks": DROP}, "decoder: pattern='gdn'"),
            ({"type": DROP}, "decoder: unknown keys"),
        ],
    )
    def test_bad_ones(self, changes, said):
        refused(changed(pattern(["gdn", "kda"]), ("decoder",), **changes), f"{FILE}: {said}")


class TestBiases:
    """The tensors say which projections have one; where the config says otherwise, the log does."""

    @pytest.mark.parametrize("present", ["", "q", "k", "v", "o", "qk", "qkv", "qkvo"])
    def test_attention(self, present, caplog):
        """Each by itself, against a config that says nothing."""
        tensors = tensors_of(fixed(ATTENTION)) | {
            f"{BLOCKS}.{layer}.mixer.{name}_proj.bias" for layer in range(2) for name in present
        }
        found = mixer(ATTENTION, tensors)
        parts = [f"{name}_proj" for name in "qkv" if name in present]
        assert found.qkv_bias == (tuple(parts) if 0 < len(parts) < 3 else bool(parts))
        assert found.output_bias == ("o" in present)
        assert warnings(caplog) == [
            f"{FILE}: the config says False of mixer.{name}_proj.bias, the tensors say True, which counts"
            for name in "qkvo"
            if name in present
        ]

    @pytest.mark.parametrize("name", "qkvo")
    def test_one_that_is_stated_and_not_there(self, name, caplog):
        values = ATTENTION | {LAYERS[name]: BIAS}
        assert mixer(values, tensors_of(fixed(ATTENTION))) == mixer(ATTENTION)
        message = f"{FILE}: the config says True of mixer.{name}_proj.bias, the tensors say False, which counts"
        assert warnings(caplog) == [message]

    @pytest.mark.parametrize("inherited", [False, True])
    @pytest.mark.parametrize("name", "qkvo")
    def test_without_tensors_a_projections_own_word_wins(self, name, inherited, caplog):
        values = ATTENTION | {"add_linear_biases": inherited, LAYERS[name]: NO_BIAS if inherited else BIAS}
        found = mixer(values)
        has = {part for part in "qkv" if found.qkv_bias is True or f"{part}_proj" in (found.qkv_bias or ())}
        has |= {"o"} if found.output_bias else set()
        assert has == ({*"qkvo"} - {name} if inherited else {name})
        assert read(fixed(values), tensors_of(fixed(values))) == read(fixed(values))
        assert warnings(caplog) == []

    def test_layers_may_differ(self, caplog):
        tensors = tensors_of(fixed(ATTENTION)) | {f"{BLOCKS}.1.mixer.q_proj.bias"}
        found = [layer.mixer.qkv_bias for layer in read(fixed(ATTENTION), tensors).layers]
        assert found == [False, ("q_proj",)]
        assert len(warnings(caplog)) == 1

    def test_in_a_supernet(self, caplog):
        at = "mixer.mixers.sliding_window.v_proj.bias"
        tensors = tensors_of(fixed(SUPERNET)) | {f"{BLOCKS}.{layer}.{at}" for layer in range(2)}
        found = dict(first(fixed(SUPERNET), tensors).mixer.mixers)
        assert found["sliding_window"].qkv_bias == ("v_proj",) and found["attention"].qkv_bias is False
        assert warnings(caplog) == [f"{FILE}: the config says False of {at}, the tensors say True, which counts"]

    @pytest.mark.parametrize(("tensor", "field"), [("up_proj", "gate_up_bias"), ("down_proj", "down_bias")])
    @pytest.mark.parametrize("gated", [False, True])
    def test_feed_forward(self, tensor, field, gated, caplog):
        values = with_mlp(gated=gated)
        tensors = tensors_of(values) | {f"{BLOCKS}.{layer}.mlp.{tensor}.bias" for layer in range(2)}
        found = mlp(tensors, gated=gated)
        assert {name: getattr(found, name) for name in ("gate_up_bias", "down_bias")} == {
            "gate_up_bias": False,
            "down_bias": False,
        } | {field: True}
        message = f"{FILE}: the config says False of mlp.{tensor}.bias, the tensors say True, which counts"
        assert warnings(caplog) == [message]

    @pytest.mark.parametrize(("layer", "field"), [("layer_1", "gate_up_bias"), ("layer_2", "down_bias")])
    def test_feed_forward_as_stated(self, layer, field):
        assert mlp(**{layer: BIAS}) == MLPConfig(intermediate_size=48, gated=False, **{field: True})
        both = {"gate_up_bias": True, "down_bias": True} | {field: False}
        assert mlp(add_linear_biases=True, **{layer: NO_BIAS}) == MLPConfig(intermediate_size=48, gated=False, **both)

    def test_a_gated_feed_forward_of_which_the_config_claims_biases(self, caplog):
        """As the published class has it: none, whatever the config says."""
        values = with_mlp(gated=True, add_linear_biases=True)
        assert first(values, tensors_of(with_mlp(gated=True))).feed_forward == MLPConfig(intermediate_size=48)
        assert len(warnings(caplog)) == 2

    @pytest.mark.parametrize(
        ("key", "tensor", "field"),
        [
            ("conv_bias", "conv1d", "conv_bias"),
            ("dt_proj_bias", "dt_proj", "dt_bias"),
            ("add_linear_biases", "in_proj", "linear_bias"),
        ],
    )
    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("stated", [False, True, None])
    def test_mamba(self, key, tensor, field, there, stated, caplog):
        values = MIXERS["mamba"] | {key: there}
        tensors = tensors_of(fixed(values))
        assert (f"{BLOCKS}.0.mixer.{tensor}.bias" in tensors) is there
        demanded = stated is True and key != "add_linear_biases"  # so that the loader names what is lost
        assert getattr(mixer(values | {key: stated}, tensors), field) is (there or demanded)
        claimed = False if stated is None and key == "add_linear_biases" else stated
        message = f"{FILE}: the config says {claimed} of mixer.{tensor}.bias, the tensors say {there}, which counts"
        assert warnings(caplog) == ([] if demanded or claimed in (None, there) else [message])


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("stated", [False, True, None])
def test_whether_a_feed_forward_is_gated(there, stated, caplog):
    """The tensors say it where the config does not, in which programs differ, or denies it; where it does, a gate that
    is not there is the loader's to name."""
    tensors = tensors_of(with_mlp(gated=there))
    assert (f"{BLOCKS}.0.mlp.gate_proj.weight" in tensors) is there
    assert mlp(tensors, gated=stated).gated is (there or stated is True)
    claim = f"{FILE}: the config says False of mlp.gate_proj.weight, the tensors say True, which counts"
    assert warnings(caplog) == ([claim] if there and stated is False else [])
    assert mlp(None, gated=stated).gated is bool(stated)


class TestNorms:
    def test_a_blocks_own_epsilon_counts_and_the_log_says_so_once(self, caplog):
        values = fixed(ATTENTION, layers=3, normalization={"type": "rms_norm", "epsilon": 1e-2})
        model = read(values)
        assert model.norm == NormConfig(eps=1e-5)
        assert {layer.norm for layer in model.layers} == {NormConfig(eps=1e-2)}
        said = "block block norms with its own epsilon, as in training; the published class takes the head's"
        assert warnings(caplog) == [f"{FILE}: {said}"]

    @pytest.mark.parametrize("own", [{}, {"type": "rms_norm"}, {"type": "rms_norm", "epsilon": 1e-3}])
    def test_one_that_is_the_heads_is_not_worth_a_word(self, own, caplog):
        head = {"normalization": {"type": "rms_norm", "epsilon": 1e-3}}
        assert first(fixed(ATTENTION, normalization=own) | {"head": head}).norm == NormConfig(eps=1e-3)
        assert warnings(caplog) == []

    def test_layer_norms_of_blocks(self):
        values = fixed(MIXERS["gdn"], normalization={"type": "layer_norm", "epsilon": 1e-5})
        assert first(values).norm == NormConfig(eps=1e-5, kind="layer")
        norms = {f"{BLOCKS}.0.{name}_layernorm.{part}" for name in ("input", "post_attention") for part in ("bias",)}
        assert norms <= tensors_of(values) and not norms & tensors_of(fixed(MIXERS["gdn"]))


class TestSupernets:
    @pytest.mark.parametrize(
        "changes",
        [
            {"sampling_strategy": "uniform"},
            {"sampling_strategy": "full_layout"},
            {"sampling_strategy": "weighted"},
            {"sampling_strategy": "weighted", "sampling_weights": {"attention": 0.5}},
            {"predefined_layouts": [["gdn", "kda"]], "predefined_layout_probabilities": [0.25], "seed_shift": 3},
        ],
    )
    def test_how_they_were_sampled_in_training_says_nothing(self, changes):
        """The published class refuses some of these, even to infer."""
        assert read(fixed(SUPERNET | changes)) == read(fixed(SUPERNET))

    def test_mixers_keep_their_order_and_the_first_is_the_main_one(self):
        found = mixer({"type": "stochastic", "mixers": dict(reversed(MIXERS.items()))})
        assert isinstance(found, StochasticConfig)
        assert found.names == tuple(reversed(MIXERS)) and found.main == "mamba"
        assert mixer(SUPERNET | {"main_mixer_name": "kda"}).main == "kda"
        alone = {name: mixer(values) for name, values in MIXERS.items()}
        assert dict(found.mixers) == alone

    def test_a_mixer_that_is_null_is_none(self):
        assert mixer(SUPERNET | {"mixers": MIXERS | {"rwkv": None}}) == mixer(SUPERNET)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"main_mixer_name": "rwkv"}, "mixer: stochastic.main_mixer_name='rwkv'"),
            ({"main_mixer_name": 3}, "mixer: stochastic.main_mixer_name=3"),
            ({"mixers": {}, "main_mixer_name": None}, "mixer: stochastic.mixers=()"),
            ({"mixers": DROP}, "mixer: stochastic.mixers=()"),
            ({"mixers": ["gdn"]}, "mixer: mixers=['gdn']"),
            ({"mixers": MIXERS | {"a.b": ATTENTION}}, "mixer: mixers='a.b' is not supported: must be names without"),
            ({"mixers": MIXERS | {"": ATTENTION}}, "mixer: mixers=''"),
            ({"mixers": MIXERS | {"gdn": "gdn"}}, "mixer: mixers: gdn='gdn' is not supported: must be a mapping"),
            ({"mixers": MIXERS | {"inner": SUPERNET}}, "mixer: mixers: inner: type='stochastic'"),
            ({"mixers": MIXERS | {"inner": {"type": "rwkv"}}}, "mixer: mixers: inner: type='rwkv'"),
        ],
    )
    def test_bad_ones(self, changes, said):
        values = changed(fixed(SUPERNET), ("decoder", "block", "mixer"), **changes)
        refused(values, f"{FILE}: decoder: block: {said}")


class TestLength:
    """2048 is what the config class writes where nobody said anything."""

    @pytest.mark.parametrize("embeddings", [None, {}, {"max_position_embeddings": 2048}])
    def test_2048_bounds_nothing(self, embeddings):
        model = read(fixed(ATTENTION) | {"embeddings": embeddings})
        assert EngineOptions(model="x").resolve_length(model) == 2048
        assert EngineOptions(model="x", max_model_len=5000).resolve_length(model) == 5000

    def test_any_other_length_bounds(self):
        model = read(fixed(ATTENTION) | {"embeddings": {"max_position_embeddings": 4096}})
        assert EngineOptions(model="x").resolve_length(model) == 4096
        assert EngineOptions(model="x", max_model_len=4096).resolve_length(model) == 4096
        with pytest.raises(ConfigError, match=r"^max_model_len=4097: the model supports at most 4096$"):
            EngineOptions(model="x", max_model_len=4097).resolve_length(model)

    def test_positions_behind_2048_are_computed(self, tmp_path):
        values = config(fixed(ATTENTION)["decoder"], embeddings={"max_position_embeddings": 2048})
        folder = checkpoint(tmp_path, values)
        (prompt,) = random_prompts((2100,))
        llm = LLM(folder, device="cpu", dtype="float32", max_model_len=2200, max_num_seqs=1)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
        (token,) = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        logits = plain_logits(llm.engine.model, torch.tensor([prompt["prompt_token_ids"]]))
        assert token == int(logits[0, -1].argmax())
        with pytest.raises(ValueError, match="max_model_len=2048"):
            LLM(folder, device="cpu", max_num_seqs=1).generate(prompt, params, use_tqdm=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Apriel2ForConditionalGeneration"], "model_type": "apriel2"},
        {"architectures": None, "model_type": "apriel2"},
        {"architectures": None, "model_type": "apriel2_text"},
        {"architectures": ["Apriel2ForCausalLM"], "model_type": None},
    ],
)
def test_names_of_the_architecture(tmp_path, changes):
    """The multimodal ones too: their text part is served."""
    vision = {"vision_encoder": {"hidden_size": 8}, "image_token_index": 5, "projector_hidden_act": "gelu"}
    values = fixed(ATTENTION) | vision | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    opened = open_checkpoint(tmp_path)
    assert opened.architecture is Apriel2ForCausalLM.description
    assert opened.read_config() == read(fixed(ATTENTION))
    assert resolve_architecture("apriel2") is resolve_architecture("apriel2_text") is Apriel2ForCausalLM


def test_a_block_is_shared_by_the_layers_that_have_it():
    """Blocks are read for each layer, and are the same afterwards: an engine tells kinds of layers by them."""
    layers = read(pattern(["gdn", "all"], {"gdn": MIXERS["gdn"], "all": SUPERNET}, layers=4)).layers
    assert layers[0] == layers[2] != layers[1] == layers[3]
