"""Diagnosis of files with unexpected content, for error messages with the way out; reading of JSON files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lamella.errors import CheckpointError

_AGAIN = "download it again"
_MARKS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself: run `git lfs pull` in the folder, or " + _AGAIN,
    ),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get` in the folder, or " + _AGAIN),
    (b"../.git/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get`, or " + _AGAIN),
    (b".git/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get`, or " + _AGAIN),
    (b"GGUF", "a GGUF file under another name: give the path of the file itself, or rename it to NAME.gguf"),
    (b"<!doctype html", "an HTML page, which a failed download leaves: " + _AGAIN),
    (b"<html", "an HTML page, which a failed download leaves: " + _AGAIN),
    (b"Entry not found", "the Hub's message of a failed download: " + _AGAIN),
    (b"Invalid username or password", "the Hub's message of a failed download: log in, and " + _AGAIN),
    (b"Access to model", "the Hub's message that access is restricted: ask for access, log in, and " + _AGAIN),
    (b"Access denied", "the Hub's message that access is restricted: ask for access, log in, and " + _AGAIN),
    (b"\x00\x05\x16\x07", "a companion file of macOS (AppleDouble), not the file itself: delete it"),
)
_PICKLES = (b"PK\x03\x04", b"\x80\x02")
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
JSON_LIMIT = 512 << 20  # bytes; the largest indices and tokenizers of public models have some tens of MB


def is_present(file: Path) -> bool:
    """Return True if a file exists.

    Raises:
        CheckpointError: the path is a broken link, as in git-annex or in an incomplete Hub cache.
    """
    if file.is_symlink() and not file.exists():
        target = str(file.readlink())
        if "annex" in target:
            raise CheckpointError(f"{file}: its content is not there (git-annex): run `git annex get` in the folder")
        raise CheckpointError(f"{file}: a link to {target}, which is not there: {_AGAIN}")
    return file.is_file()


def what_it_is(file: Path) -> str | None:
    """Return a description of a file with wrong content, and the way out; None if the content is no known mistake."""
    try:
        if file.exists() and not file.is_file():
            return "not a file: remove it, or download it again"  # opening a pipe would wait for its other end
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not size:
        return f"an empty file: {_AGAIN}"
    lowered = start.lstrip().lower()
    return next((what for mark, what in _MARKS if lowered.startswith(mark.lower())), None)


def unreadable_safetensors(file: Path, reason: object) -> CheckpointError:
    """Return the error for a file that the safetensors library rejects with `reason`."""
    what = what_it_is(file)
    if what is None and file.open("rb").read(4).startswith(_PICKLES):
        what = "a PyTorch file (pickle) under a name of safetensors: name it pytorch_model.bin"
    if what is None and (missing := _missing_bytes(file)) is not None:
        what = f"truncated, {missing} bytes are missing: {_AGAIN}"
    return CheckpointError(f"{file}: not a readable safetensors file: {what or f'{reason}: {_AGAIN}'}")


def unreadable_torch(file: Path, reason: str) -> CheckpointError:
    """Return the error for a file that `torch.load(weights_only=True)` rejects with `reason`."""
    what = what_it_is(file)
    if what is None and "weights_only" in reason.lower().replace(" ", "_"):
        what = (
            "holds pickled objects that are not tensors, which are not loaded since they may run code: save its "
            "state_dict() as safetensors"
        )
    return CheckpointError(f"{file}: not a readable weights-only torch file: {what or f'{reason}: {_AGAIN}'}")


def _missing_bytes(file: Path) -> int | None:
    """Return how many bytes a safetensors file is shorter than its header states; None if it is not shorter."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return 8 - size
        (length,) = struct.unpack("<Q", start)
        if length > _HEADER_LIMIT or stream.read(1) != b"{":
            return None
    if 8 + length > size:
        return int(8 + length - size)
    end = max((entry[1] for entry in data_offsets(file).values()), default=0)
    return int(8 + length + end - size) if 8 + length + end > size else None


def data_offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Return the byte range of each tensor after the header of a safetensors file; empty if the header is damaged."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        try:
            header = json.loads(stream.read(min(length, _HEADER_LIMIT)))
        except (ValueError, RecursionError):
            return {}
    if not isinstance(header, dict):
        return {}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)}
    found = {name: entry.get("data_offsets") for name, entry in entries.items()}
    return {
        name: (offsets[0], offsets[1])
        for name, offsets in found.items()
        if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    }


def why_no_weights(folder: Path) -> str:
    """Return a description of a folder without usable weights, and the way out."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))

    def ending_with(*ends: str) -> list[str]:
        return [name for name in names if name.endswith(ends)]

    if "adapter_config.json" in names:
        return (
            f"a PEFT adapter{_base_of(folder)}, not a model: merge it into its base (PeftModel.merge_and_unload(), "
            "then save_pretrained) and give that folder"
        )
    if ending_with(".gguf"):
        return f"{ending_with('.gguf')[0]} is GGUF: give the path of the file, not of the folder"
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return (
            "Meta's own format (consolidated.NN.pth): take the repository in Hugging Face's format, or convert it with "
            "transformers' convert_llama_weights_to_hf.py"
        )
    if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in names):
        return "Mistral's own format (consolidated*.safetensors): take the files model*.safetensors of the repository"
    if ending_with(".distcp"):
        return "a distributed checkpoint (.distcp): consolidate it first (torch.distributed.checkpoint.format_utils)"
    if others := ending_with(".h5", ".msgpack", ".onnx", ".ckpt", ".nemo", ".npz"):
        return f"{others[0]} is of a format that is not read: save the model as safetensors with its own library"
    nested = [name for name in names if (folder / name).is_dir() and _has_weights(folder / name)]
    if nested:
        return f"the weights stand in {', '.join(nested[:3])}: give that folder"
    return (
        "no weights there (*.safetensors, pytorch_model.bin or consolidated.pth): download them, or load_format='dummy'"
    )


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin", "consolidated.pth"))


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError, RecursionError):
        return ""
    return f" of {base}" if base else ""


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, or is too large or too deep to be one of a model.
    """
    try:
        if not file.is_file():
            raise OSError("not a file")  # a pipe would be waited for
        if (size := file.stat().st_size) > JSON_LIMIT:
            raise ValueError(f"{size} bytes are too many for a file of a model")
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:  # the last of JSON that is nested too deeply
        what = what_it_is(file) or f"not JSON ({error}): correct it, or download it again"
        raise CheckpointError(f"{file}: {what}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a JSON object: correct it, or download it again")
    return values
