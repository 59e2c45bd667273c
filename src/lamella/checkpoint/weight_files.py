"""Selection of the files of a folder that contain the model's weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lamella.checkpoint.file_kinds import data_offsets, is_present, read_json, unreadable_safetensors, what_it_is
from lamella.errors import CheckpointError
from lamella.validation import listed

logger = logging.getLogger("lamella")

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)$")
# Names of other files in model folders: adapters, training state, and weights in Mistral's own format.
_OTHER = re.compile(r"adapter|optim|scheduler|random_states|rng_state|training|consolidated|lora|(^|_)ema|embeddings$")
_SAMPLE = 256  # bytes to compare at the start, middle and end of a tensor
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of one format.

    Attributes:
        files: files of the model, sorted by name; empty if the folder has none.
        indexed: names of the tensors that the index lists; empty without an index.
        skipped: names of other files of the format.
    """

    files: tuple[Path, ...] = ()
    indexed: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Format:
    """File format of weights.

    Attributes:
        main: name of a single file without its suffix.
        suffix: of all files.
    """

    main: str
    suffix: str

    @property
    def index(self) -> str:
        """Name of the index file."""
        return f"{self.main}{self.suffix}.index.json"


SAFETENSORS = _Format("model", ".safetensors")
TORCH = _Format("pytorch_model", ".bin")


def has_weights(folder: Path, kind: _Format = SAFETENSORS) -> bool:
    """Return True if a folder has files of a format that may contain the model. The files are not read."""
    if (folder / kind.index).is_file():
        return True
    present = (path for path in folder.glob(f"*{kind.suffix}") if not path.name.startswith("."))
    return any(
        path.stem.startswith(kind.main) or (kind is SAFETENSORS and not _OTHER.search(path.stem)) for path in present
    )


def find_weights(folder: Path, kind: _Format = SAFETENSORS) -> WeightFiles:
    """Return the files of a format that contain the model.

    In order of preference: the files of the index; `model.safetensors` (`pytorch_model.bin`); a complete set of shards;
    for safetensors, all files whose names do not denote adapters or training state.

    Args:
        folder: to search.
        kind: the format.

    Raises:
        CheckpointError: files of the index or of a set of shards are missing; or the index and `model.safetensors` have
            different weights, and it is not clear which are newer.
    """
    present = sorted(path for path in folder.glob(f"*{kind.suffix}") if not path.name.startswith("."))
    main, index = folder / f"{kind.main}{kind.suffix}", folder / kind.index
    indexed: frozenset[str] = frozenset()
    if is_present(index):
        weight_map = _weight_map(index)
        files = [folder / name for name in sorted(set(weight_map.values()))]
        indexed = frozenset(weight_map)
        missing = [file.name for file in files if not is_present(file)]
        if main not in files and main in present and (missing or _is_newer(main, files, weight_map, kind)):
            logger.warning(
                "%s: %s is read, not the %s: delete what is not to be read",
                folder,
                main.name,
                f"shards of {index.name}, some of which are missing" if missing else f"older shards of {index.name}",
            )
            files, indexed = [main], frozenset()
        elif missing:
            raise CheckpointError(
                f"{folder}: {index.name} names files that are not there: {listed(missing)}; download them"
            )
    elif is_present(main):
        files = [main]
    else:
        files = _shards(folder, present, kind)
        if not files and kind is SAFETENSORS:
            files = [file for file in present if not _OTHER.search(file.stem)]
    skipped = tuple(file.name for file in present if file not in files)
    return WeightFiles(tuple(files), indexed, skipped)


def _weight_map(index: Path) -> Mapping[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: no weight_map of tensors to files; delete it, or download it again")
    for name in found.values():
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"{index}: names {name!r}, which is no file of this folder; correct it, or download it again"
            )
    return found


def _shards(folder: Path, present: Sequence[Path], kind: _Format) -> list[Path]:
    """Return the shards with the model's name, for a folder without an index; empty if there are none."""
    shards = {file: match for file in present if (match := _SHARD.match(file.stem)) and match["stem"] == kind.main}
    if not shards:
        return []
    counts = {match["count"] for match in shards.values()}
    if len(counts) > 1:
        raise CheckpointError(f"{folder}: shards of several sets, -of-{', -of-'.join(sorted(counts))}: delete the old")
    (count,) = counts
    numbers = {int(match["number"]) for match in shards.values()}
    if missing := sorted(set(range(1, int(count) + 1)) - numbers):
        raise CheckpointError(
            f"{folder}: shards are not there: {listed([str(n) for n in missing])} of {int(count)}; download them"
        )
    return sorted(shards)


def _is_newer(main: Path, shards: Sequence[Path], weight_map: Mapping[str, str], kind: _Format) -> bool:
    """Return True if the single file contains a newer save of the model than the shards."""
    if kind is SAFETENSORS:
        whole = _offsets(main)
        if set(weight_map) - set(whole) - {_HEAD}:
            return False  # not the whole model
        sharded = {name: (shard, offsets) for shard in shards for name, offsets in _offsets(shard).items()}
        common = [name for name in whole if name in sharded]
        if len(common) == len(whole) and all(_is_equal(main, whole[name], *sharded[name]) for name in common):
            return False  # both have the same weights
    elif what_it_is(main):
        return False
    changed, others = main.stat().st_mtime_ns, [shard.stat().st_mtime_ns for shard in shards]
    if changed > max(others):
        return True
    if changed >= min(others):
        raise CheckpointError(
            f"{main.parent}: {main.name} and the shards of {kind.index} hold different weights, and none is newer: "
            "delete those that are not to be read"
        )
    logger.warning("%s: the shards of %s are read, not the older %s", main.parent, kind.index, main.name)
    return False


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Return the byte ranges of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass
    except SafetensorError as error:
        raise unreadable_safetensors(file, error) from error
    start = 8 + int.from_bytes(file.open("rb").read(8), "little")
    return {name: (start + first, start + last) for name, (first, last) in data_offsets(file).items()}


def _is_equal(a: Path, a_range: tuple[int, int], b: Path, b_range: tuple[int, int]) -> bool:
    """Compare two tensors by samples of their bytes."""
    size = a_range[1] - a_range[0]
    if size != b_range[1] - b_range[0]:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        for offset in {0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}:
            first.seek(a_range[0] + offset)
            second.seek(b_range[0] + offset)
            if first.read(min(_SAMPLE, size)) != second.read(min(_SAMPLE, size)):
                return False
    return True
