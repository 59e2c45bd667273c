"""Fuzz of everything that a caller gives: each case ends in success or in one line of a `LamellaError`.

The fast suite runs 2,000 cases, the slow one 50,000, from fixed seeds. A case that takes 60 seconds is a failure, and
so is a process whose memory grows by more than 2 GiB.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import apriel2_models
from helpers import canon_checkpoint, shard
from lamella import LLM, LamellaError, SamplingParams
from lamella.checkpoint import open_checkpoint
from lamella.cli.main import main
from lamella.engine.options import EngineOptions, declared_options
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.layers.local_kit import LocalKit

SECONDS = 60
MEMORY = 2 << 30  # bytes
FAST = {
    "config": 600,
    "params": 200,
    "header": 300,
    "index": 150,
    "tokenizer": 200,
    "sampling": 300,
    "options": 150,
    "cli": 100,
}
assert sum(FAST.values()) == 2000
SLOW = 25  # times as many


def sizes(target: str) -> list[Any]:
    """Parameters of a test: the fast number of cases, and the slow one."""
    return [FAST[target], pytest.param(SLOW * FAST[target], marks=pytest.mark.slow)]


def run(examples: int, strategy: st.SearchStrategy[Any], case: Callable[[Any], None]) -> None:
    """Run `case` on so many drawn inputs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value: Any) -> None:
        with one_line():
            case(value)

    each()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """The block succeeds, or raises one line of a `LamellaError`, within the time limit."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    except LamellaError as error:
        text = str(error)
        assert text and "\n" not in text and text.isprintable(), text
        assert len(text) < 2000, text
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Values that files of strangers hold in place of the right ones.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**12, 10**30, 10**400, 10**6]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=6),
    st.sampled_from(
        ["silu", "gelu", "llama3", "yarn", "full_attention", "\x1b]0;x\x07", "a\nb", "bfloat16", "é" * 3000]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=8) | st.sampled_from(["type", "factor"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, original: Any, most: int = 3) -> Any:
    """A JSON value with some of its parts replaced, removed, doubled or added."""
    found = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, most))):
        at = found
        while True:
            inner = [key for key in keys(at) if isinstance(at[key], dict | list) and at[key]]
            if not inner or draw(st.booleans()):
                break
            at = at[draw(st.sampled_from(inner))]
        names = keys(at)
        if not names:
            continue
        key = draw(st.sampled_from(names))
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "swap"])):
            case "replace":
                at[key] = draw(values)
            case "remove":
                del at[key]
            case "add" if isinstance(at, dict):
                at[draw(st.text(max_size=10))] = draw(values)
            case _:
                at[key] = at[draw(st.sampled_from(names))]
    return found


def keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def dumps(value: Any) -> str:
    return json.dumps(value)  # NaN and Infinity included, as Python writes them


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of several kinds, each with a tokenizer."""
    top = tmp_path_factory.mktemp("models")
    canon_checkpoint(top / "canon", max_position_embeddings=64)
    apriel2_models.checkpoint(
        top / "hybrid", apriel2_models.pattern(["attention", "gdn", "mamba", "sliding_window", "kda"])
    )
    apriel2_models.checkpoint(top / "supernet", apriel2_models.fixed(apriel2_models.SUPERNET, 2))
    base = {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    kinds = {
        "llama": base | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 32},
        },
        "qwen3": base | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 8,
                         "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        "llama4": {
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
            "text_config": base | {
                "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 32, "attention_chunk_size": 16, "no_rope_layers": [1, 0], "use_qk_norm": True,
            },
        },
    }  # fmt: skip
    for name, config in kinds.items():
        (top / name).mkdir()
        (top / name / "config.json").write_text(json.dumps(config))
    for folder in top.iterdir():
        tokenizer = Tokenizers(WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken("w2", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
    return {folder.name: folder for folder in top.iterdir()}


@pytest.fixture
def copied(folders, tmp_path) -> Callable[[str], Path]:
    """Return a folder with links to a model's files, which a test may replace."""

    def copy_of(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for file in folders[name].iterdir():
            (folder / file.name).symlink_to(file)
        return folder

    return copy_of


def replace(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("examples", sizes("config"))
def test_config_files(folders, copied, examples):
    originals = {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}

    def case(drawn: tuple[str, Any]) -> None:
        name, config = drawn
        folder = copied(name)
        replace(folder, "config.json", dumps(config))
        checkpoint = open_checkpoint(folder)
        model_config = checkpoint.read_config()
        if len(model_config.layers) <= 8:
            checkpoint.allocate(model_config, LocalKit(device="meta"))

    drawn = st.sampled_from(sorted(originals)).flatmap(lambda name: st.tuples(st.just(name), changed(originals[name])))
    run(examples, drawn, case)


@pytest.mark.parametrize("examples", sizes("params"))
def test_lingua_params(tmp_path, examples):
    import torch

    original = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 60, "rope_theta": 10000.0,
                  "canon_set": "ABCD", "canon_bias": False, "canon_activation": False, "canon_kernel": 4,
                  "max_seqlen": 64},
        "data": {"seq_len": 64},
    }  # fmt: skip
    torch.save({"model": {}}, tmp_path / "consolidated.pth")

    def case(params: Any) -> None:
        replace(tmp_path, "params.json", dumps(params))
        checkpoint = open_checkpoint(tmp_path)
        config = checkpoint.read_config()
        if len(config.layers) <= 8:
            checkpoint.allocate(config, LocalKit(device="meta"))

    run(examples, changed(original), case)


@pytest.mark.parametrize("examples", sizes("header"))
def test_safetensors_headers(folders, copied, examples):
    data = (folders["canon"] / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    def case(drawn: tuple[Any, int, int]) -> None:
        changed_header, more, cut = drawn
        text = dumps(changed_header).encode("utf-8", "surrogatepass")
        folder = copied("canon")
        replace(
            folder, "model.safetensors", struct.pack("<Q", max(0, len(text) + more)) + text + rest[: len(rest) - cut]
        )
        checkpoint = open_checkpoint(folder)
        checkpoint.read_config()
        with checkpoint.tensors.opened() as tensors:
            for name in tensors.names():
                tensors.load(name)

    more = st.sampled_from([0, 0, 0, 1, -1, 2**40, -(10**6)])
    run(examples, st.tuples(changed(header), more, st.sampled_from([0, 0, 1, 100])), case)


@pytest.mark.parametrize("examples", sizes("index"))
def test_index_files(folders, copied, examples):
    folder = copied("canon")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((folders["canon"] / "model.safetensors").read_bytes())
    shard(folder)
    index = folder / "model.safetensors.index.json"
    original = json.loads(index.read_text())

    def case(changed_index: Any) -> None:
        replace(folder, index.name, dumps(changed_index))
        checkpoint = open_checkpoint(folder)
        checkpoint.read_config()
        with checkpoint.tensors.opened() as tensors:
            tensors.names()

    run(examples, changed(original), case)


@pytest.mark.parametrize("examples", sizes("tokenizer"))
def test_tokenizer_files(folders, copied, examples):
    tokenizer = json.loads((folders["canon"] / "tokenizer.json").read_text())
    settings_file = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1",
        "eos_token": {"content": "w2", "lstrip": False},
        "add_bos_token": True, "added_tokens_decoder": {"2": {"content": "w2", "special": True}},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}", "model_max_length": 64,
    }  # fmt: skip
    files = {
        "tokenizer.json": changed(tokenizer).map(dumps),
        "tokenizer_config.json": changed(settings_file).map(dumps),
        "special_tokens_map.json": changed({"eos_token": "w2", "bos_token": {"content": "w1"}}).map(dumps),
        "chat_template.jinja": st.sampled_from(
            ["{{", "{% for %}", "{{ 1/0 }}", "{{ raise_exception('x') }}", "x" * 99]
        ),
        "generation_config.json": changed({"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 5}).map(dumps),
    }

    def case(drawn: tuple[str, str]) -> None:
        folder = copied("canon")
        if "tokenizer_config.json" not in drawn[0]:
            replace(folder, "tokenizer_config.json", dumps(settings_file))
        replace(folder, *drawn)
        checkpoint = open_checkpoint(folder)
        checkpoint.eos_token_ids(checkpoint.read_config())
        tokenizer = Tokenizer.load(folder)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("w3 w4 unknown"))

    run(examples, st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), files[name])), case)


