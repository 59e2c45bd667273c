"""Shards and computations of all ranks in one process; together they equal the model of one rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import canon_checkpoint, canon_config, randomize
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.loader import fill
from lamella.checkpoint.names import targets
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.layers.state_modules import find_state_modules
from lamella.models import resolve_architecture
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition, Split, shard_tensor

pytestmark = pytest.mark.unit


class Table:
    """Exchange of tensors between ranks that are threads of one process."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.places: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.places[rank] = x
        self.barrier.wait()
        every = [place.clone() for place in self.places]
        self.barrier.wait()
        return every


class ThreadGroup(Group):
    def __init__(self, rank: int, table: Table) -> None:
        super().__init__(Partition(rank, len(table.places)))
        self._table = table

    def all_reduce(self, x):
        return torch.stack(self._table.exchange(self.partition.rank, x)).sum(0)

    def all_gather(self, x):
        return torch.cat(self._table.exchange(self.partition.rank, x), -1)


def ranks(size: int) -> list[ThreadGroup]:
    table = Table(size)
    return [ThreadGroup(rank, table) for rank in range(size)]


def llama(**changes):
    values = canon_config(**changes) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {key: value for key, value in values.items() if "canon" not in key and key != "qk_norm"}


def qwen(**changes):
    return llama(**changes) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def llama4(intermediate_size, num_hidden_layers, mlp_bias=None, **changes):
    """Return a model with an expert layer and a dense layer, one of them with attention chunks."""
    return llama(**changes) | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_hidden_layers": 2,
        "intermediate_size": intermediate_size,
        "intermediate_size_mlp": 2 * intermediate_size,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "moe_layers": [0],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 4,
    }


def logits(model, ids):
    with torch.inference_mode():
        return model.compute_logits(model(ids))


def split_logits(parts, ids):
    with ThreadPoolExecutor(len(parts)) as pool:
        # Each thread with what is set here, such as the portable kernels of unit tests.
        return list(
            pool.map(lambda part, context: context.run(logits, part, ids), parts, [copy_context() for _ in parts])
        )


class Source:
    """Reader of a model's tensors that counts the elements that are read."""

    def __init__(self, model, names):
        self.tensors = {name: target.destination.detach() for name, target in targets(model, names).items()}
        self.read = 0

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def load(self, name, splits=()):
        part = shard_tensor(self.tensors[name], splits)
        self.read += part.numel()
        return part


def divided(config, size, seed=0):
    """Return a whole model, and the shards that ranks load."""
    architecture = resolve_architecture(config["architectures"][0])
    whole = architecture.from_config(config)
    randomize(whole, seed)
    parts = []
    for group in ranks(size):
        part = architecture.allocate(whole.config, LocalKit(group=group))
        for parameter in part.parameters():
            parameter.data.fill_(torch.nan)
        source = Source(whole, {})
        fill(part, FakeCheckpoint(architecture.description), source)
        # No tensor is read beyond what the rank keeps.
        assert source.read == sum(parameter.numel() for parameter in part.parameters())
        assert not any(parameter.isnan().any() for parameter in part.parameters())
        parts.append(part.eval())
    return whole.eval(), parts


class FakeCheckpoint:
    path, names, tied_head = "memory", {}, "lm_head.weight"

    def __init__(self, architecture):
        self.architecture = architecture


@st.composite
def configs(draw):
    size = draw(st.sampled_from([2, 3, 4]))
    kv_heads = draw(st.sampled_from([1, size, 2 * size]))
    changes = dict(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if kv_heads * n % size == 0])),
        head_dim=draw(st.sampled_from([4, 8])),
        intermediate_size=size * draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(40, 50)),
        num_hidden_layers=1,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )
    family = draw(st.sampled_from([llama, qwen, canon_config, llama4]))
    if family is canon_config:
        letters = draw(st.sets(st.sampled_from("ABCD")))
        changes |= dict(
            canon_set="".join(sorted(letters)),
            canon_bias=draw(st.booleans()),
            canon_activation=draw(st.booleans()),
            qk_norm=draw(st.booleans()),
        )
    if family is not qwen:
        changes["mlp_bias"] = draw(st.booleans())
    return size, family(**changes)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_sharded_ranks_compute_the_logits_of_one_rank(case):
    size, config = case
    whole, parts = divided(config, size)
    ids = torch.arange(30).view(2, 15) % config["vocab_size"]
    expected = logits(whole, ids)
    for ours in split_logits(parts, ids):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(configs(), st.integers(0, 3))
