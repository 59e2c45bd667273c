"""Dequantization of quantized checkpoints.

Supported formats: compressed-tensors with one number per element ("float-quantized", "int-quantized",
"naive-quantized"), FBGEMM's FP8 as transformers writes it, ModelOpt's FP8, and FP8 with scales per block ("fp8").
Scales of activations are ignored: activations are not quantized.
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

# Suffixes of a scale's name, after the name of its tensor.
_SCALES = ("_scale", "_scale_inv", "_weight_scale")
_OFFSET = "_zero_point"
_OF_ACTIVATIONS = re.compile(r"(^|[._])(input_scale(_ub)?|input_zero_point|output_scale|[qkv]_scale)$")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_MODELOPT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class Quantization:
    """Quantization of a file's weights.

    Attributes:
        method: name in the file.
        blocks: block sizes: numbers of consecutive indices of a dimension that share a scale, other than one and all.
    """

    method: str
    blocks: frozenset[int] = frozenset()

    @classmethod
    def read(cls, values: Mapping[str, Any], config_file: Path) -> Quantization | None:
        """Read the quantization from config.json, or from a ModelOpt file in its folder; None if there is none.

        Args:
            values: content of config.json.
            config_file: its path.

        Raises:
            ConfigError: the format is not supported.
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
    """Return block sizes, given as one number or one per dimension; empty if there is no value."""
    sizes = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ConfigError(f"{source}: quantization_config: {key}={value!r}: must be positive integers")
    return frozenset(sizes)


def _read_compressed(stated: Mapping[str, Any], source: Path) -> frozenset[int]:
    """Return the sizes of groups and blocks of compressed-tensors that share a scale."""
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
        if weights.get("group_size") != -1:  # -1: one scale per row
            blocks |= _sizes(source, "group_size", weights.get("group_size"))
    if not groups:
        _require(source, "format", stated.get("format"), _FORMATS)
    return blocks


@dataclass(frozen=True)
class Scales:
    """Quantized tensors of a file, with their scales and zero points.

    Attributes:
        quantization: of the file.
        path: of the checkpoint, for error messages.
        scales: name of the scale by name of the tensor.
        offsets: name of the zero points by name of the tensor, for tensors that have them.
    """

    quantization: Quantization
    path: Path
    scales: Mapping[str, str]
    offsets: Mapping[str, str]

    @classmethod
    def find(cls, names: Collection[str], quantization: Quantization, path: Path) -> Scales:
        """Find the scales among the tensors of a file.

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
        """Read a quantized tensor, or a part of it, and return the weights in fp32.

        Args:
            name: of the tensor, which has a scale.
            splits: parts of its leading dimensions to read.
            tensors: stored tensors of the file.

        Raises:
            CheckpointError: the tensor is not quantized or is packed, or its scale has the wrong shape.
        """
        tensor = tensors.load(name, splits)
        if tensor.dtype.itemsize > 1:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {tensor.dtype}, which is not quantized, and has a scale "
                f"{self.scales[name]}: download the files again"
            )
        if tensor.dtype == torch.uint8:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {tensor.dtype}: packed weights are not supported; take files of "
                "another format"
            )
        value = tensor.float()
        if name in self.offsets:
            value -= self._spread(self.offsets[name], name, splits, tensors)
        return value.mul_(self._spread(self.scales[name], name, splits, tensors))

    def _spread(self, factor: str, name: str, splits: Sequence[Split], tensors: TensorReader) -> Tensor:
        """Return a scale, or zero points, in fp32, in a shape that broadcasts to the selected part of the tensor."""
        full, found = tensors.shape(name), tensors.load(factor).float()
        misfit = CheckpointError(f"{self.path}: {factor} has shape {tuple(found.shape)}, and {name} has {full}")
        if found.dim() > len(full):
            raise misfit
        if self.quantization.method == "fbgemm_fp8" and found.dim() == 3 and found.shape[-1] == 1:
            found = found.transpose(1, 2)  # experts (E, in, out) have scales (E, out, 1)
        found = found[(...,) + (None,) * (len(full) - found.dim())]
        for dim, size in enumerate(full):
            if found.shape[dim] == 1:
                continue
            block = self._block_size(size, found.shape[dim])
            if block is None:
                raise misfit
            spans = splits[dim].spans if dim < len(splits) else ((0, size),)
            index = torch.cat([torch.arange(start, stop) for start, stop in spans])
            found = found.index_select(dim, index // block)
        return found

    def _block_size(self, size: int, scales: int) -> int | None:
        """Return the block size of a dimension with `size` indices and `scales` scales; None if it is ambiguous."""
        if size == scales:
            return 1
        fitting = [block for block in self.quantization.blocks if -(-size // block) == scales]
        return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True)
class DequantizingMethod(DenseMethod):
    """`LinearMethod` for any supported format: weights are dequantized on loading and used as dense weights."""

    scales: Scales

    def load(self, name: str, target: Tensor, splits: Sequence[Split], tensors: TensorReader) -> None:
        """See `LinearMethod.load`."""
        target.copy_(self.scales.dequantize(name, splits, tensors))


class DequantizedTensors:
    """Source of quantized files that returns dequantized weights."""

    def __init__(self, source: TensorSource, quantization: Quantization, path: Path) -> None:
        """Wrap a source of stored tensors.

        Args:
            source: of the stored tensors.
            quantization: of the files.
            path: of the checkpoint, for messages.
        """
        self._source, self._quantization, self._path, self._has_logged = source, quantization, path, False

    @contextmanager
    def opened(self) -> Iterator[DequantizedView]:
        """Open the files, and yield their dequantized tensors."""
        with self._source.opened() as tensors:
            yield DequantizedView(tensors, Scales.find(tensors.names(), self._quantization, self._path))

    def log(self, view: DequantizedView) -> None:
        """Log, once, how many tensors are dequantized on loading, and how many keep the file's format."""
        if self._has_logged:
            return
        self._has_logged = True
        kept = len(view.stored_as_is)
        logger.info(
            "%s: %d tensors (%s) are dequantised on loading%s; activations and the cache are not quantised, so %d "
            "scales of them are not read",
            self._path,
            len(view.scales.scales) - kept,
            self._quantization.method,
            f", and {kept} are kept in their format" if kept else "",
            view.num_unread,
        )


class DequantizedView:
    """Tensors of opened quantized files, dequantized to fp32. Scales are not among the names.

    Attributes:
        stored: tensors in the format of the file.
        scales: scales of the quantized tensors.
        num_unread: number of ignored scales of activations and caches.
        stored_as_is: quantized tensors that a linear method uses in the format of the file.
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
            loaded_by_methods: tensors that `load` does not dequantize, since a linear method reads them.
            claimed: scales and zero points with their own parameters, which therefore are among the names.
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
        """Return the names of the tensors that parameters can be filled from."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self.stored.shape(name)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read a tensor or a part of it. Quantized ones are dequantized to fp32, unless a linear method reads them."""
        if name in self._dequantized:
            return self.scales.dequantize(name, splits, self.stored)
        return self.stored.load(name, splits)
