"""Reader of GGUF models in one or several files: metadata, and tensors that are dequantized on reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lamella.checkpoint.tensors import OpenTensors
from lamella.errors import CheckpointError
from lamella.parallel.sharding import Split, shard_tensor
from lamella.validation import listed

if TYPE_CHECKING:
    import gguf

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_VALUES = 1 << 26  # values that are dequantized at a time


def is_gguf(path: Path) -> bool:
    """Return True if a file starts with the magic number of GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def find_gguf(folder: Path) -> Path | None:
    """Return the first file of the GGUF model in a folder; None if there is none.

    Raises:
        CheckpointError: there are several models.
    """
    firsts = []
    for file in sorted(folder.glob("*.gguf")):
        shard = _SHARD.fullmatch(file.name)
        if (shard is None or int(shard[2]) == 1) and not file.name.startswith("mmproj"):
            firsts.append(file)
    if len(firsts) > 1:
        names = listed([file.name for file in firsts])
        raise CheckpointError(f"{folder}: {len(firsts)} GGUF models ({names}): give the path of one")
    return firsts[0] if firsts else None


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF model. The result is cached until the file changes, since parsing takes seconds."""
    status = path.stat()
    return _opened(path.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _opened(path: Path, changed: int, size: int) -> GgufFile:
    return GgufFile(path)


@dataclass(frozen=True)
class GgufTensor:
    """Source of a tensor of the model.

    Attributes:
        name: in the GGUF file.
        heads: number of heads whose rows llama.cpp has interleaved; None if the rows are not interleaved.
        expert: index of an expert in a tensor of all experts; None for a tensor that is not of experts.
    """

    name: str
    heads: int | None = None
    expert: int | None = None


class GgufFile:
    """GGUF model. A `TensorSource` with Hugging Face's names.

    Attributes:
        path: a file of the model.
    """

    def __init__(self, path: Path) -> None:
        """Make a reader of the model that the file `path` belongs to. Nothing is read yet."""
        self.path = path
        self._names: Callable[[GgufFile], Mapping[str, GgufTensor]] | None = None
        self._lists: dict[str, list[Any]] = {}

    def use_names(self, names: Callable[[GgufFile], Mapping[str, GgufTensor]]) -> None:
        """Set the function that returns the source of each tensor by its Hugging Face name."""
        self._names = names

    @cached_property
    def files(self) -> list[Path]:
        """All files of the model, in order.

        Raises:
            CheckpointError: a file is missing.
        """
        shard = _SHARD.fullmatch(self.path.name)
        if shard is None:
            return [self.path]
        count = int(shard[3])
        files = [self.path.with_name(f"{shard[1]}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{self.path}: of {count} files {listed(missing)} are missing: download them, too")
        return files

    @cached_property
    def _readers(self) -> list[gguf.GGUFReader]:
        return [_read(file) for file in self.files]

    @cached_property
    def tensors(self) -> Mapping[str, gguf.ReaderTensor]:
        """All tensors by their names in the files."""
        found: dict[str, Any] = {}
        for file, reader in zip(self.files, self._readers, strict=True):
            for tensor in reader.tensors:
                if tensor.name in found:
                    raise CheckpointError(f"{file}: {tensor.name} is in two files; take all files from one place")
                found[tensor.name] = tensor
        declared = self.get("split.tensors.count", int)
        if declared is not None and declared != len(found):
            raise CheckpointError(
                f"{self.path}: {len(found)} tensors, and {declared} are declared: the files are not of one model; "
                "download them again"
            )
        return found

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a metadata value, or `default` if there is none.

        Raises:
            CheckpointError: the value cannot be read, or has another type.
        """
        field = self._readers[0].fields.get(key)
        if field is None:
            return default
        try:
            value = self._lists[key] if key in self._lists else field.contents()
        except Exception as error:  # damaged files raise many types
            raise CheckpointError(f"{self.path}: {key} cannot be read ({error}): download the file again") from error
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, list):
            self._lists[key] = value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            value = float(str(np.float32(value)))  # the shortest decimal, such as 1e-05, not the exact float32 value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.path}: {key} is of type {type(value).__name__}: not a file of this kind")
        return value

    def require(self, key: str, kind: type) -> Any:
        """Return a metadata value.

        Raises:
            CheckpointError: the value is missing, or has another type.
        """
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing: convert the model again with llama.cpp's converter")
        return value

    def keys(self) -> list[str]:
        """Return the names of all metadata values."""
        return list(self._readers[0].fields)

    def stored_dtype(self) -> torch.dtype:
        """Return the default dtype to compute in: the dtype of most values; bfloat16 if they are quantized."""
        import gguf

        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        kinds = {gguf.GGMLQuantizationType.F32.name: torch.float32, gguf.GGMLQuantizationType.F16.name: torch.float16}
        return kinds.get(max(sizes, key=lambda name: sizes[name]), torch.bfloat16) if sizes else torch.float32

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        """Yield the tensors by their Hugging Face names."""
        assert self._names is not None
        yield _Opened(self, self._names(self))


