"""Mapping from lamella's parameter paths to the tensor names of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

# lamella's path components -> those of transformers' Llama, which most architectures share.
LLAMA_NAMES: Mapping[str, str] = {
    "mixer": "self_attn",
    "feed_forward": "mlp",
    "mixer_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
# lamella's merged modules -> the projections of a file that they contain.
PACKED_MODULES: Mapping[str, Sequence[str]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


def rename(path: str, names: Mapping[str, str]) -> str:
    """Return `path` with each run of components that is a key of `names` replaced by its value; longer keys win."""
    parts, keys = path.split("."), {tuple(key.split(".")): value for key, value in names.items()}
    longest = max(map(len, keys), default=0)
    renamed: list[str] = []
    index = 0
    while index < len(parts):
        for length in range(longest, 0, -1):
            value = keys.get(tuple(parts[index : index + length]))
            if value is not None:
                renamed.append(value)
                index += length
                break
        else:
            renamed.append(parts[index])
            index += 1
    return ".".join(renamed)


def shard_ids(packed: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str | int]]:
    """Invert a packed mapping: "q_proj" -> ("qkv_proj", "q"), "up_proj" -> ("gate_up_proj", 1)."""

    def entries() -> Iterator[tuple[str, tuple[str, str | int]]]:
        for merged, parts in packed.items():
            letters = merged == "qkv_proj"
            for index, part in enumerate(parts):
                yield part, (merged, part.removesuffix("_proj") if letters else index)

    found: dict[str, tuple[str, str | int]] = {}
    for part, entry in entries():
        found.setdefault(part, entry)
    return found