def test_every_weight_is_held_by_the_expected_number_of_ranks(case, seed):
    """Together the ranks cover every tensor; only key/value heads are replicated, if there are too few."""
    size, config = case
    whole, parts = divided(config, size, seed)
    kept = [targets(part, {}) for part in parts]
    for name, target in targets(whole, {}).items():
        held = torch.zeros(target.destination.shape)
        for rank in kept:
            mine = rank[name]
            assert mine.shape == target.shape
            at = shard_tensor(torch.arange(held.numel()).view(held.shape), mine.splits).flatten()
            assert torch.equal(mine.destination.flatten(), target.destination.flatten()[at])
            held.view(-1)[at] += 1
        copies = max(1, size // config["num_key_value_heads"])
        if all(split == Split.whole(split.full) for split in kept[0][name].splits):
            assert (held == size).all(), name
        elif "mixer.canon." in name:
            assert (held.min(), held.max()) == (1, copies)
        else:
            assert (held == (copies if "k_" in name or "v_" in name else 1)).all(), name


def test_state_is_sharded():
    config = canon_config(num_attention_heads=4, num_key_value_heads=1, qk_norm=True)
    whole, parts = divided(config, 2)
    for one, first, second in zip(*map(find_state_modules, (whole, *parts)), strict=True):
        assert first.specs == second.specs
        (whole_spec,), (spec,) = one.specs, first.specs
        if hasattr(spec, "kv_heads"):
            assert (whole_spec.kv_heads, spec.kv_heads) == (1, 1)
        else:
            # A and C whole; B's queries by half, its one key and value head on both; D by half.
            hidden, inside = config["hidden_size"], config["intermediate_size"]
            assert whole_spec.shape[1] == 2 * hidden + 6 * 16 + 2 * inside
            assert spec.shape[1] == 2 * hidden + 4 * 16 + inside


def test_a_canon_shard_contains_the_channels_of_its_heads():
    (first, second) = (
        Split.join((partition.heads(4).times(2), partition.kv_heads(1).times(2), partition.kv_heads(1).times(2)))
        for partition in (Partition(0, 2), Partition(1, 2))
    )
    assert (first.spans, second.spans) == (((0, 4), (8, 12)), ((4, 12),))
    assert first.full == second.full == 12 and first.size == second.size == 8


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1, "canon_bias": True}])
def test_dummy_weights_of_ranks_are_shards_of_one_model(tmp_path, size, changes):
    checkpoint = open_checkpoint(canon_checkpoint(tmp_path, vocab_size=50, qk_norm=True, **changes))
    whole = targets(load_model(checkpoint, load_format="dummy", seed=3), {})
    for group in ranks(size):
        part = targets(load_model(checkpoint, load_format="dummy", seed=3, group=group), {})
        assert part.keys() == whole.keys()
        for name, target in part.items():
            assert torch.equal(target.destination, shard_tensor(whole[name].destination, target.splits)), name


def test_shards_are_read_from_both_kinds_of_files(tmp_path):
    full = torch.arange(24.0).view(6, 4)
    splits = (Split(6, ((0, 1), (3, 5))), Split(4, ((2, 4),)))
    expected = full[[0, 3, 4], 2:]
    from safetensors.torch import save_file

    from lamella.checkpoint.tensors import SafetensorsFolder, TorchFile

    save_file({"x": full}, tmp_path / "model.safetensors")
    torch.save({"x": full}, tmp_path / "x.pth")
    for source in (SafetensorsFolder(tmp_path), TorchFile(tmp_path / "x.pth")):
        with source.opened() as tensors:
            assert torch.equal(tensors.load("x", splits), expected)
            assert torch.equal(tensors.load("x"), full)
            assert torch.equal(tensors.load("x", (Split.whole(6),)), full)
            assert tensors.shape("x") == (6, 4)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"num_attention_heads": 6}, 4, "num_attention_heads=6: must be divisible by tensor_parallel_size=4"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            "num_key_value_heads=6: must divide tensor_parallel_size=4, or be divisible by it",
        ),
        ({"intermediate_size": 51}, 2, "intermediate_size=51: must be divisible by tensor_parallel_size=2"),
        ({"vocab_size": 5, "num_attention_heads": 4}, 4, "vocab_size=5: too small for tensor_parallel_size=4"),
    ],
)
def test_models_that_cannot_be_sharded_are_rejected(changes, size, message):
    architecture = resolve_architecture("LlamaCanonForCausalLM")
    config = architecture.from_config(canon_config(**changes)).config
    with pytest.raises(ConfigError) as error:
        architecture.allocate(config, LocalKit(device="meta", group=ranks(size)[0]))
    assert str(error.value) == message


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def resolve(**options):
        return EngineOptions(model="x", **options).resolve_device()

    assert resolve(tensor_parallel_size=2) == resolve(device="cuda", tensor_parallel_size=2) == torch.device("cuda", 0)
    assert resolve(device="cpu", tensor_parallel_size=8) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^tensor_parallel_size=4: this host has 2 CUDA devices$"):
        resolve(tensor_parallel_size=4)
    with pytest.raises(ConfigError, match=r"^device='cuda:1': must be cuda or cpu with tensor_parallel_size=2$"):
        resolve(device="cuda:1", tensor_parallel_size=2)


@pytest.mark.parametrize(("full", "size"), [(5, 3), (7, 4), (8, 4), (9, 4), (11, 5), (5, 5)])
def test_nearly_even_shards_cover_everything_once(full, size):
    splits = [Partition(rank, size).nearly_even(full, "experts") for rank in range(size)]
    held = [index for split in splits for start, stop in split.spans for index in range(start, stop)]
    assert held == list(range(full))
    assert {split.size for split in splits} <= {full // size, full // size + 1}