class _Opened:
    """`OpenTensors` of a GGUF model."""

    def __init__(self, file: GgufFile, names: Mapping[str, GgufTensor]) -> None:
        self._file, self._names = file, names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape(self._names[name])

    def _shape(self, where: GgufTensor) -> tuple[int, ...]:
        shape = tuple(int(size) for size in reversed(self._file.tensors[where.name].shape))
        return shape if where.expert is None else shape[1:]

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read and dequantize only the selected rows."""
        where = self._names[name]
        shape, tensor = self._shape(where), self._file.tensors[where.name]
        rows = np.concatenate([np.arange(*span) for span in splits[0].spans]) if splits else np.arange(shape[0])
        if where.heads is not None:
            # llama.cpp has (head, channel, half) where Hugging Face has (head, half, channel).
            order = np.arange(shape[0]).reshape(where.heads, -1, 2).swapaxes(1, 2).reshape(-1)
            rows = order[rows]
        data = tensor.data if where.expert is None else tensor.data[where.expert]
        whole = dequantize(self._file.path, where.name, data, tensor.tensor_type, rows, shape[1:])
        others = list(splits[1:])
        return shard_tensor(whole, [Split.whole(whole.shape[0]), *others]) if others else whole


def dequantize(
    path: Path, name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType, rows: np.ndarray, shape: tuple[int, ...]
) -> Tensor:
    """Return rows of a tensor.

    Args:
        path: of the model, for error messages.
        name: of the tensor.
        data: raw data of the tensor.
        kind: its quantization.
        rows: (num_rows,) indices of the first dimension.
        shape: further dimensions of the tensor; empty for a vector.

    Returns:
        (num_rows, *shape) in float32, or in the stored type for float16 and bfloat16.

    Raises:
        CheckpointError: the quantization is not supported.
    """
    import gguf

    if not shape:  # a vector
        values = gguf.quants.dequantize(data, kind)[rows]
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    batch = max(1, _MAX_VALUES // int(np.prod(shape)))
    plain = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}.get(kind)
    out = torch.empty((len(rows), *shape), dtype=plain or torch.float32)
    for start in range(0, len(rows), batch):
        some = data[rows[start : start + batch]]
        try:
            values = gguf.quants.dequantize(some, kind)
        except (NotImplementedError, KeyError) as error:
            raise CheckpointError(
                f"{path}: {name} is quantized as {kind.name}, which the gguf package cannot dequantize: take another "
                "quantization of the model, such as Q8_0, or pip install -U gguf"
            ) from error
        out[start : start + batch] = torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *shape)
    return out


def _read(file: Path) -> gguf.GGUFReader:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{file}: reading GGUF needs the gguf package: pip install 'lamella[gguf]'") from error
    if not is_gguf(file):
        raise CheckpointError(f"{file}: not a GGUF file; download it again")
    try:
        return gguf.GGUFReader(str(file))
    except Exception as error:  # damaged files raise many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file}: cannot be read as GGUF ({reason}): download it again, or pip install -U gguf"
        ) from error
