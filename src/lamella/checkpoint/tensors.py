"""Where a checkpoint's tensors come from: safetensors files, or a lingua `.pth`. Nothing is unpickled as code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.checkpoint.json_file import read_json
from lamella.distributed.sharding import Split, cut
from lamella.errors import CheckpointError

logger = logging.getLogger("lamella")

INDEX = "model.safetensors.index.json"


class TensorSource(Protocol):
    """Named tensors, read one at a time while `opened()`."""

    def opened(self) -> Any:
        """A context manager that gives an `OpenTensors`."""
        ...


class OpenTensors(Protocol):
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; nothing is read."""
        ...

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """The tensor, or what `splits` say of its leading dimensions: no more than that is read."""
        ...


class SafetensorsFolder:
    """All `*.safetensors` of a folder, or those that its index names.

    `own` says what a tensor of the files is called here, or None where it does not belong to `part` and is left aside,
    unread; the log says so once, unless `part` is None.
    """

    def __init__(
        self, folder: Path, own: Callable[[str], str | None] = str, part: str | None = "the language model"
    ) -> None:
        self.folder, self._own, self._part, self._said = folder, own, part, False
        self._indexed: dict[str, str] | None = None
        if (folder / INDEX).is_file():
            self._indexed = read_json(folder / INDEX).get("weight_map")
            if not isinstance(self._indexed, dict) or not all(isinstance(f, str) for f in self._indexed.values()):
                raise CheckpointError(f"{folder / INDEX}: no weight_map of tensors to files")
        files = sorted(set(self._indexed.values())) if self._indexed else [p.name for p in folder.glob("*.safetensors")]
        self.files = [folder / name for name in sorted(files)]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            names: dict[str, str] = {}  # as they are called here -> in the files
            for file in self.files:
                try:
                    handle = stack.enter_context(safe_open(str(file), framework="pt"))
                except SafetensorError as error:
                    raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name in handles:
                        raise CheckpointError(f"{file}: tensor {name} stands in another file of {self.folder} too")
                    handles[name] = handle
                    if (known := self._own(name)) is None:
                        continue
                    if known in names:
                        raise CheckpointError(f"{self.folder}: {name} and {names[known]} are both {known}")
                    names[known] = name
            absent = sorted(set(self._indexed or ()) - set(handles))
            if absent:
                raise CheckpointError(f"{self.folder}: {INDEX} names tensors that no file holds: {_some(absent)}")
            aside = sorted(set(handles) - set(names.values()))
            if aside and self._part and not self._said:
                self._said = True
                listed = _some(aside, 3)
                logger.info("%s: not read for %s: %s", self.folder, self._part, listed)
            yield _Handles(handles, names)


class _Handles:
    def __init__(self, handles: dict[str, Any], names: dict[str, str]) -> None:
        self._handles, self._names = handles, names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        there = self._names[name]
        return tuple(self._handles[there].get_slice(there).get_shape())

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        there = self._names[name]
        if all(split == Split.whole(split.full) for split in splits):
            return self._handles[there].get_tensor(there)
        return cut(self._handles[there].get_slice(there), splits)


class TorchFile:
    """A state dict in a `.pth` file, mapped into memory, under the key `model` or bare."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a dozen types, from zipfile's to pickle's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.file}: not a readable weights-only torch file ({reason})") from error
        state = state.get("model", state) if isinstance(state, dict) else state
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.file}: not a state dict")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if len(tensors) != len(state):
            others = sorted(set(state) - set(tensors))
            raise CheckpointError(f"{self.file}: entries that are not tensors: {_some(others)}")
        yield _Tensors(tensors)


class _Tensors:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        return cut(self._tensors[name], splits)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
