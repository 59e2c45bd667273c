"""Models as plain modules: keyword constructors, `from_config`, `from_pretrained`, forward, logits, training."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config

from helpers import VOCAB, canon_checkpoint, canon_config, hf_checkpoint, plain_logits, randomize
from lamella.errors import CheckpointError, ConfigError
from lamella.models import CausalLM, LlamaCanonForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM
from lamella.models.llama import LLAMA_3_2_ROPE

REQUIRED = inspect.Parameter.empty
QWEN3_SIGNATURE = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "num_heads": REQUIRED,
    "head_dim": None,
    "scale": 1.0,
    "num_kv_heads": None,
    "rms_norm_epsilon": 1e-5,
    "qkv_bias": False,
    "base": 10000,
    "max_position": 16384,
    "intermediate_size": 4096,
    "ffn_bias": True,
    "num_layers": 12,
    "tie_word_embeddings": False,
    "block_size": 256,
}
LLAMA_SIGNATURE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "head_dim": 64,
    "num_qo_heads": 32,
    "num_kv_heads": 8,
    "has_attn_bias": False,
    "rms_norm_epsilon": 1e-5,
    "rope_base": 500000,
    "max_position_embeddings": 131072,
    "intermediate_size": 8192,
    "ffn_bias": False,
    "num_layers": 16,
    "block_size": 256,
    "tie_word_embeddings": True,
    "rope_scaling": LLAMA_3_2_ROPE,
}
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "head_dim": 16, "num_kv_heads": 2, "intermediate_size": 96}
HF_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


MODELS = {
    "llama": lambda: LlamaForCausalLM(**SMALL, num_qo_heads=4, num_layers=2),
    "qwen3": lambda: Qwen3ForCausalLM(**SMALL, num_heads=4, num_layers=2),
    "canon": lambda: LlamaCanonForCausalLM.from_config(canon_config(qk_norm=True)),
}


@pytest.fixture(params=MODELS)
def fresh(request) -> CausalLM:
    return MODELS[request.param]()


@pytest.fixture
def model(fresh) -> CausalLM:
    randomize(fresh, 0)
    return fresh


@pytest.mark.parametrize(
    ("cls", "expected"), [(Qwen3ForCausalLM, QWEN3_SIGNATURE), (LlamaForCausalLM, LLAMA_SIGNATURE)]
)
def test_signatures(cls, expected):
    parameters = inspect.signature(cls).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == expected
    assert list(parameters) == list(expected)
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())


@torch.no_grad()
def test_the_quick_starts_run():
    """Published examples at their real widths, with one layer and few tokens; no process group, no context."""
    assert not torch.distributed.is_initialized()
    qwen3 = Qwen3ForCausalLM(
        vocab_size=1000, hidden_size=2048, num_heads=16, num_kv_heads=8, intermediate_size=6144, num_layers=1
    )
    ids = torch.randint(0, 1000, (1, 64))
    hidden = qwen3(ids)
    assert hidden.shape == (1, 64, 2048)
    assert qwen3.compute_logits(hidden).shape == (1, 64, 1000)
    llama = LlamaForCausalLM(vocab_size=1000, num_layers=1)
    hidden = llama(ids[0, :20])
    assert hidden.shape == (20, 2048)
    logits = llama.compute_logits(hidden)
    assert logits.shape == (20, 1000)
    assert logits.isfinite().all()


def test_the_llama_constructor_is_the_config_of_its_arguments():
    arguments = SMALL | {"num_qo_heads": 4, "num_layers": 3, "has_attn_bias": True, "ffn_bias": True}
    built = LlamaForCausalLM(**arguments, rms_norm_epsilon=1e-4, tie_word_embeddings=False, max_position_embeddings=999)
    read = LlamaForCausalLM.from_config(
        LlamaConfig(
            **HF_SMALL,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-4,
            max_position_embeddings=999,
            rope_parameters=LLAMA_3_2_ROPE | {"rope_theta": 500000.0},
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    assert_same(built, read)


@pytest.mark.parametrize("tied", [False, True])
def test_the_qwen3_constructor_is_the_config_of_its_arguments(tied):
    arguments = SMALL | {"num_heads": 4, "num_layers": 3, "ffn_bias": False, "tie_word_embeddings": tied}
    built = Qwen3ForCausalLM(**arguments, base=1e6, max_position=999)
    read = Qwen3ForCausalLM.from_config(
        Qwen3Config(
            **HF_SMALL,
            rms_norm_eps=1e-5,
            max_position_embeddings=999,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
        )
    )
    assert_same(built, read)


def assert_same(first: CausalLM, second: CausalLM) -> None:
    assert first.config == second.config
    randomize(first, 0)
    assert first.load_state_dict(second.state_dict()) is not None
    ids = torch.randint(0, VOCAB, (2, 33))
    assert torch.equal(plain_logits(first, ids), plain_logits(second, ids))


def test_qwen3_defaults_follow_other_arguments():
    mixer = Qwen3ForCausalLM(VOCAB, 64, 4, num_layers=1, intermediate_size=8, scale=3.0).config.layers[0].mixer
    assert (mixer.head_dim, mixer.num_kv_heads) == (16, 4)
    assert mixer.scale == pytest.approx(3.0 / 16**0.5)


def test_qwen3_biases():
    shape = SMALL | {"num_heads": 4, "num_layers": 1}
    without = {name for name, _ in Qwen3ForCausalLM(**shape, ffn_bias=False).named_parameters()}
    every = {name for name, _ in Qwen3ForCausalLM(**shape, ffn_bias=True, qkv_bias=True).named_parameters()}
    layer = "model.layers.0"
    names = ("mixer.qkv_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj")
    assert every - without == {f"{layer}.{name}.bias" for name in names}
    assert f"{layer}.mixer.q_norm.weight" in without  # queries and keys are normalised whatever the biases


def test_llama_rope_scaling_is_free():
    shape = SMALL | {"num_qo_heads": 4, "num_layers": 1}
    unscaled = LlamaForCausalLM(**shape, rope_scaling=None).config.layers[0].mixer.rope
    assert (unscaled.scaling, unscaled.theta) == (None, 500000.0)
    older = LlamaForCausalLM(**shape, rope_scaling={"type": "linear", "factor": 2}).config.layers[0].mixer.rope
    assert older.scaling.factor == 2.0
    with pytest.raises(ConfigError, match="num_kv_heads=2"):
        LlamaForCausalLM(**shape | {"num_qo_heads": 3})


@torch.no_grad()
def test_forward_shapes_and_row_independence(model):
    ids = torch.randint(0, VOCAB, (3, 17))
    hidden = model(ids)
    size = model.config.hidden_size
    assert hidden.shape == (3, 17, size)
    assert model.compute_logits(hidden).shape == (3, 17, VOCAB)
    for row in range(3):
        alone = model(ids[row])
        assert alone.shape == (17, size)
        torch.testing.assert_close(alone, hidden[row], atol=1e-5, rtol=1e-5)
        # Causal: what comes later changes nothing.
        torch.testing.assert_close(model(ids[row, :5]), alone[:5], atol=1e-5, rtol=1e-5)
        assert model.compute_logits(alone[-1]).shape == (VOCAB,)


@torch.no_grad()
def test_positions_change_the_rotation_only(model):
    ids = torch.randint(0, VOCAB, (2, 9))
    counted = torch.arange(9).expand(2, 9)
    assert torch.equal(model(ids, counted), model(ids))
    torch.testing.assert_close(model(ids, counted + 7), model(ids), atol=1e-4, rtol=1e-4)  # rotation is relative
    assert not torch.allclose(model(ids, counted * 2), model(ids), atol=1e-2)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 2, 3)])
def test_unusable_ids(model, shape):
    with pytest.raises(ValueError, match="input_ids of shape"):
        model(torch.zeros(shape, dtype=torch.long))


def test_packed_modules_mapping(model):
    """Every packed name is a module, and each part is a projection of the file that is not a module here."""
    assert model.packed_modules_mapping == PACKED
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    for packed, parts in model.packed_modules_mapping.items():
        assert list(modules[packed].parts) == parts
        assert not set(parts) & set(modules)


def test_initial_weights(fresh):
    for name, parameter in fresh.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif "canon" in name:
            assert parameter.abs().max() <= 0.5 < 1.1 * parameter.abs().max()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)


def test_from_config_takes_dicts_and_transformers_configs():
    config = Qwen3Config(**HF_SMALL)
    assert Qwen3ForCausalLM.from_config(config).config == Qwen3ForCausalLM.from_config(config.to_dict()).config


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_from_pretrained(tmp_path, dtype):
    hf_checkpoint(tmp_path, LlamaConfig(**HF_SMALL))
    for cls in (LlamaForCausalLM, CausalLM):
        model = cls.from_pretrained(tmp_path, dtype=dtype)
        assert isinstance(model, LlamaForCausalLM)
        assert model.lm_head.weight.dtype == (torch.float32 if dtype == "auto" else dtype)
        assert model.model.norm.weight.dtype == torch.float32
        assert plain_logits(model, torch.arange(9)).dtype == torch.float32
        assert not model.training
    with pytest.raises(CheckpointError, match="holds a LlamaForCausalLM, not a Qwen3ForCausalLM"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)


def test_from_pretrained_canon(tmp_path):
    first = LlamaCanonForCausalLM.from_pretrained(canon_checkpoint(tmp_path, canon_bias=True))
    again = LlamaCanonForCausalLM.from_config(canon_config(canon_bias=True))
    randomize(again, 0)
    assert first.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_training_lowers_the_loss(model):
    """Gradients reach every parameter of a plain forward and lower the loss."""
    ids = torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss() -> torch.Tensor:
        logits = model.compute_logits(model(ids))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert losses == sorted(losses, reverse=True)


def test_gradients_are_those_of_transformers(tmp_path):
    theirs = hf_checkpoint(tmp_path, Qwen3Config(**HF_SMALL))
    ours = Qwen3ForCausalLM.from_pretrained(tmp_path).requires_grad_(True)
    ids = torch.randint(0, VOCAB, (2, 20))
    ours.compute_logits(ours(ids)).logsumexp(-1).sum().backward()
    theirs(ids).logits.logsumexp(-1).sum().backward()
    expected = dict(theirs.named_parameters())
    for index, layer in enumerate(ours.model.layers):
        prefix = f"model.layers.{index}"
        parts = [expected[f"{prefix}.self_attn.{part}_proj.weight"].grad for part in "qkv"]
        pairs = [
            (layer.mixer.qkv_proj.weight, torch.cat(parts)),
            (layer.mixer.q_norm.weight, expected[f"{prefix}.self_attn.q_norm.weight"].grad),
            (layer.mixer_norm.weight, expected[f"{prefix}.input_layernorm.weight"].grad),
            (layer.feed_forward.down_proj.weight, expected[f"{prefix}.mlp.down_proj.weight"].grad),
        ]
        for parameter, gradient in pairs:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-3)
