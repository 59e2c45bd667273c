"""What each parameter is called in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lamella.layers.linear import Apart, splits_of
from lamella.models.names import rename
from lamella.parallel.sharding import Split


@dataclass(frozen=True)
class Target:
    """Where one tensor of a file goes: rows [start, stop) of a parameter, all of it where they are None.

    `parameter` may be a part of one. `splits` say of its leading dimensions what of the tensor goes there; the others
    go whole.
    """

    parameter: Tensor
    path: str
    splits: tuple[Split, ...] = ()
    start: int | None = None
    stop: int | None = None

    @property
    def place(self) -> Tensor:
        """The part of the parameter that the tensor fills, or a rank's part of the tensor."""
        return self.parameter[self.start : self.stop]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return (*(split.full for split in self.splits), *self.place.shape[len(self.splits) :])

    def pieces(self, nbytes: int) -> Iterator[Target]:
        """The same, some of the leading places at a time: as many as `nbytes` of the parameter's hold, one at least."""
        place = self.place
        first, *others = self.splits or (Split.whole(place.shape[0]),)
        if place.nbytes <= nbytes or len(first.spans) > 1:
            yield self
            return
        (start, _), *_ = first.spans
        step = max(1, nbytes * first.size // place.nbytes)
        for index in range(0, first.size, step):
            stop = min(index + step, first.size)
            split = Split(first.full, ((start + index, start + stop),))
            yield Target(place[index:stop], self.path, (split, *others))


def targets(model: nn.Module, names: Mapping[str, str], present: Collection[str] = ()) -> dict[str, Target]:
    """Every tensor that a checkpoint of `model` holds, by its name in the file. A tied parameter stands once.

    Some modules' parameters stand in some files in parts (see `Experts.apart`): these are meant where any of them is
    among the names that are `present`, and the parameter itself is not.
    """
    modules, present = dict(model.named_modules()), set(present)
    found: dict[str, Target] = {}
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = modules[owner]
        splits = splits_of(module, leaf)
        if hasattr(module, "apart") and present and rename(path, names) not in present:
            apart = {f"{owner}.{name}": part for name, part in module.apart(leaf).items()}
            if any(rename(name, names) in present for name in apart):
                found |= {rename(name, names): Target(part.place, name, part.splits) for name, part in apart.items()}
                continue
        parts: Mapping[str, Split] | None = getattr(module, "parts", None)
        if parts is None:
            found[rename(path, names)] = Target(parameter, path, splits)
            continue
        parent, start = owner.rpartition(".")[0], 0
        for part, rows in parts.items():
            part_path, stop = f"{parent}.{part}.{leaf}", start + rows.size
            if leaf == "bias" and part in getattr(module, "unbiased", ()):
                start = stop
                continue
            found[rename(part_path, names)] = Target(parameter, part_path, (rows, *splits[1:]), start, stop)
            start = stop
    return found


def parts_apart(model: nn.Module) -> Iterator[tuple[str, str, Apart]]:
    """What some files hold in place of a parameter: its path, the path of what stands there, and the part it fills."""
    for owner, module in model.named_modules():
        if hasattr(module, "apart"):
            for leaf, _ in module.named_parameters(recurse=False):
                yield from ((f"{owner}.{leaf}", f"{owner}.{name}", part) for name, part in module.apart(leaf).items())
