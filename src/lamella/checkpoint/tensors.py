"""Sources of a checkpoint's tensors: safetensors files, PyTorch files, or a lingua `.pth` file.

PyTorch files are loaded with `weights_only=True`, so no pickled code is executed.
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
    """Source of named tensors, which are read one at a time."""

    def opened(self) -> Any:
        """Return a context manager that opens the files and yields an `OpenTensors`."""
        ...


class OpenTensors(Protocol):
    """Tensors of opened files."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor, without reading it."""
        ...

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read a tensor, or only the parts of its leading dimensions that `splits` select."""
        ...


class SafetensorsFolder:
    """Safetensors files of a folder that contain the model, see `find_weights`."""

    def __init__(
        self, folder: Path, own: Callable[[str], str | None] = str, part: str | None = "the language model"
    ) -> None:
        """Make a source; no file is opened.

        Args:
            folder: of the files.
            own: returns the architecture's name of a tensor of the files, or None for a tensor of another part of a
                larger model, which is not read.
            part: name of the part of the model that is read, for one log message about tensors that are not read; None:
                no message.
        """
        self.folder = folder
        self._view = _View(folder, own, part)

    @cached_property
    def found(self) -> WeightFiles:
        """Files of the model, chosen on first use."""
        return find_weights(self.folder)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Open the files, and yield their tensors by the architecture's names."""
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for file in self.found.files:
                try:
                    handle = stack.enter_context(safe_open(str(file), framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise unreadable_safetensors(file, error) from error
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                    if name in handles:
                        raise _duplicate_error(file, name)
                    handles[name] = handle
            yield _Handles(handles, self._view.names(handles, self.found))


class TorchFolder:
    """PyTorch files of a folder that contain the model, see `find_weights`; otherwise like `SafetensorsFolder`."""

    def __init__(self, folder: Path, own: Callable[[str], str | None] = str) -> None:
        self.folder = folder
        self._view = _View(folder, own, "the language model")

    @cached_property
    def found(self) -> WeightFiles:
        """Files of the model, chosen on first use."""
        return find_weights(self.folder, TORCH)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Map the files into memory, and yield their tensors by the architecture's names."""
        tensors: dict[str, Tensor] = {}
        for file in self.found.files:
            for name, tensor in _state_dict(file).items():
                if name in tensors:
                    raise _duplicate_error(file, name)
                tensors[name] = tensor
        names = self._view.names(tensors, self.found)
        yield _Tensors({known: tensors[name] for known, name in names.items()})


class TorchFile:
    """State dict of lingua in a `.pth` file, either the whole file or under the key `model`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._view = _View(file.parent, str, None, lingua=True)

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Map the file into memory, and yield its tensors."""
        tensors = _state_dict(self.file)
        names = self._view.names(tensors)
        yield _Tensors({known: tensors[name] for known, name in names.items()})


# Tensors that an index may list although no file contains them: a tied head, and RoPE frequencies.
_DISPENSABLE = ("lm_head.weight", "rotary_emb.inv_freq")


class _View:
    """Maps names of tensors in the files to the architecture's names, and logs once which tensors are not read."""

    def __init__(
        self,
        folder: Path,
        own: Callable[[str], str | None],
        part: str | None,
        lingua: bool = False,
    ) -> None:
        self._folder, self._own, self._part, self._lingua = folder, own, part, lingua
        self._has_reported = False

    def names(self, present: Collection[str], files: WeightFiles | None = None) -> dict[str, str]:
        """Return the name in the files of each tensor by its architecture's name.

        Raises:
            CheckpointError: two tensors have the same name, or a tensor of the index is in no file.
        """
        if self._part is None and not self._lingua:  # parts of a larger model have no common prefix to replace
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
        if self._has_reported or self._part is None:
            return
        self._has_reported = True
        if unread := sorted(present - set(names.values())):
            logger.info("%s: not read for %s: %s", self._folder, self._part, listed(unread, 3))
        if files.skipped:
            logger.info("%s: not part of the model, not read: %s", self._folder, listed(files.skipped, 8))
        if prefix is not None:
            logger.info("%s: tensors' names start with %r in place of 'model.'", self._folder, prefix)
        if absent := sorted(files.indexed - present):
            logger.info("%s: in the index, and in no file: %s", self._folder, listed(absent, 3))


def open_weights(folder: Path, own: Callable[[str], str | None] = str) -> TensorSource:
    """Return the weights of a Hugging Face folder: safetensors files, or PyTorch files if there are none."""
    if not has_weights(folder) and has_weights(folder, TORCH):
        return TorchFolder(folder, own)
    return SafetensorsFolder(folder, own)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch file: its content, or the state dict that trainers store in it under a key."""
    try:
        state = _load_torch(file)
    except Exception as error:  # torch.load raises many types, for example of zipfile and pickle
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unreadable_torch(file, reason) from error
    if isinstance(state, dict):
        inner = next((key for key in ("model", "state_dict", "module") if isinstance(state.get(key), dict)), None)
        state = state[inner] if inner is not None else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: not a state dict; save the model's state_dict()")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{file}: {name} is not a dense tensor with data; save dense tensors, as safetensors")
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
        # Files in the format before torch 1.6 cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True)


def _duplicate_error(file: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name} is in another file of {file.parent}, too; delete one of them")


class _Handles:
    """`OpenTensors` of safetensors files."""

    def __init__(self, handles: dict[str, Any], names: dict[str, str]) -> None:
        self._handles, self._names = handles, names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._names[name]
        return tuple(self._handles[stored].get_slice(stored).get_shape())

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        stored = self._names[name]
        if all(split == Split.whole(split.full) for split in splits):
            return self._handles[stored].get_tensor(stored)
        return shard_tensor(self._handles[stored].get_slice(stored), splits)


class _Tensors:
    """`OpenTensors` of tensors that are mapped into memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        return shard_tensor(self._tensors[name], splits)
