"""Quantized files: their forms, and the weights that their numbers and scales stand for.

Forms: compressed-tensors (one number an element: "float-", "int-" and "naive-quantized"), FBGEMM's FP8 as transformers
writes it, ModelOpt's FP8, and FP8 in blocks ("fp8"). Activations are not quantized, whatever the files say of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint.file_kinds import read_json
from lamella.checkpoint.tensors import OpenTensors, TensorSource
from lamella.errors import CheckpointError, ConfigError
from lamella.layers.linear import DenseMethod
from lamella.layers.parameters import TensorReader
from lamella.parallel.sharding import Split

logger = logging.getLogger("lamella")

# What the scale of a tensor is called, behind the tensor's own name.
_SCALES = ("_scale", "_scale_inv", "_weight_scale")
_OFFSET = "_zero_point"
_OF_ACTIVATIONS = re.compile(r"(^|[._])(input_scale(_ub)?|input_zero_point|output_scale|[qkv]_scale)$")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_MODELOPT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class Quantization:
    """Quantization of a file's weights.

    Attributes:
        method: as the file calls it.
        blocks: numbers of places that share a scale, along any dimension, other than one and all of them.
    """

    method: str
    blocks: frozenset[int] = frozenset()

    @classmethod
    def read(cls, values: Mapping[str, Any], config_file: Path) -> Quantization | None:
        """Return what a config.json states, or a ModelOpt file beside it; None if nothing is quantized.

        Args:
            values: of the config.json.
            config_file: its path.

        Raises:
            ConfigError: the form is none of those above.
        """
        stated, source = values.get("quantization_config"), config_file
        own_file = config_file.parent / _MODELOPT_FILE
        if stated is None and own_file.is_file():
            stated, source = {"quant_method": "modelopt", **read_json(own_file)}, own_file
        if stated is None:
            return None
        if not isinstance(stated, Mapping):
            raise ConfigError(f"{source}: quantization_config={stated!r}: must be a mapping")
        method = str(stated.get("quant_method"))
        if method == "compressed-tensors":
            return cls(method, _read_compressed(stated, source))
        if method == "modelopt":
            inner = _mapping(source, "quantization", stated.get("quantization", stated))
            _require(source, "quant_algo", inner.get("quant_algo"), ("FP8",))
        elif method == "fp8":
            return cls(method, _sizes(source, "weight_block_size", stated.get("weight_block_size")))
        else:
            _require(source, "quant_method", method, ("fbgemm_fp8",))
        return cls(method)


def _require(source: Path, key: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"{source}: quantization_config: {key}={value!r}: weights are dequantised of compressed-tensors "
            f"({', '.join(_FORMATS)}), fbgemm_fp8, fp8, and modelopt with FP8; take files of another format, or of 16 "
            "bits"
        )


def _mapping(source: Path, key: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: quantization_config: {key}={value!r}: must be a mapping")
    return value


def _sizes(source: Path, key: str, value: object) -> frozenset[int]:
    """The sizes of blocks: one, or one for each dimension; none where there is no value."""
    sizes = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ConfigError(f"{source}: quantization_config: {key}={value!r}: must be positive integers")
    return frozenset(sizes)


def _read_compressed(stated: Mapping[str, Any], source: Path) -> frozenset[int]:
    """The sizes of the groups and blocks that share a scale."""
    for key in ("sparsity_config", "transform_config"):
        inner = stated.get(key) or {}
        if inner and inner != {"format": "dense"}:
            raise ConfigError(f"{source}: quantization_config: {key}={inner!r}: is not undone on loading")
    groups = _mapping(source, "config_groups", stated.get("config_groups") or {})
    blocks: frozenset[int] = frozenset()
    for name, group in groups.items():
        inner = _mapping(source, name, group)
        _require(source, "format", inner.get("format") or stated.get("format"), _FORMATS)
        weights = _mapping(source, f"{name}.weights", inner.get("weights") or {})
        blocks |= _sizes(source, "block_structure", weights.get("block_structure"))
        if weights.get("group_size") != -1:  # whole rows
            blocks |= _sizes(source, "group_size", weights.get("group_size"))
    if not groups:
        _require(source, "format", stated.get("format"), _FORMATS)
    return blocks


@dataclass(frozen=True)
class Scales:
    """The quantized tensors of a file, and what turns their numbers into weights.

    Attributes:
        quantization: of the file.
        path: the checkpoint, for errors.
        scales: a tensor -> its scale.
        offsets: a tensor -> its zero points, for those that have some.
    """

    quantization: Quantization
    path: Path
    scales: Mapping[str, str]
    offsets: Mapping[str, str]

    @classmethod
    def find(cls, names: Collection[str], quantization: Quantization, path: Path) -> Scales:
        """Return the scales among the tensors of a file.

        Raises:
            CheckpointError: a tensor has several scales.
        """
        present = set(names)
        found = {name: [name + suffix for suffix in _SCALES if name + suffix in present] for name in present}
        for name, scales in found.items():
            if len(scales) > 1:
                raise CheckpointError(f"{path}: tensor {name} has several scales: {', '.join(scales)}")
        scales_by_name = {name: scale for name, (scale,) in ((n, s) for n, s in found.items() if s)}
        offsets = {name: name + _OFFSET for name in scales_by_name if name + _OFFSET in present}
        return cls(quantization, path, scales_by_name, offsets)

    def dequantize(self, name: str, splits: Sequence[Split], tensors: TensorReader) -> Tensor:
        """Read a part of a tensor that has a scale, and return the weights in fp32.

        Args:
            name: the tensor.
            splits: the places of its leading dimensions to read.
            tensors: the file's tensors, as they are stored.

        Raises:
            CheckpointError: the tensor is not quantized, is packed, or its scale has the wrong shape.
        """
        tensor = tensors.load(name, splits)
        if tensor.dtype.itemsize > 1:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {tensor.dtype}, which {self.scales[name]} is no scale of"
            )
        if tensor.dtype == torch.uint8:
            raise CheckpointError(f"{self.path}: tensor {name} is {tensor.dtype}: packed weights are not read")
        value = tensor.float()
        if name in self.offsets:
            value -= self._spread(self.offsets[name], name, splits, tensors)
        return value.mul_(self._spread(self.scales[name], name, splits, tensors))

    def _spread(self, factor: str, name: str, splits: Sequence[Split], tensors: TensorReader) -> Tensor:
        """Return a scale, or zero points, in fp32, in a shape that broadcasts to the part of the tensor."""
        full, found = tensors.shape(name), tensors.load(factor).float()
        misfit = CheckpointError(f"{self.path}: {factor} has shape {tuple(found.shape)}, and {name} has {full}")
        if found.dim() > len(full):
            raise misfit
        if self.quantization.method == "fbgemm_fp8" and found.dim() == 3 and found.shape[-1] == 1:
            found = found.transpose(1, 2)  # of experts (E, in, out): the scales of outputs are in a column
        found = found[(...,) + (None,) * (len(full) - found.dim())]
        for dim, places in enumerate(full):
            if found.shape[dim] == 1:
                continue
            block = self._block(places, found.shape[dim])
            if block is None:
                raise misfit
            spans = splits[dim].spans if dim < len(splits) else ((0, places),)
            index = torch.cat([torch.arange(start, stop) for start, stop in spans])
            found = found.index_select(dim, index // block)
        return found

    def _block(self, places: int, scales: int) -> int | None:
        """Return the number of places that share a scale; None if it is ambiguous."""
        if places == scales:
            return 1
        fitting = [size for size in self.quantization.blocks if -(-places // size) == scales]
        return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True)
class DequantizingMethod(DenseMethod):
    """A `LinearMethod` for files of any known quantization: dense weights, dequantized when they are loaded."""

    scales: Scales

    def load(self, name: str, place: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """See `LinearMethod.load`."""
        place.copy_(self.scales.dequantize(name, splits, tensors))


class DequantizedTensors:
    """A source of quantized files, whose tensors are read as the weights that they stand for."""

    def __init__(self, source: TensorSource, quantization: Quantization, path: Path) -> None:
        """Wrap the source of the tensors as they are stored."""
        self._source, self._quantization, self._path, self._said = source, quantization, path, False

    @contextmanager
    def opened(self) -> Iterator[DequantizedView]:
        """Open the files."""
        with self._source.opened() as tensors:
            yield DequantizedView(tensors, Scales.find(tensors.names(), self._quantization, self._path))

    def log(self, view: DequantizedView) -> None:
        """Log, once, how many tensors are dequantized on loading, and how many are computed with as they are."""
        if self._said:
            return
        self._said = True
        kept = len(view.stored_as_is)
        logger.info(
            "%s: %d tensors (%s) are dequantised on loading%s; activations and the cache are not quantised, and "
            "%d scales of theirs are not read",
            self._path,
            len(view.scales.scales) - kept,
            self._quantization.method,
            f", and {kept} are computed with in their format" if kept else "",
            view.num_unread,
        )


class DequantizedView:
    """The tensors of an opened quantized file, dequantized in fp32; scales are not among the names.

    Attributes:
        stored: the tensors as they are in the file.
        scales: which of them are quantized.
        num_unread: scales of activations and caches, which are left out.
        stored_as_is: quantized tensors that a linear method computes with in the file's format.
    """

    def __init__(
        self,
        stored: OpenTensors,
        scales: Scales,
        loaded_by_methods: Collection[str] = (),
        claimed: Collection[str] = (),
        stored_as_is: Collection[str] = (),
    ) -> None:
        """Wrap opened files.

        Args:
            stored: see the class.
            scales: see the class.
            loaded_by_methods: tensors that `load` returns as they are stored, since a linear method reads them.
            claimed: scales and zero points that have a parameter of their own, and so are among the names.
            stored_as_is: see the class.
        """
        self.stored, self.scales, self.stored_as_is = stored, scales, frozenset(stored_as_is)
        factors = {*scales.scales.values(), *scales.offsets.values()}
        hidden = factors - set(claimed)
        others = [name for name in stored.names() if name not in hidden]
        self._names = [name for name in others if name in factors or not _OF_ACTIVATIONS.search(name)]
        self._dequantized = set(scales.scales) - set(loaded_by_methods)
        self.num_unread = len(others) - len(self._names)

    def names(self) -> list[str]:
        """Return the names of the tensors that parameters may be filled from."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self.stored.shape(name)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read a tensor or a part of it, dequantized in fp32 unless a linear method reads it as it is stored."""
        if name in self._dequantized:
            return self.scales.dequantize(name, splits, self.stored)
        return self.stored.load(name, splits)
