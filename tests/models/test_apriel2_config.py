"""Apriel2's config files, as three programs write them: defaults, keys, patterns, length, names."""

from __future__ import annotations

import json
import math

import pytest
import torch

from apriel2_configs import DROP, FILE, LAYERS, changed, first, mixer, mlp, read, refused
from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, config, fixed, pattern
from helpers import VOCAB, plain_logits, random_prompts
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LayerConfig,
    MambaConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.models import Apriel2ForCausalLM, resolve_architecture
from lamella.models.apriel2 import _ACTIVATIONS

pytestmark = pytest.mark.unit


class TestDefaults:
    """Defaults of the published config class for missing or empty values."""

    def test_an_empty_config_gives_the_default_decoder(self):
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
    def test_empty_sections_count_as_missing(self, key, value):
        assert read({key: value}) == read({})

    def test_the_default_decoder_computes(self, tmp_path):
        """The published class cannot build its own default."""
        values = {"architectures": ["Apriel2ForCausalLM"], "hidden_size": 64, "vocab_size": VOCAB}
        model = load_model(open_checkpoint(checkpoint(tmp_path, values)))
        assert len(model.model.layers) == 32
        assert plain_logits(model, torch.arange(5)[None]).isfinite().all()

    def test_token_ids_come_from_the_file_or_the_defaults(self):
        values = fixed(ATTENTION)
        assert (read(values).bos_token_id, read(values).eos_token_ids) == (1, (2,))
        other = read(values | {"bos_token_id": 0, "eos_token_id": [7, 9], "pad_token_id": 3})
        assert (other.bos_token_id, other.eos_token_ids) == (0, (7, 9))

    def test_the_default_epsilon_of_the_head_is_1e_5(self):
        values = fixed(ATTENTION)
        for head in ({"normalization": {}}, {"normalization": None}, {"normalization": {"type": "rms_norm"}}):
            assert read(values | {"head": head}).norm == NormConfig(eps=1e-5)
        assert read(values | {"head": {"normalization": {"epsilon": 1e-3}}}).norm == NormConfig(eps=1e-3)

    def test_missing_parts_of_a_block_get_their_default_type(self):
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
        """The epsilon is 1e-5, as in training; the published vLLM code uses 1e-6."""
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

    def test_contradicting_state_sizes_are_rejected(self):
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
    def test_missing_keys_without_default_are_named(self, values, path, key):
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
    def test_unknown_keys_are_named_with_their_section(self, values, path):
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

    def test_keys_for_training_are_ignored_silently(self):
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


class TestPattern:
    def test_a_pattern_is_repeated(self):
        names = ["kda", "attention", "gdn"]
        kinds = {"kda": KimiDeltaConfig, "attention": AttentionConfig, "gdn": GatedDeltaNetConfig}
        layers = read(pattern(names, layers=8)).layers
        assert [type(layer.mixer) for layer in layers] == [kinds[names[index % 3]] for index in range(8)]
        cut = read(pattern(names) | {"decoder": pattern(names)["decoder"] | {"num_blocks": 2}}).layers
        assert cut == layers[:2]

    def test_one_block_is_a_fixed_decoder(self):
        assert read(pattern(["gdn"], layers=3)) == read(fixed(MIXERS["gdn"], layers=3))

    def test_the_default_decoder_type_is_fixed(self):
        for kind in (DROP, None):
            assert read(changed(fixed(ATTENTION), ("decoder",), type=kind)) == read(fixed(ATTENTION))

    def test_unused_blocks_are_not_read(self):
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


class TestLength:
    """2048 is the default of the config class."""

    @pytest.mark.parametrize("embeddings", [None, {}, {"max_position_embeddings": 2048}])
    def test_a_length_of_2048_is_no_limit(self, embeddings):
        model = read(fixed(ATTENTION) | {"embeddings": embeddings})
        assert EngineOptions(model="x").resolve_length(model) == 2048
        assert EngineOptions(model="x", max_model_len=5000).resolve_length(model) == 5000

    def test_other_lengths_are_limits(self):
        model = read(fixed(ATTENTION) | {"embeddings": {"max_position_embeddings": 4096}})
        assert EngineOptions(model="x").resolve_length(model) == 4096
        assert EngineOptions(model="x", max_model_len=4096).resolve_length(model) == 4096
        with pytest.raises(ConfigError, match=r"^max_model_len=4097: the model supports at most 4096$"):
            EngineOptions(model="x", max_model_len=4097).resolve_length(model)

    def test_a_top_level_length_is_used_if_embeddings_have_none(self):
        for embeddings in (None, {}, {"type": "absolute"}):
            values = fixed(ATTENTION) | {"max_position_embeddings": 4096, "embeddings": embeddings}
            assert read(values).max_position_embeddings == 4096
        both = {"max_position_embeddings": 8192, "embeddings": {"max_position_embeddings": 4096}}
        assert read(fixed(ATTENTION) | both).max_position_embeddings == 4096

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
    """Multimodal names are included: their text part is supported."""
    vision = {"vision_encoder": {"hidden_size": 8}, "image_token_index": 5, "projector_hidden_act": "gelu"}
    values = fixed(ATTENTION) | vision | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    opened = open_checkpoint(tmp_path)
    assert opened.architecture is Apriel2ForCausalLM.description
    assert opened.read_config() == read(fixed(ATTENTION))
    assert resolve_architecture("apriel2") is resolve_architecture("apriel2_text") is Apriel2ForCausalLM


def test_a_block_is_shared_by_the_layers_that_have_it():
    """Layers with the same block get equal configs, by which an engine groups layers."""
    layers = read(pattern(["gdn", "all"], {"gdn": MIXERS["gdn"], "all": SUPERNET}, layers=4)).layers
    assert layers[0] == layers[2] != layers[1] == layers[3]
