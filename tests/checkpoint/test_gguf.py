"""GGUF files: config, tensors, tokenizer and chat template, compared with the original Hugging Face models."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("gguf")

import gguf
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gguf_files import dequantized, random_state, write
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.convert import convert
from lamella.checkpoint.gguf.file import open_gguf
from lamella.checkpoint.gguf.tokenizer import read_tokenizer
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import CheckpointError, ConfigError

SIZE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
IDS = torch.arange(1, 41)[None] % 96
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZE, **changes)).eval()


def qwen(**changes):
    return Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=32, **changes)).eval()


def logits(source, **options):
    model = load_model(open_checkpoint(source, **options), "float32", torch.device("cpu"))
    with torch.inference_mode():
        return model.compute_logits(model(IDS))


def check(model, path, kind="F32", **options):
    model.load_state_dict(dequantized(model.state_dict(), kind))
    with torch.inference_mode():
        expected = model(IDS).logits
    torch.testing.assert_close(logits(path, **options), expected, rtol=2e-4, atol=2e-4)


class TestTensors:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_quantizable_types(self, tmp_path, kind):
        model = llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model), kind=kind)
        check(model, path, kind)

    @pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"])
    def test_all_dequantizable_types(self, tmp_path, kind):
        quantized = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[quantized]
        generator = torch.Generator().manual_seed(1)
        data = torch.randint(0, 256, (6, 512 // block * size), generator=generator, dtype=torch.uint8).numpy()
        expected = torch.from_numpy(gguf.quants.dequantize(data, quantized))
        import numpy as np

        from lamella.checkpoint.gguf.file import dequantize

        found = dequantize(tmp_path, "x", data, quantized, np.array([4, 1]), (512,))
        torch.testing.assert_close(found, expected[[4, 1]], equal_nan=True)

    @pytest.mark.parametrize("tied", [True, False])
    def test_qwen3_rows_are_not_reordered(self, tmp_path, tied):
        model = qwen(tie_word_embeddings=tied)
        check(model, write(tmp_path / "m.gguf", model.config, random_state(model), "qwen3"))

    def test_query_and_key_biases_are_reordered(self, tmp_path):
        model = llama(attention_bias=True, mlp_bias=True)
        check(model, write(tmp_path / "m.gguf", model.config, random_state(model)))

    def test_llama4_with_experts(self, tmp_path):
        config = Llama4TextConfig(
            **SIZE, head_dim=16, intermediate_size_mlp=160, num_local_experts=4, num_experts_per_tok=1,
            interleave_moe_layer_step=2, attention_chunk_size=8192, attn_temperature_tuning=True, use_qk_norm=True,
            no_rope_layers=[1, 1], pad_token_id=0,
        )  # fmt: skip
        model = Llama4ForCausalLM(config).eval()
        more = {
            "llama4.expert_count": 4,
            "llama4.expert_used_count": 1,
            "llama4.expert_feed_forward_length": SIZE["intermediate_size"],
            "llama4.interleave_moe_layer_step": 2,
        }
        state = random_state(model)
        path = write(tmp_path / "m.gguf", config, state, "llama4", metadata=more)
        check(model, path)

    def test_split_model_opens_from_any_file(self, tmp_path):
        model = llama()
        first = write(tmp_path / "m.gguf", model.config, random_state(model), shards=3)
        check(model, first)
        check(model, first.with_name("m-00003-of-00003.gguf"))
        check(model, tmp_path)
        (tmp_path / "other").mkdir()
        first = write(tmp_path / "other" / "m.gguf", model.config, model.state_dict(), shards=3)
        first.with_name("m-00002-of-00003.gguf").unlink()
        with pytest.raises(CheckpointError, match=r"of 3 files m-00002-of-00003\.gguf are missing"):
            open_checkpoint(first)

    def test_only_rows_of_the_rank_are_read(self, tmp_path):
        model = llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model), kind="Q8_0")
        one = LLM(path, device="cpu", dtype="float32", num_blocks=16)
        two = LLM(path, device="cpu", dtype="float32", num_blocks=16, tensor_parallel_size=2)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        prompt = {"prompt_token_ids": [5, 6, 7]}
        found = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for llm in (one, two)]
        two.engine.close()
        assert found[0] == found[1]


class TestConfig:
    def read(self, tmp_path, architecture="llama", model=None, **options):
        model = model or llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model), architecture, **options)
        return open_checkpoint(path)

    def test_values_equal_the_original_config(self, tmp_path):
        checkpoint = self.read(tmp_path, model=llama(rms_norm_eps=1e-5, rope_theta=5e5))
        assert checkpoint.values["rms_norm_eps"] == 1e-5 and checkpoint.values["torch_dtype"] == "float32"
        assert checkpoint.values["rope_theta"] in (5e5, 10000.0) and checkpoint.values["vocab_size"] == 96

    @pytest.mark.parametrize("base", ["llama3", "other"])
    def test_table_of_rope_factors(self, tmp_path, base):
        scaling = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
        }  # fmt: skip
        if base == "other":
            scaling |= {"low_freq_factor": 2.0, "original_max_position_embeddings": 512}
        model = LlamaForCausalLM(LlamaConfig(**SIZE, head_dim=64, rope_parameters=scaling)).eval()
        plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).double() / 64)
        factors = (plain / model.model.rotary_emb.inv_freq.double()).float()
        path = write(tmp_path / "m.gguf", model.config, random_state(model), more={"rope_freqs.weight": factors})
        kind = open_checkpoint(path).values["rope_scaling"]["rope_type"]
        assert kind == {"llama3": "llama3", "other": "longrope"}[base]
        check(model, path)

    def test_yarn_and_linear(self, tmp_path):
        more = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        checkpoint = self.read(tmp_path, metadata={**more, "llama.rope.scaling.original_context_length": 64})
        scaling = checkpoint.values["rope_scaling"]
        assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        assert self.read(tmp_path, metadata=more).values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            (
                {"architecture": "rwkv7"},
                ConfigError,
                "general.architecture='rwkv7' is not supported: GGUF is read for llama",
            ),
            ({"metadata": {"llama.expert_count": 8}}, ConfigError, "expert_count=8: experts are not supported"),
            ({"metadata": {"llama.attention.sliding_window": 8}}, ConfigError, "sliding_window is not supported"),
            ({"metadata": {"llama.rope.scaling.type": "su"}}, ConfigError, "rope.scaling.type='su' is not supported"),
            (
                {"more": {"blk.0.ssm_a.weight": torch.ones(4)}},
                CheckpointError,
                r"1 tensors have no place .*blk\.0\.ssm_a",
            ),
            ({"more": {"rope_freqs.weight": torch.ones(3)}}, CheckpointError, "has 3 factors, 8 are needed"),
        ],
    )
    def test_unsupported_metadata_raises(self, tmp_path, options, error, said):
        model = llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model), **options)
        with pytest.raises(error, match=said):
            logits(path)

    def test_damaged_files_raise_one_line(self, tmp_path):
        model = llama()
        whole = write(tmp_path / "m.gguf", model.config, random_state(model)).read_bytes()
        for name, content in {
            "short": whole[:100],
            "half": whole[: len(whole) // 2],
            "none": b"GGUF",
            "other": b"x" * 99,
        }.items():
            file = tmp_path / f"{name}.gguf"
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"(cannot be read as GGUF|not a GGUF file).*") as caught:
                logits(file)
            assert "\n" not in str(caught.value)

    def test_a_folder_of_several_models(self, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"2 GGUF models \(a\.gguf, b\.gguf\): give the path of one"):
            open_checkpoint(tmp_path)

    def test_overrides_replace_values(self, tmp_path):
        model = llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model))
        assert open_checkpoint(path, {"rms_norm_eps": 0.5}).read_config().norm.eps == 0.5


TEXTS = [
    "Hello, world! It's 7:30pm on 2024-11-30.\n\n  def f(x):\n\treturn x**2   # na\u00efve \u6771\u4eac \U0001f600",
    "  leading spaces, UPPER lower CamelCase don't we'LL 1234567 \r\n\r\n!!!???\n",
    "<s>special</s> inside <|x|> text",
    "",
]


class TestTokenizer:
    def bpe(self, tmp_path, pre, pattern):
        """Return a byte-level BPE trained on the texts, and a GGUF file with its tables."""
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pattern
        special = ["<s>", "</s>", "<|x|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
        trained.train_from_iterator(TEXTS * 3, trainer)
        trained.decoder = tokenizers.decoders.ByteLevel()
        state = json.loads(trained.to_str())["model"]
        tokens = sorted(state["vocab"], key=state["vocab"].get)
        more = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in state["merges"]],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
        return trained, more

    def file(self, tmp_path, more, **size):
        model = LlamaForCausalLM(LlamaConfig(**{**SIZE, **size}))
        return write(tmp_path / "t.gguf", model.config, random_state(model), metadata=more)

    @pytest.mark.parametrize("pre", ["default", "smollm", "llama-bpe", "qwen2", "tekken", "llama4"])
    def test_pre_tokenizers_equal_the_models_own(self, tmp_path, pre):
        digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel
        llama3 = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        )
        names = {
            "default": byte_level(add_prefix_space=False),
            "smollm": pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)]),
        }
        from lamella.checkpoint.gguf.tokenizer import _PATTERNS

        pattern = llama3 if pre == "llama-bpe" else _PATTERNS.get(pre, "")
        own = names.get(pre) or pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ]
        )
        trained, more = self.bpe(tmp_path, pre, own)
        found = read_tokenizer(open_gguf(self.file(tmp_path, more)))
        for text in TEXTS:
            assert found.encode(text, add_special_tokens=False).ids == trained.encode(text).ids, text
            assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize("bos", [True, False])
    def test_special_tokens_and_templates(self, tmp_path, bos):
        _, more = self.bpe(tmp_path, "default", pre_tokenizers.ByteLevel(add_prefix_space=False))
        more |= {"tokenizer.ggml.add_bos_token": bos, "tokenizer.chat_template": "{{ bos_token }}x"}
        tokenizer = Tokenizer.load(self.file(tmp_path, more, vocab_size=400))
        assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 1)
        assert (tokenizer.encode("a")[0] == 0) is bos
        assert tokenizer.decode(tokenizer.encode("<|x|>a"), skip_special_tokens=True) == "a"
        assert tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "<s>x"

    def test_sentencepiece_tokenizer(self, tmp_path):
        space = "\u2581"
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        pieces += [space, "a", "b", "c", "ab", f"{space}ab", "bc"]
        scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -3.0, -1.0]
        more = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        tokenizer = read_tokenizer(open_gguf(self.file(tmp_path, more)))
        encoded = tokenizer.encode("abc ab\u00e9")
        # "bc" has the best score and is merged first; characters without a piece become bytes.
        assert encoded.tokens == ["<s>", space, "a", "bc", f"{space}ab", "<0xC3>", "<0xA9>"]
        assert tokenizer.decode(encoded.ids) == "abc ab\u00e9"

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not read"),
            ({"tokenizer.ggml.pre": "new"}, "tokenizer.ggml.pre='new' is not known: give the folder"),
            ({"tokenizer.ggml.merges": ["ab"]}, "merges is damaged"),
            ({"tokenizer.ggml.token_type": [1]}, "token_type has not one entry"),
        ],
    )
    def test_unknown_tokenizers_raise(self, tmp_path, changes, said):
        _, more = self.bpe(tmp_path, "default", pre_tokenizers.ByteLevel(add_prefix_space=False))
        with pytest.raises(CheckpointError, match=said):
            Tokenizer.load(self.file(tmp_path, {**more, **changes}))


class TestConvert:
    def test_converted_folder_computes_equal_logits(self, tmp_path):
        maker = TestTokenizer()
        _, more = maker.bpe(tmp_path, "default", pre_tokenizers.ByteLevel(add_prefix_space=False))
        more |= {"tokenizer.chat_template": "t", "tokenizer.ggml.eot_token_id": 2}
        path = maker.file(tmp_path, more, vocab_size=400)
        folder = convert(path, tmp_path / "new", dtype="float32", shard_bytes=50_000)
        assert torch.equal(logits(path), logits(folder)) and len(list(folder.glob("*.safetensors"))) > 1
        hf = LlamaForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            torch.testing.assert_close(hf(IDS).logits, logits(path), rtol=2e-4, atol=2e-4)
        file, written = Tokenizer.load(path), Tokenizer.load(folder)
        assert all(file.encode(text) == written.encode(text) for text in TEXTS)
        assert written.chat_template == "t" and written.eos_token == "</s>"
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 2]

    def test_rope_option_raises_for_gguf(self, tmp_path):
        model = llama()
        path = write(tmp_path / "m.gguf", model.config, random_state(model))
        with pytest.raises(ConfigError, match="must be keep for a GGUF file"):
            convert(path, tmp_path / "new", rope="lingua")
