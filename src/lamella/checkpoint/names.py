"""Mapping of parameters to tensors of checkpoint files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lamella.layers.parameters import LoadFunction, SeparateTensor, layout_of
from lamella.models.names import rename
from lamella.parallel.sharding import Split


@dataclass(frozen=True)
class Target:
    """Destination of one tensor of a file: rows [start, stop) of a parameter.

    Attributes:
        parameter: a parameter, or a slice of one.
        path: dotted path of the tensor in the model.
        splits: parts of the tensor's leading dimensions that belong to this rank; further dimensions are not divided.
        start: first row; None for all rows.
        stop: row after the last one; None for all rows.
        load: fills the parameter itself, see `ParameterLayout`; None: copy.
    """

    parameter: Tensor
    path: str
    splits: tuple[Split, ...] = ()
    start: int | None = None
    stop: int | None = None
    load: LoadFunction | None = None

    @property
    def destination(self) -> Tensor:
        """Slice of the parameter that the tensor, or this rank's shard of it, fills."""
        return self.parameter[self.start : self.stop]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the file."""
        return (*(split.full for split in self.splits), *self.destination.shape[len(self.splits) :])

    def pieces(self, nbytes: int) -> Iterator[Target]:
        """Divide the target along the first dimension into pieces of at most `nbytes` bytes, or of one row."""
        destination = self.destination
        first, *others = self.splits or (Split.whole(destination.shape[0]),)
        if destination.nbytes <= nbytes or len(first.spans) > 1:
            yield self
            return
        (start, _), *_ = first.spans
        step = max(1, nbytes * first.size // destination.nbytes)
        for index in range(0, first.size, step):
            stop = min(index + step, first.size)
            split = Split(first.full, ((start + index, start + stop),))
            yield Target(destination[index:stop], self.path, (split, *others), load=self.load)


def targets(model: nn.Module, names: Mapping[str, str], present: Collection[str] = ()) -> dict[str, Target]:
    """Return the targets of all tensors of a checkpoint, by their names in the files. A tied parameter occurs once.

    Args:
        model: its modules declare the layouts of their parameters, see `ParameterLayout`.
        names: see `Architecture.checkpoint_names`.
        present: names in the files. If the files have separate tensors instead of a parameter, see
            `ParameterLayout.separate`, these are returned instead of the parameter.
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
    """Yield (path of a parameter, path of a tensor, tensor) for tensors that files may have instead of parameters."""
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            separate = layout_of(module, leaf).separate
            if separate is not None:
                yield from ((f"{owner}.{leaf}", f"{owner}.{name}", part) for name, part in separate(parameter).items())
