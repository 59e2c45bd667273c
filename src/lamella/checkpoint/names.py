"""What each parameter is called in a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lamella.layers.parameters import LoadFunction, SeparateTensor, layout_of
from lamella.models.names import rename
from lamella.parallel.sharding import Split


@dataclass(frozen=True)
class Target:
    """Where one tensor of a file goes: rows [start, stop) of a parameter, all of it where they are None.

    `parameter` may be a part of one. `splits` say of its leading dimensions what of the tensor goes there; the others
    go whole. `load` is the parameter's own way to be filled, see `ParameterLayout`.
    """

    parameter: Tensor
    path: str
    splits: tuple[Split, ...] = ()
    start: int | None = None
    stop: int | None = None
    load: LoadFunction | None = None

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
            yield Target(place[index:stop], self.path, (split, *others), load=self.load)


def targets(model: nn.Module, names: Mapping[str, str], present: Collection[str] = ()) -> dict[str, Target]:
    """Return every tensor that a checkpoint of `model` holds, by its name in the file. A tied parameter is in it once.

    Args:
        model: its modules state the layouts of their parameters, see `ParameterLayout`.
        names: see `Architecture.checkpoint_names`.
        present: names in the files. If any tensor that files may hold in place of a parameter is among them, and the
            parameter itself is not, these tensors are returned in its place.
    """
    modules, present = dict(model.named_modules()), set(present)
    found: dict[str, Target] = {}
    for path, parameter in model.named_parameters():
        owner, _, leaf = path.rpartition(".")
        layout = layout_of(modules[owner], leaf)
        if layout.separate is not None and present and rename(path, names) not in present:
            separate = {f"{owner}.{name}": part for name, part in layout.separate(parameter).items()}
            if any(rename(name, names) in present for name in separate):
                found |= {
                    rename(name, names): Target(part.target, name, part.splits) for name, part in separate.items()
                }
                continue
        parent = owner.rpartition(".")[0]
        for part, splits, start, stop in layout.tensors():
            own = path if part is None else f"{parent}.{part}.{leaf}"
            found[rename(own, names)] = Target(parameter, own, splits, start, stop, layout.load)
    return found


def separate_tensors(model: nn.Module) -> Iterator[tuple[str, str, SeparateTensor]]:
    """Yield the tensors that some files hold in place of a parameter: its path, the tensor's path, and its place."""
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            separate = layout_of(module, leaf).separate
            if separate is not None:
                yield from ((f"{owner}.{leaf}", f"{owner}.{name}", part) for name, part in separate(parameter).items())
