"""What each parameter is called in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lamella.layers.linear import MergedLinear


@dataclass(frozen=True)
class Target:
    """Where one tensor of a file goes: rows [start, stop) of a parameter, all of it where they are None."""

    parameter: nn.Parameter
    path: str
    start: int | None = None
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(self.parameter.shape)
        return whole if self.start is None or self.stop is None else (self.stop - self.start, *whole[1:])


def rename(path: str, names: Mapping[str, str]) -> str:
    """`path` with each run of components that is a key of `names` replaced; longer keys win."""
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


def targets(model: nn.Module, names: Mapping[str, str]) -> dict[str, Target]:
    """Every tensor that a checkpoint of `model` holds, by its name in the file. A tied parameter stands once."""
    modules = dict(model.named_modules())
    found: dict[str, Target] = {}
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = modules[owner]
        if not isinstance(module, MergedLinear):
            found[rename(path, names)] = Target(parameter, path)
            continue
        parent, start = owner.rpartition(".")[0], 0
        for part, size in module.parts.items():
            part_path = f"{parent}.{part}.{leaf}"
            found[rename(part_path, names)] = Target(parameter, part_path, start, start + size)
            start += size
    return found
