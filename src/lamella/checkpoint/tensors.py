"""Sources of a checkpoint's tensors: safetensors or PyTorch files, or a lingua `.pth`.

Nothing is unpickled as code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.checkpoint.file_kinds import unreadable_safetensors, unreadable_torch
from lamella.checkpoint.prefixes import canonical_names
from lamella.checkpoint.weight_files import INDEX as INDEX
from lamella.checkpoint.weight_files import TORCH, WeightFiles, find_weights, has_weights
from lamella.errors import CheckpointError
from lamella.parallel.sharding import Split, shard_tensor
from lamella.validation import listed

logger = logging.getLogger("lamella")


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
    """The model's `*.safetensors` of a folder, see `find_weights`.

    `own` says what a tensor of the files is called here, or None where it does not belong to `part` and is left aside,
    unread; the log says so once, unless `part` is None.
    """

    def __init__(
        self, folder: Path, own: Callable[[str], str | None] = str, part: str | None = "the language model"
    ) -> None:
        self.folder = folder
        self._view = _View(folder, own, part)

    @cached_property
    def found(self) -> WeightFiles:
        """The files, chosen when they are first needed."""
        return find_weights(self.folder)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Open the files, and give their tensors by the names that they have here."""
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for file in self.found.files:
                try:
                    handle = stack.enter_context(safe_open(str(file), framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise unreadable_safetensors(file, error) from error
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name in handles:
                        raise _doubled(file, name)
                    handles[name] = handle
            yield _Handles(handles, self._view.names(handles, self.found))


class TorchFolder:
    """The model's `pytorch_model*.bin` of a folder, see `find_weights`; otherwise like `SafetensorsFolder`."""

    def __init__(self, folder: Path, own: Callable[[str], str | None] = str) -> None:
        self.folder = folder
        self._view = _View(folder, own, "the language model")

    @cached_property
    def found(self) -> WeightFiles:
        """The files, chosen when they are first needed."""
        return find_weights(self.folder, TORCH)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Map the files into memory, and give their tensors by the names that they have here."""
        tensors: dict[str, Tensor] = {}
        for file in self.found.files:
            for name, tensor in _state_dict(file).items():
                if name in tensors:
                    raise _doubled(file, name)
                tensors[name] = tensor
        names = self._view.names(tensors, self.found)
        yield _Tensors({known: tensors[name] for known, name in names.items()})


class TorchFile:
    """A state dict of lingua in a `.pth` file, mapped into memory, under the key `model` or bare."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._view = _View(file.parent, str, None, lingua=True)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Map the file into memory, and give its tensors."""
        tensors = _state_dict(self.file)
        names = self._view.names(tensors)
        yield _Tensors({known: tensors[name] for known, name in names.items()})


# What an index may name although no file holds it: a tied head, which is the embedding, and tables of angles.
_DISPENSABLE = ("lm_head.weight", "rotary_emb.inv_freq")


class _View:
    """Names of a source's tensors; logs once what is left aside."""

    def __init__(
        self,
        folder: Path,
        own: Callable[[str], str | None],
        part: str | None,
        lingua: bool = False,
    ) -> None:
        self._folder, self._own, self._part, self._lingua = folder, own, part, lingua
        self._said = False

    def names(self, present: Collection[str], files: WeightFiles | None = None) -> dict[str, str]:
        """Names here -> in the files."""
        if self._part is None and not self._lingua:  # a part of a larger model has names of its own
            canonical, prefix = {name: self._own(name) for name in present}, None
        else:
            canonical, prefix = canonical_names(present, self._own, self._lingua)
        names: dict[str, str] = {}
        for name, known in canonical.items():
            if known is None:
                continue
            if known in names:
                raise CheckpointError(f"{self._folder}: {name} and {names[known]} are both {known}; delete one of them")
            names[known] = name
        files = files or WeightFiles()
        if absent := [name for name in sorted(files.indexed - set(present)) if not name.endswith(_DISPENSABLE)]:
            raise CheckpointError(
                f"{self._folder}: {INDEX} names tensors that no file holds: {listed(absent, 8)}; download the files "
                "again"
            )
        self._report(names, set(present), prefix, files)
        return names

    def _report(self, names: Mapping[str, str], present: set[str], prefix: str | None, files: WeightFiles) -> None:
        if self._said or self._part is None:
            return
        self._said = True
        if aside := sorted(present - set(names.values())):
            logger.info("%s: not read for %s: %s", self._folder, self._part, listed(aside, 3))
        if files.skipped:
            logger.info("%s: not part of the model, not read: %s", self._folder, listed(files.skipped, 8))
        if prefix is not None:
            logger.info("%s: tensors' names start with %r in place of 'model.'", self._folder, prefix)
        if absent := sorted(files.indexed - present):
            logger.info("%s: in the index, and in no file: %s", self._folder, listed(absent, 3))


def open_weights(folder: Path, own: Callable[[str], str | None] = str) -> TensorSource:
    """Return the weights of a Hugging Face folder: safetensors, else PyTorch files."""
    if not has_weights(folder) and has_weights(folder, TORCH):
        return TorchFolder(folder, own)
    return SafetensorsFolder(folder, own)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, bare or under the key that trainers give them."""
    try:
        state = _load_torch(file)
    except Exception as error:  # a dozen types, from zipfile's to pickle's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unreadable_torch(file, reason) from error
    if isinstance(state, dict):
        inner = next((key for key in ("model", "state_dict", "module") if isinstance(state.get(key), dict)), None)
        state = state[inner] if inner is not None else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: not a state dict; save the model's state_dict()")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if len(tensors) != len(state):
        others = sorted(str(name) for name in set(state) - set(tensors))
        raise CheckpointError(
            f"{file}: entries that are not tensors: {listed(others, 8)}; save the model's state_dict()"
        )
    return tensors


def _load_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format before torch 1.6 cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True)


def _doubled(file: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name} stands in another file of {file.parent} too; delete one of them")


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
        return shard_tensor(self._handles[there].get_slice(there), splits)


class _Tensors:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        return shard_tensor(self._tensors[name], splits)