fields = [name for name in SamplingParams.__dataclass_fields__ if not name.startswith("_")]
prompts = st.one_of(
    st.text(max_size=12),
    st.lists(st.integers(-2, 70), max_size=6).map(lambda ids: {"prompt_token_ids": ids}),
    st.dictionaries(
        st.sampled_from(["prompt", "prompt_token_ids", "cache_salt", "multi_modal_data", "x"]), values, max_size=3
    ),
    values,
)


@pytest.mark.parametrize("examples", sizes("sampling"))
def test_sampling_parameters_and_prompts(folders, examples):
    llm = LLM(folders["canon"], device="cpu", dtype="float32", max_model_len=48, num_blocks=32, max_num_seqs=4)
    right = {"prompt_token_ids": [3, 4, 5]}
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = llm.generate(right, greedy, use_tqdm=False)[0].outputs[0].token_ids

    def case(drawn: tuple[dict[str, Any], Any]) -> None:
        given_fields, prompt = drawn
        params = SamplingParams(**{"max_tokens": 3, **given_fields})
        if params.n is not None and params.n > 8:
            return
        llm.generate(prompt, params, use_tqdm=False)

    run(examples, st.tuples(st.dictionaries(st.sampled_from(fields), values | scalars, max_size=3), prompts), case)
    assert llm.generate(right, greedy, use_tqdm=False)[0].outputs[0].token_ids == expected
    llm.engine.state.check_at_rest()


@pytest.mark.parametrize("examples", sizes("options"))
def test_engine_options(folders, examples):
    names = [name for name in declared_options() if name != "model"]
    small = {"device": "cpu", "num_blocks": 8, "max_num_seqs": 2, "max_model_len": 32}
    remaining = [12]  # engines that are started

    def case(options: dict[str, Any]) -> None:
        read = EngineOptions(model=folders["canon"], **{**small, **options})
        read.resolve_device()
        if remaining[0] and read.tensor_parallel_size == 1 and not read.enable_compile:
            remaining[0] -= 1
            LLM(folders["canon"], **{**small, **options}).engine.close()

    run(examples, st.dictionaries(st.sampled_from(names), values | scalars, max_size=3), case)


@pytest.mark.parametrize("examples", sizes("cli"))
def test_command_lines(folders, examples):
    folder = str(folders["canon"])
    words = st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            "--json --dtype float32 --max-tokens 2 -1 0 1e9 nan --tokens 1,2 --num-blocks 8 --hf-overrides {} [1] "
            '{"vocab_size":null} --temperature --top-k --stop --seed --placement all-gdn --device cpu meta'.split()
        ),
    )

    def case(drawn: tuple[str, list[str]]) -> None:
        command, rest = drawn
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([command, folder, *rest])
            except SystemExit as error:  # argparse
                status = error.code
        assert status in (0, 1, 2), (status, err.getvalue())
        assert "Traceback" not in err.getvalue()

    commands = st.sampled_from(["inspect", "generate", "placement", "convert"])
    run(examples, st.tuples(commands, st.lists(words, max_size=5)), case)
