"""Quantised files, whose weights are multiplied by their scales while they are read.

Forms: compressed-tensors (one number an element: "float-", "int-" and "naive-quantized"), FBGEMM's FP8 as transformers
writes it, ModelOpt's FP8, and FP8 in blocks ("fp8"). What they say of activations is not followed: these stay wide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoint.json_file import read_json
from lamella.checkpoint.tensors import OpenTensors, TensorSource
from lamella.errors import CheckpointError, ConfigError
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
    """How a file's weights are quantised.

    Attributes:
        method: as the file calls it.
        blocks: places that share a scale, along any dimension, where that is neither one nor all of them.
    """

    method: str
    blocks: frozenset[int] = frozenset()

    @classmethod
    def read(cls, values: Mapping[str, Any], config_file: Path) -> Quantization | None:
        """What the values of a config.json say, or a ModelOpt file beside it; None where nothing is quantised.

        Raises `ConfigError` for another form.
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


class DequantizedTensors:
    """A source whose quantised tensors come as what they stand for, in fp32; scales have no names of their own."""

    def __init__(self, source: TensorSource, quantization: Quantization, path: Path) -> None:
        self._source, self._quantization, self._path, self._said = source, quantization, path, False

    @contextmanager
    def opened(self) -> Iterator[OpenTensors]:
        with self._source.opened() as tensors:
            opened = _Dequantized(tensors, self._quantization, self._path)
            if not self._said:
                self._said = True
                logger.info(
                    "%s: %d tensors (%s) are dequantised on loading; activations and the cache are not quantised, and "
                    "%d scales of theirs are not read",
                    self._path,
                    len(opened.scales),
                    self._quantization.method,
                    opened.num_unread,
                )
            yield opened


class _Dequantized:
    def __init__(self, tensors: OpenTensors, quantization: Quantization, path: Path) -> None:
        self._tensors, self._quantization, self._path = tensors, quantization, path
        present = set(tensors.names())
        found = {name: [name + suffix for suffix in _SCALES if name + suffix in present] for name in present}
        for name, scales in found.items():
            if len(scales) > 1:
                raise CheckpointError(f"{path}: tensor {name} has several scales: {', '.join(scales)}")
        self.scales = {name: scale for name, (scale,) in ((n, s) for n, s in found.items() if s)}
        self._offsets = {name: name + _OFFSET for name in self.scales if name + _OFFSET in present}
        others = present - set(self.scales.values()) - set(self._offsets.values())
        self._names = [name for name in tensors.names() if name in others and not _OF_ACTIVATIONS.search(name)]
        self.num_unread = len(others) - len(self._names)

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        tensor = self._tensors.load(name, splits)
        scale = self.scales.get(name)
        if scale is None:
            return tensor
        if tensor.dtype.itemsize > 1:
            raise CheckpointError(f"{self._path}: tensor {name} is {tensor.dtype}, which {scale} is no scale of")
        if tensor.dtype == torch.uint8:
            raise CheckpointError(f"{self._path}: tensor {name} is {tensor.dtype}: packed weights are not read")
        value = tensor.float()
        if name in self._offsets:
            value -= self._spread(self._offsets[name], name, splits)
        return value.mul_(self._spread(scale, name, splits))

    def _spread(self, factor: str, name: str, splits: Sequence[Split]) -> Tensor:
        """A scale, or an offset, in fp32, of a shape that broadcasts to the tensor's part."""
        full, found = self._tensors.shape(name), self._tensors.load(factor).float()
        misfit = CheckpointError(f"{self._path}: {factor} has shape {tuple(found.shape)}, and {name} has {full}")
        if found.dim() > len(full):
            raise misfit
        if self._quantization.method == "fbgemm_fp8" and found.dim() == 3 and found.shape[-1] == 1:
            found = found.transpose(1, 2)  # of experts (E, in, out): the scales of outputs stand in a column
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
        """So many places share a scale; None where that is not sure."""
        if places == scales:
            return 1
        fitting = [size for size in self._quantization.blocks if -(-places // size) == scales]
        return fitting[0] if len(fitting) == 1 else None
